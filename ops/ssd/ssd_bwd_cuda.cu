// SSD on CUDA, backward. The states at chunk beginnings and the gradients of the states at chunk ends come from two walks (ssd_cuda.cu);
// with them every chunk stands alone.
//
// ssd_chunk_bwd_kernel
// moves   per token and head x, dy in, dx out; per chunk and head two states of P N; per chunk and group B_t, C_t in, dB, dC out
// flops   per chunk of Q = 64 and head: dY X' (Q Q P), dC and dB (Q Q N and 2 Q P N each), V (Q Q P and 2 Q P N); C B' once per group
// floor   B 8, T 2048, H 24, P 64, N 128, bf16: 600 MB / 3.0 TB/s = 0.2 ms on an H100 SXM, two thirds of it states written and read
// split   one block of 8 warps per (row, chunk, part of a group's heads), which takes its heads one after the other: B_t, C_t and C B'
// stay,
//         dB and dC are summed over the heads in registers. Warp w works on rows 16 * (w % 4) and the half w / 4 of the columns
// needs   P <= 128, N <= 256 (f32: 128), padded as in the walks; one block of up to 227 KB of shared memory
// agrees  with the CPU reference to kSsdToleranceF32, kSsdToleranceBf16 (ssd.h); bf16 rounds the states, d(C B'), C B' E and rho dt X
// order   fixed, no atomics: heads in order, parts of a group summed in order, sums over rows and chunks by a fixed tree. How many parts
// there are
//         depends on the GPU's size
#include <algorithm>

#include "core/error.h"
#include "ops/common/tile_product.cuh"
#include "ops/ssd/ssd_cuda.cuh"

