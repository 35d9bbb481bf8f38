// The pieces of linear_cross_entropy that differ by device; arguments have been checked. For cross_entropy's own files.
#pragma once
#include "core/tensor.h"

namespace longhand {

// How far a GPU's losses and gradients may be from float64, relative to the largest and to 1 + the largest |logit|: a logit is off by its
// own rounding (f32 sums of d products; bf16 storage), a term of the softmax by as much again relative to itself.
inline constexpr double kCrossEntropyToleranceF32 = 2e-6;
inline constexpr double kCrossEntropyToleranceBf16 = 0x1p-8;
// Gradients out of exponentials (below), relative to the largest, whatever the logits: e, s x, grad_x and grad_x once more are rounded to
// bf16. Losses there come from f32 sums: kCrossEntropyToleranceF32.
inline constexpr double kCrossEntropyToleranceExponentials = 4 * 0x1p-9;

/// One chunk of rows between the products that make its logits and those that use their gradient.
struct LossChunk {
  Tensor logits;      // [R, V] in; with `gradient`, out: grad_logits. On a GPU rows begin at multiples of 16 bytes and what lies
                      // between V and the next such multiple belongs to the row too: its gradient is 0
  Tensor x, weight;   // [R, d], [V, d]: what the logits were made from (a GPU sums the target's logit again in f32)
  Tensor counted_x;   // [R, d] out: x, and zeros in rows that do not count; undefined: not wanted
  Tensor targets;     // [R] i32
  Tensor mask;        // [R] f32, or undefined
  Tensor factor;      // [] loss_scale / sum(mask): what one counted position's loss is multiplied by
  Tensor token_loss;  // [R] out
  int64_t first_row;  // of the chunk in the whole, for messages
  bool gradient;
};
void loss_chunk_cpu(const LossChunk&);
void loss_chunk_cuda(const LossChunk&);

/// A chunk without a pass over its logits, where forms_exponentials_cuda() says so (bf16 on sm_90a): cross_entropy_exponentials_cuda.cu.
///   e[r,v] = exp(logits[r,v] - target_logits[r])        grad_logits[r,v] = row_factors[r] * (e[r,v], in the target's place -sum of others)
struct ExponentialsChunk {
  Tensor exponentials;  // [R, V] out: what row_factors multiply; padded as logits are, with zeros. Undefined: no gradient is wanted
  Tensor x, weight;     // [R, d], [at least vocab, d]
  int64_t vocab;
  Tensor targets, mask, factor, token_loss;  // as in LossChunk
  Tensor target_logits;                      // [R] of target_logits_cuda
  Tensor row_factors, scaled_x;              // [R], [R, d] out: scaled_x = row_factors * x; with `exponentials` only. 0 in rows that do not
                                             // count; scaled_x undefined: not wanted
  int64_t first_row;
};
bool forms_exponentials_cuda(const Tensor& x, const Tensor& weight);
/// target_logits [R] f32: log2(e) * <x[r], weight[targets[r]]>; for a target that does not exist, of class 0
void target_logits_cuda(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t vocab, const Tensor& target_logits);
void exponentials_chunk_cuda(const ExponentialsChunk&);

/// factor = scale / sum(mask), or 0 when the sum is 0
void loss_factor_cpu(const Tensor& mask, double scale, const Tensor& factor);
void loss_factor_cuda(const Tensor& mask, double scale, const Tensor& factor);

/// loss = factor * sum_r mask[r] token_loss[r]
void mean_loss_cpu(const Tensor& token_loss, const Tensor& mask, const Tensor& factor, const Tensor& loss);
void mean_loss_cuda(const Tensor& token_loss, const Tensor& mask, const Tensor& factor, const Tensor& loss);

/// destination = beta * destination + upstream * row_factors * gradient; upstream is one number on the device; row_factors [rows] f32 or
/// undefined: 1; contiguous, one dtype; may be in place
void scale_gradient_cpu(const Tensor& gradient, const Tensor& upstream, const Tensor& row_factors, const Tensor& destination, double beta);
void scale_gradient_cuda(const Tensor& gradient, const Tensor& upstream, const Tensor& row_factors, const Tensor& destination, double beta);

}  // namespace longhand
