// RMSNorm, alone and joined with the addition to the residual stream in front of it.
#pragma once
#include "autograd/tape.h"

namespace longhand {

/// Root-mean-square normalisation over the last axis.
///   rstd[i] = 1 / sqrt(mean_c x[i,c]^2 + eps)        y[i,c] = weight[c] * rstd[i] * x[i,c]
/// x        [.., D]  f32 | bf16 (CUDA) | f64 (CPU); strided views allowed
/// weight   [D]      f32 (f64 when x is f64)
/// eps      > 0      same unit as x squared
/// returns  [.., D]  dtype of x, contiguous; sums and product in f32 (f64 when x is f64), one rounding at the end
/// saves    x, weight, rstd (one number per row in the dtype of weight)
/// limits   D <= 16384 on CUDA
/// errors   ShapeError if weight is not [D] or D is too wide; DtypeError for other dtypes; ValueError if eps <= 0; DeviceError for mixed
/// devices source   Zhang & Sennrich 2019, arXiv:1910.07467, Eq. 4
Variable rmsnorm(const Variable& x, const Variable& weight, double eps);

struct AddRmsnormOutput {
  Variable y, residual;
};

/// One step of a pre-norm residual stream: add the block's output, keep the sum, normalise it.
///   residual_out = residual + x        y = rmsnorm(residual_out, weight, eps), from the unrounded sum
/// x        [.., D]  dtype y_dtype; undefined in front of the first block: then residual_out is residual itself
/// residual [.., D]  f32 (f64 on the CPU when everything is f64)
/// weight   [D]      dtype of residual
/// y_dtype  f32 | bf16 (CUDA) | f64
/// returns  y [.., D] y_dtype, rounded once; residual [.., D] dtype of the input residual
/// backward grad_residual = norm'(grad_y) + grad_residual_out, the same for both inputs; rounded to its dtype for x
/// saves    residual_out, weight, rstd; where y_dtype is bf16 y instead of residual_out: xhat = y / weight, which is off by the rounding of
///          y, 2^-8, in the gradients; a weight nearer to zero than 2^-40 counts as 2^-40 there, in y too
/// limits, errors  as rmsnorm, and ShapeError if x and residual differ in shape
/// source   the state-spaces layout: norm before the mixer, residual kept in f32 (Gu & Dao 2023, arXiv:2312.00752)
AddRmsnormOutput add_rmsnorm(const Variable& x, const Variable& residual, const Variable& weight, double eps, Dtype y_dtype);

}  // namespace longhand
