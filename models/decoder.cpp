// See decoder.h.
#include "models/decoder.h"

#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"

namespace longhand {

Decoder::Decoder(const LanguageModel& model, const RecurrentState& state, const DecoderOptions& options)
    : model_(model),
      state_(state.clone()),
      tokens_(Tensor::empty(model.device(), Dtype::i32, {state.rows(), 1})),
      to_tokens_(model.device().is_cuda() ? upload_to(tokens_) : nullptr),
      then_(options.then),
      joined_(model.has_step(state.rows()) && options.joined_kernels),
      graphs_(model.device().is_cuda()) {}

const Tensor& Decoder::step(std::span<const int32_t> tokens) {
  if (static_cast<int64_t>(tokens.size()) != tokens_.dim(0))
    throw ShapeError("decoder: one token a row is needed",
                     {{"tokens", std::to_string(tokens.size())}, {"rows", std::to_string(tokens_.dim(0))}});
  if (to_tokens_) to_tokens_->send(std::as_bytes(tokens));
  else copy(tokens_, Tensor::from(Device::cpu(), tokens_.shape(), std::vector<int32_t>(tokens.begin(), tokens.end())));
  const bool watched = ops_are_watched();
  if (graphs_ && warm_ && !watched && !graph_) {
    try {
      graph_ = record_graph(model_.device(), [this] { run(); });
    } catch (const Error&) {
      graphs_ = false;  // it goes on launch by launch, to the same bits
    }
  }
  if (graph_ && !watched) {
    graph_->replay();
  } else {
    run();
    warm_ = true;
  }
  return logits_;
}

void Decoder::run() {
  const NoGrad no_grad;
  if (joined_) {
    logits_ = model_.step(tokens_, state_);
    if (then_) then_(logits_);
    return;
  }
  auto out = model_.forward(tokens_, state_);
  const Tensor logits = model_.logits(out.hidden.value());
  logits_ = logits.reshape({logits.dim(0), logits.dim(-1)});
  if (then_) then_(logits_);
  if (!model_.device().is_cuda()) {
    state_ = out.state.detach();
    return;
  }
  for (std::size_t layer = 0; layer < state_.layers().size(); ++layer)
    for (const auto& [name, variable] : state_.layers()[layer]) copy(variable.value(), out.state.get(layer, name).value());
}

}  // namespace longhand
