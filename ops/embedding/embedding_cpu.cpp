// embedding on the CPU: the reference, in the order of the formula.
#include <algorithm>

#include "ops/embedding/embedding_kernels.h"

namespace longhand {
namespace {

constexpr int64_t kColumns = 64;  // columns that one thread sums, over all positions: the order of the sums knows no threads

template <class T>
void gather(const int32_t* ids, const T* weight, T* y, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; ++r) std::copy_n(weight + ids[r] * width, width, y + r * width);
}

template <class T>
void scatter_add(const int32_t* ids, const T* grad_y, int64_t stride, T* grad_weight, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t begin = 0; begin < width; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, width);
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = grad_y + r * stride;
      T* to = grad_weight + ids[r] * width;
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    }
  }
}

}  // namespace

void embedding_fwd_cpu(const Tensor& ids, const Tensor& weight, const Tensor& y) {
  const auto* id = ids.data<int32_t>();
  if (y.dtype() == Dtype::f64) gather(id, weight.data<double>(), y.data<double>(), y.dim(0), y.dim(1));
  else gather(id, weight.data<float>(), y.data<float>(), y.dim(0), y.dim(1));
}

void embedding_bwd_cpu(const Tensor& ids, const Tensor& grad_y, const Tensor& grad_weight, double beta) {
  const auto* id = ids.data<int32_t>();
  const Rows rows = rows_of(grad_y, "embedding: grad_y");
  if (beta == 0) fill(grad_weight, 0);
  if (grad_y.dtype() == Dtype::f64) scatter_add(id, grad_y.data<double>(), rows.stride, grad_weight.data<double>(), rows.count, rows.width);
  else scatter_add(id, grad_y.data<float>(), rows.stride, grad_weight.data<float>(), rows.count, rows.width);
}

}  // namespace longhand
