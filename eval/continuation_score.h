// How likely a model finds given continuations, and what it would have said instead.
#pragma once
#include <functional>
#include <vector>

#include "eval/token_rows.h"
#include "models/language_model.h"

namespace longhand {

struct ScoredRow {
  std::vector<int32_t> context;  // at least one token
  std::vector<int32_t> target;   // at least one token
};

struct ContinuationScore {
  double log_likelihood = 0;       // sum over the target of log softmax(logits)[token], in nats
  std::vector<int32_t> predicted;  // the largest logit at each place of the target; among equals the lowest id
  bool greedy = false;             // whether all of them are the target's
};

struct ContinuationOptions {
  int64_t chunk = 2048;
  std::function<void(int64_t tokens)> progress = {};  // after each chunk: tokens read by all rows together, padding left out
};

/// Teacher-forced scores of some rows, read together: context and target go in once, whatever their length. Rows are padded to the longest,
/// so rows of about one length belong together.
///   log softmax over all padded_vocab columns, in f64 from f32 logits
/// holds    rows do not mix
/// memory   of the device: one chunk of hidden values, the logits of at most 64 positions, one state per row, whatever the rows' length;
///          of the host: the padded tokens
/// errors   ValueError for a row without context or target, or a token outside the vocabulary; NumericError for a score that is not finite
std::vector<ContinuationScore> score_continuations(const LanguageModel& model, const std::vector<ScoredRow>& rows,
                                                   const ContinuationOptions& options = {});

}  // namespace longhand
