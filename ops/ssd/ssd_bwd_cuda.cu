// SSD on CUDA, backward. The states at chunk beginnings and the gradients of the states at chunk ends come from two walks (ssd_cuda.cu);
// with them every chunk stands alone.
//
// ssd_chunk_bwd_kernel
// moves   per token and head x, dy in, dx out; per chunk and head two states of P N; per chunk and group B_t, C_t in, dB, dC out
// flops   per chunk of Q = 64 and head: dY X' and its counterpart in V (Q Q P / 2 each), dY S, R B and x R (Q P N each), times 2;
//         C B', d(C B') B and d(C B')' C once for all heads of the block
// floor   B 8, T 2048, H 24, P 64, N 128, bf16: 600 MB / 3.0 TB/s = 0.2 ms on an H100 SXM, two thirds of it states written and read
// split   one block per (row, chunk, part of a group's heads). Its teams of 8 warps take one head after the other; B_t, C_t and C B' stay,
//         d(C B') and what dB and dC get from the states are summed over the heads in registers, over the teams at the end. Warp w of a
//         team works on rows 16 * (w % 4) and the half w / 4 of the columns. With two teams the next head's tiles arrive while this
//         head's are in use. On sm_90a, in bf16 and for P <= 64 and N <= 128, ssd_bwd_warpgroups_cuda.cu takes the chunks
// needs   P <= 128, N <= 256 (f32: 128), padded as in the walks; one block of up to 227 KB of shared memory
// agrees  with the CPU reference to kSsdToleranceF32, kSsdToleranceBf16 (ssd.h); bf16 rounds the states, the sum of d(C B'), C B' E,
//         rho dt X
// order   fixed, no atomics: heads of a team in order, teams in order, parts of a group summed in order, sums over rows and chunks by a
//         fixed tree. How many parts and teams there are depends on the GPU
//
// The gradient of a_t = dt_t A, with W_ij = d(C B')_ij (C B')_ij, late_i = e^{Lambda_i} dY_i . S C_i, early_j = rho_j dt_j x_j . R B_j:
//   da_t = sum_{i >= t > j} W_ij + sum_{i >= t} late_i + sum_{j < t} early_j + e^{Lambda_Q} <R, S>
// where the first sum is that of (row sum - column sum of W, without its diagonal) over s >= t: pairs on one side of t cancel.
#include <algorithm>

#include "core/error.h"
#include "ops/common/tile_product.cuh"
#include "ops/ssd/ssd_bwd_cuda.cuh"

namespace longhand {
namespace {

constexpr int kTeamThreads = 256;

/// What a head leaves behind for the end of its work, summed by one warp while the team is at the next head.
template <int channels>
struct HeadSums {
  float late[2][kChunk];          // by half of N
  float early[2][kChunk];         // by half of P
  float direct[2][kChunk];        // V_j . x_j, by half of P
  float row_total[2][kChunk];     // of W, by half of its columns
  float column_total[4][kChunk];  // of W, by row tile
  float column_D[4][channels];    // dY . x by channel, by row tile
  float inner[8];                 // <R, S> by warp

