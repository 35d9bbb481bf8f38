// Products with swiglu in their epilogues, where a GPU has them; for this op's own files only.
#pragma once
#include "core/tensor.h"

namespace longhand {

///   gate = x Wg^T        up = x Wu^T        h = silu(gate) * up, of the rounded gate and up
struct SwigluProduct {
  Tensor x;                       // [R, in]
  Tensor gate_weight, up_weight;  // [E, in]
  Tensor gate, up;                // [R, E] written, rows at any stride; undefined: not wanted
  Tensor h;                       // [R, E] written, contiguous; has the bits that swiglu would give
};

///   grad_h = grad_y Wd, rounded        grad_gate = grad_h * up * silu'(gate)        grad_up = grad_h * silu(gate)
struct SwigluProductBackward {
  Tensor grad_y, down;        // [R, out], [out, E]
  Tensor gate, up;            // [R, E], rows at any stride
  Tensor grad_gate, grad_up;  // [R, E] written, rows at any stride
  Tensor h;                   // [R, E] written once more with the bits of the forward; undefined: not wanted
};

/// Whether there are kernels for these: bf16, widths that are multiples of 8, rows that begin at multiples of 16 bytes, on sm_90a; and
/// whether they are worth it, with tiles enough for every multiprocessor.
bool swiglu_products_fit_cuda(const Tensor& x, const Tensor& gate_up, const Tensor& down);
void swiglu_product_cuda(const SwigluProduct&);
void swiglu_product_bwd_cuda(const SwigluProductBackward&);

}  // namespace longhand
