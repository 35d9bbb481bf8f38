// Device pieces that kernels share: packs of elements moved in one access, sums in a fixed order, and the activations in f32.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace longhand {

constexpr int kWarp = 32;

// --- elements and packs ---------------------------------------------------------------------------------------

__device__ inline float to_f32(float v) {
  return v;
}
__device__ inline float to_f32(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

/// `n` neighbouring elements that travel in one load or store (two when they are more than 16 bytes).
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T at[n];
};

template <int n, class T>
__device__ Pack<T, n> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}
template <int n, class T>
__device__ void store_pack(T* to, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

/// Rounds to nearest, ties to even.
template <class T, int n>
__device__ Pack<T, n> round_to(const float (&values)[n]) {
  Pack<T, n> pack;
  if constexpr (sizeof(T) == 2 && n % 2 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[i], values[i + 1]);
      pack.at[i] = pair.x;
      pack.at[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) pack.at[i] = static_cast<T>(values[i]);
  }
  return pack;
}

// --- sums in a fixed order --------------------------------------------------------------------------------------

/// The sum over the 32 lanes, in every lane.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) v += __shfl_xor_sync(0xffffffffu, v, apart);
  return v;
}

/// The sum over all threads of a block (a multiple of 32), in every thread. `scratch` holds one float per warp; a caller that loops
/// alternates between two of them, then one barrier per call is enough.
__device__ inline float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < warps; ++w) sum += scratch[w];
  return sum;
}

// --- activations ------------------------------------------------------------------------------------------------

/// 2^x by ex2.approx.ftz: 2 ulp, subnormal results become 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// log2(x) by lg2.approx.ftz: 2^-22 absolute between 1/2 and 2, 2^-22 relative elsewhere.
__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// 1 / x by rcp.approx.ftz: 1 ulp, 0 for infinity.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2e = 1.44269504f;
/// Through exp2_approx and reciprocal_approx: relative error about (4 + |x| / 2) * 2^-23; below -88 the exponential is infinite and the
/// result 0.
__device__ inline float sigmoid(float x) {
  return reciprocal_approx(1.0f + exp2_approx(-kLog2e * x));
}
__device__ inline float silu(float x) {
  return x * sigmoid(x);
}
/// d silu / dx, given s = sigmoid(x)
__device__ inline float silu_slope(float x, float s) {
  return s * (1.0f + x * (1.0f - s));
}
/// log(1 + e^x): x itself above 20, log1pf (not approximate) below, so that it keeps its relative precision for very negative x.
__device__ inline float softplus(float x) {
  return x > 20.0f ? x : log1pf(__expf(x));
}

}  // namespace longhand
