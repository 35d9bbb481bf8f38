// Where a generation stands, as a value: for every sequence the recurrent state, the tokens that the model has yet to read, and what the
// next draw depends on. Going on from it, in this process or from its file, gives the same bits as never having stopped.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "models/language_model.h"

namespace longhand {

enum class StopReason : uint8_t { none, max_tokens, end_of_text, stop_string, interrupted };
const char* name_of(StopReason reason);  // "max_tokens"

/// One sequence beside its recurrent state.
struct SequenceState {
  std::vector<int32_t> pending;        // the last tokens, not read by the model yet; the last drawn token is always among them
  int64_t read = 0;                    // tokens that the recurrent state has seen; draws are keyed by read + pending tokens
  std::vector<int32_t> seen;           // ids of the whole sequence, each once, ascending: what the repetition penalty looks at
  std::string held;                    // bytes of the last tokens that were not given out as text yet (see TextStream)
  StopReason stop = StopReason::none;  // why it ended; a sequence that ended by itself goes on only with a new prompt
  int64_t length() const { return read + static_cast<int64_t>(pending.size()); }
};

struct GenerationState {
  RecurrentState recurrent;  // one row per sequence
  std::vector<SequenceState> sequences;
  std::string tokenizer;  // vocabulary_fingerprint of the tokenizer of the tokens; "" when unknown
  std::string weights;    // fingerprint of the model's weights; "" when unknown

  bool absent() const { return sequences.empty(); }

  /// A safetensors file: "layers.3.ssm" and the other tensors of the state, for sequence i "rows.i.pending", "rows.i.seen", "rows.i.held",
  /// for all "rows.read" and "rows.stop"; the metadata name the model's family and sizes.
  void save(const std::string& path, const LanguageModel& model) const;

  /// Reads a state for `model`, onto its device; convolution windows take the model's compute type.
  /// errors   FileError naming the file and what is wrong: not a generation state, of a model of another family or size, a tensor that is
  ///          missing, unknown or of another shape, numbers that are not finite, ids outside the vocabulary
  static GenerationState load(const std::string& path, const LanguageModel& model);
};

/// The state with the tensors, shapes, dtypes and device of `model`.
/// errors   ShapeError naming tensor, expected and actual shape
RecurrentState fitted_to(const LanguageModel& model, const RecurrentState& state);

/// A few words of every parameter, hashed: equal for the same weights on any device, different after a step of training.
std::string weights_fingerprint(const LanguageModel& model);

}  // namespace longhand
