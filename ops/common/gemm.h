// Matrix products of 2-D tensors with any row stride: OpenBLAS on the CPU, cuBLASLt on a GPU. What every projection comes down to.
#pragma once
#include "core/tensor.h"

namespace longhand {

/// Matrix product with optional transposition and accumulation.
///   C = alpha * op(A) op(B) + beta * C        op(X) = X or X^T; with beta = 0 the old C is never read
/// a        [m, k], or [k, m] when transpose_a   f64 | f32 on the CPU; f32 | bf16 on a GPU; rows contiguous, any row stride
/// b        [k, n], or [n, k] when transpose_b   dtype of a
/// c        [m, n]                               dtype of a, or f32
/// sums     in f32 (f64 for f64); f32 operands are multiplied as f32, never as TF32; a bf16 C with beta != 0 may be rounded twice:
///          the product before the old C is added
/// order    the same call gives the same bits on one machine, whatever the number of threads
/// errors   ShapeError, DtypeError, DeviceError naming the tensors
void gemm(bool transpose_a, const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& c, double alpha = 1.0, double beta = 0.0);

/// The same with a row added to every row of the product: C = A op(B) + ones row
/// row      [n]    dtype of a, contiguous
/// c        [m, n] dtype of a; rounded once, but on a GPU up to twice where n is no multiple of 8 or row begins off a multiple of 16 bytes
void gemm_add_row(const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& row, const Tensor& c);

/// The work of a product [m, k] times [k, n], for OpLedger::note(): gemm() notes its own, kernels that form one besides have to.
double product_flops(int64_t m, int64_t n, int64_t k);

/// The tensor as a matrix [rows, last axis]: a view where the leading axes have one common stride, else a contiguous copy.
Tensor as_matrix(const Tensor& t);

// The implementations; their arguments have been checked and no size is 0. row: as in gemm_add_row(), or undefined.
struct GemmShape {
  int64_t m, n, k;
};
void gemm_cpu(const GemmShape&, bool transpose_a, const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& c, double alpha,
              double beta, const Tensor& row);
void gemm_cuda(const GemmShape&, bool transpose_a, const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& c, double alpha,
               double beta, const Tensor& row);

}  // namespace longhand