  __device__ float behind(int t) const {
    return late[0][t] + late[1][t] + row_total[0][t] + row_total[1][t] -
           ((column_total[0][t] + column_total[1][t]) + (column_total[2][t] + column_total[3][t]));
  }
  __device__ float before(int t) const { return early[0][t] + early[1][t]; }
  __device__ float through_dt(int t) const { return direct[0][t] + direct[1][t]; }
  __device__ float through_D(int p) const { return (column_D[0][p] + column_D[1][p]) + (column_D[2][p] + column_D[3][p]); }
  __device__ float states() const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += inner[k];
    return sum;
  }
};

/// Shared memory in bytes: B_t, C_t and, with two teams, C B'; then for each team M, sums twice, and its stages.
template <class T, int kN, int kP, int teams>
struct ChunkBwdLayout {
  static constexpr bool pipelined = teams == 2;
  using Sums = HeadSums<kP>;
  static constexpr int size = static_cast<int>(sizeof(T));
  static constexpr int side_bytes = kChunk * tile_stride<T>(kN) * size, rows_bytes = kChunk * tile_stride<T>(kP) * size;
  static constexpr int score_bytes = pipelined ? kChunk * kChunk * 4 : 0;  // one team keeps them in registers
  static constexpr int mixing_bytes = kChunk * tile_stride<T>(kChunk) * size, state_bytes = kP * tile_stride<T>(kN) * size;
  static constexpr int steps_bytes = kChunk * 4 + kChunk * static_cast<int>(sizeof(LogDecay<T>));  // dt, lambda
  static constexpr int stages = pipelined ? 2 : 1, stage_bytes = steps_bytes + 2 * rows_bytes;
  static constexpr int common_bytes = 2 * side_bytes + score_bytes;
  static constexpr int team_bytes = mixing_bytes + 2 * static_cast<int>(sizeof(Sums)) + stages * (stage_bytes + state_bytes);
  static constexpr int total_bytes = common_bytes + teams * team_bytes;
};

template <class T, int kN, int kP, int teams>
__global__ void __launch_bounds__(kTeamThreads* teams) ssd_chunk_bwd_kernel(const SsdChunkBwdArgs<T> a) {
  using Layout = ChunkBwdLayout<T, kN, kP, teams>;
  using Sums = typename Layout::Sums;
  constexpr int side_stride = tile_stride<T>(kN), square_stride = tile_stride<T>(kChunk), rows_stride = tile_stride<T>(kP);
  constexpr int tiles = kN / 16, pairs = tiles / 2;  // a warp's half of the N columns
  constexpr bool pipelined = Layout::pipelined;
  const int team = teams == 1 ? 0 : static_cast<int>(threadIdx.x) / kTeamThreads, thread = threadIdx.x % kTeamThreads;
  const int warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int row_tile = warp % 4, column_half = warp / 4, i_low = 16 * row_tile + g, n_begin = column_half * (kN / 2);
  const auto [part, group, row_chunk, chunk, b, t0, h_first, h_end, valid] = chunk_place(a);
  const int64_t state_size = static_cast<int64_t>(a.P) * a.N;

  T* B_tile = reinterpret_cast<T*>(shared_memory());
  T* C_tile = B_tile + kChunk * side_stride;
  float* score_tile = reinterpret_cast<float*>(shared_memory() + 2 * Layout::side_bytes);
  unsigned char* team_memory = shared_memory() + Layout::common_bytes + team * Layout::team_bytes;
  Sums* sums = reinterpret_cast<Sums*>(team_memory);  // [2], head after head
  T* mixing = reinterpret_cast<T*>(team_memory + 2 * sizeof(Sums));
  unsigned char* stages = team_memory + 2 * sizeof(Sums) + Layout::mixing_bytes;
  T* S = reinterpret_cast<T*>(stages + Layout::stages * Layout::stage_bytes);
  T* R = pipelined ? S + kP * side_stride : S;  // one team: R takes the place of S

  auto team_sync = [&] {
    if constexpr (teams == 1) __syncthreads();
    else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeamThreads) : "memory");
  };
  auto at_state = [&](int64_t h) { return ((b * a.chunks + chunk) * a.H + h) * state_size; };
  auto stage_of = [&](int64_t n) { return stages + n % Layout::stages * Layout::stage_bytes; };
  auto fetch_rows = [&](int64_t h, int64_t n) {  // dt, lambda, x, dY of head h, this team's n-th
    float* dt = reinterpret_cast<float*>(stage_of(n));
    const int64_t at_steps = ((b * a.H + h) * a.chunks + chunk) * kChunk;
    copy_steps_async(dt, a.dt + at_steps, a.lambda + at_steps, thread, kTeamThreads);
    T* x = reinterpret_cast<T*>(stage_of(n) + Layout::steps_bytes);
    load_tile<kP>(x, kChunk, a.x.data + b * a.x.batch + t0 * a.x.token + h * a.P, a.x.token, valid, a.P, a.x.vectors, thread, kTeamThreads);
    load_tile<kP>(x + kChunk * rows_stride, kChunk, a.grad_y.data + b * a.grad_y.batch + t0 * a.grad_y.token + h * a.P, a.grad_y.token,
                  valid, a.P, a.grad_y.vectors, thread, kTeamThreads);
  };
  const bool state_vectors = state_size * static_cast<int64_t>(sizeof(T)) % 16 == 0 && a.N * static_cast<int>(sizeof(T)) % 16 == 0;
  auto fetch_state = [&](T* to, const T* from) { load_tile<kN>(to, kP, from, a.N, a.P, a.N, state_vectors, thread, kTeamThreads); };

  constexpr int threads = kTeamThreads * teams;
  load_tile<kN>(B_tile, kChunk, a.B_t.data + b * a.B_t.batch + t0 * a.B_t.token + group * a.N, a.B_t.token, valid, a.N, a.B_t.vectors,
                static_cast<int>(threadIdx.x), threads);
  load_tile<kN>(C_tile, kChunk, a.C_t.data + b * a.C_t.batch + t0 * a.C_t.token + group * a.N, a.C_t.token, valid, a.N, a.C_t.vectors,
                static_cast<int>(threadIdx.x), threads);
  close_copies();
  const int64_t h_mine = h_first + team;
  if constexpr (pipelined) {
    if (h_mine < h_end) {
      fetch_rows(h_mine, 0);
      fetch_state(S, a.states + at_state(h_mine));
    }
    close_copies();
    if (h_mine < h_end) fetch_state(R, a.state_grads + at_state(h_mine));
    close_copies();
  }
  copies_arrived_but<pipelined ? 2 : 0>();
  __syncthreads();

  // C B' of this warp's 16 rows and 32 columns; zero (not needed) above the diagonal tiles.
  const int tiles_below = row_tile + 1 - 2 * column_half;  // 16-column tiles up to the diagonal, of this half
  float scores[4][4];
  auto score_pair = [&](int j8, int half) {  // 8-column groups exchanged by row, so that rows lie in different banks
    return reinterpret_cast<float2*>(score_tile + (i_low + 8 * half) * kChunk + ((32 * column_half + 8 * j8) ^ (8 * (g % 4))) + 2 * q);
  };
  if (!pipelined || team == 0) {
    clear(scores);
#pragma unroll 2
    for (int n = 0; n < kN; n += 16)
      multiply<Stored::transposed, 2>(scores, Left<T>::template load<Stored::as_is>(C_tile + 16 * row_tile * side_stride + n, side_stride),
                                      B_tile + 32 * column_half * side_stride + n, side_stride, 0, tiles_below);
    if constexpr (pipelined) {
#pragma unroll
      for (int j8 = 0; j8 < 4; ++j8)
#pragma unroll
        for (int half = 0; half < 2; ++half) *score_pair(j8, half) = make_float2(scores[j8][2 * half], scores[j8][2 * half + 1]);
    }
  }
  if constexpr (pipelined) __syncthreads();
  auto scores_at = [&](int j8, int half) {
    if constexpr (pipelined) return *score_pair(j8, half);
    else return make_float2(scores[j8][2 * half], scores[j8][2 * half + 1]);
  };

  float grad_B[tiles][4], grad_C[tiles][4], grad_scores[4][4];  // summed over the heads of the team
  clear(grad_B);
  clear(grad_C);
  clear(grad_scores);

  int64_t n_head = 0;
  for (int64_t h = h_mine; h < h_end; h += teams, ++n_head) {
    Sums& sum = sums[n_head % 2];
    const float* dt = reinterpret_cast<const float*>(stage_of(n_head));
    const LogDecay<T>* lambda = reinterpret_cast<const LogDecay<T>*>(dt + kChunk);
    T* x = reinterpret_cast<T*>(stage_of(n_head) + Layout::steps_bytes);
    const T* dY = x + kChunk * rows_stride;
    const bool more = h + teams < h_end;
    if constexpr (pipelined) {
      copies_arrived_but<1>();  // all but R
      team_sync();
      if (more) fetch_rows(h + teams, n_head + 1);
      close_copies();
    } else {
      fetch_rows(h, n_head);
      fetch_state(S, a.states + at_state(h));
      copies_arrived();
      team_sync();
    }
    const LogDecay<T> last = lambda[kChunk - 1];

    if (tiles_below > 0) {  // d(C B') = (dY X') E dt into its sum, its product W with C B' into row and column sums, and M = C B' E
      float product[4][4];
      clear(product);
      for (int p = 0; p < kP; p += 16)
        multiply<Stored::transposed, 2>(product, Left<T>::template load<Stored::as_is>(dY + 16 * row_tile * rows_stride + p, rows_stride),
                                        x + 32 * column_half * rows_stride + p, rows_stride, 0, tiles_below);
      float rows[2] = {0, 0}, columns[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) columns[k] = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = i_low + 8 * half;
        const LogDecay<T> lambda_i = lambda[i];
#pragma unroll
        for (int j8 = 0; j8 < 4; ++j8) {
          if (j8 / 2 >= tiles_below) continue;
          const int j = 32 * column_half + 8 * j8 + 2 * q;
          const float own = decay_of(lambda_i - lambda[j]), next_own = decay_of(lambda_i - lambda[j + 1]);
          const float decay = j <= i ? own : 0.0f, next = j + 1 <= i ? next_own : 0.0f;
          const float2 dt_j = load_two(dt + j);
          const float first = product[j8][2 * half] * decay * dt_j.x, second = product[j8][2 * half + 1] * next * dt_j.y;
          const float2 score = scores_at(j8, half);
          store_two(mixing + i * square_stride + j, score.x * decay, score.y * next, true, true);
          grad_scores[j8][2 * half] += first;
          grad_scores[j8][2 * half + 1] += second;
          const float W_first = j < i ? first * score.x : 0.0f, W_second = j + 1 < i ? second * score.y : 0.0f;
          rows[half] += W_first + W_second;
          columns[2 * j8] += W_first;
          columns[2 * j8 + 1] += W_second;
        }
        const float total = quad_sum(rows[half]);
        if (q == 0) sum.row_total[column_half][i] = total;
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float total = column_sum(columns[k]);
        if (g == 0) sum.column_total[row_tile][32 * column_half + k / 2 * 8 + 2 * q + k % 2] = total;
      }
    } else {  // nothing below the diagonal: two of the eight warps, one of which ends the head before this one
      if (q == 0) sum.row_total[column_half][i_low] = sum.row_total[column_half][i_low + 8] = 0;
      sum.column_total[row_tile][32 * column_half + lane] = 0;
      if (row_tile == 0 && n_head > 0)
        finish_head(a, sums[(n_head - 1) % 2], load_head_end(a, b, h - teams, chunk, valid), b, h - teams, chunk, valid);
    }

    {  // dC_i += e^{Lambda_i} S' dY_i, late_i = <C_i, that>; 32 columns at a time
      const float scale[2] = {decay_of(lambda[i_low]), decay_of(lambda[i_low + 8])};
      float dots[2] = {0, 0};
#pragma unroll
      for (int part32 = 0; part32 < pairs / 2; ++part32) {
        float product[4][4];
        clear(product);
        for (int p = 0; p < kP; p += 16)
          multiply<Stored::as_is, 2>(product, Left<T>::template load<Stored::as_is>(dY + 16 * row_tile * rows_stride + p, rows_stride),
                                     S + p * side_stride + n_begin + 32 * part32, side_stride);
#pragma unroll
        for (int n8 = 0; n8 < 4; ++n8)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float first = product[n8][2 * half] * scale[half], second = product[n8][2 * half + 1] * scale[half];
            const float2 C = load_two(C_tile + (i_low + 8 * half) * side_stride + n_begin + 32 * part32 + 8 * n8 + 2 * q);
            dots[half] += first * C.x + second * C.y;
            grad_C[4 * part32 + n8][2 * half] += first;
            grad_C[4 * part32 + n8][2 * half + 1] += second;
          }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(dots[half]);
        if (q == 0) sum.late[column_half][i_low + 8 * half] = total;
      }
    }

    {  // <R, S>, of what this thread has fetched itself
      float inner = 0;
      if constexpr (pipelined) copies_arrived_but<1>();  // all but the next head's rows
      else team_sync();                                  // S has been read
      const T* from = a.state_grads + at_state(h);
      if (state_vectors) {
        constexpr int unit = 16 / static_cast<int>(sizeof(T));
        struct alignas(16) Unit {
          T values[unit];
        };
        const int units = kN / unit;
        for (int k = thread; k < kP * units; k += kTeamThreads) {
          const int row = k / units, column = k % units * unit, place = row * side_stride + column;
          Unit next;
          if constexpr (pipelined) {
            next = *reinterpret_cast<const Unit*>(R + place);
          } else {
            if (row >= a.P || column >= a.N) continue;
            next = *reinterpret_cast<const Unit*>(from + row * a.N + column);
          }
          const Unit old = *reinterpret_cast<const Unit*>(S + place);
#pragma unroll
          for (int e = 0; e < unit; ++e) inner += widen(next.values[e]) * widen(old.values[e]);
          if constexpr (!pipelined) *reinterpret_cast<Unit*>(R + place) = next;
        }
      } else {
        for (int k = thread; k < a.P * a.N; k += kTeamThreads) {
          T* place = S + k / a.N * side_stride + k % a.N;
          inner += widen(from[k]) * widen(*place);
          *place = from[k];
        }
      }
      inner = warp_sum(inner);
      if (lane == 0) sum.inner[warp] = inner;
    }
    team_sync();  // M and R are there, S has been read
    if constexpr (pipelined) {
      if (more) fetch_state(S, a.states + at_state(h + teams));
      close_copies();
    }

    const float to_end[2] = {decay_of(last - lambda[i_low]), decay_of(last - lambda[i_low + 8])};
    // dB_j += rho_j dt_j R' x_j
