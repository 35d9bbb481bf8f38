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
GlaPrepared gla_prepare_cuda(const GlaInputs& in, const GlaRule& rule);

/// Turned states at the borders of chunks, [B, chunks, H, Dv, D] in the dtype of q, for use in products; carried in f32.
struct GlaBorders {
  Tensor states;     // at the beginning of every chunk; undefined unless with_states
  Tensor gradients;  // of the state at the end of every chunk
};
/// On the way the gradients of v and h0, where defined.
GlaBorders gla_borders_cuda(const GlaInputs& in, const GlaPrepared& prepared, const Tensor& grad_o, const Tensor& grad_h_T,
                            const Tensor& grad_v, const Tensor& grad_h0, bool with_states);

constexpr int kMaxKeyDim = 256;  // a warp keeps 16 rows of the turned state in registers
bool gla_takes_keys_whole(const GlaInputs& in);

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
/// log2 of a token's decay, and d gate / d given (gate in natural logarithms): 0 where gate_min holds.
struct GateAndSlope {
  float log2, slope;
};
template <class T>
__device__ __forceinline__ GateAndSlope gate_and_slope(float given, const GateArgs& a) {
  if (!a.logit) return {given * kLog2e, 1.0f};
  const float e = exp2_approx(-kLog2e * fabsf(given)), r = reciprocal_approx(1.0f + e);
  const float slope = (given > 0.0f ? e * r : r) * a.inverse_normalizer;  // of logsigmoid: sigmoid(-given)
  if constexpr (sizeof(T) == 2) {  // lg2.approx of 1 + e: 2^-22 absolute, far below what bf16 leaves of the logits
    const float log2 = (fminf(kLog2e * given, 0.0f) - log2_approx(1.0f + e)) * a.inverse_normalizer, least = a.gate_min * kLog2e;
    return log2 < least ? GateAndSlope{least, 0.0f} : GateAndSlope{log2, slope};
  }
  const float gate = unclamped_gate(given, a);
  return gate < a.gate_min ? GateAndSlope{a.gate_min * kLog2e, 0.0f} : GateAndSlope{gate * kLog2e, slope};
}
template <class T>
__device__ __forceinline__ float log2_gate(float given, const GateArgs& a) {
  return gate_and_slope<T>(given, a).log2;
}

// A block works on a chunk, 64 columns of Dk (a slice) at a time. Each of its eight warps has eight tokens (a leaf), each lane two
// neighbouring columns of them: all that goes token by token or column by column stays in registers, and only what products need is laid
// out in shared memory. The decays are held by blocks of w = 8, 16, 32, then 64 tokens: from_begin[i] from the beginning of the block of i
// through i, to_end[j] from behind j to the end of its block. See gla_cpu.cpp for how they cover all pairs. Inside a leaf they are products
// of the tokens' decays, beyond it exponentials (ex2.approx) of sums of gates of one sign: never above 1.
constexpr int kSlice = 64, kSliceThreads = 256;
constexpr int kLeafTokens = 8, kLeaves = kChunk / kLeafTokens;

/// Two neighbouring elements as they lie in memory.
template <class T>
struct Two;
template <>
struct Two<Bf16> {
  uint32_t bits;
  __device__ __forceinline__ float2 wide() const { return unpack(bits); }
};
template <>
struct Two<float> {
  float2 bits;
  __device__ __forceinline__ float2 wide() const { return bits; }
};

/// A leaf of a lane's two columns from global memory; zeros where rows or columns do not exist. aligned: where both columns exist they lie
/// as Two in memory.
template <class T>
__device__ __forceinline__ void load_leaf(Two<T> (&to)[kLeafTokens], const T* from, int64_t row_stride, int rows, int columns,
                                          bool aligned) {
  if (aligned && rows >= kLeafTokens && columns >= 2) {
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i, from += row_stride) to[i] = *reinterpret_cast<const Two<T>*>(from);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLeafTokens; ++i) {
    T two[2] = {narrow<T>(0.0f), narrow<T>(0.0f)};
    if (i < rows && columns > 0) two[0] = from[i * row_stride];
    if (i < rows && columns > 1) two[1] = from[i * row_stride + 1];
    to[i] = *reinterpret_cast<const Two<T>*>(two);
  }
}

/// The other way round.
template <class T>
__device__ __forceinline__ void store_leaf(T* to, int64_t row_stride, const float2 (&values)[kLeafTokens], int rows, int columns,
                                           bool aligned) {
  if (aligned && rows >= kLeafTokens && columns >= 2) {
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i, to += row_stride) store_two(to, values[i].x, values[i].y, true, true);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLeafTokens; ++i)
    if (i < rows && columns > 0) store_two(to + i * row_stride, values[i].x, values[i].y, columns > 1, false);
}

__device__ __forceinline__ float2 operator*(float2 a, float2 b) {
  return make_float2(a.x * b.x, a.y * b.y);
}
__device__ __forceinline__ float2 operator*(float a, float2 b) {
  return make_float2(a * b.x, a * b.y);
}
__device__ __forceinline__ float2 operator+(float2 a, float2 b) {
  return make_float2(a.x + b.x, a.y + b.y);
}
__device__ __forceinline__ float2 exp2_of(float2 v) {
  return make_float2(exp2_approx(v.x), exp2_approx(v.y));
}

/// The decays of a lane's two columns in its leaf.
struct LeafDecays {
  float2 from_begin[kLeafTokens], to_end[kLeafTokens];

  __device__ __forceinline__ void start(const float2 (&alpha)[kLeafTokens]) {  // from the decay of each token
    from_begin[0] = alpha[0];
    to_end[kLeafTokens - 1] = make_float2(1.0f, 1.0f);
#pragma unroll
    for (int i = 1; i < kLeafTokens; ++i) {
      from_begin[i] = from_begin[i - 1] * alpha[i];
      to_end[kLeafTokens - 1 - i] = to_end[kLeafTokens - i] * alpha[kLeafTokens - i];
    }
  }
  /// From blocks of `width` tokens to blocks of twice that. leaf_sums [8][64]: log2 of each leaf's decay.
  __device__ __forceinline__ void widen(int width, int leaf, const float* leaf_sums) {
    const int leaves = width / kLeafTokens, block = leaf / leaves, lane = threadIdx.x % 32;
    float2 sum = make_float2(0, 0);
    for (int other = (block ^ 1) * leaves; other < ((block ^ 1) + 1) * leaves; ++other)
      sum = sum + *reinterpret_cast<const float2*>(leaf_sums + other * kSlice + 2 * lane);
    const float2 factor = exp2_of(sum);
    if (block % 2 == 1)
#pragma unroll
      for (int i = 0; i < kLeafTokens; ++i) from_begin[i] = factor * from_begin[i];
    else
#pragma unroll
      for (int i = 0; i < kLeafTokens; ++i) to_end[i] = factor * to_end[i];
  }
};

/// The decay of a lane's two columns over the whole chunk.
__device__ __forceinline__ float2 chunk_decay(const float* leaf_sums) {
  float2 sum = make_float2(0, 0);
#pragma unroll
  for (int leaf = 0; leaf < kLeaves; ++leaf) sum = sum + *reinterpret_cast<const float2*>(leaf_sums + leaf * kSlice + 2 * threadIdx.x % 64);
  return exp2_of(sum);
}

}  // namespace longhand
