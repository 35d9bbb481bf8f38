// What the two CUDA files of ssd share: the steps of all tokens, and the walks that carry a P x N state over the chunks.
#pragma once
#include "ops/common/token_rows.cuh"
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

/// The widths of N that kernels are made for; others are padded with zeros in shared memory.
inline int padded_state_dim(int64_t N) {
  return N <= 64 ? 64 : N <= 128 ? 128 : 256;
}

}  // namespace longhand
