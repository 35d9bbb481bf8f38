// cross_entropy: head, softmax and loss together, over row chunks, so that the logits never exist as a whole.
#pragma once
#include "autograd/variable.h"

namespace longhand {

struct CrossEntropyOptions {
  int64_t chunk_rows = 0;   // rows whose logits exist at one time; 0 chooses
  int64_t valid_vocab = 0;  // columns >= valid_vocab (padding rows of the head) are masked out; 0: none
  double loss_scale = 1.0;  // multiplies the loss, not token_loss
};

struct CrossEntropyOutput {
  Variable loss;      // [] the mean over counted positions times loss_scale
  Tensor token_loss;  // [..] the loss of every position, in nats; carries no gradient
};

/// Negative log-likelihood of the targets under softmax(x weight^T).
///   logits[r,v] = sum_i x[r,i] weight[v,i]        token_loss[r] = log(sum_v exp(logits[r,v])) - logits[r,targets[r]]
///   loss = loss_scale * sum_r mask[r] token_loss[r] / sum_r mask[r]                                (0 when nothing is counted)
///   grad_logits[r,v] = loss_scale * mask[r] / sum(mask) * (softmax(logits[r])[v] - [v = targets[r]])
/// x        [.., d]      f32 | bf16 (GPU) | f64
/// weight   [V, d]       dtype of x; tied to the embedding or not
/// targets  [..]         i32 in [0, valid_vocab); where mask is 0 any value: outside the range token_loss is 0 there
/// mask     [..]         f32 >= 0, the weight of each position; absent means 1 everywhere. A position of weight 0 adds nothing to loss and
///                       gradients, be its logits or its x infinite or NaN; token_loss says what they come to
/// returns  loss and token_loss in f32 (f64 when x is f64)
/// holds    the result does not depend on chunk_rows, but for rounding of sums (bf16: see below)
/// saves    the gradients for an incoming gradient of 1, formed chunk by chunk in the forward: grad_x in x's dtype, grad_weight in f32
///          (f64); backward multiplies them by the incoming gradient, read on the device
/// bf16     where the GPU has products of warpgroups, x and weight are laid out for them and d is a multiple of 8, logits are f32 sums that
///          are never stored: exp(logit - target's logit) is, rounded to bf16, and token_loss comes from f32 sums of it.
///          Elsewhere: without a gradient to compute, logits are f32 sums. With one they are kept in bf16, except the target's logit, which
///          is summed in f32 and used for the loss and for the target's gradient: softmax - 1 is never read back from bf16. token_loss is
///          then within 2^-8 of the largest |logit| of its row; the rounding errors of the rows are independent.
/// errors   ShapeError, DtypeError, ValueError; a counted target outside [0, valid_vocab): ValueError naming position and value, always on
///          the CPU, on a GPU with LONGHAND_CHECK=1; without it the kernel prints them, and the loss and that row's gradients are NaN
CrossEntropyOutput linear_cross_entropy(const Variable& x, const Variable& weight, const Tensor& targets, const Tensor& mask,
                                        const CrossEntropyOptions& options = {});

}  // namespace longhand
