// Argument checks and the tape node of gated_rmsnorm.
#include "autograd/late_value.h"
#include "autograd/recompute.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "ops/common/strided_rows.h"
#include "ops/gated_rmsnorm/gated_rmsnorm.h"
#include "ops/gated_rmsnorm/gated_rmsnorm_kernels.h"

namespace longhand {
namespace {

void require_args(const Tensor& y, const Tensor& z, const Tensor& weight, const GatedRmsnormOptions& options) {
  const std::string op = "gated_rmsnorm";
  if (!y.defined() || y.rank() < 1) throw ShapeError(op + ": y needs at least one axis");
  if (!z.defined() || !(y.shape() == z.shape()))
    throw ShapeError(op + ": y and z differ in shape", {{"y", y.describe()}, {"z", z.defined() ? z.describe() : "undefined"}});
  const bool cuda = y.device().is_cuda();
  if (y.dtype() != Dtype::f32 && y.dtype() != (cuda ? Dtype::bf16 : Dtype::f64))
    throw DtypeError(op + ": y has a dtype that this device does not take",
                     {{"y", y.describe()}, {"expected", cuda ? "f32 or bf16" : "f32 or f64"}});
  if (z.dtype() != y.dtype()) throw DtypeError(op + ": y and z differ in dtype", {{"y", y.describe()}, {"z", z.describe()}});
  if (!(z.device() == y.device())) throw DeviceError(op + ": y and z are on different devices", {{"y", y.describe()}, {"z", z.describe()}});
  if (!(options.eps > 0)) throw ValueError(op + ": eps must be above 0", {{"eps", std::to_string(options.eps)}});
  if (options.groups < 1) throw ValueError(op + ": groups must be at least 1", {{"groups", std::to_string(options.groups)}});
  if (y.dim(-1) % options.groups != 0)
    throw ShapeError(op + ": groups does not divide the last axis", {{"y", y.describe()}, {"groups", std::to_string(options.groups)}});
  if (cuda && y.dim(-1) / options.groups > kRowMaxWidth)
    throw ShapeError(op + ": the groups are too wide for the CUDA kernels", {{"y", y.describe()}, {"limit", std::to_string(kRowMaxWidth)}});
  if (!weight.defined()) return;
  if (!(weight.shape() == Shape{y.dim(-1)}))
    throw ShapeError(op + ": weight does not match the last axis of y",
                     {{"weight", weight.describe()}, {"y", y.describe()}, {"expected", "weight [" + std::to_string(y.dim(-1)) + "]"}});
  const Dtype sums = y.dtype() == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  if (weight.dtype() != sums)
    throw DtypeError(op + ": weight has the wrong dtype", {{"weight", weight.describe()}, {"expected", name_of(sums)}});
  if (!(weight.device() == y.device()))
    throw DeviceError(op + ": y and weight are on different devices", {{"y", y.describe()}, {"weight", weight.describe()}});
}

}  // namespace

Variable gated_rmsnorm(const Variable& y, const Variable& z, const Variable& weight, const GatedRmsnormOptions& options) {
  const OpScope op("gated_rmsnorm", {&y.value(), &z.value(), &weight.value()});
  require_args(y.value(), z.value(), weight.value(), options);
  const GatedNorm form = !weight ? GatedNorm::gate_only : options.norm_before_gate ? GatedNorm::norm_first : GatedNorm::gate_first;
  const int64_t groups = weight ? options.groups : 1;
  const int64_t rows = y.value().numel() / std::max<int64_t>(y.value().dim(-1), 1);

  const Tensor y_rows = with_strided_rows(y.value()), z_rows = with_strided_rows(z.value()), w = weight.value();
  const Tensor out = Tensor::empty(y_rows.device(), y_rows.dtype(), y_rows.shape());                  // [.., E]
  const Tensor rstd = weight ? Tensor::empty(y_rows.device(), w.dtype(), {rows, groups}) : Tensor();  // [rows, groups]
  const Device device = y_rows.device();
  on_device(device, &gated_rmsnorm_fwd_cpu,
            LONGHAND_CUDA_IMPL(gated_rmsnorm_fwd_cuda))({form, groups, options.eps, y_rows, z_rows, w, out, rstd});

  const Kept kept_y(y), kept_z(z);
  const auto late_out = std::make_shared<LateValue>();
  const Variable result = record("gated_rmsnorm", out, {y, z, weight}, [=](BackwardCall& call) {  // keeps y, z, w, rstd
    const Tensor y_again = with_strided_rows(kept_y.get()), z_again = with_strided_rows(kept_z.get());
    GatedRmsnormBackward b{form, groups, with_strided_rows(call.grad(0)), y_again, z_again, w, rstd, {}, {}, {}, {}};
    if (late_out->wanted()) b.out = Tensor::empty(y_again.device(), y_again.dtype(), y_again.shape());
    if (call.needs(0)) b.grad_y = writable_strided_rows(call.buffer(0));
    if (call.needs(1)) b.grad_z = writable_strided_rows(call.buffer(1));
    if (call.needs(2)) b.grad_weight = call.accumulate(2);
    on_device(y_again.device(), &gated_rmsnorm_bwd_cpu, LONGHAND_CUDA_IMPL(gated_rmsnorm_bwd_cuda))(b);
    call.set(0, b.grad_y);
    call.set(1, b.grad_z);
    late_out->give(b.out);
  });
  const auto make_again = [form, groups, eps = options.eps, kept_y, kept_z, w, rstd, device] {
    const Tensor y_again = with_strided_rows(kept_y.get()), z_again = with_strided_rows(kept_z.get());
    const OpScope scope("gated_rmsnorm", {&y_again, &z_again, &w});
    Tensor out_again = Tensor::empty(device, y_again.dtype(), y_again.shape());
    on_device(device, &gated_rmsnorm_fwd_cpu,  // writes the same rstd once more
              LONGHAND_CUDA_IMPL(gated_rmsnorm_fwd_cuda))({form, groups, eps, y_again, z_again, w, out_again, rstd});
    return out_again;
  };
  return remade(result, make_again, late_out);
}

}  // namespace longhand
