// Mamba-2: one state space duality (SSD) block per layer.
//   [z | x B C | dt] = X in_proj^T
//   [x | B | C]      = silu(conv1d(x B C))                                     window of d_conv - 1 inputs carried as "conv"
//   S[t] = exp(dt A) S[t-1] + dt x[t] B[t]^T,  y[t] = S[t] C[t] + D x[t]       state S carried as "ssm"
//   out  = norm(y, gated by silu(z)) out_proj^T
// source  Dao & Gu 2024, arXiv:2405.21060
#include <algorithm>
#include <cmath>
#include <limits>

#include "autograd/tape.h"
#include "core/error.h"
#include "core/philox.h"
#include "models/decay.h"
#include "models/mamba2/mamba2_layouts.h"
#include "models/mamba_backbone.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/gated_rmsnorm/gated_rmsnorm.h"
#include "ops/linear/linear.h"
#include "ops/ssd/ssd.h"
#include "ops/token_step/token_step.h"

namespace longhand::models::mamba2 {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr ModelOption kOptions[] = {
    {"d_state", 128, "N, state size per channel"},
    {"d_conv", 4, "W, width of the causal convolution"},
    {"expand", 2, "d_inner = expand * d_model"},
    {"headdim", 64, "P, channels per head"},
    {"ngroups", 1, "G, groups of B and C"},
    {"chunk_size", 256, "Q of the published configuration; the result does not depend on it"},
    {"bias", 0, "1: in_proj and out_proj have biases"},
    {"conv_bias", 1, "1: the convolution has a bias"},
    {"rmsnorm", 1, "0: only the gate, no norm before out_proj"},
    {"norm_before_gate", 0, "1: normalise, then gate"},
    {"norm_per_group", 1, "1: mean per group of d_inner / ngroups (state-spaces); 0: over d_inner (transformers)"},
    {"D_has_hdim", 0, "1: one D per channel instead of one per head"},
    {"dt_limit_min", 0, "lower clamp of dt after softplus"},
    {"dt_limit_max", kInfinity, "upper clamp of dt after softplus"},
    {"dt_min", 0.001, "initialisation: smallest dt"},
    {"dt_max", 0.1, "initialisation: largest dt"},
    {"dt_init_floor", 1e-4, "initialisation: floor of dt"},
    {"A_init_min", 1, "initialisation: smallest -A"},
    {"A_init_max", 16, "initialisation: largest -A"},
    {"conv_init", 0, "initialisation of the convolution: U(-c, c); 0: c = 1/sqrt(d_conv)"},
};

// The sizes of one block.
struct Sizes {
  int64_t d_model, d_inner, heads, headdim, groups, d_state, d_conv;
  int64_t conv_channels() const { return d_inner + 2 * groups * d_state; }
  int64_t projection() const { return d_inner + conv_channels() + heads; }  // z, x B C, dt
};

Sizes sizes_of(const ModelConfig& c) {
  const int64_t d_inner = c.count("expand") * c.d_model;
  return {c.d_model, d_inner, d_inner / c.count("headdim"), c.count("headdim"), c.count("ngroups"), c.count("d_state"), c.count("d_conv")};
}

void defaults(ModelConfig& c) {
  c.norm_eps = 1e-5;
  c.pad_vocab_size_multiple = 16;
  c.tie_embeddings = true;
}

void settle(ModelConfig& c) {
  if (c.option("ngroups") == 1) c.options["norm_per_group"] = 1;  // one group is all of d_inner
  require_sizes(c, {"d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size"});
  require_choices(c, {"bias", "conv_bias", "rmsnorm", "norm_before_gate", "norm_per_group", "D_has_hdim"});
  const Sizes s = sizes_of(c);
  require_option(c, s.d_conv <= 8, "d_conv over 8 is not supported", "d_conv");
  if (s.d_inner % s.headdim != 0)
    throw ConfigError("mamba2: headdim does not divide d_inner",
                      {{"headdim", std::to_string(s.headdim)}, {"d_inner", std::to_string(s.d_inner)}});
  if (s.heads % s.groups != 0)
    throw ConfigError("mamba2: ngroups does not divide the number of heads",
                      {{"ngroups", std::to_string(s.groups)}, {"heads", std::to_string(s.heads)}});
  require_option(c, c.option("dt_limit_min") >= 0, "dt_limit_min must be at least 0", "dt_limit_min");
  require_option(c, c.option("dt_limit_max") > c.option("dt_limit_min"), "dt_limit_max must be above dt_limit_min", "dt_limit_max");
  require_dt_options(c);
  require_option(c, c.option("A_init_min") > 0, "A_init_min must be above 0", "A_init_min");
  require_option(c, c.option("A_init_max") >= c.option("A_init_min") && std::isfinite(c.option("A_init_max")),
                 "A_init_max must be finite and at least A_init_min", "A_init_max");
  require_option(c, c.option("conv_init") >= 0 && std::isfinite(c.option("conv_init")), "conv_init must be at least 0", "conv_init");
}

class Mamba2Mixer final : public Mixer {
 public:
  Mamba2Mixer(const ModelConfig& config, const std::string& prefix, ParameterSet& parameters)
      : sizes_(sizes_of(config)),
        ssd_{.chunk_size = std::min<int64_t>(config.count("chunk_size"), kComputeChunk),
             .dt_min = config.option("dt_limit_min"),
             .dt_max = config.option("dt_limit_max")},
        norm_{.eps = config.norm_eps,
              .groups = config.flag("norm_per_group") ? sizes_.groups : 1,
              .norm_before_gate = config.flag("norm_before_gate")} {
    const Sizes& s = sizes_;
    const double conv_init = config.option("conv_init"), residual_scale = 1 / std::sqrt(static_cast<double>(config.n_layer));

    in_proj_ = parameters.declare(prefix + "in_proj.weight", {s.projection(), s.d_model}, {.init = init_fan_in(s.d_model)});
    conv_weight_ = parameters.declare(prefix + "conv1d.weight", {s.conv_channels(), 1, s.d_conv},
                                      small_parameter(conv_init > 0 ? init_uniform(-conv_init, conv_init) : init_fan_in(s.d_conv), true));
    if (config.flag("conv_bias"))
      conv_bias_ = parameters.declare(prefix + "conv1d.bias", {s.conv_channels()}, small_parameter(init_fan_in(s.d_conv)));
    dt_bias_ = parameters.declare(prefix + "dt_bias", {s.heads}, small_parameter(init_dt_bias(config)));
    A_log_ = parameters.declare(prefix + "A_log", {s.heads}, small_parameter(init_A_log(config)));
    D_ = parameters.declare(prefix + "D", config.flag("D_has_hdim") ? Shape{s.d_inner} : Shape{s.heads}, small_parameter(init_constant(1)));
    if (config.flag("rmsnorm")) norm_weight_ = parameters.declare(prefix + "norm.weight", {s.d_inner}, small_parameter(init_constant(1)));
    out_proj_ = parameters.declare(prefix + "out_proj.weight", {s.d_model, s.d_inner}, {.init = init_fan_in(s.d_inner, residual_scale)});
    if (config.flag("bias")) {
      in_bias_ = parameters.declare(prefix + "in_proj.bias", {s.projection()}, small_parameter(init_constant(0)));
      out_bias_ = parameters.declare(prefix + "out_proj.bias", {s.d_model}, small_parameter(init_constant(0)));
    }
  }