#pragma unroll
    for (int p = 0; p < kP; p += 16) {
      Left<T> left = Left<T>::template load<Stored::as_is>(x + 16 * row_tile * rows_stride + p, rows_stride);
      left.scale_rows(to_end[0] * dt[i_low], to_end[1] * dt[i_low + 8]);
      multiply<Stored::as_is, pairs>(grad_B, left, R + p * side_stride + n_begin, side_stride);
    }
    // V_j = rho_j R B_j + sum_{i >= j} M_ij dY_i;  dx_j = dt_j V_j + D dY_j, in the place of x; rows j now, 32 channels at a time
    asm volatile("bar.sync %0, 64;" ::"r"(3 + 4 * team + row_tile) : "memory");  // both warps of these rows have done with x as a whole
    {
      const float D_head = a.D_skip == nullptr || a.D_per_channel ? 0.0f : a.D_skip[h];
      float early[2] = {0, 0}, direct[2] = {0, 0};
      for (int p0 = 32 * column_half; p0 < kP; p0 += 64) {
        float V[4][4];
        clear(V);
#pragma unroll(sizeof(T) == 2 ? 4 : 1)
        for (int n = 0; n < kN; n += 16)
          multiply<Stored::transposed, 2>(V, Left<T>::template load<Stored::as_is>(B_tile + 16 * row_tile * side_stride + n, side_stride),
                                          R + p0 * side_stride + n, side_stride);
        T* const x_own = x + i_low * rows_stride + p0 + 2 * q;
        const T* const dY_own = dY + i_low * rows_stride + p0 + 2 * q;
#pragma unroll
        for (int p8 = 0; p8 < 4; ++p8)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 x_pair = load_two(x_own + 8 * half * rows_stride + 8 * p8);
            V[p8][2 * half] *= to_end[half];
            V[p8][2 * half + 1] *= to_end[half];
            early[half] += V[p8][2 * half] * x_pair.x + V[p8][2 * half + 1] * x_pair.y;
          }
        for (int k = row_tile; k < 4; ++k)
          multiply<Stored::as_is, 2>(
              V, Left<T>::template load<Stored::transposed>(mixing + 16 * k * square_stride + 16 * row_tile, square_stride),
              dY + 16 * k * rows_stride + p0, rows_stride);
#pragma unroll
        for (int p8 = 0; p8 < 4; ++p8) {
          const int p = p0 + 8 * p8 + 2 * q;
          float2 D = make_float2(D_head, D_head), columns = make_float2(0, 0);
          if (a.D_per_channel) {
            if (p < a.P) D.x = a.D_skip[h * a.P + p];
            if (p + 1 < a.P) D.y = a.D_skip[h * a.P + p + 1];
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            T* const place = x_own + 8 * half * rows_stride + 8 * p8;
            const float2 x_pair = load_two(place), dY_pair = load_two(dY_own + 8 * half * rows_stride + 8 * p8);
            const float first = V[p8][2 * half], second = V[p8][2 * half + 1], dt_j = dt[i_low + 8 * half];
            direct[half] += first * x_pair.x + second * x_pair.y;
            columns.x += dY_pair.x * x_pair.x;
            columns.y += dY_pair.y * x_pair.y;
            store_two(place, dt_j * first + D.x * dY_pair.x, dt_j * second + D.y * dY_pair.y, true, true);
          }
          columns.x = column_sum(columns.x);
          columns.y = column_sum(columns.y);
          if (g == 0) *reinterpret_cast<float2*>(&sum.column_D[row_tile][p]) = columns;
        }
        __syncwarp();
        if (a.grad_x.data != nullptr)
          store_part<32>(a.grad_x.data + b * a.grad_x.batch + (t0 + 16 * row_tile) * a.grad_x.token + h * a.P + p0, a.grad_x.token,
                         x + 16 * row_tile * rows_stride + p0, rows_stride, valid - 16 * row_tile, 16, a.P - p0, a.grad_x.vectors);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = i_low + 8 * half;
        const float early_total = quad_sum(early[half]), direct_total = quad_sum(direct[half]);
        if (q == 0) {
          sum.early[column_half][j] = early_total * dt[j];
          sum.direct[column_half][j] = direct_total;
        }
      }
    }
    team_sync();  // all sums are there; the tiles may be overwritten
    if constexpr (pipelined) {
      if (more) fetch_state(R, a.state_grads + at_state(h + teams));
      close_copies();
    }
  }
  if (n_head > 0 && warp == 0) {
    const int64_t h = h_mine + (n_head - 1) * teams;
    finish_head(a, sums[(n_head - 1) % 2], load_head_end(a, b, h, chunk, valid), b, h, chunk, valid);
  }

  // The teams exchange: the first ends with dC, the second with dB; d(C B') as a tile for both.
  if constexpr (teams == 2) {
    copies_arrived();
    __syncthreads();
    float* exchange = reinterpret_cast<float*>(shared_memory() + Layout::common_bytes + 2 * sizeof(Sums) + Layout::mixing_bytes) + thread;
    constexpr int values = 4 * tiles;
    float* for_first = exchange;                                   // grad_C, then d(C B') of the second team
    float* for_second = for_first + (values + 16) * kTeamThreads;  // grad_B of the first
#pragma unroll
    for (int k = 0; k < values; ++k)
      if (team == 0) for_second[k * kTeamThreads] = grad_B[k / 4][k % 4];
      else for_first[k * kTeamThreads] = grad_C[k / 4][k % 4];
#pragma unroll
    for (int k = 0; k < 16; ++k)
      if (team == 1) for_first[(values + k) * kTeamThreads] = grad_scores[k / 4][k % 4];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < values; ++k)
      if (team == 0) grad_C[k / 4][k % 4] += for_first[k * kTeamThreads];
      else grad_B[k / 4][k % 4] += for_second[k * kTeamThreads];