namespace longhand {
namespace {

constexpr int kBwdThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct ChunkBwdArgs {
  TokenRows<const T> x, grad_y, B_t, C_t, dt_raw;
  TokenRows<T> grad_x, grad_dt, grad_B, grad_C;  // data null: not wanted. grad_B, grad_C only when parts == 1
  float *parts_B, *parts_C;                      // [parts, B, T, G, N] when parts > 1
  const T *states, *state_grads;                 // [B, chunks, H, P, N]
  const float *dt, *lambda;                      // [B, H, chunks, 64]
  const float *A_log, *dt_bias, *D_skip;
  bool D_per_channel;
  float* sums;  // [B, chunks, H, P + 2]: dD by channel, then sum of dt * da, then d(dt_bias)
  float dt_min, dt_max;
  int64_t B, tokens, H, G, chunks, parts, heads_per_part;
  int P, N, P_padded;
};

template <class T, int kN>
struct ChunkBwdLayout {  // shared memory in elements of T, then floats
  static constexpr int side = kChunk * tile_stride<T>(kN);
  static constexpr int square = kChunk * tile_stride<T>(kChunk);
  // steps twice (dt, lambda; the next head's arrive while the last head's are in use), late and early and direct by column half, row
  // totals, rectangle sums and dD by row tile, <R, S> by warp
  static constexpr int floats = 2 * 2 * kChunk + 3 * 2 * kChunk + kChunk + 4 * kChunk + 4 * kMaxHeadDim + 8;
  __host__ __device__ static constexpr int rows(int P_padded) { return kChunk * tile_stride<T>(P_padded); }
  __host__ __device__ static constexpr int total_bytes(int P_padded) {
    return (2 * side + 2 * rows(P_padded) + P_padded * tile_stride<T>(kN) + (sizeof(T) == 2 ? 2 : 1) * square) *
               static_cast<int>(sizeof(T)) +
           floats * 4;
  }
};

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
__device__ __forceinline__ float warp_sum(float v) {
  v = quad_sum(v);
  return column_sum(v);
}

template <class T, int kN>
__global__ void __launch_bounds__(kBwdThreads) ssd_chunk_bwd_kernel(const ChunkBwdArgs<T> a) {
  using Layout = ChunkBwdLayout<T, kN>;
  constexpr int side_stride = tile_stride<T>(kN), square_stride = tile_stride<T>(kChunk);
  constexpr int tiles = kN / 16, pairs = tiles / 2;  // a warp's half of the N columns
  constexpr bool two_squares = sizeof(T) == 2;       // in f32 both products of C B' share one place, one after the other
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int row_tile = warp % 4, column_half = warp / 4, i_low = 16 * row_tile + g, n_begin = column_half * (kN / 2);
  const int64_t part = blockIdx.x % a.parts, group = blockIdx.x / a.parts % a.G, row_chunk = blockIdx.x / a.parts / a.G,
                chunk = row_chunk % a.chunks, b = row_chunk / a.chunks;
  const int64_t t0 = chunk * kChunk, left_tokens = a.tokens - t0, state_size = static_cast<int64_t>(a.P) * a.N;
  const int valid = static_cast<int>(left_tokens < kChunk ? left_tokens : kChunk);
  const int rows_stride = tile_stride<T>(a.P_padded);

  float* floats = reinterpret_cast<float*>(shared_memory());
  float* steps = floats;                      // [2][dt, lambda][64]
  float* late = steps + 4 * kChunk;           // [2][64]  e^{Lambda_i} dY_i . (S C_i), by half of N
  float* early = late + 2 * kChunk;           // [2][64]  rho_j dt_j x_j . (R B_j), by half of P
  float* direct = early + 2 * kChunk;         // [2][64]  V_j . x_j, by half of P
  float* row_total = direct + 2 * kChunk;     // [64]     sum of pairs (i, j) over j < 32
  float* rectangle = row_total + kChunk;      // [4][64]  sum of pairs (i, j), i >= t > j, j in the half of t, by row tile
  float* column_D = rectangle + 4 * kChunk;   // [4][128] dY . x by channel, by row tile
  float* inner = column_D + 4 * kMaxHeadDim;  // [8] <R, S> by warp
  T* B_tile = reinterpret_cast<T*>(inner + 8);
  T* C_tile = B_tile + Layout::side;
  T* x = C_tile + Layout::side;
  T* dY = x + Layout::rows(a.P_padded);
  T* state = dY + Layout::rows(a.P_padded);                            // S, then R
  T* pairs_tile = state + a.P_padded * side_stride;                    // d(C B')
  T* mixing = two_squares ? pairs_tile + Layout::square : pairs_tile;  // C B' * E

  load_tile(B_tile, kChunk, kN, a.B_t.data + b * a.B_t.batch + t0 * a.B_t.token + group * a.N, a.B_t.token, valid, a.N, a.B_t.vectors);
  load_tile(C_tile, kChunk, kN, a.C_t.data + b * a.C_t.batch + t0 * a.C_t.token + group * a.N, a.C_t.token, valid, a.N, a.C_t.vectors);
  copies_arrived();
  __syncthreads();

  // C B' of this warp's 16 rows and 32 columns; zero (not needed) above the diagonal tiles.
  const int tiles_below = row_tile + 1 - 2 * column_half;  // 16-column tiles up to the diagonal, of this half
  float scores[4][4];
  clear(scores);
#pragma unroll 2
  for (int n = 0; n < kN; n += 16)
    multiply<Stored::transposed, 2>(scores, Left<T>::template load<Stored::as_is>(C_tile + 16 * row_tile * side_stride + n, side_stride),
                                    B_tile + 32 * column_half * side_stride + n, side_stride, 0, tiles_below);

  float grad_B[tiles][4], grad_C[tiles][4];
  clear(grad_B);
  clear(grad_C);
  const bool state_vectors = state_size * static_cast<int64_t>(sizeof(T)) % 16 == 0 && a.N * static_cast<int>(sizeof(T)) % 16 == 0;
  const int64_t heads = a.H / a.G, h_first = group * heads + part * a.heads_per_part;
  const int64_t h_limit = h_first + a.heads_per_part, h_end = h_limit < (group + 1) * heads ? h_limit : (group + 1) * heads;

  for (int64_t h = h_first; h < h_end; ++h) {
    float* dt = steps + (h - h_first) % 2 * 2 * kChunk;
    const float* lambda = dt + kChunk;
    const int64_t at_steps = ((b * a.H + h) * a.chunks + chunk) * kChunk, at_state = ((b * a.chunks + chunk) * a.H + h) * state_size;
    if (threadIdx.x < kChunk / 2)
      copy_16_async(dt + 4 * threadIdx.x, (threadIdx.x < kChunk / 4 ? a.dt : a.lambda - kChunk) + at_steps + 4 * threadIdx.x);
    load_tile(x, kChunk, a.P_padded, a.x.data + b * a.x.batch + t0 * a.x.token + h * a.P, a.x.token, valid, a.P, a.x.vectors);
    load_tile(dY, kChunk, a.P_padded, a.grad_y.data + b * a.grad_y.batch + t0 * a.grad_y.token + h * a.P, a.grad_y.token, valid, a.P,
              a.grad_y.vectors);
    load_tile(state, a.P_padded, kN, a.states + at_state, a.N, a.P, a.N, state_vectors);
    copies_arrived();
    __syncthreads();
    const float last = lambda[kChunk - 1];
    auto decay_between = [&](int i, int j) { return j <= i ? exp2f(fminf(lambda[i] - lambda[j], 0.0f)) : 0.0f; };
    auto store_mixing = [&] {  // C B' * E
#pragma unroll
      for (int j8 = 0; j8 < 4; ++j8)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = i_low + 8 * half, j = 32 * column_half + 8 * j8 + 2 * q;
          if (j8 / 2 < tiles_below)
            store_two(mixing + i * square_stride + j, scores[j8][2 * half] * decay_between(i, j),
                      scores[j8][2 * half + 1] * decay_between(i, j + 1), true, true);
        }
    };

    {  // d(C B') = (dY X') E dt, and its product with C B' summed over the rectangles i >= t > j
      float product[4][4];
      clear(product);
      for (int p = 0; p < a.P_padded; p += 16)
        multiply<Stored::transposed, 2>(product, Left<T>::template load<Stored::as_is>(dY + 16 * row_tile * rows_stride + p, rows_stride),
                                        x + 32 * column_half * rows_stride + p, rows_stride, 0, tiles_below);
      float before_column[8];  // sum over this warp's rows i >= t of the pairs (i, j), j < t, for this lane's columns t
#pragma unroll
      for (int k = 0; k < 8; ++k) before_column[k] = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = i_low + 8 * half;
        float before = 0;  // pairs of this row left of the tile
#pragma unroll
        for (int j8 = 0; j8 < 4; ++j8) {
          const int j = 32 * column_half + 8 * j8 + 2 * q;
          const float first = product[j8][2 * half] * decay_between(i, j) * dt[j],
                      second = product[j8][2 * half + 1] * decay_between(i, j + 1) * dt[j + 1];
          if (j8 / 2 < tiles_below) store_two(pairs_tile + i * square_stride + j, first, second, true, true);
          const float pair_first = j < i ? first * scores[j8][2 * half] : 0.0f,
                      pair_second = j + 1 < i ? second * scores[j8][2 * half + 1] : 0.0f;
          float through = pair_first + pair_second;  // inclusive scan over the quad
          float other = __shfl_up_sync(kAllLanes, through, 1, 4);
          if (q >= 1) through += other;
          other = __shfl_up_sync(kAllLanes, through, 2, 4);
          if (q >= 2) through += other;
          other = __shfl_up_sync(kAllLanes, through, 1, 4);
          const float left = before + (q >= 1 ? other : 0.0f);
          if (i >= j) before_column[2 * j8] += left;
          if (i >= j + 1) before_column[2 * j8 + 1] += left + pair_first;
          before += __shfl_sync(kAllLanes, through, 3, 4);
        }
        if (column_half == 0 && q == 0) row_total[i] = before;
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float sum = column_sum(before_column[k]);
        if (g == 0) rectangle[row_tile * kChunk + 32 * column_half + k / 2 * 8 + 2 * q + k % 2] = sum;
      }
    }
    if constexpr (two_squares) store_mixing();

