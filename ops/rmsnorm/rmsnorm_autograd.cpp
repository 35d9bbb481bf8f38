// Argument checks and tape nodes of rmsnorm and add_rmsnorm.
#include "autograd/late_value.h"
#include "autograd/recompute.h"
#include "core/error.h"
#include "core/op_ledger.h"
#include "core/op_scope.h"
#include "ops/common/strided_rows.h"
#include "ops/rmsnorm/rmsnorm.h"
#include "ops/rmsnorm/rmsnorm_kernels.h"

namespace longhand {
namespace {

void require_same_device(const std::string& op, const Tensor& a, const Tensor& b) {
  if (!(a.device() == b.device()))
    throw DeviceError(op + ": the tensors are on different devices", {{"first", a.describe()}, {"second", b.describe()}});
}

// `normed` is x or residual, `sums` the dtype that sums are kept in.
void require_norm_args(const std::string& op, const Tensor& normed, const Tensor& weight, double eps, Dtype sums) {
  if (!normed.defined() || normed.rank() < 1) throw ShapeError(op + ": needs a tensor of at least one axis");
  if (!weight.defined() || !(weight.shape() == Shape{normed.dim(-1)}))
    throw ShapeError(op + ": weight does not match the last axis", {{"weight", weight.defined() ? weight.describe() : "undefined"},
                                                                    {"normalised", normed.describe()},
                                                                    {"expected", "weight [" + std::to_string(normed.dim(-1)) + "]"}});
  if (weight.dtype() != sums)
    throw DtypeError(op + ": weight has the wrong dtype",
                     {{"weight", weight.describe()}, {"normalised", normed.describe()}, {"expected", name_of(sums)}});
  if (!(eps > 0)) throw ValueError(op + ": eps must be above 0", {{"eps", std::to_string(eps)}});
  if (normed.device().is_cuda() && normed.dim(-1) > kRowMaxWidth)
    throw ShapeError(op + ": the rows are too wide for the CUDA kernels",
                     {{"normalised", normed.describe()}, {"limit", std::to_string(kRowMaxWidth)}});
  require_same_device(op, normed, weight);
}

// Activations: f32 or f64 on the CPU, f32 or bf16 on CUDA; sums are in f64 exactly for f64.
void require_activation(const std::string& op, const char* what, Dtype dtype, const Device& device) {
  const bool known = dtype == Dtype::f32 || dtype == (device.is_cuda() ? Dtype::bf16 : Dtype::f64);
  if (!known)
    throw DtypeError(op + ": " + what + " has a dtype that this device does not take",
                     {{what, name_of(dtype)}, {"device", device.name()}, {"expected", device.is_cuda() ? "f32 or bf16" : "f32 or f64"}});
}

Tensor new_rstd(const Tensor& normed, Dtype sums) {
  return Tensor::empty(normed.device(), sums, {normed.numel() / std::max<int64_t>(normed.dim(-1), 1)});
}

// The norm of what a backward keeps, once more; its rstd is there already.
Tensor normed_again(const char* op, const Tensor& base, const Tensor& weight, double eps, Dtype y_dtype) {
  const OpScope scope(op, {&base, &weight});
  Tensor y = Tensor::empty(base.device(), y_dtype, base.shape());
  on_device(base.device(), &rmsnorm_fwd_cpu,
            LONGHAND_CUDA_IMPL(rmsnorm_fwd_cuda))({base, {}, weight, eps, {}, y, new_rstd(base, weight.dtype())});
  return y;
}

}  // namespace

Variable rmsnorm(const Variable& x, const Variable& weight, double eps) {
  const OpScope op("rmsnorm", {&x.value(), &weight.value()});
  if (!x) throw ShapeError("rmsnorm: x is undefined");
  const Dtype sums = x.value().dtype() == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  require_activation("rmsnorm", "x", x.value().dtype(), x.value().device());
  require_norm_args("rmsnorm", x.value(), weight.value(), eps, sums);

  const Tensor rows = with_strided_rows(x.value()), w = weight.value();
  const Tensor y = Tensor::empty(rows.device(), rows.dtype(), rows.shape());  // [.., D]
  const Tensor rstd = new_rstd(rows, sums);                                   // [rows]
  on_device(rows.device(), &rmsnorm_fwd_cpu, LONGHAND_CUDA_IMPL(rmsnorm_fwd_cuda))({rows, {}, w, eps, {}, y, rstd});

  const Kept kept_x(x);
  const auto late_y = std::make_shared<LateValue>();
  const Variable out = record("rmsnorm", y, {x, weight}, [kept_x, w, rstd, late_y](BackwardCall& call) {
    const Tensor again = with_strided_rows(kept_x.get());
    RmsnormBackward b{with_strided_rows(call.grad(0)), {}, again, {}, w, rstd, {}, {}, {}, {}};
    if (late_y->wanted()) b.y_again = Tensor::empty(again.device(), again.dtype(), again.shape());
    if (call.needs(0)) b.grad_base = writable_strided_rows(call.buffer(0));
    if (call.needs(1)) b.grad_weight = call.accumulate(1);
    on_device(again.device(), &rmsnorm_bwd_cpu, LONGHAND_CUDA_IMPL(rmsnorm_bwd_cuda))(b);
    call.set(0, b.grad_base);
    late_y->give(b.y_again);
  });
  const auto make_again = [kept_x, w, eps] {
    const Tensor again = with_strided_rows(kept_x.get());
    return normed_again("rmsnorm", again, w, eps, again.dtype());
  };
  return remade(out, make_again, late_y);
}

AddRmsnormOutput add_rmsnorm(const Variable& x, const Variable& residual, const Variable& weight, double eps, Dtype y_dtype) {
  const OpScope op("add_rmsnorm", {&x.value(), &residual.value(), &weight.value()});
  const Tensor& r = residual.value();
  if (!r.defined()) throw ShapeError("add_rmsnorm: residual is undefined");
  require_activation("add_rmsnorm", "y_dtype", y_dtype, r.device());
  const Dtype sums = y_dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  if (r.dtype() != sums)
    throw DtypeError("add_rmsnorm: residual has the wrong dtype",
                     {{"residual", r.describe()}, {"y_dtype", name_of(y_dtype)}, {"expected", name_of(sums)}});
  require_norm_args("add_rmsnorm", r, weight.value(), eps, sums);
  if (x) {
    if (!(x.shape() == r.shape()))
      throw ShapeError("add_rmsnorm: x and residual differ in shape", {{"x", x.value().describe()}, {"residual", r.describe()}});
    if (x.value().dtype() != y_dtype)
      throw DtypeError("add_rmsnorm: x must have the dtype of y", {{"x", x.value().describe()}, {"y_dtype", name_of(y_dtype)}});
    require_same_device("add_rmsnorm", x.value(), r);
  }

  const Tensor base = with_strided_rows(r), addend = with_strided_rows(x.value()), w = weight.value();
  const Tensor sum = x ? Tensor::empty(r.device(), sums, r.shape()) : base;  // [.., D]
  const Tensor y = Tensor::empty(r.device(), y_dtype, r.shape());            // [.., D]
  const Tensor rstd = new_rstd(r, sums);                                     // [rows]
  on_device(r.device(), &rmsnorm_fwd_cpu, LONGHAND_CUDA_IMPL(rmsnorm_fwd_cuda))({base, addend, w, eps, x ? sum : Tensor(), y, rstd});

  // A narrow y, which the projections behind it keep anyway, tells what was normalised: of the stream nothing is kept.
  const bool from_y = y_dtype != sums;
  const Tensor kept = from_y ? y : sum;
  const bool shared = !from_y;  // then x and residual take the same gradient tensor
  const auto late_y = from_y ? nullptr : std::make_shared<LateValue>();
  const int64_t inputs_bytes = base.numel() * size_of(sums) + (x ? addend.numel() * size_of(y_dtype) : 0);
  auto outputs = record("add_rmsnorm", {y, sum}, {x, residual, weight}, [=](BackwardCall& call) {
    // The tape counts the inputs as read; what is kept is read in their place.
    OpLedger::note(static_cast<double>(kept.numel() * size_of(kept.dtype()) - inputs_bytes), 0);
    if (!call.grad(0).defined()) {  // only the sum was used further on
      call.set(0, call.grad(1).to(y_dtype));
      call.set(1, call.grad(1));
      return;
    }
    RmsnormBackward b{with_strided_rows(call.grad(0)), with_strided_rows(call.grad(1)), {}, {}, w, rstd, {}, {}, {}, {}};
    (from_y ? b.y : b.sum) = kept;
    if (late_y != nullptr && late_y->wanted()) b.y_again = Tensor::empty(kept.device(), y_dtype, kept.shape());
    if (call.needs(1)) b.grad_base = writable_strided_rows(call.buffer(1));
    else if (call.needs(0) && shared) b.grad_base = writable_strided_rows(call.buffer(0));
    if (call.needs(0) && !shared) b.grad_addend = writable_strided_rows(call.buffer(0));
    if (call.needs(2)) b.grad_weight = call.accumulate(2);
    on_device(kept.device(), &rmsnorm_bwd_cpu, LONGHAND_CUDA_IMPL(rmsnorm_bwd_cuda))(b);
    call.set(0, shared ? b.grad_base : b.grad_addend);
    call.set(1, b.grad_base);
    if (late_y != nullptr) late_y->give(b.y_again);
  });
  if (from_y) return {outputs[0], outputs[1]};
  const auto make_again = [kept, w, eps, y_dtype] { return normed_again("add_rmsnorm", kept, w, eps, y_dtype); };
  return {remade(outputs[0], make_again, late_y), outputs[1]};
}

}  // namespace longhand
