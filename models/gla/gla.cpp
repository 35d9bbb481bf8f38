// GLA: gated linear attention, then a position-wise network; two sublayers per layer.
//   q = X q_proj^T,  k = X k_proj^T,  v = X v_proj^T                             optionally through short convolutions, "conv_q", ...
//   g = max(logsigmoid((X gk_0^T) gk_1^T + b) / 16, clamp_min)                   log gates, never above 0
//   h[t] = diag(exp(g[t])) h[t-1] + k[t] v[t]^T,  o[t] = Dk^(-1/2) h[t]^T q[t]    per head; state h carried as "ssm"
//   out  = (rmsnorm(o) per head * silu(X g_proj^T)) o_proj^T
//   mlp  = (silu(X gate_proj^T) * X up_proj^T) down_proj^T
// source  Yang et al. 2023, arXiv:2312.06635
#include <cmath>
#include <limits>

#include "autograd/tape.h"
#include "core/error.h"
#include "models/decay.h"
#include "models/gla/gla_layouts.h"
#include "models/model_family.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/gated_rmsnorm/gated_rmsnorm.h"
#include "ops/gla/gla.h"
#include "ops/linear/linear.h"
#include "ops/rmsnorm/rmsnorm.h"
#include "ops/swiglu/swiglu.h"
#include "ops/token_step/token_step.h"