    // dC_i += e^{Lambda_i} S' dY_i, late_i = <C_i, that>; 32 columns at a time
    {
      const float scale[2] = {exp2f(lambda[i_low]), exp2f(lambda[i_low + 8])};
      float dots[2] = {0, 0};
#pragma unroll
      for (int part32 = 0; part32 < pairs / 2; ++part32) {
        float product[4][4];
        clear(product);
        for (int p = 0; p < a.P_padded; p += 16)
          multiply<Stored::as_is, 2>(product, Left<T>::template load<Stored::as_is>(dY + 16 * row_tile * rows_stride + p, rows_stride),
                                     state + p * side_stride + n_begin + 32 * part32, side_stride);
#pragma unroll
        for (int n8 = 0; n8 < 4; ++n8)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float value = product[n8][e] * scale[e / 2];
            dots[e / 2] += value * widen(C_tile[(i_low + e / 2 * 8) * side_stride + n_begin + 32 * part32 + 8 * n8 + 2 * q + e % 2]);
            grad_C[4 * part32 + n8][e] += value;
          }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(dots[half]);
        if (q == 0) late[column_half * kChunk + i_low + 8 * half] = sum;
      }
    }
    __syncthreads();  // S has been read; d(C B') is there

    {  // R takes the place of S; <R, S> on the way
      const T* from = a.state_grads + at_state;
      float sum = 0;
      if (state_vectors) {
        constexpr int unit = 16 / static_cast<int>(sizeof(T));
        struct alignas(16) Unit {
          T values[unit];
        };
        const int units = a.N / unit;
        for (int k = static_cast<int>(threadIdx.x); k < a.P * units; k += kBwdThreads) {
          Unit* place = reinterpret_cast<Unit*>(state + k / units * side_stride + k % units * unit);
          const Unit next = reinterpret_cast<const Unit*>(from)[k], old = *place;
#pragma unroll
          for (int e = 0; e < unit; ++e) sum += widen(next.values[e]) * widen(old.values[e]);
          *place = next;
        }
      } else {
        for (int k = static_cast<int>(threadIdx.x); k < a.P * a.N; k += kBwdThreads) {
          T* place = state + k / a.N * side_stride + k % a.N;
          sum += widen(from[k]) * widen(*place);
          *place = from[k];
        }
      }
      sum = warp_sum(sum);
      if (lane == 0) inner[warp] = sum;
    }
    // dC_i += sum_{j <= i} d(C B')_ij B_j;  dB_j += sum_{i >= j} d(C B')_ij C_i
    for (int k = 0; k <= row_tile; ++k)
      multiply<Stored::as_is, pairs>(
          grad_C, Left<T>::template load<Stored::as_is>(pairs_tile + 16 * row_tile * square_stride + 16 * k, square_stride),
          B_tile + 16 * k * side_stride + n_begin, side_stride);
    for (int k = row_tile; k < 4; ++k)
      multiply<Stored::as_is, pairs>(
          grad_B, Left<T>::template load<Stored::transposed>(pairs_tile + 16 * k * square_stride + 16 * row_tile, square_stride),
          C_tile + 16 * k * side_stride + n_begin, side_stride);
    __syncthreads();  // R is there, d(C B') has been read
    if constexpr (!two_squares) {
      store_mixing();
      __syncthreads();
    }

