// Mamba-1: one selective scan block per layer.
//   [x | z]           = X in_proj^T
//   u                 = silu(conv1d(x))                                        window of d_conv - 1 inputs carried as "conv"
//   [dt_low | B | C]  = u x_proj^T,  dt = softplus(dt_low dt_proj^T + bias)
//   h[t] = exp(dt A) h[t-1] + dt B[t] u[t],  y[t] = <C[t], h[t]> + D u[t]       state h carried as "ssm"
//   out  = (y * silu(z)) out_proj^T
// source  Gu & Dao 2023, arXiv:2312.00752
#include <cmath>

#include "autograd/tape.h"
#include "models/decay.h"
#include "models/mamba1/mamba1_layouts.h"
#include "models/mamba_backbone.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/linear/linear.h"
#include "ops/selective_scan/selective_scan.h"
#include "ops/token_step/token_step.h"

namespace longhand::models::mamba1 {
namespace {

constexpr ModelOption kOptions[] = {
    {"d_state", 16, "N, state size per channel"},
    {"d_conv", 4, "W, width of the causal convolution"},
    {"expand", 2, "d_inner = expand * d_model"},
    {"dt_rank", 0, "R, rank of the projection to dt; 0 becomes d_model / 16, rounded up"},
    {"bias", 0, "1: in_proj and out_proj have biases"},
    {"conv_bias", 1, "1: the convolution has a bias"},
    {"dt_init_constant", 0, "initialisation of dt_proj: 0: U(-s, s), 1: s, with s = dt_scale / sqrt(dt_rank)"},
    {"dt_scale", 1, "initialisation: scale of dt_proj"},
    {"A_init_scale", 1, "initialisation: A = -A_init_scale (1, 2, .. N); below 1 the state forgets more slowly"},
    {"dt_min", 0.001, "initialisation: smallest dt"},
    {"dt_max", 0.1, "initialisation: largest dt"},
    {"dt_init_floor", 1e-4, "initialisation: floor of dt"},
};

// The sizes of one block.
struct Sizes {
  int64_t d_model, d_inner, d_state, d_conv, dt_rank;
};

Sizes sizes_of(const ModelConfig& c) {
  return {c.d_model, c.count("expand") * c.d_model, c.count("d_state"), c.count("d_conv"), c.count("dt_rank")};
}

void defaults(ModelConfig& c) {
  c.norm_eps = 1e-5;
  c.pad_vocab_size_multiple = 8;
  c.tie_embeddings = true;
}

void settle(ModelConfig& c) {
  if (c.option("dt_rank") == 0) c.options["dt_rank"] = static_cast<double>((c.d_model + 15) / 16);
  require_sizes(c, {"d_state", "d_conv", "expand", "dt_rank"});
  require_choices(c, {"bias", "conv_bias", "dt_init_constant"});
  require_option(c, c.count("d_conv") <= 8, "d_conv over 8 is not supported", "d_conv");
  require_option(c, c.option("A_init_scale") > 0 && std::isfinite(c.option("A_init_scale")), "A_init_scale must be finite and above 0",
                 "A_init_scale");
  require_option(c, c.option("dt_scale") > 0 && std::isfinite(c.option("dt_scale")), "dt_scale must be finite and above 0", "dt_scale");
  require_dt_options(c);
}

class Mamba1Mixer final : public Mixer {
 public:
  Mamba1Mixer(const ModelConfig& config, const std::string& prefix, ParameterSet& parameters) : sizes_(sizes_of(config)) {
    const Sizes& s = sizes_;
    const double residual_scale = 1 / std::sqrt(static_cast<double>(config.n_layer));
    const double dt_bound = config.option("dt_scale") / std::sqrt(static_cast<double>(s.dt_rank));

    in_proj_ = parameters.declare(prefix + "in_proj.weight", {2 * s.d_inner, s.d_model}, {.init = init_fan_in(s.d_model)});
    conv_weight_ = parameters.declare(prefix + "conv1d.weight", {s.d_inner, 1, s.d_conv}, small_parameter(init_fan_in(s.d_conv), true));
    if (config.flag("conv_bias"))
      conv_bias_ = parameters.declare(prefix + "conv1d.bias", {s.d_inner}, small_parameter(init_fan_in(s.d_conv)));
    x_proj_ = parameters.declare(prefix + "x_proj.weight", {s.dt_rank + 2 * s.d_state, s.d_inner}, {.init = init_fan_in(s.d_inner)});
    dt_proj_ = parameters.declare(prefix + "dt_proj.weight", {s.d_inner, s.dt_rank},
                                  {.init = config.flag("dt_init_constant") ? init_constant(dt_bound) : init_uniform(-dt_bound, dt_bound)});
    dt_bias_ = parameters.declare(prefix + "dt_proj.bias", {s.d_inner}, small_parameter(init_dt_bias(config)));
    A_log_ =
        parameters.declare(prefix + "A_log", {s.d_inner, s.d_state}, small_parameter(init_A_log(s.d_state, config.option("A_init_scale"))));
    D_ = parameters.declare(prefix + "D", {s.d_inner}, small_parameter(init_constant(1)));
    out_proj_ = parameters.declare(prefix + "out_proj.weight", {s.d_model, s.d_inner}, {.init = init_fan_in(s.d_inner, residual_scale)});
    if (config.flag("bias")) {
      in_bias_ = parameters.declare(prefix + "in_proj.bias", {2 * s.d_inner}, small_parameter(init_constant(0)));
      out_bias_ = parameters.declare(prefix + "out_proj.bias", {s.d_model}, small_parameter(init_constant(0)));
    }
  }

