// Argument checks, and what many rows take instead; see token_step.h. There is no CPU form: a CPU's decoding is bound by its weights, not
// by launches.
#include "ops/token_step/token_step.h"

#include "core/error.h"
#include "core/op_ledger.h"
#include "core/op_scope.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/common/gemm.h"
#include "ops/gated_rmsnorm/gated_rmsnorm.h"
#include "ops/rmsnorm/rmsnorm.h"

namespace longhand {
namespace {

[[noreturn]] void refuse(const char* op, const char* what, const Tensor& t, const std::string& expected) {
  throw ShapeError(std::string(op) + ": " + what + " does not fit",
                   {{what, t.defined() ? t.describe() : "undefined"}, {"expected", expected}});
}

void require(const char* op, const char* what, const Tensor& t, const Shape& shape, Dtype dtype, const Device& device) {
  const std::string expected = shape.str() + " " + name_of(dtype);
  if (!t.defined() || !(t.shape() == shape)) refuse(op, what, t, expected);
  if (t.dtype() != dtype)
    throw DtypeError(std::string(op) + ": " + what + " has the wrong dtype", {{what, t.describe()}, {"expected", expected}});
  if (!(t.device() == device)) throw DeviceError(std::string(op) + ": tensors are on different devices", {{what, t.describe()}});
}

void require_contiguous(const char* op, std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  for (const auto& [what, t] : tensors)
    if (t->defined() && !t->is_contiguous())
      throw ShapeError(std::string(op) + ": " + what + " must be contiguous", {{what, t->describe()}});
}

void require_matrix(const char* op, const Tensor& weight) {
  if (!weight.defined() || weight.rank() != 2) refuse(op, "weight", weight, "[out, in]");
  if (weight.dtype() != Dtype::f32 && weight.dtype() != Dtype::bf16)
    throw DtypeError(std::string(op) + ": weight must be f32 or bf16", {{"weight", weight.describe()}});
  if (weight.dim(1) % (16 / size_of(weight.dtype())) != 0)
    throw ShapeError(std::string(op) + ": rows of weight must be whole packs of 16 bytes", {{"weight", weight.describe()}});
}

void require_float(const char* op, const char* what, const Tensor& t) {
  if (t.dtype() != Dtype::f32 && t.dtype() != Dtype::bf16) throw DtypeError(std::string(op) + ": f32 or bf16 only", {{what, t.describe()}});
}

void require_window(const char* op, const Tensor& window, const Tensor& now, int64_t B) {
  if (window.rank() != 3 || window.dim(0) != B) refuse(op, "window", window, "[B, W-1, C]");
  require(op, "now", now, {B, window.dim(2)}, window.dtype(), window.device());
  require_contiguous(op, {{"window", &window}});
}

// What a kernel moves at least, for the ledger: each of these once.
void note(std::initializer_list<const Tensor*> moved) {
  double bytes = 0;
  for (const Tensor* t : moved)
    if (t->defined()) bytes += static_cast<double>(t->numel() * size_of(t->dtype()));
  OpLedger::note(bytes, 0);
}

// Whether a kernel for few rows takes this product; `floats_ahead` is what it holds beside it.
bool few_rows_fit(const Tensor& weight, int64_t rows, int64_t floats_ahead) {
  bool (*const fit)(const Tensor&, int64_t, int64_t) = LONGHAND_CUDA_IMPL(few_rows_fit_cuda);
  return rows <= kTokenStepRows && fit(weight, rows, floats_ahead);
}

template <class F>
F* on_gpu(const char* op, const Device& device, F* cuda) {
  if (!device.is_cuda() || cuda == nullptr)
    throw DeviceError(std::string(op) + ": only on a GPU", {{"device", device.name()}, {"try", "LanguageModel::forward of one token"}});
  return cuda;
}

}  // namespace

Tensor norm_projection(const NormProjection& p) {
  const OpScope op("norm_projection", {&p.residual, &p.weight});
  if (!p.residual.defined() || p.residual.rank() != 2) refuse("norm_projection", "residual", p.residual, "[B, D]");
  const int64_t B = p.residual.dim(0), D = p.residual.dim(1);
  const Device& device = p.residual.device();
  require_matrix("norm_projection", p.weight);
  const int64_t R = p.weight.dim(0);
  require("norm_projection", "residual", p.residual, {B, D}, Dtype::f32, device);
  require("norm_projection", "norm", p.norm, {D}, Dtype::f32, device);
  require("norm_projection", "weight", p.weight, {R, D}, p.weight.dtype(), device);
  if (p.branch) require("norm_projection", "branch", p.branch, {B, D}, p.weight.dtype(), device);
  require("norm_projection", "out", p.out, {B, R}, p.out.defined() && p.out.dtype() == Dtype::f32 ? Dtype::f32 : p.weight.dtype(), device);
  require_contiguous("norm_projection",
                     {{"residual", &p.residual}, {"branch", &p.branch}, {"norm", &p.norm}, {"weight", &p.weight}, {"out", &p.out}});
  auto* const few_rows =
      on_gpu<void(const NormProjection&, const Tensor&)>("norm_projection", device, LONGHAND_CUDA_IMPL(norm_projection_cuda));
  if (p.window) require_window("norm_projection", p.window, p.now, B);
  if (!few_rows_fit(p.weight, B, D)) {
    if (p.window) shift_window(p.window, p.now);
    const auto normed = add_rmsnorm(p.branch ? Variable(p.branch) : Variable(), p.residual, p.norm, p.eps, p.weight.dtype());
    gemm(false, normed.y.value(), true, p.weight, p.out);
    return normed.residual.value();
  }
  Tensor sum = p.branch ? Tensor::empty(device, Dtype::f32, {B, D}) : p.residual;  // other blocks still read residual
  few_rows(p, sum);
  note({&p.residual, &p.branch, &p.norm, &p.weight, &sum, &p.out, &p.window, &p.window, &p.now});
  return sum;
}

bool mamba1_token_fits(int64_t d_state, int64_t rank) {
  return d_state % 4 == 0 && d_state <= 64 && rank <= 320;
}

void mamba1_token(const Mamba1Token& p) {
  const OpScope op("mamba1_token", {&p.x, &p.state});
  const char* name = "mamba1_token";
  if (!p.state.defined() || p.state.rank() != 3) refuse(name, "state", p.state, "[B, E, N]");
  if (!p.dt_weight.defined() || p.dt_weight.rank() != 2) refuse(name, "dt_weight", p.dt_weight, "[E, rank]");
  if (!p.x.defined()) refuse(name, "x", p.x, "[B, E]");
  const int64_t B = p.state.dim(0), E = p.state.dim(1), N = p.state.dim(2), rank = p.dt_weight.dim(1);
  const Device& device = p.state.device();
  if (!mamba1_token_fits(N, rank))
    throw ValueError("mamba1_token: sizes beyond the limits", {{"state", p.state.describe()},
                                                               {"dt_weight", p.dt_weight.describe()},
                                                               {"expected", "N a multiple of 4 and at most 64, rank at most 320"}});
  require_float(name, "x", p.x);
  require(name, "x", p.x, {B, E}, p.x.dtype(), device);
  require(name, "selected", p.selected, {B, rank + 2 * N}, p.x.dtype(), device);
  require(name, "dt_weight", p.dt_weight, {E, rank}, p.x.dtype(), device);
  require(name, "A_log", p.A_log, {E, N}, Dtype::f32, device);
  require(name, "D_skip", p.D_skip, {E}, Dtype::f32, device);
  require(name, "dt_bias", p.dt_bias, {E}, Dtype::f32, device);
  require(name, "state", p.state, {B, E, N}, Dtype::f32, device);
  require(name, "y", p.y, {B, E}, p.x.dtype(), device);
  require_contiguous(
      name, {{"x", &p.x}, {"selected", &p.selected}, {"dt_weight", &p.dt_weight}, {"A_log", &p.A_log}, {"state", &p.state}, {"y", &p.y}});
  on_gpu<void(const Mamba1Token&)>(name, device, LONGHAND_CUDA_IMPL(mamba1_token_cuda))(p);
  note({&p.x, &p.selected, &p.dt_weight, &p.A_log, &p.D_skip, &p.dt_bias, &p.state, &p.state, &p.y});
}

bool gla_token_fits(int64_t Dk, int64_t Dv, int64_t rank) {
  return Dk <= 256 && Dv % 4 == 0 && Dk * rank % 8 == 0 && Dk * rank <= 16384;
}

void gla_token(const GlaToken& p) {
  const OpScope op("gla_token", {&p.q, &p.state});
  const char* name = "gla_token";
  if (!p.state.defined() || p.state.rank() != 4) refuse(name, "state", p.state, "[B, H, Dk, Dv]");
  if (!p.gate_weight.defined() || p.gate_weight.rank() != 2) refuse(name, "gate_weight", p.gate_weight, "[H Dk, rank]");
  if (!p.q.defined() || p.q.rank() != 2) refuse(name, "q", p.q, "[B, H Dk]");
  const int64_t B = p.state.dim(0), H = p.state.dim(1), Dk = p.state.dim(2), Dv = p.state.dim(3), rank = p.gate_weight.dim(1);
  const Device& device = p.state.device();
  const Dtype dtype = p.q.dtype();
  if (!gla_token_fits(Dk, Dv, rank) || p.gate_normalizer <= 0)
    throw ValueError("gla_token: sizes beyond the limits",
                     {{"state", p.state.describe()},
                      {"gate_weight", p.gate_weight.describe()},
                      {"expected", "Dk at most 256, Dk rank a multiple of 8 and at most 16384, Dv a multiple of 4, a normalizer above 0"}});
  require_float(name, "q", p.q);
  require(name, "q", p.q, {B, H * Dk}, dtype, device);
  require(name, "k", p.k, {B, H * Dk}, dtype, device);
  require(name, "v", p.v, {B, H * Dv}, dtype, device);
  require(name, "gate_input", p.gate_input, {B, rank}, dtype, device);
  require(name, "gate_weight", p.gate_weight, {H * Dk, rank}, dtype, device);
  require(name, "gate_bias", p.gate_bias, {H * Dk}, Dtype::f32, device);
  require(name, "state", p.state, {B, H, Dk, Dv}, Dtype::f32, device);
  require(name, "y", p.y, {B, H * Dv}, dtype, device);
  require_contiguous(name, {{"gate_weight", &p.gate_weight}, {"gate_bias", &p.gate_bias}, {"state", &p.state}, {"y", &p.y}});
  for (const auto& [what, t] : {std::pair{"k", &p.k}, {"v", &p.v}, {"gate_input", &p.gate_input}})
    if (B > 1 && t->stride(0) != p.q.stride(0))
      throw ShapeError("gla_token: rows of q, k, v and gate_input must have one stride", {{"q", p.q.describe()}, {what, t->describe()}});
  on_gpu<void(const GlaToken&)>(name, device, LONGHAND_CUDA_IMPL(gla_token_cuda))(p);
  note({&p.q, &p.k, &p.v, &p.gate_input, &p.gate_weight, &p.gate_bias, &p.state, &p.state, &p.y});
}

bool mamba2_token_fits(int64_t headdim, int64_t d_state) {
  return headdim % 16 == 0 && d_state % 4 == 0 && d_state <= 256;
}

void mamba2_token(const Mamba2Token& p) {
  const OpScope op("mamba2_token", {&p.projected, &p.state});
  const char* name = "mamba2_token";
  if (!p.state.defined() || p.state.rank() != 4) refuse(name, "state", p.state, "[B, H, P, N]");
  if (!p.projected.defined() || p.projected.rank() != 2) refuse(name, "projected", p.projected, "[B, projection]");
  if (!p.conv_weight.defined() || p.conv_weight.rank() != 3) refuse(name, "conv_weight", p.conv_weight, "[C, 1, W]");
  const int64_t B = p.state.dim(0), H = p.state.dim(1), P = p.state.dim(2), N = p.state.dim(3), W = p.conv_weight.dim(2);
  const int64_t inner = H * P, C = inner + 2 * p.groups * N;
  const Dtype dtype = p.projected.dtype();
  const Device& device = p.projected.device();
  if (!mamba2_token_fits(P, N) || W < 1 || W > 8 || p.groups < 1 || H % p.groups != 0)
    throw ValueError("mamba2_token: sizes beyond the limits",
                     {{"state", p.state.describe()},
                      {"conv_weight", p.conv_weight.describe()},
                      {"groups", std::to_string(p.groups)},
                      {"expected", "P a multiple of 16, N a multiple of 4 and at most 256, W at most 8"}});
  if (dtype != Dtype::f32 && dtype != Dtype::bf16)
    throw DtypeError("mamba2_token: f32 or bf16 only", {{"projected", p.projected.describe()}});
  require(name, "projected", p.projected, {B, inner + C + H}, dtype, device);
  require(name, "conv_weight", p.conv_weight, {C, 1, W}, Dtype::f32, device);
  if (p.conv_bias) require(name, "conv_bias", p.conv_bias, {C}, Dtype::f32, device);
  require(name, "window", p.window, {B, W - 1, C}, dtype, device);
  require(name, "A_log", p.A_log, {H}, Dtype::f32, device);
  require(name, "dt_bias", p.dt_bias, {H}, Dtype::f32, device);
  require(name, "D_skip", p.D_skip, p.D_skip.defined() && p.D_skip.rank() == 2 ? Shape{H, P} : Shape{H}, Dtype::f32, device);
  require(name, "state", p.state, {B, H, P, N}, Dtype::f32, device);
  require(name, "y", p.y, {B, inner}, p.gate ? Dtype::f32 : dtype, device);
  require_contiguous(
      name, {{"projected", &p.projected}, {"conv_weight", &p.conv_weight}, {"window", &p.window}, {"state", &p.state}, {"y", &p.y}});
  on_gpu<void(const Mamba2Token&)>(name, device, LONGHAND_CUDA_IMPL(mamba2_token_cuda))(p);
  note({&p.projected, &p.conv_weight, &p.conv_bias, &p.window, &p.A_log, &p.D_skip, &p.dt_bias, &p.state, &p.state, &p.y});
}

void shift_window(const Tensor& window, const Tensor& now) {
  const OpScope op("shift_window", {&window});
  if (!window.defined() || window.rank() != 3) refuse("shift_window", "window", window, "[B, W-1, C]");
  require("shift_window", "now", now, {window.dim(0), window.dim(2)}, window.dtype(), window.device());
  require_contiguous("shift_window", {{"window", &window}});
  on_gpu<void(const Tensor&, const Tensor&)>("shift_window", window.device(), LONGHAND_CUDA_IMPL(shift_window_cuda))(window, now);
}

void gated_projection(const GatedProjection& p) {
  const OpScope op("gated_projection", {&p.y, &p.weight});
  const char* name = "gated_projection";
  if (!p.y.defined() || p.y.rank() != 2) refuse(name, "y", p.y, "[B, E]");
  const int64_t B = p.y.dim(0), E = p.y.dim(1);
  const Device& device = p.y.device();
  require_matrix(name, p.weight);
  const Dtype dtype = p.weight.dtype();
  if (p.groups < 1 || E % (4 * p.groups) != 0)
    throw ValueError("gated_projection: the width of a group is no multiple of four",
                     {{"y", p.y.describe()}, {"groups", std::to_string(p.groups)}});
  require(name, "y", p.y, {B, E}, dtype, device);
  require(name, "z", p.z, {B, E}, dtype, device);
  const bool shared_norm = p.norm && p.norm.rank() == 1 && p.norm.dim(0) == E / p.groups;
  if (p.norm) require(name, "norm", p.norm, {shared_norm ? E / p.groups : E}, Dtype::f32, device);
  require(name, "weight", p.weight, {p.weight.dim(0), E}, dtype, device);
  require(name, "out", p.out, {B, p.weight.dim(0)}, dtype, device);
  require_contiguous(name, {{"norm", &p.norm}, {"weight", &p.weight}, {"out", &p.out}});
  if (p.window) require_window(name, p.window, p.now, B);
  auto* const few_rows = on_gpu<void(const GatedProjection&)>(name, device, LONGHAND_CUDA_IMPL(gated_projection_cuda));
  if (few_rows_fit(p.weight, B, p.norm ? p.norm.dim(0) : 0)) {
    few_rows(p);
    return note({&p.y, &p.z, &p.norm, &p.weight, &p.out, &p.window, &p.window, &p.now});
  }
  if (p.window) shift_window(p.window, p.now);
  const Shape by_group{B, p.groups, E / p.groups};
  const bool apart = shared_norm && p.groups > 1;  // each group is a row of its own
  const Variable y = apart ? p.y.reshape(by_group) : p.y, z = apart ? p.z.reshape(by_group) : p.z;
  GatedRmsnormOptions options{.groups = apart ? 1 : p.groups, .norm_before_gate = p.norm_before_gate};
  if (p.norm) options.eps = p.eps;
  const Variable gated = gated_rmsnorm(y, z, p.norm, options);
  gemm(false, gated.value().reshape({B, E}), true, p.weight, p.out);
}

void convolved_projection(const ConvolvedProjection& p) {
  const OpScope op("convolved_projection", {&p.now, &p.weight});
  const char* name = "convolved_projection";
  if (!p.now.defined() || p.now.rank() != 2) refuse(name, "now", p.now, "[B, C]");
  if (!p.conv_weight.defined() || p.conv_weight.rank() != 3) refuse(name, "conv_weight", p.conv_weight, "[C, 1, W]");
  const int64_t B = p.now.dim(0), C = p.now.dim(1), W = p.conv_weight.dim(2);
  const Device& device = p.now.device();
  require_matrix(name, p.weight);
  const Dtype dtype = p.weight.dtype();
  if (W < 1) refuse(name, "conv_weight", p.conv_weight, "[C, 1, W], W at least 1");
  require(name, "now", p.now, {B, C}, dtype, device);
  require(name, "window", p.window, {B, W - 1, C}, dtype, device);
  require(name, "conv_weight", p.conv_weight, {C, 1, W}, Dtype::f32, device);
  if (p.conv_bias) require(name, "conv_bias", p.conv_bias, {C}, Dtype::f32, device);
  require(name, "weight", p.weight, {p.weight.dim(0), C}, dtype, device);
  require(name, "y", p.y, {B, C}, dtype, device);
  require(name, "out", p.out, {B, p.weight.dim(0)}, dtype, device);
  require_contiguous(name, {{"window", &p.window},
                            {"conv_weight", &p.conv_weight},
                            {"conv_bias", &p.conv_bias},
                            {"weight", &p.weight},
                            {"y", &p.y},
                            {"out", &p.out}});
  auto* const few_rows = on_gpu<void(const ConvolvedProjection&)>(name, device, LONGHAND_CUDA_IMPL(convolved_projection_cuda));
  if (few_rows_fit(p.weight, B, 0)) {
    few_rows(p);
    return note({&p.now, &p.window, &p.conv_weight, &p.conv_bias, &p.weight, &p.y, &p.out});
  }
  const auto conv = causal_conv1d_silu(p.now.reshape({B, 1, C}), p.conv_weight, p.conv_bias, p.window);
  copy(p.y, conv.y.value().reshape({B, C}));
  gemm(false, p.y, true, p.weight, p.out);
}

}  // namespace longhand