    // V_j = rho_j R B_j + sum_{i >= j} (C B' E)_ij dY_i;  dx_j = dt_j V_j + D dY_j; rows j now, 32 channels at a time
    const float to_end[2] = {exp2f(fminf(last - lambda[i_low], 0.0f)), exp2f(fminf(last - lambda[i_low + 8], 0.0f))};
    {
      float early_dots[2] = {0, 0}, direct_dots[2] = {0, 0};
      for (int p0 = 32 * column_half; p0 < a.P_padded; p0 += 64) {
        const int blocks = a.P_padded - p0 >= 32 ? 2 : 1;
        float V[4][4];
        clear(V);
#pragma unroll 2
        for (int n = 0; n < kN; n += 16)
          multiply<Stored::transposed, 2>(V, Left<T>::template load<Stored::as_is>(B_tile + 16 * row_tile * side_stride + n, side_stride),
                                          state + p0 * side_stride + n, side_stride, 0, blocks);
        float x_value[4][4], dY_value[4][4];
#pragma unroll
        for (int p8 = 0; p8 < 4; ++p8)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at = (i_low + e / 2 * 8) * rows_stride + p0 + 8 * p8 + 2 * q + e % 2;
            const bool inside = p8 / 2 < blocks;
            x_value[p8][e] = inside ? widen(x[at]) : 0.0f;
            dY_value[p8][e] = inside ? widen(dY[at]) : 0.0f;
            V[p8][e] *= to_end[e / 2];
            early_dots[e / 2] += V[p8][e] * x_value[p8][e];
          }
        for (int k = row_tile; k < 4; ++k)
          multiply<Stored::as_is, 2>(
              V, Left<T>::template load<Stored::transposed>(mixing + 16 * k * square_stride + 16 * row_tile, square_stride),
              dY + 16 * k * rows_stride + p0, rows_stride, 0, blocks);
#pragma unroll
        for (int p8 = 0; p8 < 4; ++p8) {
          const int p = p0 + 8 * p8 + 2 * q;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int j = i_low + 8 * half;
            const float first = V[p8][2 * half], second = V[p8][2 * half + 1];
            direct_dots[half] += first * x_value[p8][2 * half] + second * x_value[p8][2 * half + 1];
            if (a.grad_x.data != nullptr && j < valid && p < a.P) {
              const bool both = p + 1 < a.P;
              const float* D = a.D_skip == nullptr ? nullptr : a.D_skip + (a.D_per_channel ? h * a.P + p : h);
              const float D_first = D == nullptr ? 0.0f : D[0], D_second = D == nullptr ? 0.0f : a.D_per_channel && both ? D[1] : D[0];
              store_two(a.grad_x.data + b * a.grad_x.batch + (t0 + j) * a.grad_x.token + h * a.P + p,
                        dt[j] * first + D_first * dY_value[p8][2 * half], dt[j] * second + D_second * dY_value[p8][2 * half + 1], both,
                        a.grad_x.vectors);
            }
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float sum = column_sum(dY_value[p8][e] * x_value[p8][e] + dY_value[p8][e + 2] * x_value[p8][e + 2]);
            if (g == 0 && p8 / 2 < blocks) column_D[row_tile * kMaxHeadDim + p + e] = sum;
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float early_sum = quad_sum(early_dots[half]), direct_sum = quad_sum(direct_dots[half]);
        if (q == 0) {
          early[column_half * kChunk + i_low + 8 * half] = early_sum * dt[i_low + 8 * half];
          direct[column_half * kChunk + i_low + 8 * half] = direct_sum;
        }
      }
    }
    // dB_j += rho_j dt_j R' x_j
    for (int p = 0; p < a.P_padded; p += 16) {
      Left<T> left = Left<T>::template load<Stored::as_is>(x + 16 * row_tile * rows_stride + p, rows_stride);
      left.scale_rows(to_end[0] * dt[i_low], to_end[1] * dt[i_low + 8]);
      multiply<Stored::as_is, pairs>(grad_B, left, state + p * side_stride + n_begin, side_stride);
    }
    __syncthreads();  // all sums are there; the tiles may be overwritten by the next head