namespace longhand::models::gla {
namespace {

constexpr ModelOption kOptions[] = {
    {"num_heads", 4, "H, heads"},
    {"expand_k", 0.5, "H * Dk = expand_k * d_model, width of queries and keys"},
    {"expand_v", 1, "H * Dv = expand_v * d_model, width of values"},
    {"use_output_gate", 1, "0: the heads are only normalised, not gated"},
    {"gate_low_rank_dim", kPublishedGateRank, "rank of the projection to the gates of the state"},
    {"gate_logit_normalizer", kPublishedGateNormalizer, "the log gates are divided by this"},
    {"clamp_min", -std::numeric_limits<double>::infinity(), "lower limit of the log gates; -inf: none"},
    {"use_short_conv", 0, "1: q, k and v go through causal convolutions with silu"},
    {"conv_size", 4, "W, width of these convolutions"},
    {"hidden_ratio", 4, "sets the width of the position-wise network: 2/3 of hidden_ratio * d_model, rounded up to a multiple of 256"},
    {"intermediate_size", 0, "this width itself; 0 becomes what hidden_ratio sets"},
    {"initializer_range", 0.02, "initialisation: standard deviation of every matrix"},
    {"gate_bias_init", 0, "initialisation: bias of the logits of the gates; above 0 the state forgets more slowly"},
};

// The sizes of one attention.
struct Sizes {
  int64_t d_model, heads, Dk, Dv, rank, d_conv;
  int64_t keys() const { return heads * Dk; }
  int64_t values() const { return heads * Dv; }
};

int64_t share(const ModelConfig& c, const char* option) {
  return static_cast<int64_t>(static_cast<double>(c.d_model) * c.option(option));
}

Sizes sizes_of(const ModelConfig& c) {
  const int64_t heads = c.count("num_heads");
  return {c.d_model, heads, share(c, "expand_k") / heads, share(c, "expand_v") / heads, c.count("gate_low_rank_dim"), c.count("conv_size")};
}

double mlp_width(int64_t d_model, double hidden_ratio) {
  const double wanted = std::floor(static_cast<double>(d_model) * hidden_ratio * 2 / 3);
  return std::ceil(wanted / 256) * 256;
}

void defaults(ModelConfig& c) {
  c.norm_eps = 1e-6;
  c.pad_vocab_size_multiple = 1;
  c.tie_embeddings = false;
}

void settle(ModelConfig& c) {
  require_sizes(c, {"num_heads", "conv_size", "gate_low_rank_dim"});
  require_choices(c, {"use_output_gate", "use_short_conv"});
  require_option(c, c.count("conv_size") <= 8, "conv_size over 8 is not supported", "conv_size");
  for (const char* name : {"expand_k", "expand_v", "hidden_ratio", "gate_logit_normalizer"})
    require_option(c, c.option(name) > 0 && c.option(name) <= 65536, "a ratio must be above 0 and at most 65536", name);
  for (const char* name : {"expand_k", "expand_v"}) {
    const int64_t width = share(c, name);
    if (width < 1 || width % c.count("num_heads") != 0)
      throw ConfigError("gla: num_heads does not divide the width of a projection",
                        {{"option", name}, {"width", std::to_string(width)}, {"num_heads", std::to_string(c.count("num_heads"))}});
  }
  if (c.option("intermediate_size") == 0) c.options["intermediate_size"] = mlp_width(c.d_model, c.option("hidden_ratio"));
  require_sizes(c, {"intermediate_size"});
  require_option(c, c.option("clamp_min") <= 0, "clamp_min, a limit of logarithms of numbers below 1, must be at most 0", "clamp_min");
  require_option(c, std::isfinite(c.option("gate_bias_init")), "gate_bias_init must be finite", "gate_bias_init");
  require_option(c, c.option("initializer_range") >= 0 && std::isfinite(c.option("initializer_range")),
                 "initializer_range must be finite and at least 0", "initializer_range");
}

Initializer init_matrix(const ModelConfig& c) {
  return init_normal(c.option("initializer_range"));
}

class Attention final : public Mixer {
 public:
  Attention(const ModelConfig& config, const std::string& prefix, ParameterSet& parameters)
      : sizes_(sizes_of(config)),
        gla_{.gate = GlaOptions::Gate::logit,
             .gate_normalizer = config.option("gate_logit_normalizer"),
             .gate_min = config.option("clamp_min")},
        norm_{.eps = config.norm_eps, .groups = 1, .norm_before_gate = true} {
    const Sizes& s = sizes_;
    auto matrix = [&](const char* name, int64_t rows, int64_t columns) {
      return parameters.declare(prefix + name, {rows, columns}, {.init = init_matrix(config)});
    };
    auto convolution = [&](const char* name, int64_t channels) {
      return parameters.declare(prefix + name, {channels, 1, s.d_conv}, small_parameter(init_matrix(config), true));
    };
    q_proj_ = matrix("q_proj.weight", s.keys(), s.d_model);
    k_proj_ = matrix("k_proj.weight", s.keys(), s.d_model);
    v_proj_ = matrix("v_proj.weight", s.values(), s.d_model);
    gate_down_ = matrix("gk_proj.0.weight", s.rank, s.d_model);
    std::vector<Parameter*> of_input{q_proj_, k_proj_, v_proj_, gate_down_};
    if (config.flag("use_output_gate")) of_input.push_back(g_proj_ = matrix("g_proj.weight", s.values(), s.d_model));
    of_input_ = parameters.join(of_input);
    if (config.flag("use_short_conv")) {
      q_conv_ = convolution("q_conv1d.weight", s.keys());
      k_conv_ = convolution("k_conv1d.weight", s.keys());
      v_conv_ = convolution("v_conv1d.weight", s.values());
    }
    gate_up_ = matrix("gk_proj.1.weight", s.keys(), s.rank);
    gate_bias_ = parameters.declare(prefix + "gk_proj.1.bias", {s.keys()}, small_parameter(init_constant(config.option("gate_bias_init"))));
    norm_weight_ = parameters.declare(prefix + (g_proj_ != nullptr ? "g_norm_swish_gate.weight" : "g_norm.weight"), {s.Dv},
                                      small_parameter(init_constant(1)));
    o_proj_ = matrix("o_proj.weight", s.d_model, s.values());
  }

  Variable forward(const Variable& x, const LayerState& h0, LayerState& h_T) const override {
    const Sizes& s = sizes_;
    const int64_t B = x.value().dim(0), T = x.value().dim(1);
    const Shape key_heads{B, T, s.heads, s.Dk}, value_heads{B, T, s.heads, s.Dv};
    const std::vector<Variable> parts = project(x);  // q, k, v, input of the gates, and of the output gate where there is one
    auto convolved = [&](const Variable& y, const Parameter* convolution, const char* window) {
      if (convolution == nullptr) return y;
      const auto conv = causal_conv1d_silu(y, convolution->variable, {}, state_tensor(h0, window));
      h_T[window] = conv.window;
      return conv.y;
    };
    const Variable q = reshape(convolved(parts[0], q_conv_, "conv_q"), key_heads);
    const Variable k = reshape(convolved(parts[1], k_conv_, "conv_k"), key_heads);
    const Variable v = reshape(convolved(parts[2], v_conv_, "conv_v"), value_heads);
    const Variable gate = linear(parts[3], gate_up_->variable, gate_bias_->variable);  // logits [B, T, H * Dk]
    const auto mixed = longhand::gla(q, k, v, reshape(gate, key_heads), state_tensor(h0, "ssm"), gla_);
    DecayScope::observe([&] { return decay_of_gates(gate.value(), s.heads, gla_.gate_normalizer, gla_.gate_min); });
    h_T["ssm"] = mixed.h_T;
    const Variable heads = g_proj_ == nullptr
                               ? rmsnorm(mixed.o, norm_weight_->variable, norm_.eps)
                               : gated_rmsnorm(mixed.o, reshape(parts[4], value_heads), norm_weight_->variable, norm_);  // [B, T, H, Dv]
    return linear(reshape(heads, {B, T, s.values()}), o_proj_->variable);                                                // [B, T, d_model]
  }

