// What every chunk of gla gives by itself, forward and backward: what the kernels are told, and which chunks are mild.
//
// A chunk of a head is mild when no column decays over it by more than kMildDecay. Then the decay between two of its tokens is the product
// of a decay from the chunk's beginning, at most 1, and the reciprocal of another one, at most 1 / kMildDecay: all pairs of the chunk are
// one product of matrices, where squares at every scale (README.md) take twenty times the instructions. Every exponent is still a sum of
// gates of one sign, an operand is rounded once as in the squares, and a float's and a bf16's exponents have room for the reciprocal: of
// gradients, too, down to 2^-62 of what they multiply. Kernels for mild chunks treat all chunks. Those for squares come behind them, a few
// blocks that look at the decays of all chunks, and do again what is not mild.
#pragma once
#include "ops/common/warpgroup_instructions.cuh"
#include "ops/gla/gla_cuda.cuh"

namespace longhand {

constexpr float kMildDecay = 0x1p-64f;
constexpr float kLog2OfNothing = -126.0f;  // below, exp2_approx gives 0

/// What a block of a kernel for squares treats: its own piece (a chunk of a head, or a slice of its columns), or of several those that are
/// not mild.
struct SteepSearch {
  static constexpr int kMost = 64;  // pieces a block
  const float* decay = nullptr;     // [units, D]; null: every piece is treated
  int64_t pieces = 0;               // units times slices; a slice has `columns` of a unit's D
  int D = 0, slices = 1, columns = 0, per_block = 1;

  static SteepSearch of_all(int64_t pieces) { return {nullptr, pieces}; }
  static SteepSearch among(const float* decay, int64_t units, int D, int slices, int columns, int64_t blocks_at_once) {
    const int64_t pieces = units * slices, wanted = (pieces + blocks_at_once - 1) / blocks_at_once;
    return {decay, pieces, D, slices, columns, static_cast<int>(wanted < kMost ? wanted : kMost)};
  }
  dim3 grid() const { return dim3(static_cast<unsigned>((pieces + per_block - 1) / per_block)); }

  /// treat(piece), by all threads of the block together.
  template <class F>
  __device__ __forceinline__ void each(F&& treat) const {
    __shared__ bool steep[kMost];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * per_block;
    const int count = static_cast<int>(pieces - first < per_block ? pieces - first : per_block);
    if (decay != nullptr) {
      const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32),
                lane = static_cast<int>(threadIdx.x % 32);
      for (int i = warp; i < count; i += warps) {
        const float* const of_piece = decay + (first + i) / slices * D + (first + i) % slices * columns;
        bool any = false;
        for (int m = lane; m < columns; m += 32) any = any || !(of_piece[m] >= kMildDecay);  // NaN is not mild
        any = __any_sync(0xffffffffu, any);
        if (lane == 0) steep[i] = any;
      }
      __syncthreads();
    }
    for (int i = 0; i < count; ++i) {
      if (decay != nullptr && !steep[i]) continue;
      treat(first + i);
      __syncthreads();  // before shared memory is used anew
    }
  }
};

template <class T>
struct GlaPrepareArgs {
  TokenRows<const T> q, k, gate;
  T *decayed_q, *decayed_k, *scores;
  float* decay;
  GateArgs gates;
  float scale;
  int64_t tokens, H, chunks;
  int Dk, D;
  SteepSearch search;
};

template <class T>
struct GlaChunkBwdArgs {
  TokenRows<const T> q, k, v, gate, grad_o;
  TokenRows<T> grad_q, grad_k, grad_gate;  // data null: not wanted
  const T *states, *state_grads;           // [B, chunks, H, Dv, D]
  GateArgs gates;
  float scale;
  int64_t B, tokens, H, chunks;
  int Dk, Dv, D, slices, stages;
  SteepSearch search;
};

