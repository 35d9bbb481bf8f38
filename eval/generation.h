// Text out of a model: a prompt is read in chunks at constant memory, then one token follows the other from the carried state.
//
//   Generation first = generate(model, {tokens_of("Once upon")}, {.max_tokens = 20, .sampling = {.temperature = 0.8}});
//   Generation more = generate(model, {}, {.max_tokens = 20}, first.state);                       // goes on where the first one stopped
//   Generation answer = generate(model, {question_1, question_2}, {.max_tokens = 20}, book.state);  // one state, many prompts
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "eval/generation_state.h"
#include "eval/sampling.h"
#include "models/language_model.h"

namespace longhand {

/// What one sequence has produced so far.
struct GeneratedRow {
  std::vector<int32_t> tokens;         // in order; the end-of-text token is among them when it was drawn
  std::string text;                    // of the tokens, as far as it is certain: valid UTF-8, without the end of text and the stop string
  StopReason stop = StopReason::none;  // none while it runs
  int64_t prompt_tokens = 0;           // tokens that this call was given for it
  double decode_seconds = 0;           // from the first step of its batch to its last token
};

struct GenerationOptions {
  int64_t max_tokens = 128;  // of each sequence; 0 reads the prompts and draws nothing
  SamplingOptions sampling = {};
  int64_t chunk = 2048;                     // tokens of a prompt in one forward; the state is carried from chunk to chunk
  int64_t batch = 16;                       // sequences at once
  std::optional<int32_t> end_of_text = {};  // drawn, it ends a sequence; also what an empty prompt without a state begins with
  std::vector<std::string> stop = {};       // texts that end a sequence (needs the tokenizer)
  const Tokenizer* tokenizer = nullptr;     // for text; ids that it does not have are never drawn
  bool keep_state = true;                   // return the state; without it text that was held back is given out at the end of a row

  /// After each token; the row's text only grows. The call for the last token has its stop reason set; a row that ends as interrupted, or
  /// without a token, is seen in the result only.
  std::function<void(std::size_t row, const GeneratedRow& so_far)> on_token = {};
  /// Asked between chunks and between tokens; true ends every sequence as interrupted.
  std::function<bool()> should_stop = {};
};

struct GenerationSpeed {
  int64_t prefill_tokens = 0, decode_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
  double prefill_tokens_per_s() const { return prefill_seconds > 0 ? static_cast<double>(prefill_tokens) / prefill_seconds : 0; }
  double decode_tokens_per_s() const { return decode_seconds > 0 ? static_cast<double>(decode_tokens) / decode_seconds : 0; }
};

struct Generation {
  std::vector<GeneratedRow> rows;  // in the order of the prompts
  GenerationState state;           // to go on from; absent without keep_state
  GenerationSpeed speed;
};

/// Continues every prompt.
///   prefill  every token but the last goes through the model in chunks; no logits are computed
///   step     the last token of each running sequence goes in, logits come out, the next token is drawn (see Sampler)
/// prompts  token ids. From a state of R rows: R prompts, one prompt for all rows, any number of prompts for R = 1, or none: every sequence
///          goes on, except those that ended by themselves
/// from     absent: sequences start from the zero state
/// holds    rows do not mix and no padding enters a state: prompts of equal length are read together, others apart, and a row that
///          has ended leaves the batch. Draws are keyed by (seed, row, position in the sequence). Stopping anywhere and going on from
///          the state (same options, without prompts, the rest of max_tokens) gives the same bits as not stopping
/// memory   one chunk of prompts, one step, one state per running row; the state of every row with keep_state
/// errors   ValueError for an option out of range, an empty prompt without end_of_text, a token outside the vocabulary, a stop
///          string without a tokenizer, a state of another tokenizer; ShapeError for a state that does not fit; those of Sampler::draw
Generation generate(const LanguageModel& model, const std::vector<std::vector<int32_t>>& prompts, const GenerationOptions& options,
                    const GenerationState& from = {});

}  // namespace longhand
