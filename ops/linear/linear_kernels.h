// What linear asks of a device beside products (ops/common/gemm.h); for this op's own files only.
#pragma once
#include "autograd/tape.h"

namespace longhand {

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
