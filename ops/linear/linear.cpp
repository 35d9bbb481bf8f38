// linear: everything is a matrix product, the gradient of the bias too: ones^T grad_y. The same code serves every device, but for a narrow
// x on a GPU, which has kernels of its own (linear_kernels.h); see linear.h for the formulas and ops/common/gemm.h for the products.
#include "ops/linear/linear.h"

#include "autograd/aligned_rows.h"
#include "autograd/describe.h"
#include "autograd/late_value.h"
#include "autograd/recompute.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_ledger.h"
#include "core/op_scope.h"
#include "ops/common/gemm.h"
#include "ops/linear/linear_kernels.h"

namespace longhand {
namespace {

void require_linear_args(const Variable& x, const Variable& weight, const Variable& bias) {
  const Tensor& w = weight.value();
  if (x.value().rank() < 1 || w.rank() != 2 || w.dim(1) != x.value().dim(-1))
    throw ShapeError("linear: weight does not fit the last axis of x",
                     {{"x", x.value().describe()}, {"weight", describe(weight)}, {"expected", "x [.., in], weight [out, in]"}});
  if (w.dtype() != x.value().dtype())
    throw DtypeError("linear: x and weight must have one dtype", {{"x", x.value().describe()}, {"weight", describe(weight)}});
  if (!bias) return;
  const Tensor& b = bias.value();
  if (b.rank() != 1 || b.dim(0) != w.dim(0))
    throw ShapeError("linear: bias does not match the rows of weight",
                     {{"bias", b.describe()}, {"weight", w.describe()}, {"expected", "bias [out]"}});
  if (b.dtype() != w.dtype() && !(b.dtype() == Dtype::f32 && w.dtype() == Dtype::bf16))
    throw DtypeError("linear: bias must have weight's dtype, or f32 beside bf16", {{"bias", b.describe()}, {"weight", w.describe()}});
}

// Up to this many inputs a product costs about what writing its outputs costs: it is made again from the level light on.
constexpr int64_t kNarrow = 128;

Tensor row_vector(const Tensor& t) {
  return t.reshape({1, t.numel()});
}

Tensor ones_row(const Tensor& like, int64_t count) {
  return Tensor::full(like.device(), like.dtype(), {1, count}, 1.0);
}

// y = x W^T + b
Tensor product(const Tensor& x, const Tensor& w, const Tensor& bias) {
  const Tensor rows = as_matrix(x);  // [R, in]
  Shape shape = x.shape();
  shape[-1] = w.dim(0);
  Tensor y = empty_with_aligned_rows(rows.device(), rows.dtype(), shape);
  const Tensor y_rows = y.reshape({rows.dim(0), w.dim(0)});
  const auto fits = on_device<bool(const NarrowProduct&)>(w.device(), nullptr, LONGHAND_CUDA_IMPL(linear_narrow_product_fits_cuda));
  if (const NarrowProduct narrow{rows, w, bias, y_rows}; fits != nullptr && fits(narrow)) {
    OpLedger::note(0, product_flops(rows.dim(0), w.dim(0), w.dim(1)));
    on_device<void(const NarrowProduct&)>(w.device(), nullptr, LONGHAND_CUDA_IMPL(linear_narrow_product_cuda))(narrow);
    return y;
  }
  if (bias) gemm_add_row(rows, true, w, bias.to(rows.dtype()).contiguous(), y_rows);
  else gemm(false, rows, true, w, y_rows);
  return y;
}

// Whether all gradients are formed in one pass over grad_y.
bool in_one_pass(const BackwardCall& call, const Tensor& grad_y, const Tensor& w) {
  const auto fits = on_device<bool(const Tensor&, const Tensor&)>(w.device(), nullptr, LONGHAND_CUDA_IMPL(linear_narrow_fits_cuda));
  return fits != nullptr && call.needs(0) && call.needs(1) && call.needs(2) && fits(grad_y, w);
}

}  // namespace

Variable linear(const Variable& x, const Variable& weight, const Variable& bias) {
  const OpScope op("linear", {&x.value(), &weight.value()});
  require_linear_args(x, weight, bias);
  const Tensor w = weight.value(), b = bias.value();  // [out, in], [out]
  const Awaited x_later(x);                           // for the gradient of the weight, which nothing else in the backward needs
  const Variable y = record("linear", product(x.value(), w, b), {x, weight, bias}, [x_later, x_now = Kept(x), w](BackwardCall& call) {
    const Tensor grad_y = as_matrix(call.grad(0));  // [R, out]
    if (in_one_pass(call, grad_y, w)) {
      OpLedger::note(0, 2 * product_flops(grad_y.dim(0), w.dim(0), w.dim(1)));
      on_device<void(const NarrowGradients&)>(w.device(), nullptr, LONGHAND_CUDA_IMPL(linear_narrow_bwd_cuda))(
          {grad_y, as_matrix(x_now.get()), w, call.accumulate(0), call.accumulate(1), call.accumulate(2)});
      return;
    }
    if (call.needs(0)) {
      const auto [grad_x, beta] = call.accumulate(0);
      gemm(false, grad_y, false, w, grad_x.reshape({grad_y.dim(0), w.dim(1)}), 1.0, beta);
    }
    if (call.needs(1))
      x_later.then(call, 1, [grad_y](BackwardCall& then, const Tensor& x_again) {
        const auto [grad_weight, beta] = then.accumulate(1);
        gemm(true, grad_y, false, as_matrix(x_again), grad_weight, 1.0, beta);
      });
    if (call.needs(2)) {
      const auto [grad_bias, beta] = call.accumulate(2);
      gemm(false, ones_row(grad_y, grad_y.dim(0)), false, grad_y, row_vector(grad_bias), 1.0, beta);
    }
  });
  if (w.dim(1) > kNarrow && recompute_level() < Recompute::projections) return y;
  return remade(y, [kept_x = Kept(x), w, b] {
    const OpScope again("linear", {&kept_x.get(), &w});
    return product(kept_x.get(), w, b);
  });
}

}  // namespace longhand
