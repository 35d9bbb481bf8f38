// What the two CUDA files of ssd share: the steps of all tokens, and the walks that carry a P x N state over the chunks.
#pragma once
#include <type_traits>

#include "ops/common/cuda_math.cuh"
#include "ops/common/launch.cuh"
#include "ops/common/tile_product.cuh"
#include "ops/common/token_rows.cuh"
#include "ops/ssd/ssd.h"
#include "ops/ssd/ssd_layout.h"

namespace longhand {

/// dt after softplus and clamp, and its decays, by chunks of kChunk tokens; tokens behind T have dt = 0.
struct SsdSteps {
  Tensor dt;      // [B, H, chunks, 64] f32
  Tensor lambda;  // [B, H, chunks, 64] LogDecay: log2 of the decay from the chunk's beginning through the token
};

/// Decays are exp2 of differences of sums that grow to thousands: in f32 those would cost 2^-13, which bf16 does not notice and f32 does.
template <class T>
using LogDecay = std::conditional_t<sizeof(T) == 2, float, double>;
SsdSteps ssd_steps_cuda(const SsdInputs& in, const SsdOptions& options);

/// In the dtype of x, for use in products; carried in f32.
struct SsdBorders {
  Tensor states;       // [B, chunks, H, P, N]: the state at the beginning of every chunk
  Tensor state_grads;  // [B, chunks, H, P, N]: the gradient of the state at the end of every chunk
};
/// The gradient of h0 goes to grad_h0 where defined.
SsdBorders ssd_borders_cuda(const SsdInputs& in, const SsdSteps& steps, const Tensor& grad_y, const Tensor& grad_h_T,
                            const Tensor& grad_h0);

// What fits into registers and shared memory of the kernels.
constexpr int kMaxHeadDim = 128, kMaxStateDim = 256, kMaxStateDimF32 = 128;
void require_ssd_cuda_sizes(const SsdInputs& in);  // ValueError naming x and B_t

/// The widths of N that kernels are made for; others are padded with zeros in shared memory.
inline int padded_state_dim(int64_t N) {
  return N <= 64 ? 64 : N <= 128 ? 128 : 256;
}

// --- in kernels -----------------------------------------------------------------------------------------------

/// The decay whose log2 is the difference of two sums, at most 1 whatever their rounding.
template <class L>
__device__ __forceinline__ float decay_of(L log2_decay) {
  return exp2_approx(fminf(static_cast<float>(log2_decay), 0.0f));
}

/// dt and lambda of a chunk, one behind the other in shared memory, by `threads` threads; complete as a tile is.
template <class L>
__device__ __forceinline__ void copy_steps_async(float* to, const float* dt, const L* lambda, int thread, int threads) {
  constexpr int dt_units = kChunk * 4 / 16, units = dt_units + kChunk * static_cast<int>(sizeof(L)) / 16;
  for (int i = thread; i < units; i += threads)
    copy_16_async(to + 4 * i, i < dt_units ? static_cast<const void*>(dt + 4 * i) : lambda + (i - dt_units) * (16 / sizeof(L)));
}

}  // namespace longhand
