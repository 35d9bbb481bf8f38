// Decoder: one token after the other, from a state that stays where it is. On a GPU a step is recorded as a graph and replayed, so that a
// token costs one launch instead of one for every kernel of every layer.
#pragma once
#include <functional>
#include <memory>
#include <span>

#include "core/device_graph.h"
#include "core/upload.h"
#include "models/language_model.h"

namespace longhand {

struct DecoderOptions {
  bool joined_kernels = true;  // on a GPU, where the model offers them: LanguageModel::step() instead of forward()

  /// Called with the logits of every step, to queue what comes behind them. On a GPU it is recorded with the step and no longer called:
  /// what it queues must read from device memory whatever changes.
  std::function<void(const Tensor& logits)> then = {};
};

class Decoder {
 public:
  /// state  of as many rows as are decoded together; copied
  Decoder(const LanguageModel& model, const RecurrentState& state, const DecoderOptions& options = {});

  /// Reads one token of every row.
  /// tokens   [B]
  /// returns  [B, padded vocabulary] f32 (f64), on the model's device, until the next step
  /// holds    the same bits as forward() and logits() of that token, or as step() where joined kernels are used; with a graph and without
  /// errors   ShapeError for another number of tokens
  const Tensor& step(std::span<const int32_t> tokens);

  /// Whether a step is LanguageModel::step() rather than forward().
  bool joined_kernels() const { return joined_; }

  /// After the last step. It changes with the next one: take a clone to keep it.
  const RecurrentState& state() const { return state_; }

 private:
  void run();  // tokens_, state_ -> logits_, state_

  const LanguageModel& model_;
  RecurrentState state_;
  Tensor tokens_, logits_;
  std::unique_ptr<Upload> to_tokens_;  // on a GPU
  std::unique_ptr<DeviceGraph> graph_;
  std::function<void(const Tensor&)> then_;
  bool joined_, graphs_, warm_ = false;
};

}  // namespace longhand
