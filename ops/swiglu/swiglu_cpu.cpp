// The reference of swiglu in f32 and f64; see swiglu.h for the formula.
#include "ops/common/activations.h"
#include "ops/common/strided_rows.h"
#include "ops/swiglu/swiglu_kernels.h"

namespace longhand {
namespace {

template <class T>
void forward(const SwigluForward& f) {
  const StridedRows gate_rows = strided_rows_of(f.gate), up_rows = strided_rows_of(f.up);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < gate_rows.count; ++row) {
    const T* gate = f.gate.data<T>() + gate_rows.begin(row);
    const T* up = f.up.data<T>() + up_rows.begin(row);
    T* y = f.y.data<T>() + row * gate_rows.width;
    for (int64_t c = 0; c < gate_rows.width; ++c) y[c] = silu(gate[c]) * up[c];
  }
}

template <class T>
void backward(const SwigluBackward& b) {
  const StridedRows gate_rows = strided_rows_of(b.gate), up_rows = strided_rows_of(b.up), grad_y_rows = strided_rows_of(b.grad_y),
                    grad_gate_rows = strided_rows_of(b.grad_gate), grad_up_rows = strided_rows_of(b.grad_up);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < gate_rows.count; ++row) {
    const T* gate = b.gate.data<T>() + gate_rows.begin(row);
    const T* up = b.up.data<T>() + up_rows.begin(row);
    const T* grad_y = b.grad_y.data<T>() + grad_y_rows.begin(row);
    if (b.grad_gate) {
      T* grad_gate = b.grad_gate.data<T>() + grad_gate_rows.begin(row);
      for (int64_t c = 0; c < gate_rows.width; ++c) grad_gate[c] = grad_y[c] * up[c] * silu_slope(gate[c]);
    }
    if (b.grad_up) {
      T* grad_up = b.grad_up.data<T>() + grad_up_rows.begin(row);
      for (int64_t c = 0; c < gate_rows.width; ++c) grad_up[c] = grad_y[c] * silu(gate[c]);
    }
    if (b.y) {
      T* y = b.y.data<T>() + row * gate_rows.width;
      for (int64_t c = 0; c < gate_rows.width; ++c) y[c] = silu(gate[c]) * up[c];
    }
  }
}

}  // namespace

void swiglu_fwd_cpu(const SwigluForward& f) {
  f.gate.dtype() == Dtype::f64 ? forward<double>(f) : forward<float>(f);
}
void swiglu_bwd_cpu(const SwigluBackward& b) {
  b.gate.dtype() == Dtype::f64 ? backward<double>(b) : backward<float>(b);
}

}  // namespace longhand
