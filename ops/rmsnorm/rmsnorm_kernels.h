// What rmsnorm and add_rmsnorm ask of a device; for this op's own files only.
#pragma once
#include <optional>

#include "autograd/tape.h"

namespace longhand {

/// Largest difference between f32 kernels and the reference in f64, relative to the largest element: a few roundings per element, sums of
/// up to 16384 squares whose errors average out. bf16 adds one rounding of each output, 2^-9.
constexpr double kRmsnormToleranceF32 = 4e-6;
/// The same for gradients where y is bf16 and xhat is told from it: off by a rounding of y, at most 2^-8 of each element, as grad_y already
/// is.
constexpr double kRmsnormToleranceFromY = 1.0 / 256;

/// What a weight nearer to zero counts as where xhat is told from y.
constexpr float kRmsnormLeastWeight = 0x1p-40f;

/// sum = base + addend, y = weight * rstd * sum; without an addend the sum is base itself and is not written. Where y is narrower than
/// base, weights count as kRmsnormLeastWeight at least.
struct RmsnormForward {
  Tensor base;    // [.., D] residual or x; rows at two strides
  Tensor addend;  // [.., D] or undefined; rows at two strides
  Tensor weight;  // [D]
  double eps;
  Tensor sum;   // [.., D] dtype of base; undefined without an addend
  Tensor y;     // [.., D]
  Tensor rstd;  // [rows] dtype of weight
};

/// With xhat = rstd * sum and u = weight * grad_y:  grad_base = rstd * (u - xhat * mean(xhat * u)) + grad_sum,  grad_weight =
/// sum_rows grad_y * xhat. xhat is told from the sum or from y, one of which is given.
struct RmsnormBackward {
  Tensor grad_y;                            // [.., D]; rows at two strides
  Tensor grad_sum;                          // [.., D] dtype of the sum, or undefined: zero
  Tensor sum;                               // [.., D] what was normalised; rows at two strides
  Tensor y;                                 // [.., D] bf16 (CUDA), where the sum is f32; contiguous
  Tensor weight, rstd;                      //
  Tensor grad_base;                         // written; undefined: not wanted
  Tensor grad_addend;                       // the same rounded to grad_y's dtype; undefined: not wanted
  Tensor y_again;                           // [.., D] dtype of grad_y; written with the bits of the forward; undefined: not wanted
  std::optional<Accumulation> grad_weight;  // absent: not wanted
};

void rmsnorm_fwd_cpu(const RmsnormForward&);
void rmsnorm_bwd_cpu(const RmsnormBackward&);
void rmsnorm_fwd_cuda(const RmsnormForward&);
void rmsnorm_bwd_cuda(const RmsnormBackward&);

}  // namespace longhand
