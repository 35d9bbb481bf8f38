// What linear asks of a device beside products (ops/common/gemm.h); for this op's own files only.
#pragma once
#include "autograd/tape.h"

namespace longhand {

/// y = x W^T + b for a narrow x, such as the input of gates: writing y is all that takes time.
struct NarrowProduct {
  Tensor x, weight, bias, y;  // [R, in], [out, in], [out] f32 or bf16 or undefined, [R, out]
};

/// Whether the kernel takes these: bf16, in = 16, out a multiple of 8 of at most 8192 (there are warps for all columns), rows of y that
/// begin at multiples of 16 bytes, those of x and weight at multiples of 4. Where it does not, linear asks for a product of matrices, as on
/// a CPU.
bool linear_narrow_product_fits_cuda(const NarrowProduct&);
void linear_narrow_product_cuda(const NarrowProduct&);

/// The gradients of y = x W^T + b for a narrow x, such as the input of gates: a product for each would cost a pass over grad_y or more.
struct NarrowGradients {
  Tensor grad_y, x, weight;  // [R, out], [R, in], [out, in]
  Accumulation grad_x, grad_weight, grad_bias;
};

/// Whether the kernel takes these shapes: bf16, in = 16, out a multiple of 8 from 136 to 1024, rows of grad_y and weight that may be moved
/// by 16 bytes. Where it does not, linear forms the gradients by three products, as on a CPU.
bool linear_narrow_fits_cuda(const Tensor& grad_y, const Tensor& weight);
void linear_narrow_bwd_cuda(const NarrowGradients&);

}  // namespace longhand
