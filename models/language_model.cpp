// See language_model.h.
#include "models/language_model.h"

#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "ops/common/gemm.h"
#include "ops/cross_entropy/cross_entropy.h"
#include "ops/embedding/embedding.h"
#include "ops/rmsnorm/rmsnorm.h"

namespace longhand {

LanguageModel::LanguageModel(ModelConfig config) : config_(std::move(config)), family_(&model_family(config_.family)) {
  config_.complete();
  const int64_t vocab = config_.padded_vocab(), d = config_.d_model;
  embedding_ = parameters_.declare(family_->embedding_name, {vocab, d}, {.init = family_->embedding_init(config_)});
  for (int64_t i = 0; i < config_.n_layer; ++i) layers_.push_back(family_->make_layer(config_, i, parameters_));
  final_norm_ = parameters_.declare(family_->final_norm_name, {d}, small_parameter(init_constant(1)));
  head_ = config_.tie_embeddings ? embedding_ : parameters_.declare(family_->head_name, {vocab, d}, {.init = family_->head_init(config_)});
}

LanguageModel::LanguageModel(ModelConfig config, const Device& device, Dtype compute_dtype, Dtype master_dtype)
    : LanguageModel(std::move(config)) {
  device_ = device;
  parameters_.allocate(device, master_dtype, compute_dtype);
}

RecurrentState LanguageModel::zero_state(int64_t rows) const {
  std::vector<LayerState> layers;
  for (const auto& sublayers : layers_) {
    LayerState layer;
    for (const Sublayer& sublayer : sublayers) layer.merge(sublayer.mixer->zero_state(rows, device_, compute_dtype()));
    layers.push_back(std::move(layer));
  }
  return RecurrentState(std::move(layers));
}

LanguageModel::Forward LanguageModel::forward(const Tensor& tokens, const RecurrentState& h0) const {
  if (tokens.rank() != 2) throw ShapeError("model: tokens are [B, T]", {{"tokens", tokens.describe()}});
  if (!h0.absent() && (h0.layers().size() != layers_.size() || h0.rows() != tokens.dim(0)))
    throw ShapeError("model: the initial state does not fit",
                     {{"state", std::to_string(h0.layers().size()) + " layers, " + std::to_string(h0.rows()) + " rows"},
                      {"tokens", tokens.describe()},
                      {"expected", std::to_string(layers_.size()) + " layers, one row per row of tokens"}});
  Variable residual = embedding(tokens, embedding_->variable, wide_dtype());  // [B, T, d]
  Variable branch;                                                            // what the last sublayer adds; absent before the first
  std::vector<LayerState> states(layers_.size());
  const LayerState absent;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    for (const Sublayer& sublayer : layers_[i]) {
      const LayerScope scope(sublayer.scope);
      auto normed = add_rmsnorm(branch, residual, sublayer.norm->variable, config_.norm_eps, compute_dtype());
      residual = normed.residual;
      branch = sublayer.mixer->forward(normed.y, h0.absent() ? absent : h0.layers()[i], states[i]);
    }
    if (h0.absent()) continue;
    for (const auto& [name, variable] : h0.layers()[i])
      if (!states[i].contains(name))
        throw ValueError("model: the initial state has a tensor that no layer reads", {{"layer", std::to_string(i)}, {"tensor", name}});
  }
  const LayerScope scope("norm_f");
  auto normed = add_rmsnorm(branch, residual, final_norm_->variable, config_.norm_eps, compute_dtype());
  return {normed.y, RecurrentState(std::move(states))};
}

Tensor LanguageModel::logits(const Tensor& hidden) const {
  const LayerScope scope("lm_head");
  const Tensor head = head_->variable.value(), rows = as_matrix(hidden);  // [V, d_model], [R, d_model]
  const OpScope op("logits", {&hidden, &head});
  Shape shape = hidden.shape();
  shape[-1] = head.dim(0);
  const Tensor logits = Tensor::empty(device_, wide_dtype(), shape);
  gemm(false, rows, true, head, logits.reshape({rows.dim(0), head.dim(0)}));
  return record("logits", logits, {}, {}).value();  // a constant of the tape, looked at by LONGHAND_CHECK like every op's output
}

Tensor LanguageModel::token_loss(const Tensor& hidden, const Tensor& targets) const {
  const LayerScope scope("lm_head");
  const NoGrad no_grad;
  return linear_cross_entropy(hidden, head_->variable, targets, {}).token_loss;
}

LanguageModel::Loss LanguageModel::loss(const TokenBatch& batch, const RecurrentState& h0, double loss_scale) const {
  auto [hidden, state] = forward(batch.tokens, h0);
  const LayerScope scope("lm_head");
  auto result = linear_cross_entropy(hidden, head_->variable, batch.targets, batch.mask, {.loss_scale = loss_scale});
  return {result.loss, result.token_loss, std::move(state)};
}

double LanguageModel::forward_flops_per_token() const {
  double flops = 2.0 * static_cast<double>(config_.padded_vocab() * config_.d_model);
  for (const auto& sublayers : layers_)
    for (const Sublayer& sublayer : sublayers) flops += sublayer.mixer->forward_flops_per_token();
  return flops;
}

int64_t LanguageModel::non_embedding_parameter_count() const {
  return parameters_.count() - embedding_->shape.numel() - (head_ == embedding_ ? 0 : head_->shape.numel());
}

}  // namespace longhand
