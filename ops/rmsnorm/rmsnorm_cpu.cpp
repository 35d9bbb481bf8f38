// The reference of rmsnorm and add_rmsnorm in f32 and f64; see rmsnorm.h for the formulas.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/dtype.h"
#include "ops/common/strided_rows.h"
#include "ops/rmsnorm/rmsnorm_kernels.h"

namespace longhand {
namespace {

constexpr int64_t kRowsPerChunk = 64;  // weight gradients are summed chunk by chunk: the same bits for any number of threads

template <class T>
void forward(const RmsnormForward& f) {
  const StridedRows base_rows = strided_rows_of(f.base), addend_rows = strided_rows_of(f.addend);
  const int64_t width = base_rows.width;
  const T* weight = f.weight.data<T>();
  const bool add = f.addend.defined();
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < base_rows.count; ++row) {
    const T* x = f.base.data<T>() + base_rows.begin(row);
    if (add) {
      const T* addend = f.addend.data<T>() + addend_rows.begin(row);
      T* sum = f.sum.data<T>() + row * width;
      for (int64_t c = 0; c < width; ++c) sum[c] = x[c] + addend[c];
      x = sum;
    }
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < width; ++c) squares += x[c] * x[c];
    const T rstd = T(1) / std::sqrt(squares / static_cast<T>(width) + static_cast<T>(f.eps));
    f.rstd.data<T>()[row] = rstd;
    T* y = f.y.data<T>() + row * width;
    for (int64_t c = 0; c < width; ++c) y[c] = weight[c] * (rstd * x[c]);
  }
}

template <class T>
void backward(const RmsnormBackward& b) {
  const StridedRows sum_rows = strided_rows_of(b.sum), grad_y_rows = strided_rows_of(b.grad_y), grad_sum_rows = strided_rows_of(b.grad_sum),
                    grad_base_rows = strided_rows_of(b.grad_base), grad_addend_rows = strided_rows_of(b.grad_addend);
  const int64_t width = sum_rows.width, chunks = (sum_rows.count + kRowsPerChunk - 1) / kRowsPerChunk;
  const T* weight = b.weight.data<T>();
  std::vector<T> partials(static_cast<std::size_t>(b.grad_weight ? chunks * width : 0));

#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    T* grad_weight = b.grad_weight ? partials.data() + chunk * width : nullptr;
    for (int64_t row = chunk * kRowsPerChunk; row < std::min(sum_rows.count, (chunk + 1) * kRowsPerChunk); ++row) {
      const T* x = b.sum.data<T>() + sum_rows.begin(row);
      const T* grad_y = b.grad_y.data<T>() + grad_y_rows.begin(row);
      const T rstd = b.rstd.data<T>()[row];
      T dot = 0;  // sum_c xhat * u
#pragma omp simd reduction(+ : dot)
      for (int64_t c = 0; c < width; ++c) dot += (rstd * x[c]) * (weight[c] * grad_y[c]);
      const T mean = dot / static_cast<T>(width);
      if (grad_weight != nullptr)
        for (int64_t c = 0; c < width; ++c) grad_weight[c] += grad_y[c] * (rstd * x[c]);
      if (b.y_again.defined())
        for (int64_t c = 0; c < width; ++c) b.y_again.data<T>()[row * width + c] = weight[c] * (rstd * x[c]);
      if (!b.grad_base.defined()) continue;
      T* grad_base = b.grad_base.data<T>() + grad_base_rows.begin(row);
      for (int64_t c = 0; c < width; ++c) grad_base[c] = rstd * (weight[c] * grad_y[c] - (rstd * x[c]) * mean);
      if (b.grad_sum.defined()) {
        const T* grad_sum = b.grad_sum.data<T>() + grad_sum_rows.begin(row);
        for (int64_t c = 0; c < width; ++c) grad_base[c] += grad_sum[c];
      }
      if (b.grad_addend.defined()) std::copy(grad_base, grad_base + width, b.grad_addend.data<T>() + grad_addend_rows.begin(row));
    }
  }

  if (!b.grad_weight) return;
  T* grad_weight = b.grad_weight->destination.data<T>();
  for (int64_t c = 0; c < width; ++c) {
    T sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[static_cast<std::size_t>(chunk * width + c)];
    grad_weight[c] = b.grad_weight->beta == 0 ? sum : static_cast<T>(b.grad_weight->beta) * grad_weight[c] + sum;
  }
}

}  // namespace

void rmsnorm_fwd_cpu(const RmsnormForward& f) {
  f.weight.dtype() == Dtype::f64 ? forward<double>(f) : forward<float>(f);
}
void rmsnorm_bwd_cpu(const RmsnormBackward& b) {
  b.weight.dtype() == Dtype::f64 ? backward<double>(b) : backward<float>(b);
}

}  // namespace longhand
