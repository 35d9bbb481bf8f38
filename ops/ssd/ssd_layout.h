// How the kernels of ssd see its tensors: element strides over B and T; the axes behind T are packed.
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

struct SsdSizes {
  int64_t B, T, H, P, G, N;
  int64_t heads_per_group() const { return H / G; }
};
inline SsdSizes ssd_sizes(const Tensor& x, const Tensor& B_t) {
  return {x.dim(0), x.dim(1), x.dim(2), x.dim(3), B_t.dim(2), B_t.dim(3)};
}

}  // namespace longhand