#pragma unroll
    for (int k = 0; k < 16; ++k)
      if (team == 0) grad_scores[k / 4][k % 4] += for_first[(values + k) * kTeamThreads];
  }
  T* grad_score_tile = reinterpret_cast<T*>(shared_memory() + Layout::common_bytes + 2 * sizeof(Sums));  // M of the first team
  if (team == 0) {
#pragma unroll
    for (int j8 = 0; j8 < 4; ++j8)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_two(grad_score_tile + (i_low + 8 * half) * square_stride + 32 * column_half + 8 * j8 + 2 * q, grad_scores[j8][2 * half],
                  grad_scores[j8][2 * half + 1], true, true);
  }
  __syncthreads();

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
  if (team == 0) {  // dC_i += sum_{j <= i} d(C B')_ij B_j
    for (int k = 0; k <= row_tile; ++k)
      multiply<Stored::as_is, pairs>(
          grad_C, Left<T>::template load<Stored::as_is>(grad_score_tile + 16 * row_tile * square_stride + 16 * k, square_stride),
          B_tile + 16 * k * side_stride + n_begin, side_stride);
    store(grad_C, a.grad_C, a.parts_C);
  }
  if (team == teams - 1) {  // dB_j += sum_{i >= j} d(C B')_ij C_i
    for (int k = row_tile; k < 4; ++k)
      multiply<Stored::as_is, pairs>(
          grad_B, Left<T>::template load<Stored::transposed>(grad_score_tile + 16 * k * square_stride + 16 * row_tile, square_stride),
          C_tile + 16 * k * side_stride + n_begin, side_stride);
    store(grad_B, a.grad_B, a.parts_B);
  }
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
  float* partial;     // [slices, H, P + 2], or null: write the gradients
  const float* A_log;
  float *grad_A_log, *grad_D, *grad_bias;  // null: not wanted
  bool D_per_channel;
  int64_t rows, H;
  int P;
};

