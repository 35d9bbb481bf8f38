// GLA: gated linear attention, a matrix-valued state per head whose rows decay by data-dependent gates, computed chunk by chunk.
#pragma once
#include <limits>

#include "autograd/variable.h"

namespace longhand {

struct GlaOptions {
  /// What `gate` holds: the log gate g <= 0 itself, or logits y with g = max(logsigmoid(y) / gate_normalizer, gate_min).
  enum class Gate { log, logit } gate = Gate::logit;
  double gate_normalizer = 16;                                 // gate_logit_normalizer; logits only
  double gate_min = -std::numeric_limits<double>::infinity();  // clamp_min, logits only; the gradient is 0 where it holds
  double scale = 0;                                            // of q; 0 means Dk^(-1/2)
};

struct GlaOutput {
  Variable o, h_T;
};

/// Gated linear attention.
///   h[t] = diag(exp(g[t])) h[t-1] + k[t] v[t]'            o[t] = scale * h[t]' q[t]
/// q, k      [B, T, H, Dk]      f32 | bf16 (CUDA) | f64 (CPU); any strides over B and T
/// v         [B, T, H, Dv]      dtype of q
/// gate      [B, T, H, Dk]      dtype of q; -inf (or logits of -inf) empties a row of the state
/// h0        [B, H, Dk, Dv]     f32 (f64 when q is f64), as h_T; undefined means zeros
/// returns   o [B, T, H, Dv] dtype of q; h_T [B, H, Dk, Dv]; gates, sums and states in f32 (f64 when q is f64)
/// holds     running [0, s), then [s, T) from that state, gives the run of [0, T) for every s, gradients too;
///           finite for every gate from 0 to -1e4: no exponent above 0 is formed, but for reciprocals of decays down to 2^-64 in a chunk
///           on CUDA (ops/gla/README.md)
/// saves     its inputs and, on CUDA below the level `projections` (autograd/recompute.h), what was formed of every chunk by itself;
///           backward recomputes the states at chunk borders (freed when it returns)
/// errors    ShapeError naming both tensors; DtypeError; DeviceError; ValueError for a gate_normalizer <= 0, a gate_min > 0, a scale that
///           is not finite
/// widths    any Dk and Dv. CUDA has kernels for Dk up to 256; above, 128 keys of a head are taken at a time (gla_key_slices_cuda.cpp), and
///           so they are in f32 above 128 on a GPU with little shared memory
/// source    Yang et al. 2023, arXiv:2312.06635, section 4 (secondary chunking: section 4.3)
GlaOutput gla(const Variable& q, const Variable& k, const Variable& v, const Variable& gate, const Variable& h0,
              const GlaOptions& options = {});

}  // namespace longhand
