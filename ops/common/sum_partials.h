// The second half of a deterministic reduction: blocks leave partial sums, one row each; this adds the rows in a fixed order.
#pragma once
#include "autograd/tape.h"

namespace longhand {

/// destination[i] = beta * destination[i] + sum_p partials[p, i], p in a fixed order; beta = 0 does not read the destination.
/// partials     [P, n]  f32, contiguous, on CUDA; P = 0 gives a sum of zero
/// destination  n contiguous f32 elements of any shape
void sum_partials_cuda(const Tensor& partials, const Accumulation& target);

/// The same for columns of two destinations that lie side by side: partials [P, n + m].
void sum_partials_cuda(const Tensor& partials, const Accumulation& first, const Accumulation& second);

}  // namespace longhand
