// The two halves of embedding per device; arguments have been checked. For embedding's own files.
#pragma once
#include "core/tensor.h"

namespace longhand {

/// y[r,:] = weight[ids[r],:]     ids [R] i32 contiguous, weight [V, d], y [R, d] contiguous
void embedding_fwd_cpu(const Tensor& ids, const Tensor& weight, const Tensor& y);
void embedding_fwd_cuda(const Tensor& ids, const Tensor& weight, const Tensor& y);

/// grad_weight[v,:] = beta * grad_weight[v,:] + sum of grad_y[r,:] over the rows with ids[r] = v, in order of r     beta 0 or 1
/// grad_y [R, d], rows may be strided; grad_weight [V, d] contiguous f32 (f64)
void embedding_bwd_cpu(const Tensor& ids, const Tensor& grad_y, const Tensor& grad_weight, double beta);
void embedding_bwd_cuda(const Tensor& ids, const Tensor& grad_y, const Tensor& grad_weight, double beta);

}  // namespace longhand
