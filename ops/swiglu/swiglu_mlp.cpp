// swiglu_mlp: the position-wise network as three ops, or as one node around products that have swiglu in their epilogues.
#include <vector>

#include "autograd/describe.h"
#include "autograd/late_value.h"
#include "autograd/recompute.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_ledger.h"
#include "core/op_scope.h"
#include "ops/common/gemm.h"
#include "ops/common/strided_rows.h"
#include "ops/linear/linear.h"
#include "ops/swiglu/swiglu.h"
#include "ops/swiglu/swiglu_kernels.h"
#include "ops/swiglu/swiglu_mlp_kernels.h"

namespace longhand {
namespace {

void require_mlp_args(const Variable& x_in, const Variable& gate_up_in, const Variable& down_in) {
  const Tensor &x = x_in.value(), &gate_up = gate_up_in.value(), &down = down_in.value();
  const auto fields = [&](const char* expected) -> std::vector<ErrorRow> {
    return {{"x", describe(x_in)}, {"gate_up", describe(gate_up_in)}, {"down", describe(down_in)}, {"expected", expected}};
  };
  if (!x.defined() || x.rank() < 1 || !gate_up.defined() || gate_up.rank() != 2 || gate_up.dim(1) != x.dim(-1) || gate_up.dim(0) % 2 != 0 ||
      !down.defined() || down.rank() != 2 || 2 * down.dim(1) != gate_up.dim(0))
    throw ShapeError("swiglu_mlp: x, gate_up and down do not fit together", fields("x [.., in], gate_up [2 E, in], down [out, E]"));
  if (gate_up.dtype() != x.dtype() || down.dtype() != x.dtype())
    throw DtypeError("swiglu_mlp: x and the weights have different dtypes", fields("one dtype"));
  if (!(gate_up.device() == x.device() && down.device() == x.device()))
    throw DeviceError("swiglu_mlp: x and the weights are on different devices", fields("one device"));
}

struct Hidden {
  Tensor both;  // [R, 2 E] gate, and up behind it; undefined: not kept
  Tensor h;     // [R, E]
};

Tensor gates_of(const Tensor& both) {
  return both.slice(1, 0, both.dim(1) / 2);
}
Tensor ups_of(const Tensor& both) {
  return both.slice(1, both.dim(1) / 2, both.dim(1));
}

Hidden form_hidden(const Tensor& x, const Tensor& gate_up, bool keeps_both) {
  const Tensor rows = as_matrix(x);  // [R, in]
  const int64_t R = rows.dim(0), E = gate_up.dim(0) / 2;
  Hidden hidden{{}, Tensor::empty(x.device(), x.dtype(), {R, E})};
  SwigluProduct product{rows, gate_up.slice(0, 0, E), gate_up.slice(0, E, 2 * E), {}, {}, hidden.h};
  if (keeps_both) {
    hidden.both = Tensor::empty(x.device(), x.dtype(), {R, 2 * E});
    product.gate = gates_of(hidden.both);
    product.up = ups_of(hidden.both);
  }
  OpLedger::note(0, product_flops(R, gate_up.dim(0), gate_up.dim(1)));
  on_device<void(const SwigluProduct&)>(x.device(), nullptr, LONGHAND_CUDA_IMPL(swiglu_product_cuda))(product);
  return hidden;
}

Tensor project_down(const Tensor& h, const Tensor& down, Shape shape) {
  shape[-1] = down.dim(0);
  const Tensor y = Tensor::empty(h.device(), h.dtype(), {h.dim(0), down.dim(0)});
  gemm(false, h, true, down, y);
  return y.reshape(shape);
}

/// What a backward has of the forward: as much as the level keeps, and the rest made again once for all who ask.
class KeptHidden {
 public:
  KeptHidden(const Variable& x, const Tensor& gate_up, const Hidden& hidden, Recompute level) : gate_up_(gate_up) {
    if (level >= Recompute::projections) x_ = Kept(x);
    else hidden_.both = hidden.both;
    if (level == Recompute::none) hidden_.h = hidden.h;
  }
  const Hidden& get() {
    if (hidden_.both.defined()) return hidden_;
    const OpScope again("swiglu_mlp", {&x_.get(), &gate_up_});
    return hidden_ = form_hidden(x_.get(), gate_up_, true);
  }

