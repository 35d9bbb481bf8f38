// SSD: the recurrence of Mamba-2, a scalar decay per head, computed chunk by chunk with matrix products.
#pragma once
#include <limits>

#include "autograd/variable.h"

namespace longhand {

struct SsdOptions {
  int64_t chunk_size = 64;  // tokens per chunk on the CPU; CUDA always takes 64. The result does not depend on it.
  double dt_min = 0.0;      // limits of dt after softplus (dt_limit); the gradient of dt is 0 where dt is clamped
  double dt_max = std::numeric_limits<double>::infinity();
};

struct SsdOutput {
  Variable y, h_T;
};

/// Structured state space duality: one matrix-valued linear recurrence per head.
///   dt[t,h] = clamp(softplus(dt_raw[t,h] + dt_bias[h]), dt_min, dt_max)        A[h] = -exp(A_log[h])        g = h / (H / G)
///   h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] B_t[t,g]'                    y[t] = h[t] C_t[t,g] + D_skip * x[t]
/// x         [B, T, H, P]         f32 | bf16 (CUDA) | f64 (CPU); any strides over B and T
/// dt        [B, T, H]            dtype of x; before bias and softplus; -inf keeps the state
/// A_log     [H]                  f32 (f64 when x is f64), as D_skip, dt_bias, h0 and h_T
/// B_t, C_t  [B, T, G, N]         dtype of x; G divides H, consecutive heads share a group
/// D_skip    [H] or [H, P]        undefined means no skip
/// dt_bias   [H]
/// h0        [B, H, P, N]         undefined means zeros
/// returns   y [B, T, H, P] dtype of x; h_T [B, H, P, N]; decays, sums and states in f32 (f64 when x is f64)
/// holds     running [0, s), then [s, T) from that state, gives the run of [0, T) for every s, gradients too
/// saves     its inputs only; backward recomputes the states at chunk borders (bounded, freed when it returns)
/// errors    ShapeError naming both tensors; DtypeError; DeviceError; ValueError if chunk_size < 1 or dt_min > dt_max;
///           CUDA: ValueError if P > 128 or N > 256 (f32: N > 128)
/// source    Dao & Gu 2024, arXiv:2405.21060, sections 6 and 7
SsdOutput ssd(const Variable& x, const Variable& dt, const Variable& A_log, const Variable& B_t, const Variable& C_t,
              const Variable& D_skip, const Variable& dt_bias, const Variable& h0, const SsdOptions& options = {});

// --- the same on tensors ----------------------------------------------------------------------------------------

/// The inputs of ssd, as tensors of the shapes above.
struct SsdInputs {
  Tensor x, dt, A_log, B_t, C_t, D_skip, dt_bias, h0;
};

struct SsdResult {
  Tensor y, h_T;
};

/// Where backward writes; undefined members are left out. x, dt, B_t, C_t may be strided over B and T.
struct SsdGradients {
  Tensor x, dt, A_log, B_t, C_t, D_skip, dt_bias, h0;
};

/// One token after the other, plain loops, f32 or f64 on the CPU: the definition, and the fast way for a few tokens.
SsdResult ssd_recurrent(const SsdInputs& in, const SsdOptions& options = {});

/// How far the fast forms may be from f64, relative to the largest entry of a tensor.
/// f32   sums of up to some hundred products, 2^-24 each, which grow like the square root of their number
/// bf16  three roundings of 2^-9 on the way of a value (an operand, the state or M beside it, the result), twice that for the tails of many
/// entries
constexpr double kSsdToleranceF32 = 1e-5, kSsdToleranceBf16 = 6.0 / 512;

/// The chunked form; inputs as ssd() has checked them.
SsdResult ssd_fwd_cpu(const SsdInputs& in, const SsdOptions& options);
SsdResult ssd_fwd_cuda(const SsdInputs& in, const SsdOptions& options);

/// Gradients for grad_y (like y, any strides over B and T) and grad_h_T (contiguous); either may be undefined, meaning zero.
void ssd_bwd_cpu(const SsdInputs& in, const SsdOptions& options, const Tensor& grad_y, const Tensor& grad_h_T, const SsdGradients& out);
void ssd_bwd_cuda(const SsdInputs& in, const SsdOptions& options, const Tensor& grad_y, const Tensor& grad_h_T, const SsdGradients& out);

}  // namespace longhand
