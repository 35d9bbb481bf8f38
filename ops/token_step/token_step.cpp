// Argument checks; see token_step.h. There is no CPU form: a CPU's decoding is bound by its weights, not by launches.
#include "ops/token_step/token_step.h"

#include "core/error.h"
#include "core/op_scope.h"

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

void require_matrix(const char* op, const Tensor& weight, int64_t rows) {
  if (!weight.defined() || weight.rank() != 2) refuse(op, "weight", weight, "[out, in]");
  if (weight.dtype() != Dtype::f32 && weight.dtype() != Dtype::bf16)
    throw DtypeError(std::string(op) + ": weight must be f32 or bf16", {{"weight", weight.describe()}});
  if (weight.dim(1) % (16 / size_of(weight.dtype())) != 0)
    throw ShapeError(std::string(op) + ": rows of weight must be whole packs of 16 bytes", {{"weight", weight.describe()}});
  if (rows > kTokenStepRows)
    throw ValueError(std::string(op) + ": too many rows at once",
                     {{"rows", std::to_string(rows)}, {"limit", std::to_string(kTokenStepRows)}});
}

template <class F>
F* on_gpu(const char* op, const Device& device, F* cuda) {
  if (!device.is_cuda() || cuda == nullptr)
    throw DeviceError(std::string(op) + ": only on a GPU", {{"device", device.name()}, {"try", "LanguageModel::forward of one token"}});
  return cuda;
}

}  // namespace

void norm_projection(const NormProjection& p) {
  const OpScope op("norm_projection", {&p.residual, &p.weight});
  if (!p.residual.defined() || p.residual.rank() != 2) refuse("norm_projection", "residual", p.residual, "[B, D]");
  const int64_t B = p.residual.dim(0), D = p.residual.dim(1);
  const Device& device = p.residual.device();
  require_matrix("norm_projection", p.weight, B);
  const int64_t R = p.weight.dim(0);
  require("norm_projection", "residual", p.residual, {B, D}, Dtype::f32, device);
  require("norm_projection", "norm", p.norm, {D}, Dtype::f32, device);
  require("norm_projection", "weight", p.weight, {R, D}, p.weight.dtype(), device);
  require("norm_projection", "sum", p.sum, {B, D}, Dtype::f32, device);
  if (p.branch) require("norm_projection", "branch", p.branch, {B, D}, p.weight.dtype(), device);
  require("norm_projection", "out", p.out, {B, R}, p.out.defined() && p.out.dtype() == Dtype::f32 ? Dtype::f32 : p.weight.dtype(), device);
  require_contiguous(
      "norm_projection",
      {{"residual", &p.residual}, {"branch", &p.branch}, {"norm", &p.norm}, {"weight", &p.weight}, {"sum", &p.sum}, {"out", &p.out}});
  if (p.sum.same_storage(p.residual) && p.sum.offset() == p.residual.offset())
    throw ValueError("norm_projection: sum and residual are one tensor, which other blocks still read");
  on_gpu<void(const NormProjection&)>("norm_projection", device, LONGHAND_CUDA_IMPL(norm_projection_cuda))(p);
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
  require(name, "y", p.y, {B, inner}, dtype, device);
  require_contiguous(
      name, {{"projected", &p.projected}, {"conv_weight", &p.conv_weight}, {"window", &p.window}, {"state", &p.state}, {"y", &p.y}});
  on_gpu<void(const Mamba2Token&)>(name, device, LONGHAND_CUDA_IMPL(mamba2_token_cuda))(p);
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
  require_matrix(name, p.weight, B);
  const Dtype dtype = p.weight.dtype();
  require(name, "y", p.y, {B, E}, dtype, device);
  require(name, "z", p.z, {B, E}, dtype, device);
  if (p.norm) require(name, "norm", p.norm, {E}, Dtype::f32, device);
  require(name, "weight", p.weight, {p.weight.dim(0), E}, dtype, device);
  require(name, "out", p.out, {B, p.weight.dim(0)}, dtype, device);
  require_contiguous(name, {{"y", &p.y}, {"norm", &p.norm}, {"weight", &p.weight}, {"out", &p.out}, {"window", &p.window}});
  if (p.groups < 1 || E % p.groups != 0) throw ValueError("gated_projection: groups do not divide y", {{"y", p.y.describe()}});
  if (p.window) {
    if (p.window.rank() != 3 || p.window.dim(0) != B) refuse(name, "window", p.window, "[B, W-1, C]");
    require(name, "now", p.now, {B, p.window.dim(2)}, dtype, device);
  }
  on_gpu<void(const GatedProjection&)>(name, device, LONGHAND_CUDA_IMPL(gated_projection_cuda))(p);
}

}  // namespace longhand
