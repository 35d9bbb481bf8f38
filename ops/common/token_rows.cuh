// Tensors [B, T, ...] as kernels of the chunked ops see them, and how those are launched.
#pragma once
#include <cuda_runtime.h>

#include "core/cuda_context.h"
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

template <class Kernel, class Args>
void launch(Kernel kernel, const char* name, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const Args& args) {
  if (shared > 48 * 1024)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  kernel<<<grid, block, shared, stream>>>(args);
  launch_check(name, grid, block, shared);
}

inline int64_t chunk_count(int64_t tokens) {
  return (tokens + 63) / 64;
}
inline int rounded_up(int64_t value, int multiple) {
  return static_cast<int>((value + multiple - 1) / multiple * multiple);
}

}  // namespace longhand
