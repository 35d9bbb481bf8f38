// See language_model.h.
#include "models/language_model.h"

#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "ops/common/gemm.h"
#include "ops/cross_entropy/cross_entropy.h"
#include "ops/embedding/embedding.h"
#include "ops/rmsnorm/rmsnorm.h"
#include "ops/token_step/token_step.h"

namespace longhand {
namespace {

// mixer.forward(x, h0, h_T), of which only x and h0 are kept.
Variable forward_to_be_run_again(const Mixer& mixer, const Variable& x, const LayerState& h0, LayerState& h_T) {
  std::vector<Variable> inputs{x};
  std::vector<std::string> given;
  for (const auto& [name, variable] : h0) {
    inputs.push_back(variable);
    given.push_back(name);
  }
  const auto left = std::make_shared<std::vector<std::string>>();  // names of the states after the last token
  const auto outputs = recomputed(inputs, [&mixer, given, left](const std::vector<Variable>& in) {
    LayerState begin, end;
    for (std::size_t i = 0; i < given.size(); ++i) begin[given[i]] = in[i + 1];
    std::vector<Variable> out{mixer.forward(in[0], begin, end)};
    left->clear();
    for (const auto& [name, variable] : end) {
      left->push_back(name);
      out.push_back(variable);
    }
    return out;
  });
  for (std::size_t i = 0; i < left->size(); ++i) h_T[(*left)[i]] = outputs[i + 1];
  return outputs[0];
}

}  // namespace

LanguageModel::LanguageModel(ModelConfig config) : config_(std::move(config)), family_(&model_family(config_.family)) {
  config_.complete();
  const int64_t vocab = config_.padded_vocab(), d = config_.d_model;
  embedding_ = parameters_.declare(family_->embedding_name, {vocab, d}, {.init = family_->embedding_init(config_)});
  for (int64_t i = 0; i < config_.n_layer; ++i) layers_.push_back(family_->make_layer(config_, i, parameters_));
  recompute_.resize(layers_.size(), Recompute::none);
  final_norm_ = parameters_.declare(family_->final_norm_name, {d}, small_parameter(init_constant(1)));
  head_ = config_.tie_embeddings ? embedding_ : parameters_.declare(family_->head_name, {vocab, d}, {.init = family_->head_init(config_)});
}

LanguageModel::LanguageModel(ModelConfig config, const Device& device, Dtype compute_dtype, Dtype master_dtype)
    : LanguageModel(std::move(config)) {
  device_ = device;
  parameters_.allocate(device, master_dtype, compute_dtype);
}

void LanguageModel::set_recompute(RecomputePlan plan) {
  if (plan.size() != layers_.size())
    throw ValueError("model: recomputation is planned for another number of layers",
                     {{"plan", text_of(plan)}, {"levels", std::to_string(plan.size())}, {"layers", std::to_string(layers_.size())}});
  recompute_ = std::move(plan);
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
    const RecomputeScope recompute(recompute_[i]);
    for (const Sublayer& sublayer : layers_[i]) {
      const LayerScope scope(sublayer.scope);
      auto normed = add_rmsnorm(branch, residual, sublayer.norm->variable, config_.norm_eps, compute_dtype());
      residual = normed.residual;
      const LayerState& begin = h0.absent() ? absent : h0.layers()[i];
      branch = recompute_[i] == Recompute::full ? forward_to_be_run_again(*sublayer.mixer, normed.y, begin, states[i])
                                                : sublayer.mixer->forward(normed.y, begin, states[i]);
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

bool LanguageModel::has_step(int64_t rows) const {
  if (!device_.is_cuda()) return false;
  for (const auto& sublayers : layers_)
    for (const Sublayer& sublayer : sublayers)
      if (!sublayer.mixer->has_step(rows, compute_dtype())) return false;
  return true;
}

Tensor LanguageModel::step(const Tensor& tokens, const RecurrentState& state) const {
  const NoGrad no_grad;
  const int64_t B = tokens.dim(0), d = config_.d_model;
  const Tensor first = embedding(tokens, embedding_->variable, Dtype::f32).value().reshape({B, d});
  Tensor residual = first, branch;
  for (std::size_t i = 0; i < layers_.size(); ++i)
    for (const Sublayer& sublayer : layers_[i]) {
      const LayerScope scope(sublayer.scope);
      const Tensor out = Tensor::empty(device_, compute_dtype(), {B, d});
      residual = sublayer.mixer->step({residual, branch, sublayer.norm->variable.value(), config_.norm_eps, out}, state.layers()[i]);
      branch = out;
    }
  const LayerScope scope("lm_head");
  const Tensor head = head_->variable.value();
  Tensor logits = Tensor::empty(device_, Dtype::f32, {B, head.dim(0)});
  (void)norm_projection({residual, branch, final_norm_->variable.value(), config_.norm_eps, head, logits});
  return logits;
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
