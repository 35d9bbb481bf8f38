// How the columns of a row are dealt to the threads of a kernel that keeps whole rows in registers (the norms).
#pragma once
#include "ops/common/cuda_math.cuh"
#include "ops/common/strided_rows.h"

namespace longhand {

constexpr int kRowWarpsPerBlock = 4;  // when a warp owns a row
constexpr int kRowMaxThreads = 512;   // when a block owns a row
static_assert(kRowMaxWidth == kRowMaxThreads * 32);

/// A thread holds per_thread packs of vec elements; thread `lane` of the row's `lanes` threads has the packs at (k * lanes + lane) * vec.
template <int vec, int per_thread, bool warp_per_row>
struct RowSplit {
  static constexpr int kVec = vec, kPerThread = per_thread;
  static constexpr bool kWarpPerRow = warp_per_row;
  static constexpr int kMaxThreads = warp_per_row ? kRowWarpsPerBlock * kWarp : kRowMaxThreads;
  static constexpr int kRowsPerBlock = warp_per_row ? kRowWarpsPerBlock : 1;

  static __device__ int lanes() { return warp_per_row ? kWarp : static_cast<int>(blockDim.x); }
  static __device__ int lane() { return static_cast<int>(warp_per_row ? threadIdx.x % kWarp : threadIdx.x); }
  static __device__ int row_in_block() { return static_cast<int>(warp_per_row ? threadIdx.x / kWarp : 0); }
  static __device__ int column(int k) { return (k * lanes() + lane()) * vec; }

  /// The sum over the row's threads; `turn` counts the calls and chooses one of two scratch rows.
  static __device__ float sum(float v, int turn) {
    if constexpr (warp_per_row) {
      return warp_sum(v);
    } else {
      __shared__ float scratch[2][kRowMaxThreads / kWarp];
      return block_sum(v, scratch[turn & 1]);
    }
  }

  /// Adds up what the rows of a block have summed for their columns and writes one partial row of `width` floats.
  static __device__ void write_partial(const float (&sums)[per_thread][vec], int width, float* partial) {
    if constexpr (warp_per_row) {
      __shared__ float total[kWarp * per_thread * vec];
      for (int w = 0; w < kRowWarpsPerBlock; ++w) {  // warp after warp: a fixed order
        if (row_in_block() == w) {
#pragma unroll
          for (int k = 0; k < per_thread; ++k)
#pragma unroll
            for (int i = 0; i < vec; ++i) total[column(k) + i] = w == 0 ? sums[k][i] : total[column(k) + i] + sums[k][i];
        }
        __syncthreads();
      }
      for (int c = static_cast<int>(threadIdx.x); c < width; c += static_cast<int>(blockDim.x)) partial[c] = total[c];
    } else {
#pragma unroll
      for (int k = 0; k < per_thread; ++k)
#pragma unroll
        for (int i = 0; i < vec; ++i)
          if (column(k) + i < width) partial[column(k) + i] = sums[k][i];
    }
  }
};

/// Calls f(RowSplit<...>, threads per block) with the split for rows of `width`, which is a multiple of vec and at most kRowMaxWidth.
/// one_pack  rows of up to 256 packs that are too wide for a warp are dealt out pack by pack: few registers a thread, many threads a row
/// warp_columns  up to which width a warp has the whole row
template <int vec, bool one_pack = false, int warp_columns = 32 * kWarp, class F>
void split_row(int64_t width, F&& f) {
  const auto threads = [&](int64_t per_thread) {
    return static_cast<unsigned>((width + per_thread * kWarp - 1) / (per_thread * kWarp) * kWarp);
  };
  constexpr unsigned warps = kRowWarpsPerBlock * kWarp;
  if constexpr (vec == 1) {
    if (width <= kRowMaxThreads * 8) return f(RowSplit<1, 8, false>{}, threads(8));
    return f(RowSplit<1, 32, false>{}, threads(32));
  } else {
    if (width <= kWarp * 8) return f(RowSplit<vec, 8 / vec, true>{}, warps);
    if (width <= kWarp * 16) return f(RowSplit<vec, 16 / vec, true>{}, warps);
    if (width <= kWarp * 24) return f(RowSplit<vec, 24 / vec, true>{}, warps);
    if constexpr (warp_columns >= kWarp * 32) {
      if (width <= kWarp * 32) return f(RowSplit<vec, 32 / vec, true>{}, warps);
    }
    if constexpr (one_pack) {
      if (width <= kRowMaxThreads / 2 * vec) return f(RowSplit<vec, 1, false>{}, threads(vec));
    }
    if (width <= kRowMaxThreads * 16) return f(RowSplit<vec, 16 / vec, false>{}, threads(16));
    return f(RowSplit<vec, 32 / vec, false>{}, threads(32));
  }
}

}  // namespace longhand
