// What swiglu asks of a device; for this op's own files only.
#pragma once
#include "ops/swiglu/swiglu.h"

namespace longhand {

/// Largest difference between f32 kernels and the reference in f64, relative to the largest element: the approximate exponential of the
/// gate, (4 + |gate| / 2) * 2^-23 for gates of a few units, and one rounding. bf16 adds one rounding of each output, 2^-9.
constexpr double kSwigluToleranceF32 = 2e-6;

struct SwigluForward {
  Tensor gate, up;  // [.., E]; rows at two strides
  Tensor y;         // [.., E] contiguous
};

///   grad_gate = grad_y * up * silu'(gate)        grad_up = grad_y * silu(gate)
struct SwigluBackward {
  Tensor grad_y, gate, up;    // rows at two strides
  Tensor grad_gate, grad_up;  // written; undefined: not wanted
  Tensor y;                   // [.., E] contiguous; written with the bits of the forward; undefined: not wanted
};

void swiglu_fwd_cpu(const SwigluForward&);
void swiglu_bwd_cpu(const SwigluBackward&);
void swiglu_fwd_cuda(const SwigluForward&);
void swiglu_bwd_cuda(const SwigluBackward&);

}  // namespace longhand
