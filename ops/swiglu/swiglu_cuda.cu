// SwiGLU kernels; swiglu.h has the formula.
//
// swiglu_fwd_kernel
// moves   gate and up in, y out: 6 bytes per element in bf16
// flops   about 5, one exponential and one reciprocal per element: memory bound
// floor   32768 x 2816 bf16: 554 MB / 3.0 TB/s = 0.18 ms on an H100 SXM
// split   a thread per pack of 16 bytes (8 bf16, 4 f32), or per element where width, strides or addresses do not allow packs
// needs   rows at two strides (strided_rows.h), any width
// agrees  with the CPU reference: kSwigluToleranceF32 (the sigmoid goes through ex2.approx and rcp.approx); bf16 adds one rounding
// order   no sums: the same input gives the same bits
//
// swiglu_bwd_kernel
// moves   grad_y, gate, up in, grad_gate and grad_up out: 10 bytes per element in bf16; floor 0.31 ms at the shape above. 2 bytes more
//         where y is left once more
// split   as forward
#include <algorithm>

#include "core/cuda_context.h"
#include "ops/common/cuda_math.cuh"
#include "ops/common/launch.cuh"
#include "ops/common/strided_rows.h"
#include "ops/common/whole_stores.cuh"
#include "ops/swiglu/swiglu_kernels.h"

namespace longhand {
namespace {

constexpr unsigned kThreads = 256;

template <class T>
struct ForwardArgs {
  const T *gate, *up;
  T* y;  // contiguous
  StridedRows gate_rows, up_rows;
};

template <class T, int vec>
__global__ void __launch_bounds__(kThreads) swiglu_fwd_kernel(const ForwardArgs<T> a) {
  const int64_t per_row = a.gate_rows.width / vec, unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = unit / per_row,
                column = (unit - row * per_row) * vec;
  if (row >= a.gate_rows.count) return;
  const Pack<T, vec> gate = load_pack<vec>(a.gate + a.gate_rows.begin(row) + column),
                     up = load_pack<vec>(a.up + a.up_rows.begin(row) + column);
  float y[vec];
#pragma unroll
  for (int i = 0; i < vec; ++i) y[i] = silu(to_f32(gate.at[i])) * to_f32(up.at[i]);
  store_whole(a.y + unit * vec, round_to<T>(y));
}

template <class T>
struct BackwardArgs {
  const T *grad_y, *gate, *up;
  T *grad_gate, *grad_up;  // may be null: not wanted
  T* y;                    // contiguous; may be null: not wanted
  StridedRows grad_y_rows, gate_rows, up_rows, grad_gate_rows, grad_up_rows;
};

template <class T, int vec>
__global__ void __launch_bounds__(kThreads) swiglu_bwd_kernel(const BackwardArgs<T> a) {
  const int64_t per_row = a.gate_rows.width / vec, unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = unit / per_row,
                column = (unit - row * per_row) * vec;
  if (row >= a.gate_rows.count) return;
  const Pack<T, vec> grad_y = load_pack<vec>(a.grad_y + a.grad_y_rows.begin(row) + column),
                     gate = load_pack<vec>(a.gate + a.gate_rows.begin(row) + column),
                     up = load_pack<vec>(a.up + a.up_rows.begin(row) + column);
  float grad_gate[vec], grad_up[vec], y[vec];
#pragma unroll
  for (int i = 0; i < vec; ++i) {
    const float g = to_f32(gate.at[i]), s = sigmoid(g), grad = to_f32(grad_y.at[i]);
    grad_gate[i] = grad * to_f32(up.at[i]) * silu_slope(g, s);
    grad_up[i] = grad * (g * s);
    y[i] = (g * s) * to_f32(up.at[i]);
  }
  if (a.grad_gate != nullptr) store_whole(a.grad_gate + a.grad_gate_rows.begin(row) + column, round_to<T>(grad_gate));
  if (a.grad_up != nullptr) store_whole(a.grad_up + a.grad_up_rows.begin(row) + column, round_to<T>(grad_up));
  if (a.y != nullptr) store_whole(a.y + unit * vec, round_to<T>(y));
}

template <class T>
constexpr int kPackWidth = 16 / static_cast<int>(sizeof(T));

template <class T>
bool packs_fit(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor* t) {
    return !t->defined() || (t->dim(-1) % kPackWidth<T> == 0 && rows_are_aligned(*t, kPackWidth<T>));
  });
}

template <class Kernel, class Args>
void launch_units(Kernel kernel, const char* name, int64_t units, const Tensor& on, const Args& args) {
  const dim3 grid(static_cast<unsigned>((units + kThreads - 1) / kThreads));
  launch(kernel, name, grid, dim3(kThreads), 0, on.device().cuda_context(), args);
}

template <class T>
void forward(const SwigluForward& f) {
  const int64_t elements = f.gate.numel();
  if (elements == 0) return;
  const ForwardArgs<T> args{address_of<T>(f.gate), address_of<T>(f.up), address_of<T>(f.y), strided_rows_of(f.gate), strided_rows_of(f.up)};
  if (packs_fit<T>({&f.gate, &f.up, &f.y}))
    launch_units(&swiglu_fwd_kernel<T, kPackWidth<T>>, "swiglu_fwd_kernel", elements / kPackWidth<T>, f.gate, args);
  else launch_units(&swiglu_fwd_kernel<T, 1>, "swiglu_fwd_kernel (element by element)", elements, f.gate, args);
}

template <class T>
void backward(const SwigluBackward& b) {
  const int64_t elements = b.gate.numel();
  if (elements == 0) return;
  const BackwardArgs<T> args{address_of<T>(b.grad_y),  address_of<T>(b.gate),        address_of<T>(b.up),       address_of<T>(b.grad_gate),
                             address_of<T>(b.grad_up), address_of<T>(b.y),           strided_rows_of(b.grad_y), strided_rows_of(b.gate),
                             strided_rows_of(b.up),    strided_rows_of(b.grad_gate), strided_rows_of(b.grad_up)};
  if (packs_fit<T>({&b.grad_y, &b.gate, &b.up, &b.grad_gate, &b.grad_up, &b.y}))
    launch_units(&swiglu_bwd_kernel<T, kPackWidth<T>>, "swiglu_bwd_kernel", elements / kPackWidth<T>, b.gate, args);
  else launch_units(&swiglu_bwd_kernel<T, 1>, "swiglu_bwd_kernel (element by element)", elements, b.gate, args);
}

}  // namespace

void swiglu_fwd_cuda(const SwigluForward& f) {
  f.gate.dtype() == Dtype::bf16 ? forward<__nv_bfloat16>(f) : forward<float>(f);
}
void swiglu_bwd_cuda(const SwigluBackward& b) {
  b.gate.dtype() == Dtype::bf16 ? backward<__nv_bfloat16>(b) : backward<float>(b);
}

}  // namespace longhand