  Variable forward(const Variable& x, const LayerState& h0, LayerState& h_T) const override {
    const Sizes& s = sizes_;
    const int64_t B = x.value().dim(0), T = x.value().dim(1);
    const Variable projected = linear(x, in_proj_->variable, optional_variable(in_bias_));  // [B, T, projection]
    const auto parts = split(projected, {s.d_inner, s.conv_channels(), s.heads});           // z, x B C, dt
    const auto conv = causal_conv1d_silu(parts[1], conv_weight_->variable, optional_variable(conv_bias_), state_tensor(h0, "conv"));
    const auto xBC = split(conv.y, {s.d_inner, s.groups * s.d_state, s.groups * s.d_state});
    const Variable D_skip = D_->shape[0] == s.heads ? D_->variable : reshape(D_->variable, {s.heads, s.headdim});
    const auto scan = ssd(reshape(xBC[0], {B, T, s.heads, s.headdim}), parts[2], A_log_->variable,  //
                          reshape(xBC[1], {B, T, s.groups, s.d_state}), reshape(xBC[2], {B, T, s.groups, s.d_state}), D_skip,
                          dt_bias_->variable, state_tensor(h0, "ssm"), ssd_);
    DecayScope::observe([&] {
      return decay_of_steps(parts[2].value(), dt_bias_->variable.value(), A_log_->variable.value(), s.heads, ssd_.dt_min, ssd_.dt_max);
    });
    h_T["conv"] = conv.window;
    h_T["ssm"] = scan.h_T;
    const Variable gated = gated_rmsnorm(reshape(scan.y, {B, T, s.d_inner}), parts[0], optional_variable(norm_weight_), norm_);
    return linear(gated, out_proj_->variable, optional_variable(out_bias_));  // [B, T, d_model]
  }

