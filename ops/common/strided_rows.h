// Rows of a strided view, for kernels: all axes but the last seen as rows that begin at two strides.
#pragma once
#include "core/host_device.h"
#include "core/tensor.h"

namespace longhand {

/// Row i begins at element (i / inner) * outer_stride + (i % inner) * inner_stride. Enough for slices along time ([B, T, C] with B apart)
/// and for a slice of a projection seen as heads ([B, T, H, P] with B and T joined).
struct StridedRows {
  int64_t count = 1;         // product of all axes but the last
  int64_t width = 1;         // the last axis
  int64_t inner = 1;         // rows at inner_stride before the outer stride is taken
  int64_t inner_stride = 0;  // elements
  int64_t outer_stride = 0;  // elements
  LONGHAND_HOST_DEVICE int64_t begin(int64_t row) const {
    if (row < inner) return row * inner_stride;
    const int64_t outer = row / inner;
    return outer * outer_stride + (row - outer * inner) * inner_stride;
  }
};

/// Sees `t` as such rows; `fits` is false when its leading axes need more than two strides (take a contiguous copy then).
StridedRows strided_rows_of(const Tensor& t, bool& fits);

/// `t` itself when it is such rows, else a contiguous copy.
Tensor with_strided_rows(const Tensor& t);

/// The rows of a tensor that with_strided_rows() has returned; an undefined tensor gives no rows.
StridedRows strided_rows_of(const Tensor& t);

/// `buffer` itself when its rows can be written that way, else a new tensor like it.
Tensor writable_strided_rows(const Tensor& buffer);

/// Whether every row begins at a multiple of `elements`, so that it can be read `elements` at a time; true for an undefined tensor.
bool rows_are_aligned(const Tensor& t, int64_t elements);

/// The address of element 0 as a device element type, null for an undefined tensor: how optional tensors reach a kernel.
template <class T>
T* address_of(const Tensor& t) {
  return t.defined() ? static_cast<T*>(t.raw()) : nullptr;
}

/// The widest row that CUDA kernels keep in registers: 32 elements in each of 512 threads.
constexpr int64_t kRowMaxWidth = 16384;

}  // namespace longhand
