// See sampling.h. Candidates stay in ascending order of ids from step to step, so that the draw depends on the set that is kept alone.
#include "eval/sampling.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/philox.h"
#include "ops/next_token/next_token.h"

namespace longhand {
namespace {

constexpr float kImpossible = -std::numeric_limits<float>::infinity();

uint64_t key_of_row(uint64_t seed, uint64_t row) {
  return philox_key(philox_key(seed, hash_name("sampling")), row);
}

// U(0, 1) with 53 random bits, never 0 and never 1.
double uniform(uint64_t seed, uint64_t row, uint64_t position) {
  return (static_cast<double>(philox_u64(key_of_row(seed, row), position) >> 12) + 0.5) * 0x1p-52;
}

}  // namespace

void require_sampling_options(const SamplingOptions& o) {
  const auto require = [](bool holds, const char* name, double value, const char* expected) {
    if (!holds)
      throw ValueError(fmt::format("sampling: {} is out of its range", name), {{name, fmt::format("{}", value)}, {"expected", expected}});
  };
  const auto finite = [](double value) { return std::isfinite(value); };  // false for NaN too
  require(finite(o.repetition_penalty) && o.repetition_penalty > 0, "repetition_penalty", o.repetition_penalty, "above 0; 1 is off");
  require(finite(o.temperature) && o.temperature >= 0, "temperature", o.temperature, "0 (greedy) or above");
  require(o.top_k >= 0, "top_k", static_cast<double>(o.top_k), "0 (off) or a number of tokens");
  require(o.top_p > 0 && o.top_p <= 1, "top_p", o.top_p, "above 0, at most 1 (off)");
  require(o.min_p >= 0 && o.min_p <= 1, "min_p", o.min_p, "from 0 (off) to 1");
}

Sampler::Sampler(SamplingOptions options, std::vector<int32_t> never) : options_(options), never_(std::move(never)) {
  require_sampling_options(options_);
}

int32_t Sampler::draw(std::span<const float> logits, std::span<const int32_t> seen, uint64_t row, uint64_t position) {
  const auto where = [&] { return fmt::format("token {} of row {}", position, row); };
  logits_.assign(logits.begin(), logits.end());
  for (std::size_t id = 0; id < logits_.size(); ++id)
    if (!(logits_[id] <= std::numeric_limits<float>::max()))
      throw NumericError("sampling: a logit is not a number below infinity",
                         {{"logit", fmt::format("{}", logits_[id])},
                          {"id", std::to_string(id)},
                          {"for", where()},
                          {"try", "LONGHAND_CHECK=1 to see which layer it comes from"}});
  for (const int32_t id : never_)
    if (id >= 0 && static_cast<std::size_t>(id) < logits_.size()) logits_[static_cast<std::size_t>(id)] = kImpossible;
  const auto largest = [&] {
    const auto found = std::max_element(logits_.begin(), logits_.end());  // the first among equals
    if (found == logits_.end() || *found == kImpossible)
      throw NumericError("sampling: no token is possible: every logit is -inf",
                         {{"vocabulary", std::to_string(logits_.size())}, {"for", where()}});
    return found;
  };
  if (options_.repetition_penalty != 1) {
    penalised_.assign(logits_.size(), 0);
    for (const int32_t id : seen) {
      const auto i = static_cast<std::size_t>(id);
      if (id < 0 || i >= logits_.size())
        throw ValueError("sampling: a token seen before is outside the vocabulary",
                         {{"id", std::to_string(id)}, {"vocabulary", std::to_string(logits_.size())}});
      if (std::exchange(penalised_[i], uint8_t{1}) != 0) continue;
      const auto penalty = static_cast<float>(options_.repetition_penalty);
      logits_[i] = logits_[i] < 0 ? logits_[i] * penalty : logits_[i] / penalty;
    }
  }
  const auto best = largest();
  if (options_.temperature == 0) return static_cast<int32_t>(best - logits_.begin());

  candidates_.clear();
  for (std::size_t id = 0; id < logits_.size(); ++id)
    if (logits_[id] != kImpossible) candidates_.push_back({logits_[id] / options_.temperature, static_cast<int32_t>(id)});
  keep_top_k();
  keep_top_p();
  keep_min_p();

  // From here on `logit` holds exp(logit - the largest).
  const double top = static_cast<double>(*best) / options_.temperature;
  double sum = 0;
  for (Candidate& c : candidates_) sum += c.logit = std::exp(c.logit - top);
  const double threshold = uniform(options_.seed, row, position) * sum;
  double passed = 0;
  for (const Candidate& c : candidates_)
    if ((passed += c.logit) > threshold) return c.id;
  return static_cast<int32_t>(best - logits_.begin());  // only if rounding left the whole sum at the threshold
}

void Sampler::keep_top_k() {
  const auto k = static_cast<std::size_t>(options_.top_k);
  if (k == 0 || k >= candidates_.size()) return;
  order_.clear();
  for (const Candidate& c : candidates_) order_.push_back(c.logit);
  const auto last = order_.begin() + static_cast<std::ptrdiff_t>(k) - 1;
  std::nth_element(order_.begin(), last, order_.end(), std::greater<>());
  std::erase_if(candidates_, [least = *last](const Candidate& c) { return c.logit < least; });
}

void Sampler::keep_top_p() {
  if (options_.top_p == 1) return;
  // A heap gives the most probable tokens one by one: mostly few are needed, and sorting the vocabulary would cost more.
  const auto below = [](const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit < b.logit : a.id > b.id; };
  std::make_heap(candidates_.begin(), candidates_.end(), below);
  const double top = candidates_.front().logit;
  double sum = 0;
  for (const Candidate& c : candidates_) sum += std::exp(c.logit - top);
  auto end = candidates_.end();
  for (double kept = 0; end != candidates_.begin() && kept < options_.top_p * sum;) {
    std::pop_heap(candidates_.begin(), end, below);
    kept += std::exp((--end)->logit - top);
  }
  candidates_.erase(candidates_.begin(), end);
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
}

void Sampler::keep_min_p() {
  if (options_.min_p == 0) return;
  double top = -std::numeric_limits<double>::infinity();
  for (const Candidate& c : candidates_) top = std::max(top, c.logit);
  const double least = top + std::log(options_.min_p);
  std::erase_if(candidates_, [&](const Candidate& c) { return c.logit < least; });
}

BatchSampler::BatchSampler(const Device& gpu, const SamplingOptions& options, const std::vector<int32_t>& never, int64_t vocab,
                           std::span<const Row> rows)
    : options_(options) {
  require_sampling_options(options_);
  const auto B = static_cast<int64_t>(rows.size());
  const auto on_gpu = [&](Shape shape, const auto& values) { return Tensor::from(Device::cpu(), shape, values).to(gpu); };
  std::vector<uint8_t> never_flags(static_cast<std::size_t>(vocab)), seen_flags;
  for (const int32_t id : never)
    if (id >= 0 && id < vocab) never_flags[static_cast<std::size_t>(id)] = 1;
  never_ = on_gpu({vocab}, never_flags);
  std::vector<int64_t> keys, positions;
  for (const Row& row : rows) {
    keys.push_back(static_cast<int64_t>(key_of_row(options_.seed, row.index)));
    positions.push_back(static_cast<int64_t>(row.position));
  }
  key_ = on_gpu({B}, keys);
  position_ = on_gpu({B}, positions);
  ids_ = Tensor::zeros(gpu, Dtype::i32, {B});
  if (options_.repetition_penalty == 1) return;
  seen_flags.resize(static_cast<std::size_t>(B * vocab));
  for (std::size_t b = 0; b < rows.size(); ++b)
    for (const int32_t id : rows[b].seen) {
      if (id < 0 || id >= vocab)
        throw ValueError("sampling: a token seen before is outside the vocabulary",
                         {{"id", std::to_string(id)}, {"vocabulary", std::to_string(vocab)}});
      seen_flags[b * static_cast<std::size_t>(vocab) + static_cast<std::size_t>(id)] = 1;
    }
  seen_ = on_gpu({B, vocab}, seen_flags);
}

void BatchSampler::queue(const Tensor& logits) const {
  next_token({.logits = logits,
              .never = never_,
              .seen = seen_,
              .repetition_penalty = options_.repetition_penalty,
              .temperature = options_.temperature,
              .top_k = options_.top_k,
              .top_p = options_.top_p,
              .min_p = options_.min_p,
              .key = key_,
              .position = position_,
              .ids = ids_});
}

}  // namespace longhand
