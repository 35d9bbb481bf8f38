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

struct GlaResult {
  Tensor o, h_T;
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
void gla_bwd_cpu(const GlaInputs& in, const GlaRule& rule, const Tensor& grad_o, const Tensor& grad_h_T, const GlaGradients& out);
void gla_bwd_cuda(const GlaInputs& in, const GlaRule& rule, const Tensor& grad_o, const Tensor& grad_h_T, const GlaGradients& out);

/// The same for keys that are wider than the kernels take (gla_key_slices_cuda.cpp).
GlaResult gla_fwd_key_slices_cuda(const GlaInputs& in, const GlaRule& rule);
void gla_bwd_key_slices_cuda(const GlaInputs& in, const GlaRule& rule, const Tensor& grad_o, const Tensor& grad_h_T,
                             const GlaGradients& out);

}  // namespace longhand
