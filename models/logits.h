// Everything that a model computes from given tokens, as named tensors: what one compares with another library, or studies.
#pragma once
#include <map>
#include <string>

#include "core/named_tensors.h"
#include "models/language_model.h"

namespace longhand {

struct LogitsOptions {
  bool gradients = false;  // of the loss by every parameter; needs labels
  int64_t chunk = 2048;    // positions of all rows together in one forward; the state is carried from chunk to chunk
};

/// Runs the model from the zero state.
///   loss = mean over the counted positions of -log softmax(logits[b,t])[labels[b,t]]        labels are not shifted: labels[b,t] is what
///                                                                                           should follow input_ids[b,0..t]
/// input    "input_ids" [B, T] i32 | i64 in [0, vocab_size); optionally "labels" [B, T] i32 | i64, the same range, or -100: not counted
/// returns  "logits" [B, T, V] f32, V the padded vocabulary, as the models' libraries return them; "final_state.<layer>.<tensor>";
///          with labels "loss" [] f32; with gradients "grad.<parameter>", named and shaped like the parameters, f32. All on the host
/// memory   beside the output one chunk; with gradients the activations of the whole input
/// errors   FileError naming input.path for a missing tensor; ShapeError, DtypeError; ValueError naming the index of an id out of range, or
///          when gradients are asked for without labels, or no label counts
std::map<std::string, Tensor> logits_and_loss(LanguageModel& model, const NamedTensors& input, const LogitsOptions& options = {});

}  // namespace longhand
