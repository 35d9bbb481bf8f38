// Gated RMSNorm: the norm at the end of a Mamba-2 mixer and of a GLA head, joined with the silu gate.
#pragma once
#include "autograd/tape.h"

namespace longhand {

struct GatedRmsnormOptions {
  double eps = 1e-5;
  int64_t groups = 1;             // the mean of squares is taken over each of `groups` equal parts of the last axis
  bool norm_before_gate = false;  // false: norm(y * silu(z)), as in Mamba-2; true: norm(y) * silu(z), as in GLA
};

/// RMSNorm with a silu gate over groups of the last axis.
///   gate first:  v = y * silu(z)    rstd = 1 / sqrt(mean_group v^2 + eps)    o = weight * rstd * v
///   norm first:                     rstd = 1 / sqrt(mean_group y^2 + eps)    o = weight * rstd * y * silu(z)
///   no weight:   o = y * silu(z)
/// y        [.., E]  f32 | bf16 (CUDA) | f64 (CPU); strided views allowed
/// z        [.., E]  dtype of y; strided views allowed (a slice of a projection, also reshaped to heads)
/// weight   [E]      f32 (f64 when y is f64); undefined: the gate alone
/// returns  [.., E]  dtype of y, contiguous; everything in f32 (f64), one rounding at the end
/// saves    y, z, weight, rstd (one number per row and group); silu(z) is computed again in the backward
/// limits   E / groups <= 16384 on CUDA
/// errors   ShapeError if y, z and weight do not fit or groups does not divide E; DtypeError; ValueError if eps <= 0 or groups < 1
/// source   Dao & Gu 2024, arXiv:2405.21060, section 7.1 (gate first); Yang et al. 2023, arXiv:2312.06635, section 4.4 (norm first)
Variable gated_rmsnorm(const Variable& y, const Variable& z, const Variable& weight, const GatedRmsnormOptions& options);

}  // namespace longhand