/// Whether kernels for mild chunks can run: on this GPU, in this build, for these shapes (whole chunks, 16-byte copies).
bool gla_prepare_has_mild(const GlaPrepareArgs<Bf16>& args, const CudaContext& context);
void launch_gla_prepare_mild(const GlaPrepareArgs<Bf16>& args, int64_t units, const CudaContext& context);
bool gla_chunk_bwd_has_mild(const GlaChunkBwdArgs<Bf16>& args, const CudaContext& context);
void launch_gla_chunk_bwd_mild(const GlaChunkBwdArgs<Bf16>& args, const CudaContext& context);

#if LONGHAND_WARPGROUP_INSTRUCTIONS
/// acc [64, 32] += a [64, 16] * b [16, 32], both summed along the rows of their panels.
__device__ __forceinline__ void multiply_half_panel(float (&acc)[4][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"
      : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]), "+f"(acc[1][0]), "+f"(acc[1][1]), "+f"(acc[1][2]),
        "+f"(acc[1][3]), "+f"(acc[2][0]), "+f"(acc[2][1]), "+f"(acc[2][2]), "+f"(acc[2][3]), "+f"(acc[3][0]), "+f"(acc[3][1]),
        "+f"(acc[3][2]), "+f"(acc[3][3])
      : "l"(a), "l"(b));
}
#endif

/// Two gates of columns that do not exist: they keep all.
template <bool logit>
__device__ __forceinline__ Two<Bf16> no_gates() {
  return {logit ? 0x7f807f80u : 0u};  // logits of infinity
}

/// Of a lane's two columns in its leaf, the decays over the whole chunk: from its beginning through a token, from behind a token to its
/// end.
struct ChunkDecays {
  float2 from_begin[kLeafTokens], to_end[kLeafTokens], whole, inverse;  // inverse: 1 / whole

  /// from the tokens' gates; leaf_sums as below
  __device__ __forceinline__ void form(const Two<Bf16> (&gate)[kLeafTokens], const GateArgs& gates, unsigned leaf, float* leaf_sums) {
    float2 log2[kLeafTokens];
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      const float2 given = gate[i].wide();
      log2[i] = make_float2(log2_gate<Bf16>(given.x, gates), log2_gate<Bf16>(given.y, gates));
    }
    form(log2, leaf, leaf_sums);
  }

  /// from the logarithms of each token's decay; leaf_sums [8][64] is written and read, with a barrier of the block in between
  __device__ __forceinline__ void form(const float2 (&log2)[kLeafTokens], unsigned leaf, float* leaf_sums) {
    const unsigned column = 2 * (threadIdx.x % 32);
    float2 own = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) own = own + log2[i];
    *reinterpret_cast<float2*>(leaf_sums + leaf * kSlice + column) = own;
    float2 alpha = exp2_of(log2[0]);
    from_begin[0] = alpha;
#pragma unroll
    for (int i = 1; i < kLeafTokens; ++i) {
      to_end[i - 1] = alpha = exp2_of(log2[i]);
      from_begin[i] = from_begin[i - 1] * alpha;
    }
    to_end[kLeafTokens - 1] = make_float2(1.0f, 1.0f);
#pragma unroll
    for (int i = kLeafTokens - 2; i >= 0; --i) to_end[i] = to_end[i] * to_end[i + 1];
    __syncthreads();
    float2 before = make_float2(0, 0), behind = before;
#pragma unroll
    for (unsigned other = 0; other < kLeaves; ++other) {
      const float2 sum = *reinterpret_cast<const float2*>(leaf_sums + other * kSlice + column);
      if (other < leaf) before = before + sum;
      if (other > leaf) behind = behind + sum;
    }
    const float2 total = before + own + behind, first = exp2_of(before), last = exp2_of(behind);
    whole = exp2_of(total);
    inverse = exp2_of(-1.0f * total);
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      from_begin[i] = first * from_begin[i];
      to_end[i] = last * to_end[i];
    }
  }
};

}  // namespace longhand
