// GLA on CUDA where the keys of a head are wider than the kernels. Every row of the state decays by itself, so that slices of Dk are
// attentions of their own:
//   o = sum over slices of scale * h_s' q_s        grad v = sum over slices        all else belongs to one slice
// Each slice is laid out for itself and goes through the kernels; the sums over slices are formed in f32.
#include <algorithm>

#include "ops/gla/gla_kernels.h"

namespace longhand {
namespace {

constexpr int64_t kKeySlice = 128;  // what the kernels take fastest

Tensor keys_of(const Tensor& t, int axis, int64_t begin, int64_t end) {
  return t.defined() ? t.slice(axis, begin, end).contiguous() : t;
}

/// visit(begin, end, inputs) for every slice of Dk
template <class Visit>
void each_slice(const GlaInputs& in, Visit&& visit) {
  for (int64_t begin = 0, Dk = in.sizes().Dk; begin < Dk; begin += kKeySlice) {
    const int64_t end = std::min(begin + kKeySlice, Dk);
    const auto keys = [&](const Tensor& t) { return keys_of(t, 3, begin, end); };
    visit(begin, end, GlaInputs{keys(in.q), keys(in.k), in.v, keys(in.gate), keys_of(in.h0, 2, begin, end)});
  }
}

}  // namespace

GlaResult gla_fwd_key_slices_cuda(const GlaInputs& in, const GlaRule& rule) {
  const GlaSizes s = in.sizes();
  const Shape o_shape{s.B, s.T, s.H, s.Dv}, state_shape{s.B, s.H, s.Dk, s.Dv};
  const Tensor sum = Tensor::zeros(in.q.device(), Dtype::f32, o_shape), h_T = Tensor::empty(in.q.device(), Dtype::f32, state_shape);
  each_slice(in, [&](int64_t begin, int64_t end, const GlaInputs& slice) {
    const GlaResult part = gla_fwd_cuda(slice, rule);
    add_scaled(sum, part.o);
    copy(h_T.slice(2, begin, end), part.h_T);
  });
  return {sum.to(in.q.dtype()), h_T};
}

void gla_bwd_key_slices_cuda(const GlaInputs& in, const GlaRule& rule, const Tensor& grad_o, const Tensor& grad_h_T,
                             const GlaGradients& out) {
  const Tensor sum = out.v.defined() ? Tensor::zeros(in.v.device(), Dtype::f32, in.v.shape()) : Tensor();
  each_slice(in, [&](int64_t begin, int64_t end, const GlaInputs& slice) {
    const auto like = [](const Tensor& wanted, const Tensor& input) {
      return wanted.defined() ? Tensor::empty(input.device(), input.dtype(), input.shape()) : Tensor();
    };
    const GlaGradients part{like(out.q, slice.q), like(out.k, slice.k), like(out.v, slice.v), like(out.gate, slice.gate),
                            like(out.h0, slice.h0)};
    gla_bwd_cuda(slice, rule, {}, grad_o, keys_of(grad_h_T, 2, begin, end), part);
    const auto place = [&](const Tensor& whole, int axis, const Tensor& gradient) {
      if (whole.defined()) copy(whole.slice(axis, begin, end), gradient);
    };
    place(out.q, 3, part.q);
    place(out.k, 3, part.k);
    place(out.gate, 3, part.gate);
    place(out.h0, 2, part.h0);
    if (sum.defined()) add_scaled(sum, part.v);
  });
  if (sum.defined()) copy(out.v, sum);
}

}  // namespace longhand
