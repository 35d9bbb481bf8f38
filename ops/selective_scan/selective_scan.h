// Selective scan: the recurrence of Mamba-1, a diagonal state per channel with input-dependent step, joined with softplus, skip and gate.
#pragma once
#include "autograd/variable.h"

namespace longhand {

struct SelectiveScanOutput {
  Variable y, h_T;
};

/// One scalar recurrence per channel d and state entry n.
///   dt[t,d]   = softplus(dt_raw[t,d] + dt_bias[d])                                A[d,n] = -exp(A_log[d,n])
///   h[t,d,n]  = exp(dt[t,d] * A[d,n]) * h[t-1,d,n] + dt[t,d] * B_t[t,n] * x[t,d]
///   y[t,d]    = (sum_n C_t[t,n] * h[t,d,n] + D_skip[d] * x[t,d]) * silu(z[t,d])
/// x, z      [B, T, D]    f32 | bf16 (CUDA) | f64 (CPU); any strides over B and T; z undefined: no gate
/// dt        [B, T, D]    dtype of x; before bias and softplus; -inf keeps the state
/// A_log     [D, N]       f32 (f64 when x is f64), as D_skip, dt_bias, h0 and h_T
/// B_t, C_t  [B, T, N]    dtype of x; shared by all channels
/// D_skip    [D]          undefined means no skip
/// dt_bias   [D]
/// h0        [B, D, N]    undefined means zeros
/// returns   y [B, T, D] dtype of x; h_T [B, D, N]; decays, sums and states in f32 (f64 when x is f64)
/// holds     scanning [0, s), then [s, T) from that state, gives the scan of [0, T) for every s, gradients too
/// saves     its inputs; on CUDA also the state in front of every 32 tokens, N / 8 bytes per token and channel. Backward recomputes the
///           states between
/// errors    ShapeError naming both tensors; DtypeError; DeviceError; ValueError naming the limits of the CUDA kernels
/// source    Gu & Dao 2023, arXiv:2312.00752, Algorithm 2; B_t by the Euler rule, not zero-order hold
SelectiveScanOutput selective_scan(const Variable& x, const Variable& dt, const Variable& A_log, const Variable& B_t, const Variable& C_t,
                                   const Variable& D_skip, const Variable& z, const Variable& dt_bias, const Variable& h0);

}  // namespace longhand
