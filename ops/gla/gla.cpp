// The public op: argument checks, choice of device, the node on the tape.
#include "ops/gla/gla.h"

#include <cmath>

#include "autograd/recompute.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "ops/gla/gla_kernels.h"

namespace longhand {
namespace {

void require_shape(const Tensor& t, const char* name, const Shape& expected, const Tensor& beside, const char* beside_name) {
  if (t.shape() == expected) return;
  throw ShapeError(std::string("gla: ") + name + " does not fit " + beside_name,
                   {{name, t.describe()}, {beside_name, beside.describe()}, {"expected", expected.str()}});
}

void require_dtype(const Tensor& t, const char* name, Dtype expected, const Tensor& q) {
  if (t.dtype() == expected) return;
  throw DtypeError(std::string("gla: ") + name + " has another dtype than is needed beside q",
                   {{name, t.describe()}, {"q", q.describe()}, {"expected", name_of(expected)}});
}

void require_gla_args(const GlaInputs& in, const GlaOptions& options) {
  const auto& [q, k, v, gate, h0] = in;
  const std::pair<const char*, const Tensor*> needed[] = {{"q", &q}, {"k", &k}, {"v", &v}, {"gate", &gate}};
  for (auto [name, t] : needed)
    if (!t->defined()) throw ShapeError(std::string("gla: ") + name + " is absent", {{"try", "only h0 may be absent"}});
  if (q.rank() != 4 || q.dim(3) < 1) throw ShapeError("gla: q is not [B, T, H, Dk]", {{"q", q.describe()}});
  if (v.rank() != 4) throw ShapeError("gla: v is not [B, T, H, Dv]", {{"v", v.describe()}, {"q", q.describe()}});
  const auto [B, T, H, Dk, Dv] = in.sizes();
  require_shape(k, "k", {B, T, H, Dk}, q, "q");
  require_shape(gate, "gate", {B, T, H, Dk}, q, "q");
  require_shape(v, "v", {B, T, H, Dv}, q, "q");
  if (h0 && !(h0.shape() == Shape{B, H, Dk, Dv}))
    throw ShapeError("gla: h0 does not fit q and v",
                     {{"h0", h0.describe()}, {"q", q.describe()}, {"v", v.describe()}, {"expected", Shape{B, H, Dk, Dv}.str()}});

  const bool cuda = q.device().is_cuda();
  if (q.dtype() != Dtype::f32 && q.dtype() != (cuda ? Dtype::bf16 : Dtype::f64))
    throw DtypeError("gla: q has a dtype that is not computed here",
                     {{"q", q.describe()}, {"expected", "f32 or f64 on the CPU, f32 or bf16 on CUDA"}});
  require_dtype(k, "k", q.dtype(), q);
  require_dtype(v, "v", q.dtype(), q);
  require_dtype(gate, "gate", q.dtype(), q);
  if (h0) require_dtype(h0, "h0", q.dtype() == Dtype::f64 ? Dtype::f64 : Dtype::f32, q);
  for (const Tensor* t : {&k, &v, &gate, &h0})
    if (t->defined() && !(t->device() == q.device()))
      throw DeviceError("gla: the inputs are on different devices", {{"q", q.describe()}, {"other", t->describe()}});

  if (!std::isfinite(options.scale)) throw ValueError("gla: scale is not a number", {{"scale", std::to_string(options.scale)}});
  if (options.gate == GlaOptions::Gate::log) return;
  if (!(options.gate_normalizer > 0))
    throw ValueError("gla: gate_normalizer must be above 0", {{"gate_normalizer", std::to_string(options.gate_normalizer)}});
  if (!(options.gate_min <= 0))
    throw ValueError("gla: gate_min is above every gate",
                     {{"gate_min", std::to_string(options.gate_min)}, {"expected", "at most 0: gates are logarithms of decays"}});
}

Tensor whole(const Tensor& t) {
  return t.defined() ? t.contiguous() : t;
}

}  // namespace

GlaOutput gla(const Variable& q, const Variable& k, const Variable& v, const Variable& gate, const Variable& h0,
              const GlaOptions& options) {
  const OpScope op("gla", {&q.value(), &k.value(), &v.value(), &gate.value()});
  const GlaInputs given{q.value(), k.value(), v.value(), gate.value(), h0.value()};
  require_gla_args(given, options);
  const GlaInputs in{with_packed_tokens(given.q), with_packed_tokens(given.k), with_packed_tokens(given.v), with_packed_tokens(given.gate),
                     whole(given.h0)};
  const GlaRule rule{options.gate == GlaOptions::Gate::logit, options.gate_normalizer, options.gate_min,
                     options.scale != 0 ? options.scale : 1 / std::sqrt(static_cast<double>(in.sizes().Dk))};
  const GlaResult result = on_device(in.q.device(), &gla_fwd_cpu, LONGHAND_CUDA_IMPL(gla_fwd_cuda))(in, rule);
  // What was prepared costs more than a pass over memory, like a projection.
  const GlaPrepared prepared = recompute_level() < Recompute::projections ? result.prepared : GlaPrepared{};
  const auto backward_gla = [kept_q = Kept(q), kept_k = Kept(k), kept_v = Kept(v), kept_gate = Kept(gate), h0_value = in.h0, rule,
                             prepared](BackwardCall& call) {
    const GlaInputs all{with_packed_tokens(kept_q.get()), with_packed_tokens(kept_k.get()), with_packed_tokens(kept_v.get()),
                        with_packed_tokens(kept_gate.get()), h0_value};
    const Tensor grad_o = with_packed_tokens(call.grad(0)), grad_h_T = whole(call.grad(1));
    const auto place = [&](int input) { return call.needs(input) ? writable_packed_tokens(call.buffer(input)) : Tensor(); };
    const GlaGradients out{place(0), place(1), place(2), place(3),
                           call.needs(4) ? Tensor::empty(all.h0.device(), all.h0.dtype(), all.h0.shape()) : Tensor()};
    on_device(all.q.device(), &gla_bwd_cpu, LONGHAND_CUDA_IMPL(gla_bwd_cuda))(all, rule, prepared, grad_o, grad_h_T, out);
    const Tensor* grads[] = {&out.q, &out.k, &out.v, &out.gate, &out.h0};
    for (int i = 0; i < 5; ++i) call.set(i, *grads[i]);
  };
  auto outputs = record("gla", {result.o, result.h_T}, {q, k, v, gate, h0}, backward_gla);
  return {outputs[0], outputs[1]};
}

}  // namespace longhand
