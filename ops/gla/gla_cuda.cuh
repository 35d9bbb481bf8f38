// What the CUDA files of gla share: gates and the decays of one chunk, the prepared chunks, and the walks that carry the state over them.
#pragma once
#include "ops/common/cuda_math.cuh"
#include "ops/common/launch.cuh"
#include "ops/common/strided_rows.h"
#include "ops/common/tile_product.cuh"
#include "ops/common/token_rows.cuh"
#include "ops/gla/gla_kernels.h"

namespace longhand {

/// Every chunk's queries and keys with their decays, its scores, and its decay: all that the walks need beside v.
/// D is Dk padded with zeros to 64, 128 or 256; tokens behind T are zeros.
struct GlaPrepared {
  Tensor q;       // [B, chunks, H, 64, D]   scale * q_i * decay from the chunk's beginning through i
  Tensor k;       // [B, chunks, H, 64, D]   k_j * decay from behind j to the chunk's end
  Tensor scores;  // [B, chunks, H, 64, 64]  scale * sum_m q_i k_j decay from behind j through i; 0 for j > i
  Tensor decay;   // [B, chunks, H, D] f32   over the whole chunk
};
GlaPrepared gla_prepare_cuda(const GlaInputs& in, const GlaRule& rule);

/// The state at the beginning of every chunk, turned: [B, chunks, H, Dv, D] in the dtype of q, for use in products; carried in f32.
Tensor gla_chunk_states_cuda(const GlaInputs& in, const GlaPrepared& prepared);

/// The gradient of the state at the end of every chunk, laid out likewise; on the way the gradients of v and h0, where defined.
Tensor gla_chunk_state_gradients_cuda(const GlaInputs& in, const GlaPrepared& prepared, const Tensor& grad_o, const Tensor& grad_h_T,
                                      const Tensor& grad_v, const Tensor& grad_h0);

constexpr int kMaxKeyDim = 256;                    // a warp keeps 16 rows of the turned state in registers
void require_gla_cuda_sizes(const GlaInputs& in);  // ValueError naming q

/// The widths of Dk that kernels are made for; others are padded with zeros.
inline int padded_key_dim(int64_t Dk) {
  return Dk <= 64 ? 64 : Dk <= 128 ? 128 : 256;
}

// --- gates and decays -------------------------------------------------------------------------------------------

/// GlaRule for kernels.
struct GateArgs {
  bool logit;
  float inverse_normalizer, gate_min;
};
inline GateArgs gate_args(const GlaRule& rule) {
  return {rule.logit, static_cast<float>(1 / rule.normalizer), static_cast<float>(rule.gate_min)};
}

/// log(1 + x) for 0 <= x <= 1: 2 artanh(x / (2 + x)) by its series up to the 13th power, remainder below 2e-8 of the value.
__device__ __forceinline__ float log1p_of_fraction(float x) {
  const float s = x * reciprocal_approx(2.0f + x), z = s * s;
  float p = 1.0f / 13.0f;
  p = p * z + 1.0f / 11.0f;
  p = p * z + 1.0f / 9.0f;
  p = p * z + 1.0f / 7.0f;
  p = p * z + 1.0f / 5.0f;
  p = p * z + 1.0f / 3.0f;
  p = p * z + 1.0f;
  return 2.0f * s * p;
}
/// logsigmoid(y) / normalizer; NaN stays NaN.
__device__ __forceinline__ float unclamped_gate(float y, const GateArgs& a) {
  return (fminf(y, 0.0f) - log1p_of_fraction(exp2_approx(-kLog2e * fabsf(y)))) * a.inverse_normalizer;
}
/// log2 of a token's decay.
__device__ __forceinline__ float log2_gate(float given, const GateArgs& a) {
  if (!a.logit) return given * kLog2e;
  const float gate = unclamped_gate(given, a);
  return (gate < a.gate_min ? a.gate_min : gate) * kLog2e;
}
/// d gate / d given, gate in natural logarithms.
__device__ __forceinline__ float gate_slope(float given, const GateArgs& a) {
  if (!a.logit) return 1.0f;
  return unclamped_gate(given, a) < a.gate_min ? 0.0f : sigmoid(-given) * a.inverse_normalizer;
}

// The decays of a chunk are held for a slice of 64 columns of Dk at a time, by blocks of w = 8, 16, 32, then 64 tokens: from_begin[i] from
// the beginning of the block of i through i, to_end[j] from behind j to the end of its block. See gla_cpu.cpp for how they cover all pairs.
// All are exponentials (ex2.approx) of sums of gates of one sign.
constexpr int kSlice = 64, kSliceThreads = 256;
constexpr int kLeafTokens = 8, kLeaves = kChunk / kLeafTokens;
constexpr int kDecayStride = kSlice + 8;  // floats: accumulator fragments, read two columns at a time, meet all banks once

/// In shared memory.
struct SliceDecays {
  float *from_begin, *to_end;  // [64][kDecayStride]
  float* leaf_sums;            // [8][64] log2 of a leaf's decay
};
constexpr int kDecayFloats = kChunk * kDecayStride, kLeafSumFloats = kLeaves * kSlice;

/// A thread of a block of 256 looks after one column and 16 rows (two leaves) wherever work goes by columns.
__device__ __forceinline__ int own_column() {
  return static_cast<int>(threadIdx.x) % kSlice;
}
__device__ __forceinline__ int own_rows() {
  return static_cast<int>(threadIdx.x) / kSlice * 16;
}

/// The decays inside one leaf of one column, from the log2 of its gates.
__device__ __forceinline__ void leaf_decays(const SliceDecays& d, int leaf, int column, const float (&log2_gates)[kLeafTokens]) {
  const int first = leaf * kLeafTokens * kDecayStride + column;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kLeafTokens; ++i) {
    sum += log2_gates[i];
    d.from_begin[first + i * kDecayStride] = exp2_approx(sum);
  }
  d.leaf_sums[leaf * kSlice + column] = sum;
  sum = 0;
#pragma unroll
  for (int i = kLeafTokens - 1; i >= 0; --i) {
    d.to_end[first + i * kDecayStride] = exp2_approx(sum);
    sum += log2_gates[i];
  }
}

/// From blocks of `width` tokens to blocks of twice that; barriers before and after are the caller's.
__device__ __forceinline__ void widen_decays(const SliceDecays& d, int width) {
  const int column = own_column();
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int row = own_rows() + k * kLeafTokens, block = row / width, neighbour = block ^ 1;
    float sum = 0;
    for (int leaf = neighbour * width / kLeafTokens; leaf < (neighbour + 1) * width / kLeafTokens; ++leaf)
      sum += d.leaf_sums[leaf * kSlice + column];
    const float factor = exp2_approx(sum);
    float* decays = (block % 2 == 1 ? d.from_begin : d.to_end) + row * kDecayStride + column;
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) decays[i * kDecayStride] *= factor;
  }
}

/// The decay of a column over the whole chunk.
__device__ __forceinline__ float chunk_decay(const SliceDecays& d, int column) {
  float sum = 0;
#pragma unroll
  for (int leaf = 0; leaf < kLeaves; ++leaf) sum += d.leaf_sums[leaf * kSlice + column];
  return exp2_approx(sum);
}

}  // namespace longhand