// One block per head and slice of the rows: 8 groups of 128 threads, a thread per column, a slice's rows in steps of 8; groups in order.
// Once over the chunks into slices, once over the slices.
constexpr int kSumColumns = 128, kSumGroups = 8, kSumSlices = 16;
__global__ void ssd_sum_heads_kernel(const HeadSumArgs a) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // [groups][columns], then [P] of dD
  float* channels = shared + kSumColumns * kSumGroups;
  const int column = threadIdx.x % kSumColumns, group = threadIdx.x / kSumColumns, width = a.P + 2;
  const int64_t h = blockIdx.x, slice = blockIdx.y, slices = gridDim.y, begin_row = a.rows * slice / slices,
                end_row = a.rows * (slice + 1) / slices;
  for (int begin = 0; begin < width; begin += kSumColumns) {
    const int k = begin + column;
    float sum = 0;
    if (k < width)
      for (int64_t row = begin_row + group; row < end_row; row += kSumGroups) sum += a.sums[(row * a.H + h) * width + k];
    shared[group * kSumColumns + column] = sum;
    __syncthreads();
    if (group == 0 && k < width) {
      float whole = 0;
      for (int other = 0; other < kSumGroups; ++other) whole += shared[other * kSumColumns + column];
      if (a.partial != nullptr) a.partial[(slice * a.H + h) * width + k] = whole;
      else if (k < a.P) channels[k] = whole;
      else if (k == a.P && a.grad_A_log != nullptr) a.grad_A_log[h] = -expf(a.A_log[h]) * whole;
      else if (k == a.P + 1 && a.grad_bias != nullptr) a.grad_bias[h] = whole;
    }
    __syncthreads();
  }
  if (a.partial != nullptr || a.grad_D == nullptr) return;
  if (a.D_per_channel) {
    for (int p = static_cast<int>(threadIdx.x); p < a.P; p += static_cast<int>(blockDim.x)) a.grad_D[h * a.P + p] = channels[p];
  } else if (threadIdx.x == 0) {
    float sum = 0;
    for (int p = 0; p < a.P; ++p) sum += channels[p];
    a.grad_D[h] = sum;
  }
}

