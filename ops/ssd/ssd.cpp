// The public op: argument checks, choice of device, the node on the tape.
#include "ops/ssd/ssd.h"

#include "autograd/recompute.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "ops/ssd/ssd_layout.h"

namespace longhand {
namespace {

void require_shape(const Tensor& t, const char* name, const Shape& expected, const Tensor& x) {
  if (t.shape() == expected) return;
  throw ShapeError(std::string("ssd: ") + name + " does not fit x",
                   {{name, t.describe()}, {"x", x.describe()}, {"expected", expected.str()}});
}

void require_dtype(const Tensor& t, const char* name, Dtype expected, const Tensor& x) {
  if (t.dtype() == expected) return;
  throw DtypeError(std::string("ssd: ") + name + " has another dtype than is needed beside x",
                   {{name, t.describe()}, {"x", x.describe()}, {"expected", name_of(expected)}});
}

void require_ssd_args(const SsdInputs& in, const SsdOptions& options) {
  const auto& [x, dt, A_log, B_t, C_t, D_skip, dt_bias, h0] = in;
  const std::pair<const char*, const Tensor*> needed[] = {{"x", &x},     {"dt", &dt},   {"A_log", &A_log},
                                                          {"B_t", &B_t}, {"C_t", &C_t}, {"dt_bias", &dt_bias}};
  for (auto [name, t] : needed)
    if (!t->defined()) throw ShapeError(std::string("ssd: ") + name + " is absent", {{"try", "only D_skip and h0 may be absent"}});
  if (x.rank() != 4) throw ShapeError("ssd: x is not [B, T, H, P]", {{"x", x.describe()}});
  if (B_t.rank() != 4) throw ShapeError("ssd: B_t is not [B, T, G, N]", {{"B_t", B_t.describe()}, {"x", x.describe()}});
  const SsdSizes s = ssd_sizes(x, B_t);
  if (s.G < 1 || s.H % s.G != 0)
    throw ShapeError("ssd: the groups do not divide the heads",
                     {{"x", x.describe()}, {"B_t", B_t.describe()}, {"expected", "G divides H"}});
  require_shape(B_t, "B_t", {s.B, s.T, s.G, s.N}, x);
  require_shape(C_t, "C_t", {s.B, s.T, s.G, s.N}, x);
  require_shape(dt, "dt", {s.B, s.T, s.H}, x);
  require_shape(A_log, "A_log", {s.H}, x);
  require_shape(dt_bias, "dt_bias", {s.H}, x);
  if (D_skip && D_skip.rank() != 1) require_shape(D_skip, "D_skip", {s.H, s.P}, x);
  if (D_skip && D_skip.rank() == 1) require_shape(D_skip, "D_skip", {s.H}, x);
  if (h0) require_shape(h0, "h0", {s.B, s.H, s.P, s.N}, x);

  const bool known =
      x.device().is_cuda() ? x.dtype() == Dtype::f32 || x.dtype() == Dtype::bf16 : x.dtype() == Dtype::f32 || x.dtype() == Dtype::f64;
  if (!known)
    throw DtypeError("ssd: x has a dtype that is not computed here",
                     {{"x", x.describe()}, {"expected", "f32 or f64 on the CPU, f32 or bf16 on CUDA"}});
  const Dtype sums = x.dtype() == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  require_dtype(dt, "dt", x.dtype(), x);
  require_dtype(B_t, "B_t", x.dtype(), x);
  require_dtype(C_t, "C_t", x.dtype(), x);
  const std::pair<const char*, const Tensor*> small[] = {{"A_log", &A_log}, {"dt_bias", &dt_bias}, {"D_skip", &D_skip}, {"h0", &h0}};
  for (auto [name, t] : small)
    if (t->defined()) require_dtype(*t, name, sums, x);
  for (const Tensor* t : {&dt, &A_log, &B_t, &C_t, &D_skip, &dt_bias, &h0})
    if (t->defined() && !(t->device() == x.device()))
      throw DeviceError("ssd: the inputs are on different devices", {{"x", x.describe()}, {"other", t->describe()}});
  if (options.chunk_size < 1)
    throw ValueError("ssd: a chunk holds at least one token", {{"chunk_size", std::to_string(options.chunk_size)}});
  if (!(options.dt_min >= 0 && options.dt_min <= options.dt_max))
    throw ValueError(
        "ssd: the limits of dt are out of order",
        {{"dt_min", std::to_string(options.dt_min)}, {"dt_max", std::to_string(options.dt_max)}, {"expected", "0 <= dt_min <= dt_max"}});
}

Tensor whole(const Tensor& t) {
  return t.defined() ? t.contiguous() : t;
}

/// The place for an activation's gradient: the tape's own where the kernels can write into it, else a new one.
Tensor place_for(const BackwardCall& call, int input) {
  return call.needs(input) ? writable_packed_tokens(call.buffer(input)) : Tensor();
}

Tensor fresh_like(const BackwardCall& call, int input, const Tensor& value) {
  return call.needs(input) ? Tensor::empty(value.device(), value.dtype(), value.shape()) : Tensor();
}

}  // namespace

SsdOutput ssd(const Variable& x, const Variable& dt, const Variable& A_log, const Variable& B_t, const Variable& C_t,
              const Variable& D_skip, const Variable& dt_bias, const Variable& h0, const SsdOptions& options) {
  const OpScope op("ssd", {&x.value(), &dt.value(), &B_t.value()});
  const SsdInputs given{x.value(), dt.value(), A_log.value(), B_t.value(), C_t.value(), D_skip.value(), dt_bias.value(), h0.value()};
  require_ssd_args(given, options);
  const SsdInputs in{with_packed_tokens(given.x),   with_packed_tokens(given.dt), whole(given.A_log),   with_packed_tokens(given.B_t),
                     with_packed_tokens(given.C_t), whole(given.D_skip),          whole(given.dt_bias), whole(given.h0)};
  auto [y, h_T] = on_device(in.x.device(), &ssd_fwd_cpu, LONGHAND_CUDA_IMPL(ssd_fwd_cuda))(in, options);
  SsdInputs small = in;  // without what may be cheaper to make again
  small.x = small.dt = small.B_t = small.C_t = Tensor();
  const Kept kept_x(x), kept_dt(dt), kept_B(B_t), kept_C(C_t);
  const auto backward_ssd = [small, kept_x, kept_dt, kept_B, kept_C, options](BackwardCall& call) {
    SsdInputs all = small;
    all.x = with_packed_tokens(kept_x.get());
    all.dt = with_packed_tokens(kept_dt.get());
    all.B_t = with_packed_tokens(kept_B.get());
    all.C_t = with_packed_tokens(kept_C.get());
    const Tensor grad_y = with_packed_tokens(call.grad(0));
    const Tensor grad_h_T = whole(call.grad(1));
    const SsdGradients out{place_for(call, 0),
                           place_for(call, 1),
                           fresh_like(call, 2, all.A_log),
                           place_for(call, 3),
                           place_for(call, 4),
                           fresh_like(call, 5, all.D_skip),
                           fresh_like(call, 6, all.dt_bias),
                           fresh_like(call, 7, all.h0)};
    on_device(all.x.device(), &ssd_bwd_cpu, LONGHAND_CUDA_IMPL(ssd_bwd_cuda))(all, options, grad_y, grad_h_T, out);
    const Tensor* grads[] = {&out.x, &out.dt, &out.A_log, &out.B_t, &out.C_t, &out.D_skip, &out.dt_bias, &out.h0};
    for (int i = 0; i < 8; ++i) call.set(i, *grads[i]);
  };
  auto outputs = record("ssd", {y, h_T}, {x, dt, A_log, B_t, C_t, D_skip, dt_bias, h0}, backward_ssd);
  return {outputs[0], outputs[1]};
}

}  // namespace longhand
