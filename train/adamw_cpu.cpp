// AdamW on the CPU; see adamw.h for the formula. Both passes are bound by memory: 4 bytes a parameter for the norm, 28 for the update
// (f32). Compiled with -fno-math-errno: by default the root of a negative number sets errno, and a loop with such roots is not vectorised.
#include <algorithm>

#include "core/error.h"
#include "train/adamw_kernels.h"

namespace longhand {
namespace {

constexpr int64_t kBlock = 1 << 15;  // elements summed, or updated, by one thread at a time

template <class T>
double sum_of_squares(const T* x, int64_t n) {
  constexpr int kLanes = 16;  // fixed partial sums, whatever the width of the machine's vectors
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(x[i + lane]);
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <class T>
void update(T* __restrict w, T* __restrict m, T* __restrict v, const T* __restrict g, int64_t n, const AdamWStep<T>& step) {
  const AdamWStep<T> s = step;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) s.update(w[i], m[i], v[i], g[i]);
}

template <class T>
void step_cpu(const AdamWBuffers& b, const AdamWRule& rule, std::span<const DecaySegment> segments, const Tensor& loss) {
  const int64_t n = b.grad.numel(), blocks = adamw_partials_cpu(n);
  const T* g = b.grad.data<T>();
  double* partials = b.partials.data<double>();
  double* control = b.control.data<double>();
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < blocks; ++k) partials[k] = sum_of_squares(g + k * kBlock, std::min(kBlock, n - k * kBlock));
  double sum = 0;
  for (int64_t k = 0; k < blocks; ++k) sum += partials[k];
  decide_adamw_step(rule, sum, static_cast<double>(*loss.data<T>()), control);

  T *w = b.master.data<T>(), *m = b.first.data<T>(), *v = b.second.data<T>();
  for (const DecaySegment& segment : segments) {
    const AdamWStep<T> step(rule, control, segment.decays);
    if (!step.apply) return;
#pragma omp parallel for schedule(static)
    for (int64_t i = segment.begin; i < segment.end; i += kBlock)
      update(w + i, m + i, v + i, g + i, std::min(kBlock, segment.end - i), step);
  }
}

}  // namespace

int64_t adamw_partials_cpu(int64_t n) {
  return (n + kBlock - 1) / kBlock;
}

void adamw_step_cpu(const AdamWBuffers& buffers, const AdamWRule& rule, std::span<const DecaySegment> segments, const Tensor& loss) {
  if (buffers.compute) throw DtypeError("adamw: a compute copy on the CPU is not supported", {{"compute", buffers.compute.describe()}});
  if (buffers.master.dtype() == Dtype::f64) {
    step_cpu<double>(buffers, rule, segments, loss);
  } else {
    step_cpu<float>(buffers, rule, segments, loss);
  }
}

void adamw_set_rates_cpu(const Tensor& control, double lr, double weight_decay) {
  control.data<double>()[kControlLr] = lr;
  control.data<double>()[kControlWeightDecay] = weight_decay;
}

}  // namespace longhand
