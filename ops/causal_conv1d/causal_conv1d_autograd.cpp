// Argument checks and the tape node of causal_conv1d_silu.
#include "autograd/recompute.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/causal_conv1d/causal_conv1d_kernels.h"

namespace longhand {
namespace {

void require_args(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& window0) {
  const std::string op = "causal_conv1d_silu";
  if (!x.defined() || x.rank() != 3) throw ShapeError(op + ": x must be [B, T, C]", {{"x", x.defined() ? x.describe() : "undefined"}});
  const bool cuda = x.device().is_cuda();
  if (x.dtype() != Dtype::f32 && x.dtype() != (cuda ? Dtype::bf16 : Dtype::f64))
    throw DtypeError(op + ": x has a dtype that this device does not take",
                     {{"x", x.describe()}, {"expected", cuda ? "f32 or bf16" : "f32 or f64"}});
  if (x.dim(1) > kMaxConvTime)
    throw ShapeError(op + ": the sequence is too long, feed it in parts with the window",
                     {{"x", x.describe()}, {"limit", std::to_string(kMaxConvTime)}});
  const int64_t C = x.dim(2);
  if (!weight.defined() || weight.rank() != 3 || weight.dim(0) != C || weight.dim(1) != 1)
    throw ShapeError(op + ": weight does not match the channels of x", {{"weight", weight.defined() ? weight.describe() : "undefined"},
                                                                        {"x", x.describe()},
                                                                        {"expected", "weight [" + std::to_string(C) + ", 1, W]"}});
  const int64_t W = weight.dim(2);
  if (W < 1 || W > kMaxConvWidth) throw ValueError(op + ": the width must be 1 to 8", {{"weight", weight.describe()}});
  const Dtype sums = x.dtype() == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const auto require = [&](const char* what, const Tensor& t, const Shape& shape, Dtype dtype) {
    const std::string expected = shape.str() + " " + name_of(dtype);
    if (!(t.shape() == shape))
      throw ShapeError(op + ": " + what + " does not match x and weight",
                       {{what, t.describe()}, {"x", x.describe()}, {"expected", expected}});
    if (t.dtype() != dtype)
      throw DtypeError(op + ": " + what + " has the wrong dtype", {{what, t.describe()}, {"x", x.describe()}, {"expected", expected}});
    if (!(t.device() == x.device()))
      throw DeviceError(op + ": x and " + what + " are on different devices", {{what, t.describe()}, {"x", x.describe()}});
  };
  require("weight", weight, {C, 1, W}, sums);
  if (bias.defined()) require("bias", bias, {C}, sums);
  if (window0.defined()) require("window0", window0, {x.dim(0), W - 1, C}, x.dtype());
}

// Without a step there is nothing to convolve: the window passes through.
CausalConv1dOutput pass_window(const Tensor& y, const Tensor& window, const Variable& x, const Variable& weight, const Variable& bias,
                               const Variable& window0) {
  window0 ? copy(window, window0.value()) : fill(window, 0);
  auto outputs =
      record("causal_conv1d_silu", {y, window}, {x, weight, bias, window0}, [](BackwardCall& call) { call.set(3, call.grad(1)); });
  return {outputs[0], outputs[1]};
}

}  // namespace

CausalConv1dOutput causal_conv1d_silu(const Variable& x, const Variable& weight, const Variable& bias, const Variable& window0) {
  const OpScope op("causal_conv1d_silu", {&x.value(), &weight.value(), &bias.value(), &window0.value()});
  require_args(x.value(), weight.value(), bias.value(), window0.value());
  const Tensor in = x.value(), w = weight.value().contiguous(), b = bias.value(), start = window0.value();
  const Device device = in.device();
  const int64_t B = in.dim(0), C = in.dim(2), W = w.dim(2);
  const Tensor y = Tensor::empty(device, in.dtype(), in.shape());          // [B, T, C]
  const Tensor window = Tensor::empty(device, in.dtype(), {B, W - 1, C});  // [B, W-1, C]
  if (in.numel() == 0) return pass_window(y, window, x, weight, bias, window0);
  on_device(device, &causal_conv1d_fwd_cpu, LONGHAND_CUDA_IMPL(causal_conv1d_fwd_cuda))({in, w, b, start, y, window});

  const Kept kept_x(x);
  auto outputs = record("causal_conv1d_silu", {y, window}, {x, weight, bias, window0}, [kept_x, w, b, start](BackwardCall& call) {
    CausalConv1dBackward g{call.grad_or_zeros(0), call.grad(1), kept_x.get(), w, b, start, {}, {}, {}, {}};
    if (call.needs(0)) g.grad_x = call.buffer(0);
    if (call.needs(1)) g.grad_weight = call.accumulate(1);
    if (call.needs(2)) g.grad_bias = call.accumulate(2);
    if (call.needs(3)) g.grad_window0 = call.buffer(3);
    on_device(w.device(), &causal_conv1d_bwd_cpu, LONGHAND_CUDA_IMPL(causal_conv1d_bwd_cuda))(g);
    call.set(0, g.grad_x);
    call.set(3, g.grad_window0);
  });
  const auto again = [kept_x, w, b, start, window_shape = window.shape()] {
    const Tensor& x_again = kept_x.get();
    const OpScope scope("causal_conv1d_silu", {&x_again, &w, &b, &start});
    Tensor y_again = Tensor::empty(w.device(), x_again.dtype(), x_again.shape());
    const Tensor window_again = Tensor::empty(w.device(), x_again.dtype(), window_shape);
    on_device(w.device(), &causal_conv1d_fwd_cpu,
              LONGHAND_CUDA_IMPL(causal_conv1d_fwd_cuda))({x_again, w, b, start, y_again, window_again});
    return y_again;
  };
  return {remade(outputs[0], again), outputs[1]};
}

}  // namespace longhand