    float* sums = a.sums + ((b * a.chunks + chunk) * a.H + h) * (a.P + 2);
    if (warp == 0) {  // da_t = rectangle + sum_{i >= t} late_i + sum_{j < t} early_j + e^{Lambda_Q} <R, S>, two tokens per lane
      float behind[2], crossing = row_total[lane + 32], before[2];  // crossing: pairs (i, j) with i >= t >= 32 > j
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = lane + 32 * half;
        behind[half] = late[t] + late[kChunk + t];
        before[half] = early[t] + early[kChunk + t];
      }
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const float more_crossing = __shfl_down_sync(kAllLanes, crossing, distance);
        if (lane + distance < 32) crossing += more_crossing;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float more_behind = __shfl_down_sync(kAllLanes, behind[half], distance),
                      more_before = __shfl_up_sync(kAllLanes, before[half], distance);
          if (lane + distance < 32) behind[half] += more_behind;
          if (lane >= distance) before[half] += more_before;
        }
      }
      behind[0] += __shfl_sync(kAllLanes, behind[1], 0);
      const float first_half = __shfl_sync(kAllLanes, before[0], 31);
      before[1] += first_half;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // exclusive
        const float previous = __shfl_up_sync(kAllLanes, before[half], 1);
        before[half] = lane > 0 ? previous : half == 0 ? 0.0f : first_half;
      }
      float whole = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) whole += inner[k];
      whole *= exp2f(last);
      const float A = -expf(a.A_log[h]), bias = a.dt_bias[h];
      float sum_A = 0, sum_bias = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = lane + 32 * half;
        float da = behind[half] + before[half] + whole + (half == 1 ? crossing : 0.0f);
