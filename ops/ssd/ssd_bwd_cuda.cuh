// What the kernels of ssd's backward share: their arguments, and the end of a head's work in a chunk.
#pragma once
#include "ops/ssd/ssd_cuda.cuh"

namespace longhand {

template <class T>
struct SsdChunkBwdArgs {
  TokenRows<const T> x, grad_y, B_t, C_t, dt_raw;
  TokenRows<T> grad_x, grad_dt, grad_B, grad_C;  // data null: not wanted. grad_B, grad_C only when parts == 1
  float *parts_B, *parts_C;                      // [parts, B, T, G, N] when parts > 1
  const T *states, *state_grads;                 // [B, chunks, H, P, N]
  const float* dt;                               // [B, H, chunks, 64]
  const LogDecay<T>* lambda;                     // [B, H, chunks, 64]
  const float *A_log, *dt_bias, *D_skip;
  bool D_per_channel;
  float* sums;  // [B, chunks, H, P + 2]: dD by channel, then sum of dt * da, then d(dt_bias)
  float dt_min, dt_max;
  int64_t B, tokens, H, G, chunks, parts, heads_per_part;
  int P, N;
};

/// Takes the chunks with products of warpgroups, where this GPU, this build and these shapes allow it; false: nothing was done.
bool launch_ssd_chunk_bwd_warpgroups(const SsdChunkBwdArgs<Bf16>& args, const CudaContext& context);

// --- in kernels -----------------------------------------------------------------------------------------------

constexpr unsigned kAllLanes = 0xffffffffu;

/// What a block works on: tokens [t0, t0 + valid) of a row, and of a group's heads, cut into parts, those in [h_first, h_end).
struct ChunkPlace {
  int64_t part, group, row_chunk, chunk, b, t0, h_first, h_end;  // row_chunk: a chunk of all rows
  int valid;
};
template <class T>
__device__ __forceinline__ ChunkPlace chunk_place(const SsdChunkBwdArgs<T>& a) {
  const int64_t part = blockIdx.x % a.parts, group = blockIdx.x / a.parts % a.G, row_chunk = blockIdx.x / a.parts / a.G,
                chunk = row_chunk % a.chunks, b = row_chunk / a.chunks;
  const int64_t t0 = chunk * kChunk, left_tokens = a.tokens - t0;
  const int64_t heads = a.H / a.G, h_first = group * heads + part * a.heads_per_part;
  const int64_t h_limit = h_first + a.heads_per_part, h_end = h_limit < (group + 1) * heads ? h_limit : (group + 1) * heads;
  return {part, group, row_chunk, chunk, b, t0, h_first, h_end, static_cast<int>(left_tokens < kChunk ? left_tokens : kChunk)};
}

/// Sum over the four lanes of a quad (a row of an accumulator).
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}
/// Sum over the lanes that hold one column.
__device__ __forceinline__ float column_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 4);
  v += __shfl_xor_sync(kAllLanes, v, 8);
  return v + __shfl_xor_sync(kAllLanes, v, 16);
}

/// The end of a head's work in a chunk, by one warp: grad_dt, and the sums of the chunk for A_log, D and dt_bias. Of Sums, for token t:
///   behind(t)      late_t + row sum - column sum of W       before(t)     early_t            states()      <R, S>
///   through_dt(t)  V_t . x_t                                through_D(p)  sum of dY_p x_p over the chunk
/// What the end of a head's work reads from global memory: to be asked for well before.
struct HeadEnd {
  float A, bias, last /* lambda of the chunk's last token */, raw[2], dt[2] /* of tokens lane and lane + 32 */;
};
template <class T>
__device__ __forceinline__ HeadEnd load_head_end(const SsdChunkBwdArgs<T>& a, int64_t b, int64_t h, int64_t chunk, int valid) {
  const int64_t at_steps = ((b * a.H + h) * a.chunks + chunk) * kChunk, t0 = chunk * kChunk;
  const int lane = threadIdx.x % 32;
  HeadEnd end;
  end.A = a.A_log[h];
  end.bias = a.dt_bias[h];
  end.last = static_cast<float>(a.lambda[at_steps + kChunk - 1]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = lane + 32 * half, existing = t < valid ? t : valid - 1;
    end.raw[half] = widen(a.dt_raw.data[b * a.dt_raw.batch + (t0 + existing) * a.dt_raw.token + h]);
    end.dt[half] = a.dt[at_steps + t];
  }
  return end;
}

template <class T, class Sums>
__device__ __forceinline__ void finish_head(const SsdChunkBwdArgs<T>& a, const Sums& s, const HeadEnd& end, int64_t b, int64_t h,
                                            int64_t chunk, int valid) {
  const int lane = threadIdx.x % 32;
  const int64_t t0 = chunk * kChunk;
  float behind[2], before[2];  // sums over s >= t and over s < t, two tokens per lane
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = lane + 32 * half;
    behind[half] = s.behind(t);
    before[half] = s.before(t);
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float more_behind = __shfl_down_sync(kAllLanes, behind[half], distance),
                  more_before = __shfl_up_sync(kAllLanes, before[half], distance);
      if (lane + distance < 32) behind[half] += more_behind;
      if (lane >= distance) before[half] += more_before;
    }
  behind[0] += __shfl_sync(kAllLanes, behind[1], 0);
  const float first_half = __shfl_sync(kAllLanes, before[0], 31);
  before[1] += first_half;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // exclusive
    const float previous = __shfl_up_sync(kAllLanes, before[half], 1);
    before[half] = lane > 0 ? previous : half == 0 ? 0.0f : first_half;
  }
  const float whole = s.states() * decay_of(end.last), A = -expf(end.A);
  float sum_A = 0, sum_bias = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = lane + 32 * half;
    const float da = behind[half] + before[half] + whole;
    const float raw = end.raw[half] + end.bias;
    const float unclamped = raw > 20.0f ? raw : log1pf(expf(raw)), slope = raw > 20.0f ? 1.0f : 1.0f / (1.0f + expf(-raw));
    const bool inside = t < valid && unclamped >= a.dt_min && unclamped <= a.dt_max;
    const float grad = inside ? (s.through_dt(t) + A * da) * slope : 0.0f;
    if (t < valid) sum_A += end.dt[half] * da;
    sum_bias += grad;
    if (t < valid && a.grad_dt.data != nullptr) a.grad_dt.data[b * a.grad_dt.batch + (t0 + t) * a.grad_dt.token + h] = narrow<T>(grad);
  }
  sum_A = warp_sum(sum_A);
  sum_bias = warp_sum(sum_bias);
  float* sums = a.sums + ((b * a.chunks + chunk) * a.H + h) * (a.P + 2);
  for (int p = lane; p < a.P; p += 32) sums[p] = s.through_D(p);
  if (lane == 0) {
    sums[a.P] = sum_A;
    sums[a.P + 1] = sum_bias;
  }
}

}  // namespace longhand
