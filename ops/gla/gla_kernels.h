// What gla asks of a device; for this op's own files only.
#pragma once
#include "ops/common/token_strides.h"
#include "ops/gla/gla.h"

namespace longhand {

struct GlaSizes {
  int64_t B, T, H, Dk, Dv;
};

/// The inputs of gla as tensors, checked, packed behind T; h0 contiguous or undefined.
struct GlaInputs {
  Tensor q, k, v, gate, h0;
  GlaSizes sizes() const { return {q.dim(0), q.dim(1), q.dim(2), q.dim(3), v.dim(3)}; }
};

/// GlaOptions with its defaults resolved.
struct GlaRule {
  bool logit;
  double normalizer, gate_min, scale;
};

/// What the kernels of a device form of every chunk by itself, before the states walk over the chunks: of use to the backward too.
/// Undefined where there is no such thing. CUDA: D is Dk padded with zeros to 64, 128 or 256; tokens behind T are zeros.
struct GlaPrepared {
  Tensor q;       // [B, chunks, H, 64, D]   scale * q_i * decay from the chunk's beginning through i
  Tensor k;       // [B, chunks, H, 64, D]   k_j * decay from behind j to the chunk's end
  Tensor scores;  // [B, chunks, H, 64, 64]  scale * sum_m q_i k_j decay from behind j through i; 0 for j > i
  Tensor decay;   // [B, chunks, H, D] f32   over the whole chunk
};

struct GlaResult {
  Tensor o, h_T;
  GlaPrepared prepared = {};
};

/// Where backward writes; undefined members are left out. q, k, v, gate may be strided over B and T; h0 is contiguous.
struct GlaGradients {
  Tensor q, k, v, gate, h0;
};

/// One token after the other, plain loops, f32 or f64 on the CPU: the definition, and the fast way for a few tokens.
GlaResult gla_recurrent(const GlaInputs& in, const GlaRule& rule);

/// How far the fast forms may be from f64, relative to the largest entry of a tensor.
/// f32   sums of up to some hundred products, 2^-24 each, which grow like the square root of their number. A decay is the exponential of
///       a sum of gates, all of one sign: where it is above e^-20 its exponent is off by at most 20 * 2^-22, on CUDA exp2 adds 2^-22
/// bf16  three roundings of 2^-9 on the way of a value (a decayed operand, the scores or the state beside it, the result), twice that for
///       the tails of many entries
constexpr double kGlaToleranceF32 = 1e-5, kGlaToleranceBf16 = 6.0 / 512;

/// The chunked form.
GlaResult gla_fwd_cpu(const GlaInputs& in, const GlaRule& rule);
GlaResult gla_fwd_cuda(const GlaInputs& in, const GlaRule& rule);

/// Gradients for grad_o (like o, packed behind T) and grad_h_T (contiguous); either may be undefined, meaning zero.
/// prepared  by the forward of the same inputs; undefined: it is formed once more
void gla_bwd_cpu(const GlaInputs& in, const GlaRule& rule, const GlaPrepared& prepared, const Tensor& grad_o, const Tensor& grad_h_T,
                 const GlaGradients& out);
void gla_bwd_cuda(const GlaInputs& in, const GlaRule& rule, const GlaPrepared& prepared, const Tensor& grad_o, const Tensor& grad_h_T,
                  const GlaGradients& out);

/// Whether mild chunks of these inputs have kernels of their own (gla_chunks_cuda.cuh): for tests, whose numbers do not show it.
bool gla_tells_mild_chunks_cuda(const GlaInputs& in, const GlaRule& rule);

/// The same for keys that are wider than the kernels take (gla_key_slices_cuda.cpp).
GlaResult gla_fwd_key_slices_cuda(const GlaInputs& in, const GlaRule& rule);
void gla_bwd_key_slices_cuda(const GlaInputs& in, const GlaRule& rule, const Tensor& grad_o, const Tensor& grad_h_T,
                             const GlaGradients& out);

}  // namespace longhand