#pragma unroll
        for (int k = 0; k < 4; ++k) da += rectangle[k * kChunk + t];
        if (t < valid) {
          const float raw = widen(a.dt_raw.data[b * a.dt_raw.batch + (t0 + t) * a.dt_raw.token + h]) + bias;
          const float unclamped = raw > 20.0f ? raw : log1pf(expf(raw)), slope = raw > 20.0f ? 1.0f : 1.0f / (1.0f + expf(-raw));
          const bool inside = unclamped >= a.dt_min && unclamped <= a.dt_max;
          const float grad = inside ? (direct[t] + direct[kChunk + t] + A * da) * slope : 0.0f;
          sum_A += dt[t] * da;
          sum_bias += grad;
          if (a.grad_dt.data != nullptr) a.grad_dt.data[b * a.grad_dt.batch + (t0 + t) * a.grad_dt.token + h] = narrow<T>(grad);
        }
      }
      sum_A = warp_sum(sum_A);
      sum_bias = warp_sum(sum_bias);
      if (lane == 0) {
        sums[a.P] = sum_A;
        sums[a.P + 1] = sum_bias;
      }
    } else {
      for (int p = static_cast<int>(threadIdx.x) - 32; p < a.P; p += kBwdThreads - 32)
        sums[p] = column_D[p] + column_D[kMaxHeadDim + p] + column_D[2 * kMaxHeadDim + p] + column_D[3 * kMaxHeadDim + p];
    }
    // Sums of this head are read by warp 0 before it arrives at the next head's first barrier, and written by nobody before that barrier;
    // column_D likewise by the others.
  }

  auto store = [&](const float(&grad)[tiles][4], const TokenRows<T>& to, float* parts) {
#pragma unroll
    for (int n8 = 0; n8 < tiles; ++n8)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = i_low + 8 * half, n = n_begin + 8 * n8 + 2 * q;
        if (i >= valid || n >= a.N) continue;
        if (parts != nullptr)
          store_two(parts + (((part * a.B + b) * a.tokens + t0 + i) * a.G + group) * a.N + n, grad[n8][2 * half], grad[n8][2 * half + 1],
                    n + 1 < a.N, a.N % 2 == 0);
        else if (to.data != nullptr)
          store_two(to.data + b * to.batch + (t0 + i) * to.token + group * a.N + n, grad[n8][2 * half], grad[n8][2 * half + 1], n + 1 < a.N,
                    to.vectors);
      }
  };
  store(grad_B, a.grad_B, a.parts_B);
  store(grad_C, a.grad_C, a.parts_C);
}

// --- reductions -----------------------------------------------------------------------------------------------

template <class T>
struct PartsArgs {
  const float* parts;  // [parts, B, T, G * N]
  TokenRows<T> to;
  int64_t B, tokens, width, count;
};

// One thread per element, parts in order.
template <class T>
__global__ void ssd_sum_parts_kernel(const PartsArgs<T> a) {
  const int64_t size = a.B * a.tokens * a.width, k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= size) return;
  float sum = 0;
  for (int64_t part = 0; part < a.count; ++part) sum += a.parts[part * size + k];
  const int64_t row = k / a.width;
  a.to.data[row / a.tokens * a.to.batch + row % a.tokens * a.to.token + k % a.width] = narrow<T>(sum);
}

struct HeadSumArgs {
  const float* sums;  // [rows, H, P + 2]
  const float* A_log;
  float *grad_A_log, *grad_D, *grad_bias;  // null: not wanted
  bool D_per_channel;
  int64_t rows, H;
  int P;
};

// One block per head: 8 groups of 128 threads, a thread per column, rows in steps of 8; groups in order.
constexpr int kSumColumns = 128, kSumGroups = 8;
__global__ void ssd_sum_heads_kernel(const HeadSumArgs a) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // [groups][columns], then [P] of dD
  float* channels = shared + kSumColumns * kSumGroups;
  const int column = threadIdx.x % kSumColumns, group = threadIdx.x / kSumColumns, width = a.P + 2;
  const int64_t h = blockIdx.x;
  for (int begin = 0; begin < width; begin += kSumColumns) {
    const int k = begin + column;
    float sum = 0;
    if (k < width)
      for (int64_t row = group; row < a.rows; row += kSumGroups) sum += a.sums[(row * a.H + h) * width + k];
    shared[group * kSumColumns + column] = sum;
    __syncthreads();
    if (group == 0 && k < width) {
      float whole = 0;
      for (int other = 0; other < kSumGroups; ++other) whole += shared[other * kSumColumns + column];
      if (k < a.P) channels[k] = whole;
      else if (k == a.P && a.grad_A_log != nullptr) a.grad_A_log[h] = -expf(a.A_log[h]) * whole;
      else if (k == a.P + 1 && a.grad_bias != nullptr) a.grad_bias[h] = whole;
    }
    __syncthreads();
  }
  if (a.grad_D == nullptr) return;
  if (a.D_per_channel) {
    for (int p = static_cast<int>(threadIdx.x); p < a.P; p += static_cast<int>(blockDim.x)) a.grad_D[h * a.P + p] = channels[p];
  } else if (threadIdx.x == 0) {
    float sum = 0;
    for (int p = 0; p < a.P; ++p) sum += channels[p];
    a.grad_D[h] = sum;
  }
}