 private:
  Kept x_;
  Tensor gate_up_;
  Hidden hidden_;
};

/// The copy engine brings rows that begin at multiples of 16 bytes.
Tensor with_aligned_rows(const Tensor& matrix) {
  return rows_are_aligned(matrix, 8) ? matrix : matrix.clone();
}

bool has_products(const Tensor& x, const Tensor& gate_up, const Tensor& down) {
  const auto fit = on_device<decltype(swiglu_products_fit_cuda)>(x.device(), nullptr, LONGHAND_CUDA_IMPL(swiglu_products_fit_cuda));
  return fit != nullptr && fit(x, gate_up, down);
}

}  // namespace

Variable swiglu_mlp(const Variable& x, const Variable& gate_up, const Variable& down) {
  const Tensor w = gate_up.value(), w_down = down.value();  // [2 E, in], [out, E]
  require_mlp_args(x, gate_up, down);
  const int64_t E = w_down.dim(1);
  if (!has_products(x.value(), w, w_down)) {
    const auto parts = split(linear(x, gate_up), {E, E});
    return linear(swiglu(parts[0], parts[1]), down);
  }

  const OpScope op("swiglu_mlp", {&x.value(), &w, &w_down});
  const bool wanted = grad_enabled() && (x.requires_grad() || gate_up.requires_grad() || down.requires_grad());
  const Recompute level = recompute_level();
  const Hidden hidden = form_hidden(x.value(), w, wanted && level < Recompute::projections);
  const Tensor y_value = project_down(hidden.h, w_down, x.shape());

  const auto kept = std::make_shared<KeptHidden>(x, w, hidden, level);
  const Awaited x_later(x);  // for the gradient of gate_up alone
  const Variable y = record("swiglu_mlp", y_value, {x, gate_up, down}, [x_later, kept, w, w_down](BackwardCall& call) {
    const Tensor grad_y = with_aligned_rows(as_matrix(call.grad(0)));  // [R, out]
    const Device& device = grad_y.device();
    auto [both, h] = kept->get();
    const bool h_wanted = call.needs(2) && !h.defined();
    if (h_wanted) h = Tensor::empty(device, grad_y.dtype(), {both.dim(0), both.dim(1) / 2});
    Tensor grad_both;  // [R, 2 E]
    if (call.needs(0) || call.needs(1)) {
      grad_both = Tensor::empty(device, grad_y.dtype(), both.shape());
      OpLedger::note(0, product_flops(both.dim(0), w_down.dim(1), w_down.dim(0)));
      on_device<void(const SwigluProductBackward&)>(device, nullptr, LONGHAND_CUDA_IMPL(swiglu_product_bwd_cuda))(
          {grad_y, w_down, gates_of(both), ups_of(both), gates_of(grad_both), ups_of(grad_both), h_wanted ? h : Tensor()});
    } else if (h_wanted) {
      on_device<void(const SwigluForward&)>(device, nullptr, LONGHAND_CUDA_IMPL(swiglu_fwd_cuda))({gates_of(both), ups_of(both), h});
    }
    if (call.needs(2)) {
      const auto [grad_down, beta] = call.accumulate(2);
      gemm(true, grad_y, false, h, grad_down, 1.0, beta);
    }
    if (call.needs(0)) {
      const auto [grad_x, beta] = call.accumulate(0);
      gemm(false, grad_both, false, w, grad_x.reshape({both.dim(0), w.dim(1)}), 1.0, beta);
    }
    if (call.needs(1))
      x_later.then(call, 1, [grad_both](BackwardCall& then, const Tensor& x_again) {
        const auto [grad_gate_up, beta] = then.accumulate(1);
        gemm(true, grad_both, false, as_matrix(x_again), grad_gate_up, 1.0, beta);
      });
  });
  if (level < Recompute::projections) return y;
  return remade(y, [kept, w_down, shape = x.shape()] {
    const OpScope again("swiglu_mlp", {&w_down});
    return project_down(kept->get().h, w_down, shape);
  });
}

}  // namespace longhand
