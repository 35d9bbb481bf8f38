// The public op: argument checks, choice of device, the node on the tape.
#include "ops/selective_scan/selective_scan.h"

#include <algorithm>

#include "autograd/recompute.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "ops/selective_scan/selective_scan_kernels.h"

namespace longhand {
namespace {

void require_shape(const Tensor& t, const char* name, const Shape& expected, const Tensor& x) {
  if (t.shape() == expected) return;
  throw ShapeError(std::string("selective_scan: ") + name + " does not fit x",
                   {{name, t.describe()}, {"x", x.describe()}, {"expected", expected.str()}});
}

void require_dtype(const Tensor& t, const char* name, Dtype expected, const Tensor& x) {
  if (t.dtype() == expected) return;
  throw DtypeError(std::string("selective_scan: ") + name + " has another dtype than is needed beside x",
                   {{name, t.describe()}, {"x", x.describe()}, {"expected", name_of(expected)}});
}

void require_selective_scan_args(const SelectiveScanInputs& in) {
  const auto& [x, dt, A_log, B_t, C_t, D_skip, z, dt_bias, h0] = in;
  const std::pair<const char*, const Tensor*> activations[] = {{"x", &x}, {"dt", &dt}, {"B_t", &B_t}, {"C_t", &C_t}, {"z", &z}};
  const std::pair<const char*, const Tensor*> sums[] = {{"A_log", &A_log}, {"D_skip", &D_skip}, {"dt_bias", &dt_bias}, {"h0", &h0}};
  for (const Tensor* t : {&x, &dt, &A_log, &B_t, &C_t, &dt_bias})
    if (!t->defined()) {
      const char* name = t == &x ? "x" : t == &dt ? "dt" : t == &A_log ? "A_log" : t == &B_t ? "B_t" : t == &C_t ? "C_t" : "dt_bias";
      throw ShapeError(std::string("selective_scan: ") + name + " is absent", {{"try", "only D_skip, z and h0 may be absent"}});
    }
  if (x.rank() != 3) throw ShapeError("selective_scan: x is not [B, T, D]", {{"x", x.describe()}});
  if (A_log.rank() != 2) throw ShapeError("selective_scan: A_log is not [D, N]", {{"A_log", A_log.describe()}, {"x", x.describe()}});
  const int64_t B = x.dim(0), T = x.dim(1), D = x.dim(2), N = A_log.dim(1);
  require_shape(A_log, "A_log", {D, N}, x);
  require_shape(dt, "dt", {B, T, D}, x);
  require_shape(dt_bias, "dt_bias", {D}, x);
  if (D_skip) require_shape(D_skip, "D_skip", {D}, x);
  if (z) require_shape(z, "z", {B, T, D}, x);
  if (h0) require_shape(h0, "h0", {B, D, N}, x);
  const std::pair<const char*, const Tensor*> shared[] = {{"B_t", &B_t}, {"C_t", &C_t}};
  for (auto [name, t] : shared)
    if (!(t->shape() == Shape{B, T, N}))
      throw ShapeError(std::string("selective_scan: ") + name + " does not fit x and A_log",
                       {{name, t->describe()}, {"x", x.describe()}, {"A_log", A_log.describe()}, {"expected", Shape{B, T, N}.str()}});
  if (N < 1) throw ShapeError("selective_scan: a channel needs at least one state entry", {{"A_log", A_log.describe()}});

  const bool cuda = x.device().is_cuda();
  if (x.dtype() != Dtype::f32 && x.dtype() != (cuda ? Dtype::bf16 : Dtype::f64))
    throw DtypeError("selective_scan: x has a dtype that is not computed here",
                     {{"x", x.describe()}, {"expected", "f32 or f64 on the CPU, f32 or bf16 on CUDA"}});
  for (auto [name, t] : activations)
    if (t->defined()) require_dtype(*t, name, x.dtype(), x);
  for (auto [name, t] : sums)
    if (t->defined()) require_dtype(*t, name, x.dtype() == Dtype::f64 ? Dtype::f64 : Dtype::f32, x);
  for (const Tensor* t : {&dt, &A_log, &B_t, &C_t, &D_skip, &z, &dt_bias, &h0})
    if (t->defined() && !(t->device() == x.device()))
      throw DeviceError("selective_scan: the inputs are on different devices", {{"x", x.describe()}, {"other", t->describe()}});
  if (cuda && N > kSelectiveScanMaxStateDim)
    throw ValueError("selective_scan: the state of a channel does not fit the kernels",
                     {{"A_log", A_log.describe()}, {"limit", "N <= " + std::to_string(kSelectiveScanMaxStateDim) + " on CUDA"}});
}

Tensor whole(const Tensor& t) {
  return t.defined() ? t.contiguous() : t;
}

// Without a token or a channel there is nothing to scan: the state passes through.
SelectiveScanOutput pass_state(const SelectiveScanInputs& in, const std::vector<Variable>& inputs) {
  const int64_t B = in.x.dim(0), D = in.x.dim(2), N = in.A_log.dim(1);
  const Tensor y = Tensor::empty(in.x.device(), in.x.dtype(), in.x.shape());
  const Tensor h_T = Tensor::zeros(in.x.device(), in.A_log.dtype(), {B, D, N});
  if (in.h0) copy(h_T, in.h0);
  auto outputs = record("selective_scan", {y, h_T}, inputs, [](BackwardCall& call) { call.set(8, call.grad(1)); });
  return {outputs[0], outputs[1]};
}

}  // namespace

SelectiveScanOutput selective_scan(const Variable& x, const Variable& dt, const Variable& A_log, const Variable& B_t, const Variable& C_t,
                                   const Variable& D_skip, const Variable& z, const Variable& dt_bias, const Variable& h0) {
  const OpScope op("selective_scan", {&x.value(), &dt.value(), &B_t.value()});
  SelectiveScanInputs in{x.value(),      dt.value(), A_log.value(),   B_t.value(), C_t.value(),
                         D_skip.value(), z.value(),  dt_bias.value(), h0.value()};
  require_selective_scan_args(in);
  for (Tensor* t : {&in.A_log, &in.D_skip, &in.dt_bias, &in.h0}) *t = whole(*t);
  const std::vector<Variable> inputs{x, dt, A_log, B_t, C_t, D_skip, z, dt_bias, h0};
  if (in.x.numel() == 0) return pass_state(in, inputs);

  const bool differentiated =
      grad_enabled() && std::any_of(inputs.begin(), inputs.end(), [](const Variable& v) { return v.defined() && v.requires_grad(); });
  auto [y, h_T, borders] =
      on_device(in.x.device(), &selective_scan_fwd_cpu, LONGHAND_CUDA_IMPL(selective_scan_fwd_cuda))(in, differentiated);
  SelectiveScanInputs small = in;  // without what may be cheaper to make again
  small.x = small.dt = small.B_t = small.C_t = small.z = Tensor();
  const auto backward_scan = [small, kept_x = Kept(x), kept_dt = Kept(dt), kept_B = Kept(B_t), kept_C = Kept(C_t), kept_z = Kept(z),
                              borders = borders](BackwardCall& call) {
    SelectiveScanBackward g;
    g.in = small;
    g.in.x = kept_x.get();
    g.in.dt = kept_dt.get();
    g.in.B_t = kept_B.get();
    g.in.C_t = kept_C.get();
    g.in.z = kept_z.get();
    g.borders = borders;
    g.grad_y = call.grad(0);
    g.grad_h_T = whole(call.grad(1));
    const std::pair<int, Tensor*> activations[] = {{0, &g.grad_x}, {1, &g.grad_dt}, {3, &g.grad_B_t}, {4, &g.grad_C_t}, {6, &g.grad_z}};
    for (auto [input, place] : activations)
      if (call.needs(input)) *place = call.buffer(input);
    if (call.needs(2)) g.grad_A_log = call.accumulate(2);
    if (call.needs(5)) g.grad_D_skip = call.accumulate(5);
    if (call.needs(7)) g.grad_dt_bias = call.accumulate(7);
    if (call.needs(8)) g.grad_h0 = Tensor::empty(g.in.h0.device(), g.in.h0.dtype(), g.in.h0.shape());
    on_device(g.in.x.device(), &selective_scan_bwd_cpu, LONGHAND_CUDA_IMPL(selective_scan_bwd_cuda))(g);
    for (auto [input, place] : activations) call.set(input, *place);
    call.set(8, g.grad_h0);
  };
  auto outputs = record("selective_scan", {y, h_T}, inputs, backward_scan);
  return {outputs[0], outputs[1]};
}

}  // namespace longhand
