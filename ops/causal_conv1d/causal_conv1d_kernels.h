// What causal_conv1d_silu asks of a device; for this op's own files only.
#pragma once
#include <optional>

#include "ops/causal_conv1d/causal_conv1d.h"

namespace longhand {

constexpr int64_t kMaxConvWidth = 8;
constexpr int64_t kMaxConvTime = 2147480000;  // times fit an int, a run beyond the end included

/// Largest difference between f32 kernels and the reference in f64, relative to the largest element: sums of up to 9 terms and the
/// approximate exponential; sums over batch and time for the weights. bf16 adds one rounding of each output, 2^-9.
constexpr double kCausalConv1dToleranceF32 = 6e-6;

/// All tensors of rank 3 are [B, time, C] with any strides of batch and time; T >= 1.
struct CausalConv1dForward {
  Tensor x, weight, bias, window0;  // bias and window0 may be undefined
  Tensor y, window;                 // contiguous; window is undefined when W = 1
};

/// With q a position from -(W-1) (the oldest row of window0) to T-1:
///   grad_pre[t] = grad_y[t] * silu'(pre[t])
///   grad[q] = sum_j weight[j] * grad_pre[q + (W-1) - j] over positions in 0..T-1, + grad_window[q - (T - (W-1))] for the last W-1
///   positions grad_x = grad[0..T-1]    grad_window0 = grad[-(W-1)..-1] grad_weight[j] = sum_{b,t} grad_pre[t] * x[t - (W-1) + j] grad_bias
///   = sum_{b,t} grad_pre[t]
struct CausalConv1dBackward {
  Tensor grad_y, grad_window;  // grad_window may be undefined: zero
  Tensor x, weight, bias, window0;
  Tensor grad_x, grad_window0;                         // written; undefined: not wanted
  std::optional<Accumulation> grad_weight, grad_bias;  // absent: not wanted
};

void causal_conv1d_fwd_cpu(const CausalConv1dForward&);
void causal_conv1d_bwd_cpu(const CausalConv1dBackward&);
void causal_conv1d_fwd_cuda(const CausalConv1dForward&);
void causal_conv1d_bwd_cuda(const CausalConv1dBackward&);

}  // namespace longhand