  bool has_step(int64_t /*rows*/, Dtype compute) const override {
    const Sizes& s = sizes_;
    const int64_t pack = 16 / size_of(compute);
    return of_input_->variable && g_proj_ != nullptr && q_conv_ == nullptr && gla_token_fits(s.Dk, s.Dv, s.rank) && s.d_model % pack == 0 &&
           s.values() % pack == 0;
  }

  Tensor step(const Step& step, const LayerState& state) const override {
    const Sizes& s = sizes_;
    const int64_t B = step.residual.dim(0);
    const Tensor weight = of_input_->variable.value();
    const Tensor all = Tensor::empty(weight.device(), weight.dtype(), {B, weight.dim(0)}),
                 y = Tensor::empty(weight.device(), weight.dtype(), {B, s.values()});
    Tensor sum = norm_projection({step.residual, step.branch, step.norm, step.eps, weight, all});
    const auto parts = split(all, {s.keys(), s.keys(), s.values(), s.rank, s.values()});
    gla_token({.q = parts[0].value(),
               .k = parts[1].value(),
               .v = parts[2].value(),
               .gate_input = parts[3].value(),
               .gate_weight = gate_up_->variable.value(),
               .gate_bias = gate_bias_->variable.value(),
               .gate_normalizer = gla_.gate_normalizer,
               .gate_min = gla_.gate_min,
               .scale = 1 / std::sqrt(static_cast<double>(s.Dk)),
               .state = state_tensor(state, "ssm").value(),
               .y = y});
    gated_projection({y,
                      parts[4].value(),
                      norm_weight_->variable.value(),
                      norm_.eps,
                      s.heads,
                      norm_.norm_before_gate,
                      o_proj_->variable.value(),
                      step.out,
                      {},
                      {}});
    return sum;
  }

  LayerState zero_state(int64_t rows, const Device& device, Dtype compute) const override {
    const Sizes& s = sizes_;
    const Dtype state_dtype = compute == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    LayerState state{{"ssm", Tensor::zeros(device, state_dtype, {rows, s.heads, s.Dk, s.Dv})}};
    auto window = [&](const char* name, const Parameter* convolution) {
      if (convolution != nullptr) state[name] = Tensor::zeros(device, compute, {rows, s.d_conv - 1, convolution->shape[0]});
    };
    window("conv_q", q_conv_), window("conv_k", k_conv_), window("conv_v", v_conv_);
    return state;
  }

  double forward_flops_per_token() const override {
    const Sizes& s = sizes_;
    const auto d = static_cast<double>(s.d_model), K = static_cast<double>(s.keys()), V = static_cast<double>(s.values());
    const double C = kFlopsChunk, r = static_cast<double>(s.rank), outputs = g_proj_ != nullptr ? 3 : 2;  // v, o and g
    double flops = 2 * (2 * K * d + outputs * V * d + r * d + r * K);
    flops += C * (K + V) + 4 * K * static_cast<double>(s.Dv);
    if (q_conv_ != nullptr) flops += 2 * static_cast<double>(s.d_conv) * (2 * K + V);
    return flops;
  }

 private:
  static constexpr double kFlopsChunk = 64;  // counted for the published chunk, whatever chunk a device uses

