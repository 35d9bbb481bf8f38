// See gradient_exchange.h.
#include "train/gradient_exchange.h"

#include <algorithm>

#include "autograd/parameter_alignment.h"
#include "core/error.h"

namespace longhand {
namespace {

// A bucket is large enough to fill a link (32 MiB of f32) and a sixteenth of the model at most, so that the last one, which nothing hides,
// is small; models of nothing but small tensors still get a few.
constexpr int64_t kLargestBucket = int64_t{8} << 20, kSmallestBucket = 4096, kBucketsAtLeast = 16;

int64_t bucket_size(int64_t n, int64_t processes) {
  const int64_t wanted = std::clamp(n / kBucketsAtLeast, kSmallestBucket, kLargestBucket), step = kParameterAlignment * processes;
  return (wanted + step - 1) / step * step;
}

// What products read in the masters' type although there are copies: it lies together, and is a bucket of its own.
Part full_precision_of(const ParameterSet& parameters) {
  if (!parameters.flat_compute()) return {0, 0};
  Part range{parameters.flat_master().numel(), 0};
  for (const Parameter& p : parameters.all()) {
    if (!p.options.full_precision) continue;
    range.begin = std::min(range.begin, p.master.offset());
    range.end = std::max(range.end, aligned_elements(p.master.offset() + p.shape.numel()));
  }
  return range.end > 0 ? range : Part{0, 0};
}

}  // namespace

GradientExchange::GradientExchange(ParameterSet& parameters, Communicator& processes, const ExchangeOptions& options)
    : parameters_(parameters), processes_(processes), options_(options) {
  const int64_t n = parameters.flat_master().numel(), size = bucket_size(n, processes.size());
  const Part full = full_precision_of(parameters);
  for (const Part& range : {Part{0, full.begin}, full, Part{full.end, n}})
    for (int64_t begin = range.begin; begin < range.end; begin += size)
      buckets_.push_back({{begin, std::min(range.end, begin + size)}, 0, n, false});
  auto for_each_bucket = [&](const Parameter& p, auto&& f) {
    const int64_t begin = p.master.offset(), end = begin + p.shape.numel();
    for (std::size_t b = 0; b < buckets_.size(); ++b)
      if (buckets_[b].range.begin < end && begin < buckets_[b].range.end) f(b);
  };
  int64_t declared = 0;
  for (const Parameter& p : parameters.all()) {
    for_each_bucket(p, [&](std::size_t b) {
      Bucket& bucket = buckets_[b];
      ++bucket.parameters;
      bucket.first_declared = std::min(bucket.first_declared, declared);
      bucket.masters_read = bucket.masters_read || !parameters.flat_compute() || p.options.full_precision;
    });
    ++declared;
  }
  // Backward comes to parameters in about the reverse of the order in which they are declared, and to some twice.
  std::stable_sort(buckets_.begin(), buckets_.end(), [](const Bucket& a, const Bucket& b) {
    return a.first_declared != b.first_declared ? a.first_declared > b.first_declared : a.range.begin > b.range.begin;
  });
  for (const Parameter& p : parameters.all()) for_each_bucket(p, [&](std::size_t b) { of_[p.name].push_back(b); });
  if (!options_.sharded) return;
  for (const Bucket& bucket : buckets_) {
    const Part own = processes.own(bucket.range.size(), kParameterAlignment);
    if (own.size() > 0) own_.push_back({bucket.range.begin + own.begin, bucket.range.begin + own.end});
    const auto within = [&](const Tensor& flat) { return flat.slice(0, bucket.range.begin, bucket.range.end); };
    if (parameters.flat_compute()) shared_weights_.push_back(within(parameters.flat_compute()));
    if (bucket.masters_read) shared_weights_.push_back(within(parameters.flat_master()));
    else shared_masters_.push_back(within(parameters.flat_master()));
  }
  std::sort(own_.begin(), own_.end(), [](const Part& a, const Part& b) { return a.begin < b.begin; });
  if (own_.empty()) own_.push_back({0, 0});  // fewer units than processes
}

void GradientExchange::begin(bool overlap) {
  missing_.clear();
  for (const Bucket& bucket : buckets_) missing_.push_back(bucket.parameters);
  next_ = 0;
  overlap_ = options_.overlap && overlap;
  if (overlap_) processes_.begin_overlap();
}

void GradientExchange::arrived(const std::string& parameter) {
  for (const std::size_t bucket : of_.at(parameter)) --missing_[bucket];
  if (overlap_) exchange_ready();
}

// In the order of buckets_, which is the same everywhere: a bucket waits for those before it.
void GradientExchange::exchange_ready() {
  if (next_ == buckets_.size() || missing_[next_] > 0) return;
  const auto ready = [&] {
    for (; next_ < buckets_.size() && missing_[next_] <= 0; ++next_) {
      const Part& range = buckets_[next_].range;
      const Tensor gradients = parameters_.flat_grad().slice(0, range.begin, range.end);
      options_.sharded ? processes_.reduce_scatter_sum(gradients, kParameterAlignment) : processes_.all_reduce_sum(gradients);
    }
  };
  processes_.as_one(ready);
}

void GradientExchange::complete() {
  std::fill(missing_.begin(), missing_.end(), 0);
  exchange_ready();
  processes_.end_overlap();
}

void GradientExchange::end() {
  processes_.join();
}

void GradientExchange::sum(const Tensor& loss_and_squares) {
  processes_.all_reduce_sum(options_.sharded ? loss_and_squares
                                             : loss_and_squares.slice(0, 0, 1));  // unsharded, the squares are those of all
}

void GradientExchange::share_weights() {
  gather(shared_weights_);
}

void GradientExchange::share_masters() {
  gather(shared_masters_);
}

void GradientExchange::gather(const std::vector<Tensor>& wholes) {
  if (wholes.empty()) return;
  processes_.as_one([&] {
    for (const Tensor& whole : wholes) processes_.all_gather(whole, processes_.cuts(whole.numel(), kParameterAlignment));
  });
}

GradientExchange::Traffic GradientExchange::traffic() const {
  auto bytes_of = [](const Tensor& t) { return t.numel() * size_of(t.dtype()); };
  const int64_t others = processes_.size() - 1, gradient = bytes_of(parameters_.flat_grad()) * others / processes_.size();
  Traffic traffic{options_.sharded ? gradient : 2 * gradient, 0};
  for (const Tensor& t : shared_weights_) traffic.weights += bytes_of(t) * others / processes_.size();
  return traffic;
}

}  // namespace longhand
