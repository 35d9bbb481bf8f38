// embedding: the rows of a table, looked up by token id.
#pragma once
#include "autograd/variable.h"

namespace longhand {

/// Table lookup.
///   y[b,t,:] = weight[tokens[b,t],:]        grad_weight[v,:] = sum of grad_y[b,t,:] over the positions with tokens[b,t] = v
/// tokens   [B, T] (any leading shape)  i32
/// weight   [V, d]       f32 | bf16 (GPU) | f64
/// y_dtype  f32 | bf16 | f64: the dtype of the residual stream
/// returns  [B, T, d]    y_dtype, contiguous
/// order    gradients are summed in f32 (f64) in order of position; no atomics
/// errors   ShapeError, DtypeError; ValueError naming position and value for an id outside [0, V): always on the CPU, on a GPU with
///          LONGHAND_CHECK=1. Without it a GPU cannot stop in the middle of its queue: the row becomes NaN, the kernel prints position and
///          value, and the gradient of that position is left out; nothing is read out of bounds.
Variable embedding(const Tensor& tokens, const Variable& weight, Dtype y_dtype);

}  // namespace longhand