  bool has_step(int64_t /*rows*/, Dtype compute) const override {
    const int64_t pack = 16 / size_of(compute);
    return in_bias_ == nullptr && mamba2_token_fits(sizes_.headdim, sizes_.d_state) && sizes_.d_model % pack == 0;
  }

  Tensor step(const Step& step, const LayerState& state) const override {
    const Sizes& s = sizes_;
    const int64_t B = step.residual.dim(0), C = s.conv_channels();
    const Tensor in_weight = in_proj_->variable.value(), out_weight = out_proj_->variable.value();
    const Tensor norm = norm_weight_ != nullptr ? norm_weight_->variable.value() : Tensor();
    const Tensor window = state_tensor(state, "conv").value();
    Tensor projected = Tensor::empty(in_weight.device(), in_weight.dtype(), {B, s.projection()});
    Tensor sum = norm_projection({step.residual, step.branch, step.norm, step.eps, in_weight, projected});
    const Tensor z = projected.slice(1, 0, s.d_inner), now = projected.slice(1, s.d_inner, s.d_inner + C);
    const bool gate_first = norm && norm_.groups == 1 && !norm_.norm_before_gate;  // then the recurrence's kernel does it
    const Tensor y = Tensor::empty(in_weight.device(), gate_first ? Dtype::f32 : in_weight.dtype(), {B, s.d_inner});
    const Tensor D = D_->variable.value();
    mamba2_token({.projected = projected,
                  .conv_weight = conv_weight_->variable.value(),
                  .conv_bias = optional_variable(conv_bias_).value(),
                  .window = window,
                  .A_log = A_log_->variable.value(),
                  .D_skip = D.dim(0) == s.heads ? D : D.reshape({s.heads, s.headdim}),
                  .dt_bias = dt_bias_->variable.value(),
                  .dt_min = ssd_.dt_min,
                  .dt_max = ssd_.dt_max,
                  .groups = s.groups,
                  .state = state_tensor(state, "ssm").value(),
                  .y = y,
                  .gate = gate_first});
    if (gate_first) (void)norm_projection({y, {}, norm, norm_.eps, out_weight, step.out, window, now});
    else gated_projection({y, z, norm, norm_.eps, norm_.groups, norm_.norm_before_gate, out_weight, step.out, window, now});
    return sum;
  }

  LayerState zero_state(int64_t rows, const Device& device, Dtype compute) const override {
    const Sizes& s = sizes_;
    const Dtype state_dtype = compute == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    return {{"ssm", Tensor::zeros(device, state_dtype, {rows, s.heads, s.headdim, s.d_state})},
            {"conv", Tensor::zeros(device, compute, {rows, s.d_conv - 1, s.conv_channels()})}};
  }

  double forward_flops_per_token() const override {
    const Sizes& s = sizes_;
    const double e = static_cast<double>(s.d_inner), GN = static_cast<double>(s.groups * s.d_state), N = static_cast<double>(s.d_state);
    const double Q = kFlopsChunk;  // counted for the published chunk, above-diagonal blocks skipped, whatever chunk a device uses
    const double projections = 2 * static_cast<double>(s.projection() * s.d_model + s.d_model * s.d_inner);
    return projections + GN * Q + e * (Q + 4 * N) + 2 * static_cast<double>(s.d_conv * s.conv_channels()) + 2 * e * N / Q;
  }

 private:
  static constexpr int64_t kComputeChunk = 64;
  static constexpr double kFlopsChunk = 256;

  static Initializer init_A_log(const ModelConfig& c) {
    return [low = c.option("A_init_min"), high = c.option("A_init_max")](uint64_t key, uint64_t i) {
      return std::log(low + (high - low) * philox_uniform(key, i));
    };
  }

  Sizes sizes_;
  SsdOptions ssd_;
  GatedRmsnormOptions norm_;
  Parameter *in_proj_, *conv_weight_, *conv_bias_ = nullptr, *dt_bias_, *A_log_, *D_, *norm_weight_ = nullptr, *out_proj_;
  Parameter *in_bias_ = nullptr, *out_bias_ = nullptr;
};

}  // namespace

extern const ModelFamily kFamily;
const ModelFamily kFamily{.name = "mamba2",
                          .options = kOptions,
                          .defaults = defaults,
                          .settle = settle,
                          .embedding_name = kMambaEmbedding,
                          .final_norm_name = kMambaFinalNorm,
                          .head_name = "lm_head.weight",
                          .embedding_init = init_mamba_embedding,
                          .head_init = init_mamba_head,
                          .make_layer = make_mamba_layer<Mamba2Mixer>,
                          .layouts = kLayouts};

}  // namespace longhand::models::mamba2