  Variable forward(const Variable& x, const LayerState& h0, LayerState& h_T) const override {
    const Sizes& s = sizes_;
    const Variable projected = linear(x, in_proj_->variable, optional_variable(in_bias_));  // [B, T, 2 d_inner]
    const auto parts = split(projected, {s.d_inner, s.d_inner});                            // x, z
    const auto conv = causal_conv1d_silu(parts[0], conv_weight_->variable, optional_variable(conv_bias_), state_tensor(h0, "conv"));
    const auto selected = split(linear(conv.y, x_proj_->variable), {s.dt_rank, s.d_state, s.d_state});  // dt_low, B_t, C_t
    const Variable dt = linear(selected[0], dt_proj_->variable);  // [B, T, d_inner]; its bias is added in the scan, in f32
    const auto scan = selective_scan(conv.y, dt, A_log_->variable, selected[1], selected[2], D_->variable, parts[1], dt_bias_->variable,
                                     state_tensor(h0, "ssm"));
    DecayScope::observe([&] { return decay_of_steps(dt.value(), dt_bias_->variable.value(), A_log_->variable.value(), 1); });
    h_T["conv"] = conv.window;
    h_T["ssm"] = scan.h_T;
    return linear(scan.y, out_proj_->variable, optional_variable(out_bias_));  // [B, T, d_model]
  }

  bool has_step(int64_t /*rows*/, Dtype compute) const override {
    const int64_t pack = 16 / size_of(compute);
    return in_bias_ == nullptr && mamba1_token_fits(sizes_.d_state, sizes_.dt_rank) && sizes_.d_model % pack == 0 &&
           sizes_.d_inner % pack == 0;
  }

  Tensor step(const Step& step, const LayerState& state) const override {
    const Sizes& s = sizes_;
    const int64_t B = step.residual.dim(0);
    const Tensor in_weight = in_proj_->variable.value(), window = state_tensor(state, "conv").value();
    const auto empty = [&](int64_t width) { return Tensor::empty(in_weight.device(), in_weight.dtype(), {B, width}); };
    const Tensor projected = empty(2 * s.d_inner), mixed = empty(s.d_inner), selected = empty(s.dt_rank + 2 * s.d_state),
                 y = empty(s.d_inner);
    Tensor sum = norm_projection({step.residual, step.branch, step.norm, step.eps, in_weight, projected});
    const Tensor now = projected.slice(1, 0, s.d_inner), z = projected.slice(1, s.d_inner, 2 * s.d_inner);
    convolved_projection(
        {now, window, conv_weight_->variable.value(), optional_variable(conv_bias_).value(), x_proj_->variable.value(), mixed, selected});
    mamba1_token({.x = mixed,
                  .selected = selected,
                  .dt_weight = dt_proj_->variable.value(),
                  .A_log = A_log_->variable.value(),
                  .D_skip = D_->variable.value(),
                  .dt_bias = dt_bias_->variable.value(),
                  .state = state_tensor(state, "ssm").value(),
                  .y = y});
    gated_projection({y, z, {}, 0, 1, false, out_proj_->variable.value(), step.out, window, now});
    return sum;
  }

  LayerState zero_state(int64_t rows, const Device& device, Dtype compute) const override {
    const Sizes& s = sizes_;
    const Dtype state_dtype = compute == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    return {{"ssm", Tensor::zeros(device, state_dtype, {rows, s.d_inner, s.d_state})},
            {"conv", Tensor::zeros(device, compute, {rows, s.d_conv - 1, s.d_inner})}};
  }

  double forward_flops_per_token() const override {
    const Sizes& s = sizes_;
    const auto e = static_cast<double>(s.d_inner), N = static_cast<double>(s.d_state), R = static_cast<double>(s.dt_rank);
    const double projections = 2 * (3 * e * static_cast<double>(s.d_model) + (R + 2 * N) * e + R * e);
    return projections + 7 * e * N + 12 * e + 2 * static_cast<double>(s.d_conv) * e;  // an exponential counts as one
  }

 private:
  // A[c, n] = -scale (n + 1), the same for every channel c.
  static Initializer init_A_log(int64_t d_state, double scale) {
    return [N = static_cast<uint64_t>(d_state), scale](uint64_t, uint64_t i) { return std::log(scale * static_cast<double>(i % N + 1)); };
  }

  Sizes sizes_;
  Parameter *in_proj_, *conv_weight_, *conv_bias_ = nullptr, *x_proj_, *dt_proj_, *dt_bias_, *A_log_, *D_, *out_proj_;
  Parameter *in_bias_ = nullptr, *out_bias_ = nullptr;
};

}  // namespace

extern const ModelFamily kFamily;
const ModelFamily kFamily{.name = "mamba1",
                          .options = kOptions,
                          .defaults = defaults,
                          .settle = settle,
                          .embedding_name = kMambaEmbedding,
                          .final_norm_name = kMambaFinalNorm,
                          .head_name = "lm_head.weight",
                          .embedding_init = init_mamba_embedding,
                          .head_init = init_mamba_head,
                          .make_layer = make_mamba_layer<Mamba1Mixer>,
                          .layouts = kLayouts};

}  // namespace longhand::models::mamba1
