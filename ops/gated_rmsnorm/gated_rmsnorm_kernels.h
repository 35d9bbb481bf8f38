// What gated_rmsnorm asks of a device; for this op's own files only.
#pragma once
#include <optional>

#include "ops/gated_rmsnorm/gated_rmsnorm.h"

namespace longhand {

/// Largest difference between f32 kernels and the reference in f64, relative to the largest element: as in rmsnorm, and the approximate
/// exponential of the gate. bf16 adds one rounding of each output, 2^-9.
constexpr double kGatedRmsnormToleranceF32 = 6e-6;

enum class GatedNorm { gate_only, gate_first, norm_first };

struct GatedRmsnormForward {
  GatedNorm form;
  int64_t groups;
  double eps;
  Tensor y, z;    // [.., E]; rows at two strides
  Tensor weight;  // [E]; undefined in gate_only
  Tensor out;     // [.., E] contiguous
  Tensor rstd;    // [rows, groups]; undefined in gate_only
};

/// With a the normalised input (y silu(z), or y), ahat = rstd * a, u the gradient of ahat:  grad_a = rstd * (u - ahat * mean_group(ahat *
/// u))
///   gate first:  u = weight * grad_out              grad_y = grad_a * silu(z)    grad_z = grad_a * y * silu'(z)
///   norm first:  u = weight * grad_out * silu(z)    grad_y = grad_a              grad_z = grad_out * weight * ahat * silu'(z)
///   gate only:   grad_a = grad_out, then as gate first
///   grad_weight = sum_rows grad_out * (out / weight)
struct GatedRmsnormBackward {
  GatedNorm form;
  int64_t groups;
  Tensor grad_out;  // rows at two strides
  Tensor y, z, weight, rstd;
  Tensor grad_y, grad_z;                    // written; undefined: not wanted
  Tensor out;                               // [.., E] contiguous; written with the bits of the forward; undefined: not wanted
  std::optional<Accumulation> grad_weight;  // absent: not wanted
};

void gated_rmsnorm_fwd_cpu(const GatedRmsnormForward&);
void gated_rmsnorm_bwd_cpu(const GatedRmsnormBackward&);
void gated_rmsnorm_fwd_cuda(const GatedRmsnormForward&);
void gated_rmsnorm_bwd_cuda(const GatedRmsnormBackward&);

}  // namespace longhand
