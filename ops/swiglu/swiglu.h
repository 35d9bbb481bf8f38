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

}  // namespace longhand
