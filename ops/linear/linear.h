// linear: the projection y = x W^T + b over the last axis.
#pragma once
#include "autograd/variable.h"

namespace longhand {

/// Linear map of the last axis.
///   y[r,o] = sum_i x[r,i] * weight[o,i] + bias[o]
/// x        [.., in]     f32 | bf16 (GPU) | f64; the rows may be strided (a slice of a wider projection)
/// weight   [out, in]    dtype of x
/// bias     [out]        dtype of x or f32; absent means zeros
/// returns  [.., out]    dtype of x, contiguous; sums in f32 (f64 when x is f64), one rounding. Beside bf16 a bias in f32 is rounded first,
///          but for in = 16 and out a multiple of 8 on a GPU, where rows of x begin at multiples of 4 bytes: a kernel of its own
/// grads    grad_x in x's dtype; grad_weight and grad_bias are summed in place in f32 (f64): grad_y^T x, column sums of grad_y. Three
///          products; where a GPU is given bf16 with a bias, in = 16 and out a multiple of 8 from 136 to 1024 (GLA's gates: rank 16 and
///          that many keys of all heads), one pass over grad_y
/// errors   ShapeError when weight's second axis is not in, or bias is not [out]; DtypeError when x and weight differ
Variable linear(const Variable& x, const Variable& weight, const Variable& bias = {});

}  // namespace longhand
