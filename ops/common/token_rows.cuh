// Tensors [B, T, ...] as kernels of the chunked ops see them.
#pragma once
#include <cuda_runtime.h>

#include "core/tensor.h"

namespace longhand {

/// A tensor [B, T, ...] for kernels.
template <class T>
struct TokenRows {
  T* data = nullptr;
  int64_t batch = 0, token = 0;
  bool vectors = false;  // a head's (group's) piece of a row may be moved by 16 bytes
};
template <class T>
TokenRows<T> token_rows(const Tensor& t, int64_t width) {
  TokenRows<T> rows;
  if (!t.defined()) return rows;
  rows.data = static_cast<T*>(t.raw());
  rows.batch = t.stride(0);
  rows.token = t.stride(1);
  const int64_t unit = 16 / static_cast<int64_t>(sizeof(T));
  rows.vectors = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch % unit == 0 && rows.token % unit == 0 && width % unit == 0;
  return rows;
}

inline int64_t chunk_count(int64_t tokens) {
  return (tokens + 63) / 64;
}
inline int rounded_up(int64_t value, int multiple) {
  return static_cast<int>((value + multiple - 1) / multiple * multiple);
}

}  // namespace longhand
