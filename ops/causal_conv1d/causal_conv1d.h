// Short causal depthwise convolution with silu, carrying its window from one call to the next.
#pragma once
#include "autograd/tape.h"

namespace longhand {

struct CausalConv1dOutput {
  Variable y, window;
};

/// Depthwise convolution over time that looks back W - 1 steps, then silu.
///   pre[b,t,c] = bias[c] + sum_{j<W} weight[c,0,j] * x[b, t - (W-1) + j, c]        y = silu(pre)
/// where x at a negative time is window0: x[b, -(W-1) + i, c] = window0[b,i,c], zeros when it is absent.
/// x        [B, T, C]    f32 | bf16 (CUDA) | f64 (CPU); strided views allowed; any T >= 0
/// weight   [C, 1, W]    f32 (f64 when x is f64), 1 <= W <= 8; tap W-1 multiplies the current input
/// bias     [C]          dtype of weight, or undefined
/// window0  [B, W-1, C]  dtype of x, oldest first, or undefined
/// returns  y [B, T, C] dtype of x, contiguous, sums in f32 (f64), one rounding at the end;
///          window [B, W-1, C] dtype of x: the last W-1 rows of (window0 ++ x), inputs before the convolution
/// holds    running [0, s), then [s, T) with the window of the first run, gives the run of [0, T) for every s, also s < W-1
/// backward gradients of x, weight, bias and window0, from y and from window
/// saves    x, weight, bias, window0; pre is computed again
/// errors   ShapeError naming the tensors; ValueError if W is outside 1..8; DtypeError; DeviceError for mixed devices
/// source   Gu & Dao 2023, arXiv:2312.00752, section 3.4 (the local convolution of the block)
CausalConv1dOutput causal_conv1d_silu(const Variable& x, const Variable& weight, const Variable& bias, const Variable& window0);

}  // namespace longhand
