// From logits on a GPU to the next token of every row, without the logits going to the host: eval/sampling.h says what is drawn, this is
// how many rows are drawn at once.
#pragma once
#include <limits>

#include "core/tensor.h"

namespace longhand {

/// The steps of Sampler::draw (eval/sampling.h) for the rows of a batch. Everything is on one GPU and stays where it is, so that a draw can
/// be part of a recorded graph.
struct NextToken {
  Tensor logits;  // [B, >= V] f32
  Tensor never;   // [V] u8: not 0 where an id is not to be produced; its length is the vocabulary
  Tensor seen;    // [B, V] u8: not 0 where the row has the id already; undefined without a penalty. The drawn id joins
  double repetition_penalty = 1, temperature = 1;
  int64_t top_k = 0;
  double top_p = 1, min_p = 0;
  Tensor key;       // [B] i64: the bits of philox_key(philox_key(seed, hash_name("sampling")), row); undefined at temperature 0
  Tensor position;  // [B] i64: of the token before; goes up by one, then keys the draw
  Tensor ids;       // [B] i32: receives the drawn ids, or one of the numbers below
};
constexpr int32_t kNotANumber = -1;       // a logit is NaN or +inf
constexpr int32_t kNothingPossible = -2;  // every logit is -inf

/// order   sums are of whole numbers, exp(logit - largest) in units of 2^-40 at least: the same bits in any order, on every GPU
/// agrees  with Sampler::draw but where a sum of probabilities comes within 1e-5 of a border, which is then on either side
/// limits  V below 2^22
/// errors  ShapeError, DtypeError, DeviceError (there is no CPU form: Sampler::draw is it); ValueError beyond the limit
void next_token(const NextToken&);

void next_token_cuda(const NextToken&);

}  // namespace longhand