// --- launchers ------------------------------------------------------------------------------------------------

template <class T, int kN, int kP, int teams>
void launch_chunks(const SsdChunkBwdArgs<T>& args, const CudaContext& context) {
  const dim3 grid(static_cast<unsigned>(args.B * args.chunks * args.G * args.parts));
  launch(&ssd_chunk_bwd_kernel<T, kN, kP, teams>, "ssd_chunk_bwd_kernel", grid, dim3(kTeamThreads * teams),
         static_cast<size_t>(ChunkBwdLayout<T, kN, kP, teams>::total_bytes), context, args);
}

/// Two teams where there are heads for them, two of everything fit into shared memory, and states can be moved by 16 bytes.
template <int kN>
void launch_small_heads(const SsdChunkBwdArgs<Bf16>& args, const CudaContext& context) {
  const bool fits = ChunkBwdLayout<Bf16, kN, 64, 2>::total_bytes <= context.shared_memory_per_block;
  if (fits && args.N % 8 == 0 && args.heads_per_part > 1) launch_chunks<Bf16, kN, 64, 2>(args, context);
  else launch_chunks<Bf16, kN, 64, 1>(args, context);
}

template <class T>
void launch_chunks(const SsdChunkBwdArgs<T>& args, const CudaContext& context) {
  const int kN = padded_state_dim(args.N);
  if constexpr (sizeof(T) == 2) {
    if (launch_ssd_chunk_bwd_warpgroups(args, context)) return;
    if (kN == 256) return launch_chunks<T, 256, 128, 1>(args, context);
    if (args.P <= 64) return kN == 64 ? launch_small_heads<64>(args, context) : launch_small_heads<128>(args, context);
  }
  kN == 64 ? launch_chunks<T, 64, 128, 1>(args, context) : launch_chunks<T, 128, 128, 1>(args, context);
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
  const SsdBorders borders = ssd_borders_cuda(in, steps, grad_y, grad_h_T, out.h0);
  const int64_t chunks = chunk_count(s.T);
  if (chunks == 0) return;

  SsdChunkBwdArgs<T> args{};
  args.x = token_rows<const T>(in.x, s.P);
  args.grad_y = token_rows<const T>(grad_y, s.P);
  args.B_t = token_rows<const T>(in.B_t, s.N);
  args.C_t = token_rows<const T>(in.C_t, s.N);
  args.dt_raw = token_rows<const T>(in.dt, s.H);
  args.grad_x = token_rows<T>(out.x, s.P);
  args.grad_dt = token_rows<T>(out.dt, s.H);
  args.states = static_cast<const T*>(borders.states.raw());
  args.state_grads = static_cast<const T*>(borders.state_grads.raw());
  args.dt = steps.dt.data<float>();
  args.lambda = steps.lambda.data<LogDecay<T>>();
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

  // Parts of a group's heads: the waves of blocks times the heads of each, a block's own beginning and end counting as two heads.
  const int64_t blocks = s.B * chunks * s.G, heads = s.heads_per_group();
  auto cost_of = [&](int64_t parts) {
    return (blocks * parts + context.sm_count - 1) / context.sm_count * ((heads + parts - 1) / parts + 2);
  };
  int64_t wanted = 1;
  for (int64_t parts = 2; parts <= heads; ++parts)
    if (cost_of(parts) < cost_of(wanted)) wanted = parts;
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
  launch_chunks<T>(args, context);

  auto sum_parts = [&](const Tensor& parts, const Tensor& to) {
    if (!parts.defined()) return;
    const PartsArgs<T> sum{parts.data<float>(), token_rows<T>(to, s.N), s.B, s.T, s.G * s.N, args.parts};
    const dim3 grid(static_cast<unsigned>((s.B * s.T * s.G * s.N + 255) / 256));
    launch(&ssd_sum_parts_kernel<T>, "ssd_sum_parts_kernel", grid, dim3(256), 0, context, sum);
  };
  sum_parts(parts_B, out.B_t);
  sum_parts(parts_C, out.C_t);
}

