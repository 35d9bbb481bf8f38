// SwiGLU: the gate of a position-wise network.
#pragma once
#include "autograd/variable.h"

namespace longhand {

/// y = silu(gate) * up,  elementwise
/// gate, up  [.., E]  f32 | bf16 (CUDA) | f64 (CPU); strided views allowed
/// returns   [.., E]  dtype of gate, contiguous; computed in f32 (f64), one rounding at the end
/// saves     gate, up; silu(gate) is computed again in the backward
/// errors    ShapeError, DtypeError, DeviceError naming both tensors
/// source    Shazeer 2020, arXiv:2002.05202, Eq. 6
Variable swiglu(const Variable& gate, const Variable& up);

/// The position-wise network with this gate, as a whole.
///   gate = x Wg^T,  up = x Wu^T        h = silu(gate) * up        y = h Wd^T
/// x        [.., in]    f32 | bf16 (CUDA) | f64 (CPU); the rows may be strided
/// gate_up  [2 E, in]   Wg, and Wu behind it; dtype of x
/// down     [out, E]    Wd; dtype of x
/// returns  [.., out]   dtype of x, which gate, up, h and their gradients are rounded to as well; sums in f32 (f64 when x is f64)
/// saves    x, gate, up and h; from the level light on no h, from projections on x alone (autograd/recompute.h)
/// holds    the same as linear(swiglu(halves of linear(x, gate_up)), down), up to the order of sums: where there are products with swiglu
///          in their epilogues (swiglu_mlp_kernels.h says for which), gate, up and the gradient of h are not read once more
/// errors   ShapeError, DtypeError, DeviceError naming the tensors
/// source   Shazeer 2020, arXiv:2002.05202, Eq. 6
Variable swiglu_mlp(const Variable& x, const Variable& gate_up, const Variable& down);

}  // namespace longhand