  // Everything that is a product with x: one product where the weights lie one behind the other.
  std::vector<Variable> project(const Variable& x) const {
    const Sizes& s = sizes_;
    if (!of_input_->variable) {
      std::vector<Variable> parts;
      for (const Parameter* weight : of_input_->parts) parts.push_back(linear(x, weight->variable));
      return parts;
    }
    const Variable all = linear(x, of_input_->variable);
    return g_proj_ != nullptr ? split(all, {s.keys(), s.keys(), s.values(), s.rank, s.values()})
                              : split(all, {s.keys(), s.keys(), s.values(), s.rank});
  }

  Sizes sizes_;
  GlaOptions gla_;
  GatedRmsnormOptions norm_;
  Parameter *q_proj_, *k_proj_, *v_proj_, *gate_down_, *gate_up_, *gate_bias_, *g_proj_ = nullptr, *norm_weight_, *o_proj_;
  Parameter *q_conv_ = nullptr, *k_conv_ = nullptr, *v_conv_ = nullptr;
  JoinedParameters* of_input_;
};

class Mlp final : public Mixer {
 public:
  Mlp(const ModelConfig& config, const std::string& prefix, ParameterSet& parameters)
      : d_model_(config.d_model), width_(config.count("intermediate_size")) {
    gate_proj_ = parameters.declare(prefix + "gate_proj.weight", {width_, d_model_}, {.init = init_matrix(config)});
    up_proj_ = parameters.declare(prefix + "up_proj.weight", {width_, d_model_}, {.init = init_matrix(config)});
    gate_up_ = parameters.join({gate_proj_, up_proj_});
    down_proj_ = parameters.declare(prefix + "down_proj.weight", {d_model_, width_}, {.init = init_matrix(config)});
  }

  Variable forward(const Variable& x, const LayerState&, LayerState&) const override {
    if (!gate_up_->variable) return linear(swiglu(linear(x, gate_proj_->variable), linear(x, up_proj_->variable)), down_proj_->variable);
    return swiglu_mlp(x, gate_up_->variable, down_proj_->variable);
  }

  bool has_step(int64_t /*rows*/, Dtype compute) const override {
    const int64_t pack = 16 / size_of(compute);
    return gate_up_->variable && d_model_ % pack == 0 && width_ % pack == 0;
  }

  Tensor step(const Step& step, const LayerState&) const override {
    const Tensor weight = gate_up_->variable.value();
    const Tensor both = Tensor::empty(weight.device(), weight.dtype(), {step.residual.dim(0), 2 * width_});
    Tensor sum = norm_projection({step.residual, step.branch, step.norm, step.eps, weight, both});
    const Tensor gate = both.slice(1, 0, width_), up = both.slice(1, width_, 2 * width_);
    gated_projection({up, gate, {}, 0, 1, false, down_proj_->variable.value(), step.out, {}, {}});
    return sum;
  }

  LayerState zero_state(int64_t, const Device&, Dtype) const override { return {}; }
  double forward_flops_per_token() const override { return 6 * static_cast<double>(width_ * d_model_); }

 private:
  int64_t d_model_, width_;
  Parameter *gate_proj_, *up_proj_, *down_proj_;
  JoinedParameters* gate_up_;
};

std::vector<Sublayer> make_layer(const ModelConfig& config, int64_t layer, ParameterSet& parameters) {
  const std::string scope = "layers." + std::to_string(layer) + ".", prefix = "model." + scope;
  auto norm = [&](const char* name) { return parameters.declare(prefix + name, {config.d_model}, small_parameter(init_constant(1))); };
  std::vector<Sublayer> sublayers;
  Parameter* attention_norm = norm("attn_norm.weight");
  sublayers.push_back({scope + "attn", attention_norm, std::make_unique<Attention>(config, prefix + "attn.", parameters)});
  Parameter* mlp_norm = norm("mlp_norm.weight");
  sublayers.push_back({scope + "mlp", mlp_norm, std::make_unique<Mlp>(config, prefix + "mlp.", parameters)});
  return sublayers;
}

}  // namespace

extern const ModelFamily kFamily;
const ModelFamily kFamily{.name = "gla",
                          .options = kOptions,
                          .defaults = defaults,
                          .settle = settle,
                          .embedding_name = "model.embeddings.weight",
                          .final_norm_name = "model.norm.weight",
                          .head_name = "lm_head.weight",
                          .embedding_init = init_matrix,
                          .head_init = init_matrix,
                          .make_layer = make_layer,
                          .layouts = kLayouts};

}  // namespace longhand::models::gla
