// What the two CUDA files of ssd share: the steps of all tokens, and the walks that carry a P x N state over the chunks.
#pragma once
#include <cuda_runtime.h>

#include "core/cuda_context.h"
#include "ops/ssd/ssd.h"
#include "ops/ssd/ssd_layout.h"

namespace longhand {

/// dt after softplus and clamp, and its decays, by chunks of kChunk tokens; tokens behind T have dt = 0.
struct SsdSteps {
  Tensor dt;      // [B, H, chunks, 64] f32
  Tensor lambda;  // [B, H, chunks, 64] f32: log2 of the decay from the chunk's beginning through the token
};
SsdSteps ssd_steps_cuda(const SsdInputs& in, const SsdOptions& options);

/// The state at the beginning of every chunk, [B, chunks, H, P, N] in the dtype of x, for use in products; carried in f32.
Tensor ssd_chunk_states_cuda(const SsdInputs& in, const SsdSteps& steps);

/// The gradient of the state at the end of every chunk, laid out likewise; the gradient of h0 goes to grad_h0 where defined.
Tensor ssd_chunk_state_gradients_cuda(const SsdInputs& in, const SsdSteps& steps, const Tensor& grad_y, const Tensor& grad_h_T,
                                      const Tensor& grad_h0);

// What fits into registers and shared memory of the kernels.
constexpr int kMaxHeadDim = 128, kMaxStateDim = 256, kMaxStateDimF32 = 128;
void require_ssd_cuda_sizes(const SsdInputs& in);  // ValueError naming x and B_t

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
/// The widths of N that kernels are made for; others are padded with zeros in shared memory.
inline int padded_state_dim(int64_t N) {
  return N <= 64 ? 64 : N <= 128 ? 128 : 256;
}

}  // namespace longhand
