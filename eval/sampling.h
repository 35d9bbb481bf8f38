// From a row of logits to the next token: greedy, or drawn from a filtered distribution. docs/generation.md walks through the steps.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/tensor.h"

namespace longhand {

/// How a token is chosen. The steps are taken in the order of the fields, which is the order of the field's libraries; each sees what the
/// one before has left.
struct SamplingOptions {
  double repetition_penalty = 1;  // > 0; a token seen before: a logit above 0 is divided by it, one below 0 multiplied; 1: off
  double temperature = 1;         // >= 0; logits are divided by it; 0: the largest logit wins and nothing is drawn
  int64_t top_k = 0;              // >= 0; keep the k largest logits, and those equal to the last of them; 0: off
  double top_p = 1;               // in (0, 1]; keep the most probable tokens until their sum reaches top_p; 1: off
  double min_p = 0;               // in [0, 1]; keep tokens at least min_p times as probable as the most probable one; 0: off
  uint64_t seed = 0;              // of the draws
};

/// errors  ValueError naming the option, its value and what it may be
void require_sampling_options(const SamplingOptions& options);

/// Chooses tokens. Holds only scratch memory between calls: the choice depends on the arguments alone.
class Sampler {
 public:
  /// never    ids that are not to be produced, whatever their logit
  /// errors   those of require_sampling_options
  explicit Sampler(SamplingOptions options, std::vector<int32_t> never = {});

  /// The next token of one sequence.
  ///   penalise the tokens of `seen`; divide by the temperature; top-k; top-p; min-p; p = softmax of what is left
  ///   returns the first kept token, in ascending order of ids, at which the sum of p passes u = U(0, 1) keyed by (seed, row, position)
  ///   temperature 0: the largest logit; among equals the lowest id
  /// logits   [V] of the real vocabulary, without the rows that pad a head; -inf means impossible
  /// seen     ids of the sequence so far, in any order, each counted once however often it stands there; looked at only with a penalty
  /// returns  an id in [0, V)
  /// holds    the choice does not depend on other rows, on what was drawn before, or on the machine's threads; sums in f64
  /// errors   NumericError for a NaN or +inf (naming row, position and id), or when no token has a logit above -inf;
  ///          ValueError for an id in `seen` outside [0, V)
  int32_t draw(std::span<const float> logits, std::span<const int32_t> seen, uint64_t row, uint64_t position);

  const SamplingOptions& options() const { return options_; }
  const std::vector<int32_t>& never() const { return never_; }

 private:
  struct Candidate {
    double logit;  // after penalty and temperature
    int32_t id;
  };
  void keep_top_k();
  void keep_top_p();
  void keep_min_p();

  SamplingOptions options_;
  std::vector<int32_t> never_;
  std::vector<float> logits_;
  std::vector<uint8_t> penalised_;
  std::vector<Candidate> candidates_;
  std::vector<double> order_;
};

/// Sampler for all rows of a batch at once, on the GPU that has their logits: only ids come to the host.
class BatchSampler {
 public:
  struct Row {
    uint64_t index;                 // as Sampler::draw's row
    uint64_t position;              // of the last token that was read; the draw is for the next one
    std::span<const int32_t> seen;  // ids of the sequence so far; what is drawn joins them
  };
  /// errors  those of require_sampling_options; ValueError for an id in `seen` outside [0, vocab)
  BatchSampler(const Device& gpu, const SamplingOptions& options, const std::vector<int32_t>& never, int64_t vocab,
               std::span<const Row> rows);

  /// Queues the draw of every row's next token. Nothing is waited for: it can be part of a recorded graph.
  /// logits   [B, vocab or more] f32
  void queue(const Tensor& logits) const;

  /// What the last queued draw gave, waiting for it. In place of an id stands a number below 0 where Sampler::draw refuses the logits.
  std::vector<int32_t> ids() const { return ids_.to_vector<int32_t>(); }

 private:
  SamplingOptions options_;
  Tensor never_, seen_, key_, position_, ids_;  // next_token.h says what they hold
};

}  // namespace longhand
