// How kernels see tensors [B, T, ...]: element strides over B and T; the axes behind T are packed.
#pragma once
#include "core/tensor.h"

namespace longhand {

/// A tensor [B, T, ...] whose axes behind T are contiguous among themselves.
struct TokenStrides {
  int64_t batch = 0, token = 0;
  int64_t at(int64_t b, int64_t t) const { return b * batch + t * token; }
};
inline TokenStrides token_strides(const Tensor& t) {
  if (!t.defined()) return {};
  return {t.stride(0), t.stride(1)};
}

/// Whether the axes behind T are packed, so that TokenStrides describes the tensor.
inline bool packed_behind_tokens(const Tensor& t) {
  int64_t expected = 1;
  for (int axis = t.rank() - 1; axis >= 2; --axis) {
    if (t.dim(axis) > 1 && t.stride(axis) != expected) return false;
    expected *= t.dim(axis);
  }
  return true;
}

/// `t` itself when its axes behind T are packed, or when it is undefined; else a contiguous copy.
inline Tensor with_packed_tokens(const Tensor& t) {
  return !t.defined() || packed_behind_tokens(t) ? t : t.contiguous();
}

/// `buffer` itself when kernels can write into it that way, else a new tensor like it.
inline Tensor writable_packed_tokens(const Tensor& buffer) {
  return packed_behind_tokens(buffer) ? buffer : Tensor::empty(buffer.device(), buffer.dtype(), buffer.shape());
}

}  // namespace longhand
