// cross_entropy on the CPU: the reference, in the order of the formula. A row's terms e^(l - max) are kept where its logits were.
#include <algorithm>
#include <cmath>

#include "ops/common/activations.h"
#include "ops/cross_entropy/cross_entropy_kernels.h"

namespace longhand {
namespace {

constexpr int64_t kRun = 512;  // terms summed in T before they join the sum in f64

template <class T>
T largest(const T* logits, int64_t vocab) {
  T top = logits[0];
#pragma omp simd reduction(max : top)
  for (int64_t v = 0; v < vocab; ++v) top = std::max(top, logits[v]);
  return top;
}

// logits[v] becomes e^(logits[v] - top); returns their sum.
template <class T>
double exponentials(T* logits, int64_t vocab, T top) {
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kRun) {
    const int64_t end = std::min(begin + kRun, vocab);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = begin; v < end; ++v) {
      logits[v] = exp_of(logits[v] - top);
      sum += logits[v];
    }
    total += static_cast<double>(sum);
  }
  return total;
}

// -log softmax(logits)[target]; with `gradient`, logits[v] becomes scale * (softmax(logits)[v] - [v = target]).
template <class T>
double loss_of_row(T* logits, int64_t vocab, int64_t target, bool gradient, double scale) {
  const T top = largest(logits, vocab);
  const T target_logit = logits[target];
  logits[target] = -INFINITY;  // the target is counted apart: softmax - 1 = -others / sum, without cancellation
  const double others = exponentials(logits, vocab, top);
  const double own = std::exp(static_cast<double>(target_logit) - static_cast<double>(top));
  const double sum = others + own;
  if (gradient) {
    const T per_class = static_cast<T>(scale / sum);
    for (int64_t v = 0; v < vocab; ++v) logits[v] *= per_class;
    logits[target] = static_cast<T>(-scale * others / sum);
  }
  const double below = static_cast<double>(top) - static_cast<double>(target_logit);
  return below == 0 ? std::log1p(others) : below + std::log(sum);
}

template <class T>
void loss_rows(const LossChunk& chunk) {
  const int64_t rows = chunk.logits.dim(0), vocab = chunk.logits.dim(1), stride = chunk.logits.stride(0), width = chunk.x.dim(1);
  T* logits = chunk.logits.data<T>();
  const auto* targets = chunk.targets.data<int32_t>();
  const float* mask = chunk.mask.defined() ? chunk.mask.data<float>() : nullptr;
  const auto factor = static_cast<double>(*chunk.factor.data<T>());
  T* token_loss = chunk.token_loss.data<T>();
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    T* row = logits + r * stride;
    const double weight = mask != nullptr ? static_cast<double>(mask[r]) : 1.0;
    const bool known = targets[r] >= 0 && targets[r] < vocab, counts = weight != 0;  // what counts is known
    token_loss[r] = known ? static_cast<T>(loss_of_row(row, vocab, targets[r], chunk.gradient && counts, factor * weight)) : T(0);
    if (chunk.gradient && !counts) std::fill(row, row + vocab, T(0));
    if (!chunk.counted_x.defined()) continue;
    const T* x = chunk.x.data<T>() + r * chunk.x.stride(0);
    T* counted_x = chunk.counted_x.data<T>() + r * width;
    for (int64_t i = 0; i < width; ++i) counted_x[i] = counts ? x[i] : T(0);
  }
}

template <class T>
void scale_values(const Tensor& gradient, const Tensor& upstream, const Tensor& row_factors, const Tensor& destination, T beta) {
  if (row_factors.defined()) {
    for (int64_t r = 0; r < row_factors.dim(0); ++r) {
      const Tensor scale = Tensor::full(gradient.device(), gradient.dtype(), {}, upstream.item() * row_factors.slice(0, r, r + 1).item());
      scale_values<T>(gradient.slice(0, r, r + 1), scale, Tensor(), destination.slice(0, r, r + 1), beta);
    }
    return;
  }
  const T scale = *upstream.data<T>();
  const T* from = gradient.data<T>();
  T* to = destination.data<T>();
  const int64_t count = gradient.numel();
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; ++i) to[i] = (beta == T(0) ? T(0) : beta * to[i]) + scale * from[i];
}

}  // namespace

void loss_chunk_cpu(const LossChunk& chunk) {
  if (chunk.logits.dtype() == Dtype::f64) loss_rows<double>(chunk);
  else loss_rows<float>(chunk);
}

void loss_factor_cpu(const Tensor& mask, double scale, const Tensor& factor) {
  double sum = 0;
  for (int64_t r = 0; r < mask.numel(); ++r) sum += static_cast<double>(mask.data<float>()[r]);
  fill(factor, sum > 0 ? scale / sum : 0.0);
}

void mean_loss_cpu(const Tensor& token_loss, const Tensor& mask, const Tensor& factor, const Tensor& loss) {
  const auto losses = token_loss.to_vector<double>();
  double sum = 0;
  for (std::size_t r = 0; r < losses.size(); ++r) {
    const double weight = mask.defined() ? static_cast<double>(mask.data<float>()[r]) : 1.0;
    if (weight != 0) sum += weight * losses[r];
  }
  fill(loss, factor.item() * sum);
}

void scale_gradient_cpu(const Tensor& gradient, const Tensor& upstream, const Tensor& row_factors, const Tensor& destination, double beta) {
  if (gradient.dtype() == Dtype::f64) scale_values<double>(gradient, upstream, row_factors, destination, beta);
  else scale_values<float>(gradient, upstream, row_factors, destination, static_cast<float>(beta));
}

}  // namespace longhand
