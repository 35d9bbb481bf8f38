// The elementwise loops behind copy, fill and add_scaled on a GPU; implemented in tensor_cuda.cu. For core's own files only.
#pragma once
#include "core/tensor.h"

namespace longhand {

void copy_cuda(const Tensor& dst, const Tensor& src);  // same device, any dtypes and strides
void fill_cuda(const Tensor& dst, double value);
void add_scaled_cuda(const Tensor& dst, const Tensor& src, double scale);
void multiply_cuda(const Tensor& dst, double scale);
void transfer_cuda(const Tensor& dst, const Tensor& src);  // between host and device: contiguous, same dtype

}  // namespace longhand
