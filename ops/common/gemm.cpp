// gemm: what both backends share, the checks and the view of a tensor as a matrix. See gemm.h.
#include "ops/common/gemm.h"

#include <cstdint>

#include "core/error.h"
#include "core/op_ledger.h"
#include "core/op_scope.h"

namespace longhand {
namespace {

// cuBLASLt adds a row at once where the columns fill its packs and the row begins like one.
constexpr int64_t kBiasWidths = 8;
constexpr std::uintptr_t kBiasAlignment = 16;  // bytes

void require_gemm_dtypes(const Tensor& a, const Tensor& b, const Tensor& c) {
  const bool gpu = a.device().is_cuda();
  const bool known = gpu ? a.dtype() == Dtype::f32 || a.dtype() == Dtype::bf16 : a.dtype() == Dtype::f32 || a.dtype() == Dtype::f64;
  const bool sum_fits = c.dtype() == a.dtype() || (gpu && c.dtype() == Dtype::f32);
  if (known && b.dtype() == a.dtype() && sum_fits) return;
  throw DtypeError("gemm: a product of these element types is not offered",
                   {{"a", a.describe()},
                    {"b", b.describe()},
                    {"c", c.describe()},
                    {"expected", gpu ? "a and b both f32 or both bf16, c the same or f32" : "a, b and c all f32 or all f64"}});
}

void run_gemm(bool transpose_a, const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& c, double alpha, double beta,
              const Tensor& added_row) {
  const bool matrices = a.rank() == 2 && b.rank() == 2 && c.rank() == 2;
  const int row = transpose_a ? 1 : 0, column = transpose_b ? 0 : 1;
  if (!matrices || a.dim(1 - row) != b.dim(1 - column) || c.dim(0) != a.dim(row) || c.dim(1) != b.dim(column))
    throw ShapeError("gemm: the matrices do not fit together", {{"a", a.describe() + (transpose_a ? " transposed" : "")},
                                                                {"b", b.describe() + (transpose_b ? " transposed" : "")},
                                                                {"c", c.describe()},
                                                                {"expected", "[m, k] times [k, n] into [m, n]"}});
  if (!(a.device() == b.device()) || !(a.device() == c.device()))
    throw DeviceError("gemm: the matrices are on different devices", {{"a", a.describe()}, {"b", b.describe()}, {"c", c.describe()}});
  require_gemm_dtypes(a, b, c);
  const GemmShape shape{c.dim(0), c.dim(1), a.dim(1 - row)};
  if (shape.m == 0 || shape.n == 0) return;
  OpLedger::note(0, product_flops(shape.m, shape.n, shape.k));
  if (shape.k == 0) return beta == 0 ? fill(c, 0) : multiply(c, beta);
  on_device(a.device(), &gemm_cpu, LONGHAND_CUDA_IMPL(gemm_cuda))(shape, transpose_a, a, transpose_b, b, c, alpha, beta, added_row);
}

}  // namespace

double product_flops(int64_t m, int64_t n, int64_t k) {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

void gemm(bool transpose_a, const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& c, double alpha, double beta) {
  run_gemm(transpose_a, a, transpose_b, b, c, alpha, beta, {});
}

void gemm_add_row(const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& row, const Tensor& c) {
  const bool fits = row.rank() == 1 && c.rank() == 2 && row.dim(0) == c.dim(1) && row.is_contiguous();
  if (!fits || row.dtype() != a.dtype() || c.dtype() != a.dtype() || !(row.device() == a.device()))
    throw ShapeError("gemm: the row does not fit the product",
                     {{"row", row.describe()}, {"c", c.describe()}, {"expected", "row [n] of the dtype and device of a and c [m, n]"}});
  const bool fills_packs = row.dim(0) % kBiasWidths == 0 && reinterpret_cast<std::uintptr_t>(row.raw()) % kBiasAlignment == 0;
  const bool at_once = a.dim(1) > 0 && (!a.device().is_cuda() || fills_packs);
  if (at_once) return run_gemm(false, a, transpose_b, b, c, 1.0, 0.0, row);
  gemm(true, Tensor::full(a.device(), a.dtype(), {1, a.dim(0)}, 1.0), false, row.reshape({1, row.dim(0)}), c);
  gemm(false, a, transpose_b, b, c, 1.0, 1.0);
}

Tensor as_matrix(const Tensor& t) {
  const int64_t width = t.dim(-1);
  const Shape matrix{width == 0 ? 0 : t.numel() / width, width};
  int64_t joined = 0;  // the stride that the next outer axis must have; 0 until an inner one of more than one row was seen
  for (int axis = t.rank() - 2; axis >= 0; --axis) {
    if (t.dim(axis) == 1) continue;
    if (joined != 0 && t.stride(axis) != joined) return t.contiguous().reshape(matrix);
    joined = t.stride(axis) * t.dim(axis);
  }
  return t.reshape(matrix);
}

}  // namespace longhand
