// Argument checks and the tape node of swiglu.
#include "autograd/late_value.h"
#include "autograd/recompute.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "ops/common/strided_rows.h"
#include "ops/swiglu/swiglu.h"
#include "ops/swiglu/swiglu_kernels.h"

namespace longhand {
namespace {

void require_args(const Tensor& gate, const Tensor& up) {
  const std::string op = "swiglu";
  if (!gate.defined() || gate.rank() < 1) throw ShapeError(op + ": gate needs at least one axis");
  if (!up.defined() || !(gate.shape() == up.shape()))
    throw ShapeError(op + ": gate and up differ in shape", {{"gate", gate.describe()}, {"up", up.defined() ? up.describe() : "undefined"}});
  if (!(gate.device() == up.device()))
    throw DeviceError(op + ": gate and up are on different devices", {{"gate", gate.describe()}, {"up", up.describe()}});
  const bool cuda = gate.device().is_cuda();
  if (gate.dtype() != Dtype::f32 && gate.dtype() != (cuda ? Dtype::bf16 : Dtype::f64))
    throw DtypeError(op + ": gate has a dtype that this device does not take",
                     {{"gate", gate.describe()}, {"expected", cuda ? "f32 or bf16" : "f32 or f64"}});
  if (up.dtype() != gate.dtype())
    throw DtypeError(op + ": gate and up differ in dtype", {{"gate", gate.describe()}, {"up", up.describe()}});
}

}  // namespace

Variable swiglu(const Variable& gate, const Variable& up) {
  const OpScope op("swiglu", {&gate.value(), &up.value()});
  require_args(gate.value(), up.value());
  const Tensor gate_rows = with_strided_rows(gate.value()), up_rows = with_strided_rows(up.value());
  const Tensor y = Tensor::empty(gate_rows.device(), gate_rows.dtype(), gate_rows.shape());  // [.., E]
  on_device(gate_rows.device(), &swiglu_fwd_cpu, LONGHAND_CUDA_IMPL(swiglu_fwd_cuda))({gate_rows, up_rows, y});

  const Kept kept_gate(gate), kept_up(up);
  const auto late_y = std::make_shared<LateValue>();
  const Variable result = record("swiglu", y, {gate, up}, [kept_gate, kept_up, late_y](BackwardCall& call) {  // y is not kept
    const Tensor gate_again = with_strided_rows(kept_gate.get()), up_again = with_strided_rows(kept_up.get());
    SwigluBackward b{with_strided_rows(call.grad(0)), gate_again, up_again, {}, {}, {}};
    if (late_y->wanted()) b.y = Tensor::empty(gate_again.device(), gate_again.dtype(), gate_again.shape());
    if (call.needs(0)) b.grad_gate = writable_strided_rows(call.buffer(0));
    if (call.needs(1)) b.grad_up = writable_strided_rows(call.buffer(1));
    on_device(gate_again.device(), &swiglu_bwd_cpu, LONGHAND_CUDA_IMPL(swiglu_bwd_cuda))(b);
    call.set(0, b.grad_gate);
    call.set(1, b.grad_up);
    late_y->give(b.y);
  });
  const auto make_again = [kept_gate, kept_up] {
    const Tensor gate_again = with_strided_rows(kept_gate.get()), up_again = with_strided_rows(kept_up.get());
    const OpScope scope("swiglu", {&gate_again, &up_again});
    Tensor y_again = Tensor::empty(gate_again.device(), gate_again.dtype(), gate_again.shape());
    on_device(gate_again.device(), &swiglu_fwd_cpu, LONGHAND_CUDA_IMPL(swiglu_fwd_cuda))({gate_again, up_again, y_again});
    return y_again;
  };
  return remade(result, make_again, late_y);
}

}  // namespace longhand