// --- launchers ------------------------------------------------------------------------------------------------

template <class T, int kN>
void launch_chunks(const ChunkBwdArgs<T>& args, const CudaContext& context) {
  const auto shared = static_cast<size_t>(ChunkBwdLayout<T, kN>::total_bytes(args.P_padded));
  const dim3 grid(static_cast<unsigned>(args.B * args.chunks * args.G * args.parts));
  launch(&ssd_chunk_bwd_kernel<T, kN>, "ssd_chunk_bwd_kernel", grid, dim3(kBwdThreads), shared, context.stream, args);
}

Tensor rows_of_batch(const Tensor& t, int64_t begin, int64_t end) {
  return t.defined() ? t.slice(0, begin, end) : t;
}

float* floats_of(const Tensor& t) {
  return t.defined() ? t.data<float>() : nullptr;
}

/// Backward of some rows of the batch; sums [rows, chunks, H, P + 2] are filled, parameters' gradients are left to the caller.
template <class T>
void backward_rows(const SsdInputs& in, const SsdOptions& options, const Tensor& grad_y, const Tensor& grad_h_T, const SsdGradients& out,
                   const Tensor& sums) {
  const CudaContext& context = in.x.device().cuda_context();
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  const SsdSteps steps = ssd_steps_cuda(in, options);
  const Tensor state_grads = ssd_chunk_state_gradients_cuda(in, steps, grad_y, grad_h_T, out.h0);
  const int64_t chunks = chunk_count(s.T);
  if (chunks == 0) return;
  const Tensor states = ssd_chunk_states_cuda(in, steps);

  ChunkBwdArgs<T> args{};
  args.x = token_rows<const T>(in.x, s.P);
  args.grad_y = token_rows<const T>(grad_y, s.P);
  args.B_t = token_rows<const T>(in.B_t, s.N);
  args.C_t = token_rows<const T>(in.C_t, s.N);
  args.dt_raw = token_rows<const T>(in.dt, s.H);
  args.grad_x = token_rows<T>(out.x, s.P);
  args.grad_dt = token_rows<T>(out.dt, s.H);
  args.states = static_cast<const T*>(states.raw());
  args.state_grads = static_cast<const T*>(state_grads.raw());
  args.dt = steps.dt.data<float>();
  args.lambda = steps.lambda.data<float>();
  args.A_log = in.A_log.data<float>();
  args.dt_bias = in.dt_bias.data<float>();
  args.D_skip = floats_of(in.D_skip);
  args.D_per_channel = in.D_skip.defined() && in.D_skip.rank() == 2;
  args.sums = sums.data<float>();
  args.dt_min = static_cast<float>(options.dt_min);
  args.dt_max = static_cast<float>(options.dt_max);
  args.B = s.B;
  args.tokens = s.T;
  args.H = s.H;
  args.G = s.G;
  args.chunks = chunks;
  args.P = static_cast<int>(s.P);
  args.N = static_cast<int>(s.N);
  args.P_padded = rounded_up(s.P, 16);

  // Parts of a group's heads: enough blocks for the GPU, few partial sums.
  const int64_t blocks = s.B * chunks * s.G, heads = s.heads_per_group();
  const int64_t wanted = std::clamp<int64_t>((4 * context.sm_count + blocks - 1) / blocks, 1, heads);
  args.heads_per_part = (heads + wanted - 1) / wanted;
  args.parts = (heads + args.heads_per_part - 1) / args.heads_per_part;
  Tensor parts_B, parts_C;
  if (args.parts > 1) {
    const Shape shape{args.parts, s.B, s.T, s.G * s.N};
    if (out.B_t.defined()) parts_B = Tensor::empty(in.x.device(), Dtype::f32, shape);
    if (out.C_t.defined()) parts_C = Tensor::empty(in.x.device(), Dtype::f32, shape);
    args.parts_B = floats_of(parts_B);
    args.parts_C = floats_of(parts_C);
  } else {
    args.grad_B = token_rows<T>(out.B_t, s.N);
    args.grad_C = token_rows<T>(out.C_t, s.N);
  }
  switch (padded_state_dim(s.N)) {
    case 64:
      launch_chunks<T, 64>(args, context);
      break;
    case 128:
      launch_chunks<T, 128>(args, context);
      break;
    default:
      if constexpr (sizeof(T) == 2) launch_chunks<T, 256>(args, context);  // f32 ends at 128: require_ssd_cuda_sizes
  }

  auto sum_parts = [&](const Tensor& parts, const Tensor& to) {
    if (!parts.defined()) return;
    const PartsArgs<T> sum{parts.data<float>(), token_rows<T>(to, s.N), s.B, s.T, s.G * s.N, args.parts};
    const dim3 grid(static_cast<unsigned>((s.B * s.T * s.G * s.N + 255) / 256));
    launch(&ssd_sum_parts_kernel<T>, "ssd_sum_parts_kernel", grid, dim3(256), 0, context.stream, sum);
  };
  sum_parts(parts_B, out.B_t);
  sum_parts(parts_C, out.C_t);
}

