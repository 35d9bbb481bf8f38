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
void sums_cpu(const AdamWBuffers& b, std::span<const Part> own, const Tensor& loss) {
  double* partials = b.partials.data<double>();
  double sum = 0;
  for (const Part& part : own) {
    const T* g = b.grad.data<T>() + part.begin;
    const int64_t n = part.size(), blocks = adamw_partials_cpu(n);
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < blocks; ++k) partials[k] = sum_of_squares(g + k * kBlock, std::min(kBlock, n - k * kBlock));
    for (int64_t k = 0; k < blocks; ++k) sum += partials[k];
    partials += blocks;
  }
  b.control.data<double>()[kControlLossSum] = static_cast<double>(*loss.data<T>());
  b.control.data<double>()[kControlSquareSum] = sum;
}

template <class T>
void update_cpu(const AdamWBuffers& b, const AdamWRule& rule, std::span<const AdamWPiece> pieces) {
  double* control = b.control.data<double>();
  decide_adamw_step(rule, control);
  const T* g = b.grad.data<T>();
  T* w = b.master.data<T>();
  for (const AdamWPiece& piece : pieces) {
    const AdamWStep<T> step(rule, control, piece.decays);
    if (!step.apply) return;
    T *m = b.first.data<T>() + piece.moments - piece.begin, *v = b.second.data<T>() + piece.moments - piece.begin;
#pragma omp parallel for schedule(static)
    for (int64_t i = piece.begin; i < piece.end; i += kBlock) update(w + i, m + i, v + i, g + i, std::min(kBlock, piece.end - i), step);
  }
}

}  // namespace

int64_t adamw_partials_cpu(int64_t n) {
  return (n + kBlock - 1) / kBlock;
}

void adamw_sums_cpu(const AdamWBuffers& buffers, std::span<const Part> own, const Tensor& loss) {
  buffers.master.dtype() == Dtype::f64 ? sums_cpu<double>(buffers, own, loss) : sums_cpu<float>(buffers, own, loss);
}

void adamw_update_cpu(const AdamWBuffers& buffers, const AdamWRule& rule, std::span<const AdamWPiece> pieces) {
  if (buffers.compute) throw DtypeError("adamw: a compute copy on the CPU is not supported", {{"compute", buffers.compute.describe()}});
  buffers.master.dtype() == Dtype::f64 ? update_cpu<double>(buffers, rule, pieces) : update_cpu<float>(buffers, rule, pieces);
}

void adamw_set_rates_cpu(const Tensor& control, double lr, double weight_decay) {
  control.data<double>()[kControlLr] = lr;
  control.data<double>()[kControlWeightDecay] = weight_decay;
}

}  // namespace longhand