// Two borders of every chunk and head are kept while backward runs; the batch is taken in equal pieces so that they stay below this, as
// far as whole rows allow.
constexpr int64_t kBorderBytes = int64_t{1} << 30;

template <class T>
void backward(const SsdInputs& in, const SsdOptions& options, const Tensor& grad_y_or_none, const Tensor& grad_h_T,
              const SsdGradients& out) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  const int64_t chunks = chunk_count(s.T);
  const Shape sums_shape{s.B, chunks, s.H, s.P + 2};
  const Tensor sums = Tensor::empty(in.x.device(), Dtype::f32, sums_shape);
  const Tensor grad_y = grad_y_or_none.defined() ? grad_y_or_none : Tensor::zeros(in.x.device(), in.x.dtype(), in.x.shape());
  const int64_t border_bytes = 2 * s.B * chunks * s.H * s.P * s.N * static_cast<int64_t>(sizeof(T));
  const int64_t pieces = std::clamp<int64_t>((border_bytes + kBorderBytes - 1) / kBorderBytes, 1, std::max<int64_t>(1, s.B)),
                rows = (s.B + pieces - 1) / pieces;
  for (int64_t begin = 0; begin < s.B; begin += rows) {
    const int64_t end = std::min(begin + rows, s.B);
    auto piece = [&](const Tensor& t) { return rows_of_batch(t, begin, end); };
    backward_rows<T>({piece(in.x), piece(in.dt), in.A_log, piece(in.B_t), piece(in.C_t), in.D_skip, in.dt_bias, piece(in.h0)}, options,
                     piece(grad_y), piece(grad_h_T),
                     {piece(out.x), piece(out.dt), {}, piece(out.B_t), piece(out.C_t), {}, {}, piece(out.h0)}, piece(sums));
  }
  if (s.H == 0) return;
  HeadSumArgs args{sums.data<float>(),
                   nullptr,
                   in.A_log.data<float>(),
                   floats_of(out.A_log),
                   floats_of(out.D_skip),
                   floats_of(out.dt_bias),
                   in.D_skip.defined() && in.D_skip.rank() == 2,
                   s.B * chunks,
                   s.H,
                   static_cast<int>(s.P)};
  const auto sum = [&](int64_t slices) {
    launch(&ssd_sum_heads_kernel, "ssd_sum_heads_kernel", dim3(static_cast<unsigned>(s.H), static_cast<unsigned>(slices)),
           dim3(kSumColumns * kSumGroups), (kSumColumns * kSumGroups + kMaxHeadDim) * sizeof(float), in.x.device().cuda_context(), args);
  };
  Tensor partial;
  if (args.rows > 4 * kSumSlices) {
    const Shape shape{int64_t{kSumSlices}, s.H, s.P + 2};
    partial = Tensor::empty(in.x.device(), Dtype::f32, shape);
    args.partial = partial.data<float>();
    sum(kSumSlices);
    args.sums = args.partial;
    args.rows = kSumSlices;
    args.partial = nullptr;
  }
  sum(1);
}

}  // namespace

void ssd_bwd_cuda(const SsdInputs& in, const SsdOptions& options, const Tensor& grad_y, const Tensor& grad_h_T, const SsdGradients& out) {
  require_ssd_cuda_sizes(in);
  in.x.dtype() == Dtype::bf16 ? backward<Bf16>(in, options, grad_y, grad_h_T, out) : backward<float>(in, options, grad_y, grad_h_T, out);
}

}  // namespace longhand
