// The selective scan on tensors: what the op, its tests and the two devices share.
#pragma once
#include <optional>

#include "autograd/tape.h"
#include "core/tensor.h"

namespace longhand {

/// The inputs of selective_scan, as tensors of the shapes in selective_scan.h; A_log, D_skip, dt_bias and h0 contiguous, T >= 1.
struct SelectiveScanInputs {
  Tensor x, dt, A_log, B_t, C_t, D_skip, z, dt_bias, h0;  // D_skip, z and h0 may be undefined
};

struct SelectiveScanResult {
  Tensor y, h_T;
  Tensor borders = {};  // the states that backward starts from, in a form of the device's own; undefined where there are none
};

/// With softplus, skip and gate around the recurrence as in selective_scan.h, r = C_t h + D_skip x, p[t] = exp(dt[t] A) h[t-1]:
///   grad_r[t] = grad_y[t] * silu(z[t])                            grad_z[t] = grad_y[t] * r[t] * silu'(z[t])
///   lambda[t] = C_t[t] grad_r[t] + carry[t]                       carry[t-1] = exp(dt[t] A) * lambda[t]
///   carry[T]  = grad_h_T                                          grad_h0 = carry[0]
///   grad_x    = D_skip grad_r + dt * <B_t, lambda>                grad_D_skip = sum_{b,t} grad_r x
///   grad_dt   = (x <B_t, lambda> + <A, lambda p>) * softplus'     grad_dt_bias = sum_{b,t} grad_dt
///   grad_B_t  = sum_d lambda dt x     grad_C_t = sum_d grad_r h   grad_A_log = A * sum_{b,t} lambda dt p
struct SelectiveScanBackward {
  SelectiveScanInputs in;
  Tensor borders;                                                     // what forward has kept
  Tensor grad_y, grad_h_T;                                            // either may be undefined: zero; grad_h_T contiguous
  Tensor grad_x, grad_dt, grad_B_t, grad_C_t, grad_z;                 // written, any strides over B and T; undefined: not wanted
  Tensor grad_h0;                                                     // written, contiguous; undefined: not wanted
  std::optional<Accumulation> grad_A_log, grad_D_skip, grad_dt_bias;  // absent: not wanted
};

/// How far f32 kernels may be from f64, relative to the largest entry of a tensor. A decay is off by 2 ulp of ex2.approx and the roundings
/// of its argument, together 2^-21; the state sums such errors over as many tokens as it remembers, the gradients over a second walk.
/// Good for memories of up to about 20 tokens, as random inputs have. bf16 adds one rounding of each result, 2^-9.
constexpr double kSelectiveScanToleranceF32 = 2e-5;

constexpr int64_t kSelectiveScanMaxStateDim = 256;  // N on CUDA

/// The definition: one token after the other in plain loops, f32 or f64 on the CPU.
SelectiveScanResult selective_scan_recurrent(const SelectiveScanInputs& in);

/// keep_borders  backward will follow; CUDA then keeps a state in front of every 32 tokens, the CPU none
SelectiveScanResult selective_scan_fwd_cpu(const SelectiveScanInputs& in, bool keep_borders = false);
SelectiveScanResult selective_scan_fwd_cuda(const SelectiveScanInputs& in, bool keep_borders);
void selective_scan_bwd_cpu(const SelectiveScanBackward& g);
void selective_scan_bwd_cuda(const SelectiveScanBackward& g);

}  // namespace longhand