// Two borders of every chunk and head are kept while backward runs; the batch is taken in pieces so that they stay below this.
constexpr int64_t kBorderBytes = int64_t{512} << 20;

template <class T>
void backward(const SsdInputs& in, const SsdOptions& options, const Tensor& grad_y_or_none, const Tensor& grad_h_T,
              const SsdGradients& out) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  const int64_t chunks = chunk_count(s.T);
  const Shape sums_shape{s.B, chunks, s.H, s.P + 2};
  const Tensor sums = Tensor::empty(in.x.device(), Dtype::f32, sums_shape);
  const Tensor grad_y = grad_y_or_none.defined() ? grad_y_or_none : Tensor::zeros(in.x.device(), in.x.dtype(), in.x.shape());
  const int64_t row_bytes = 2 * chunks * s.H * s.P * s.N * static_cast<int64_t>(sizeof(T)),
                rows = std::max<int64_t>(1, kBorderBytes / std::max<int64_t>(1, row_bytes));
  for (int64_t begin = 0; begin < s.B; begin += rows) {
    const int64_t end = std::min(begin + rows, s.B);
    auto piece = [&](const Tensor& t) { return rows_of_batch(t, begin, end); };
    backward_rows<T>({piece(in.x), piece(in.dt), in.A_log, piece(in.B_t), piece(in.C_t), in.D_skip, in.dt_bias, piece(in.h0)}, options,
                     piece(grad_y), piece(grad_h_T),
                     {piece(out.x), piece(out.dt), {}, piece(out.B_t), piece(out.C_t), {}, {}, piece(out.h0)}, piece(sums));
  }
  if (s.H == 0) return;
  const HeadSumArgs args{sums.data<float>(),     in.A_log.data<float>(),
                         floats_of(out.A_log),   floats_of(out.D_skip),
                         floats_of(out.dt_bias), in.D_skip.defined() && in.D_skip.rank() == 2,
                         s.B * chunks,           s.H,
                         static_cast<int>(s.P)};
  launch(&ssd_sum_heads_kernel, "ssd_sum_heads_kernel", dim3(static_cast<unsigned>(s.H)), dim3(kSumColumns * kSumGroups),
         (kSumColumns * kSumGroups + kMaxHeadDim) * sizeof(float), in.x.device().cuda_context().stream, args);
}

}  // namespace

void ssd_bwd_cuda(const SsdInputs& in, const SsdOptions& options, const Tensor& grad_y, const Tensor& grad_h_T, const SsdGradients& out) {
  require_ssd_cuda_sizes(in);
  in.x.dtype() == Dtype::bf16 ? backward<Bf16>(in, options, grad_y, grad_h_T, out) : backward<float>(in, options, grad_y, grad_h_T, out);
}

}  // namespace longhand
