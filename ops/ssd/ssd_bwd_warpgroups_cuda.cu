// SSD on CUDA, backward of a chunk with the products of warpgroups (sm_90a). What ssd_chunk_bwd_kernel (ssd_bwd_cuda.cu) computes, with the
// same roundings, where products of 16 rows a warp would spend most instructions on fetching operands.
//
// ssd_chunk_bwd_warpgroups_kernel
// moves   per token and head x, dy in, dx out; per chunk and head two states of P N; per chunk and group B_t, C_t in, dB, dC out
// flops   per chunk of Q = 64 and head: x dY' and M' dY (Q Q P each, whole squares), dY S, R B and x R (Q P N each), times 2
// floor   B 32, T 2048, H 24, P 64, N 128, bf16: 1.4 GB / 4.0 TB/s = 0.35 ms on an H200
// split   one block per (row, chunk, part of a group's heads), its heads one after the other through a ring of stages. Three warpgroups
//         work on a head side by side, each at its own pace: the first on what C gets, the second on what stays inside the chunk and on dx,
//         the third on what B gets. Of the fourth, two warps fetch the heads to come and two
//         end those that are done. In products inside the chunk rows
//         are tokens j (of x, B) and columns tokens i (of dY, C), so that M' leaves its accumulator as the next product's left operand
// needs   bf16, P <= 64, N <= 128, all widths, strides and addresses multiples of 16 bytes; sm_90a; 212 KB of shared memory a block
// agrees  with the CPU reference to kSsdToleranceBf16 (ssd.h); rounds the states, the sum of d(C B'), C B' E, rho dt x
// order   fixed, no atomics
#include "core/error.h"
#include "ops/common/warpgroup_instructions.cuh"
#include "ops/ssd/ssd_bwd_cuda.cuh"

namespace longhand {
namespace {

constexpr int kWorkers = 3 * kWarpgroup, kThreads = kWorkers + kWarpgroup;
constexpr int kWorkerRegisters = 152, kFetcherRegisters = 56;  // of 4 * 128
constexpr int kStages = 3;

/// What a head leaves behind for the end of its work.
struct HeadSums {
  float late[kChunk];
  float early[kChunk];
  float direct[kChunk];        // V_j . x_j
  float column_total[kChunk];  // of W, over i
  float row_total[4][kChunk];  // of W, over j, by warp
  float column_D[4][kChunk];   // dY . x by channel, by warp
  float inner[4];              // <R, S> by warp

  __device__ float behind(int t) const {
    return late[t] - column_total[t] + ((row_total[0][t] + row_total[1][t]) + (row_total[2][t] + row_total[3][t]));
  }
  __device__ float before(int t) const { return early[t]; }
  __device__ float through_dt(int t) const { return direct[t]; }
  __device__ float through_D(int p) const { return (column_D[0][p] + column_D[1][p]) + (column_D[2][p] + column_D[3][p]); }
  __device__ float states() const { return (inner[0] + inner[1]) + (inner[2] + inner[3]); }
};

/// Shared memory in bytes: B_t and C_t, one panel for dx, the stages (x, dY, S, R), C B', dt and lambda of the stages, sums.
template <int kN>
struct Layout {
  static constexpr int side_bytes = kN / kPanelColumns * kPanelBytes;
  static constexpr int B_place = 0, C_place = side_bytes, out_place = 2 * side_bytes, stages_place = out_place + kPanelBytes;
  static constexpr int dY_place = kPanelBytes, S_place = 2 * kPanelBytes, R_place = S_place + side_bytes;
  static constexpr int stage_bytes = R_place + side_bytes;
  static constexpr int scores_place = stages_place + kStages * stage_bytes;
  static constexpr int steps_place = scores_place + kChunk * kChunk * 4, steps_bytes = 2 * kChunk * 4;
  static constexpr int sums_place = steps_place + kStages * steps_bytes;
  static constexpr int total_bytes = kPanelAlignment + sums_place + kStages * static_cast<int>(sizeof(HeadSums));
};

#if LONGHAND_WARPGROUP_INSTRUCTIONS

/// Sums over the eight lanes that share columns: of 16 values (columns 8 c + 2 q and the next, value 2 c + ..) lane (g, q) gets those of c
/// = g.
__device__ __forceinline__ float2 column_sums(float (&values)[16]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int apart = 16, kept = 8; apart >= 4; apart /= 2, kept /= 2) {
    const bool upper = lane & apart;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (k < kept) {
        const float given = upper ? values[k] : values[k + kept], own = upper ? values[k + kept] : values[k];
        values[k] = own + __shfl_xor_sync(kAllLanes, given, apart);
      }
  }
  return make_float2(values[0], values[1]);
}

#endif

template <int kN>
__global__ void __launch_bounds__(kThreads, 1) ssd_chunk_bwd_warpgroups_kernel(const __grid_constant__ SsdChunkBwdArgs<Bf16> a) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  using L = Layout<kN>;
  constexpr int tiles = kN / 8;
  __shared__ uint64_t full[kStages], empty[kStages], sums_free[kStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int role = warp / 4, row_tile = warp % 4, thread = threadIdx.x % kWarpgroup, low = 16 * row_tile + g;  // rows low and low + 8
  const auto [part, group, row_chunk, chunk, b, t0, h_first, h_end, valid] = chunk_place(a);
  const int64_t state_size = static_cast<int64_t>(a.P) * a.N;
  const int count = static_cast<int>(h_end - h_first);

  unsigned char* const memory = shared_memory() + (0u - shared_address(shared_memory())) % kPanelAlignment;
  unsigned char *const B_tile = memory + L::B_place, *const C_tile = memory + L::C_place, *const out = memory + L::out_place;
  float4* const scores = reinterpret_cast<float4*>(memory + L::scores_place);
  const auto stage_of = [&](int n) { return memory + L::stages_place + n % kStages * L::stage_bytes; };
  const auto dt_of = [&](int n) { return reinterpret_cast<float*>(memory + L::steps_place + n % kStages * L::steps_bytes); };
  const auto sums_of = [&](int n) { return reinterpret_cast<HeadSums*>(memory + L::sums_place) + n % kStages; };

  if (threadIdx.x == 0)
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_create(&full[stage], 2 * 32);          // lanes that fetch
      barrier_create(&sums_free[stage], 1);          // the lane that has ended the head before
      barrier_create(&empty[stage], kWorkers / 32);  // warps that work
    }
  __syncthreads();

  if (role == 3) {
    give_up_registers<kFetcherRegisters>();
    if (row_tile >= 2) {  // two warps end the heads in turn
      for (int n = row_tile - 2; n < count + kStages; n += 2) {
        if (const int done = n - kStages; done >= 0 && done < count) {
          const HeadEnd end = load_head_end(a, b, h_first + done, chunk, valid);
          barrier_wait(&empty[done % kStages], done / kStages % 2);
          finish_head(a, *sums_of(done), end, b, h_first + done, chunk, valid);
          __syncwarp();
        }
        if (lane == 0 && n < count) barrier_arrive(&sums_free[n % kStages]);
      }
      return;
    }
    for (int n = 0; n < count; ++n) {  // two fetch
      if (n >= kStages) barrier_wait(&empty[n % kStages], (n / kStages - 1) % 2);
      const int64_t h = h_first + n, at_steps = ((b * a.H + h) * a.chunks + chunk) * kChunk, at_state = (row_chunk * a.H + h) * state_size;
      unsigned char* const stage = stage_of(n);
      if (row_tile == 0) {
        copy_steps_async(dt_of(n), a.dt + at_steps, a.lambda + at_steps, lane, 32);
        load_panels<kChunk, 32>(stage, a.x.data + b * a.x.batch + t0 * a.x.token + h * a.P, a.x.token, valid, a.P, lane);
        load_panels<kChunk, 32>(stage + L::dY_place, a.grad_y.data + b * a.grad_y.batch + t0 * a.grad_y.token + h * a.P, a.grad_y.token,
                                valid, a.P, lane);
      } else {
        load_panels<kN, 32>(stage + L::S_place, a.states + at_state, a.N, a.P, a.N, lane);
        load_panels<kN, 32>(stage + L::R_place, a.state_grads + at_state, a.N, a.P, a.N, lane);
      }
      barrier_arrive_with_copies(&full[n % kStages]);
    }
    copies_arrived();
    return;
  }
  take_registers<kWorkerRegisters>();

  const auto workers_sync = [] { named_barrier(1, kWorkers); };
  if (warp == 0) load_panels<kN, 32>(B_tile, a.B_t.data + b * a.B_t.batch + t0 * a.B_t.token + group * a.N, a.B_t.token, valid, a.N, lane);
  if (warp == 4) load_panels<kN, 32>(C_tile, a.C_t.data + b * a.C_t.batch + t0 * a.C_t.token + group * a.N, a.C_t.token, valid, a.N, lane);
  copies_arrived();
  workers_sync();
  publish_to_tensor_cores();
  const auto head_arrived = [&](int n) {
    barrier_wait(&full[n % kStages], n / kStages % 2);
    publish_to_tensor_cores();
  };
  const auto sums_to_write = [&](int n) {
    barrier_wait(&sums_free[n % kStages], n / kStages % 2);
    return sums_of(n);
  };
  const auto head_done = [&](int n) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&empty[n % kStages]);
  };
  const auto store = [&](const float(&grad)[tiles][4], const TokenRows<Bf16>& to, float* parts) {
#pragma unroll
    for (int n8 = 0; n8 < tiles; ++n8)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = low + 8 * half, n = 8 * n8 + 2 * q;
        if (i >= valid || n >= a.N) continue;
        if (parts != nullptr)
          store_two(parts + (((part * a.B + b) * a.tokens + t0 + i) * a.G + group) * a.N + n, grad[n8][2 * half], grad[n8][2 * half + 1],
                    true, true);
        else if (to.data != nullptr)
          store_two(to.data + b * to.batch + (t0 + i) * to.token + group * a.N + n, grad[n8][2 * half], grad[n8][2 * half + 1], true,
                    to.vectors);
      }
  };

  if (role == 0) {  // dC_i += e^{Lambda_i} S' dY_i, late_i = <C_i, that>
    float grad_C[tiles][4];
    clear(grad_C);
    for (int n = 0; n < count; ++n) {
      const unsigned char* const stage = stage_of(n);
      const float* const lambda = dt_of(n) + kChunk;
      head_arrived(n);
      const float scale[2] = {decay_of(lambda[low]), decay_of(lambda[low + 8])};
      HeadSums& sum = *sums_to_write(n);
      float dots[2] = {0, 0};
#pragma unroll
      for (int panel = 0; panel < kN / kPanelColumns; ++panel) {
        float product[8][4];
        products_begin();
#pragma unroll
        for (int k16 = 0; k16 < kChunk / 16; ++k16)
          multiply_panels<Summed::along_rows, Summed::across_rows>(
              product, operand<Summed::along_rows>(stage + L::dY_place, k16),
              operand<Summed::across_rows>(stage + L::S_place + panel * kPanelBytes, k16), k16 > 0);
        products_close();
        const int unit_of_row = not_hoisted(16 * g);
        products_done_but<0>();
        touch(product);
#pragma unroll
        for (int n8 = 0; n8 < 8; ++n8) {
          const unsigned char* const C_at = C_tile + panel * kPanelBytes + low * kPanelRow + (16 * n8 ^ unit_of_row) + 4 * q;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float first = product[n8][2 * half], second = product[n8][2 * half + 1];
            const float2 C = load_two(reinterpret_cast<const Bf16*>(C_at + 8 * half * kPanelRow));
            dots[half] += first * C.x + second * C.y;
            grad_C[8 * panel + n8][2 * half] += scale[half] * first;
            grad_C[8 * panel + n8][2 * half + 1] += scale[half] * second;
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(dots[half]);
        if (q == 0) sum.late[low + 8 * half] = scale[half] * total;
      }
      head_done(n);
    }
    workers_sync();  // d(C B')' lies in `out`
    products_begin();
#pragma unroll
    for (int k16 = 0; k16 < kChunk / 16; ++k16)  // dC_i += sum_{j <= i} d(C B')_ij B_j
      multiply_panels<Summed::across_rows, Summed::across_rows>(grad_C, operand<Summed::across_rows>(out, k16),
                                                                operand<Summed::across_rows>(B_tile, k16), true);
    products_close();
    products_done_but<0>();
    touch(grad_C);
    store(grad_C, a.grad_C, a.parts_C);
  } else if (role == 1) {  // inside the chunk, rows j and columns i
    float product[8][4], grad_scores[8][4];
    products_begin();
#pragma unroll
    for (int k16 = 0; k16 < kN / 16; ++k16)
      multiply_panels<Summed::along_rows, Summed::along_rows>(product, operand<Summed::along_rows>(B_tile, k16),
                                                              operand<Summed::along_rows>(C_tile, k16), k16 > 0);
    products_close();
    products_done_but<0>();
    touch(product);
#pragma unroll
    for (int i8 = 0; i8 < 8; ++i8)
      scores[i8 * kWarpgroup + thread] = make_float4(product[i8][0], product[i8][1], product[i8][2], product[i8][3]);
    clear(grad_scores);

    for (int n = 0; n < count; ++n) {
      const int64_t h = h_first + n;
      unsigned char* const stage = stage_of(n);
      const unsigned char* const dY = stage + L::dY_place;
      const float *const dt = dt_of(n), *const lambda = dt + kChunk;
      const float D_head = a.D_skip == nullptr || a.D_per_channel ? 0.0f : a.D_skip[h];
      head_arrived(n);
      HeadSums& sum = *sums_to_write(n);
      float V[8][4];  // rho_j R B_j + sum_{i >= j} M_ij dY_i
      products_begin();
#pragma unroll
      for (int k16 = 0; k16 < kChunk / 16; ++k16)
        multiply_panels<Summed::along_rows, Summed::along_rows>(product, operand<Summed::along_rows>(stage, k16),
                                                                operand<Summed::along_rows>(dY, k16), k16 > 0);
      products_close();
#pragma unroll
      for (int k16 = 0; k16 < kN / 16; ++k16)
        multiply_panels<Summed::along_rows, Summed::along_rows>(V, operand<Summed::along_rows>(B_tile, k16),
                                                                operand<Summed::along_rows>(stage + L::R_place, k16), k16 > 0);
      products_close();
      const float last = lambda[kChunk - 1];
      const float lambda_j[2] = {lambda[low], lambda[low + 8]}, dt_j[2] = {dt[low], dt[low + 8]};
      products_done_but<1>();
      touch(product);

      // d(C B') = (dY X') E dt into its sum, its product W with C B' into sums of rows and columns, and M = C B' E
      Left<Bf16> M[4];
      float over_j[16], over_i[2] = {0, 0};
#pragma unroll
      for (int i8 = 0; i8 < 8; ++i8) {
        if (i8 / 2 < row_tile) {  // above the diagonal: i < j
          over_j[2 * i8] = over_j[2 * i8 + 1] = 0;
          M[i8 / 2].r[i8 % 2 * 2] = M[i8 / 2].r[i8 % 2 * 2 + 1] = 0;
          continue;
        }
        const int i = 8 * i8 + 2 * q;
        const float2 lambda_i = load_two(lambda + i);
        const float4 four = scores[i8 * kWarpgroup + thread];
        float W[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = low + 8 * half;
          const float own = decay_of(lambda_i.x - lambda_j[half]), next_own = decay_of(lambda_i.y - lambda_j[half]);
          const float decay = j <= i ? own : 0.0f, next = j <= i + 1 ? next_own : 0.0f;
          const float2 score = half == 0 ? make_float2(four.x, four.y) : make_float2(four.z, four.w);
          const float first = product[i8][2 * half] * decay * dt_j[half], second = product[i8][2 * half + 1] * next * dt_j[half];
          M[i8 / 2].r[i8 % 2 * 2 + half] = pack(score.x * decay, score.y * next);
          grad_scores[i8][2 * half] += first;
          grad_scores[i8][2 * half + 1] += second;
          W[half][0] = j < i ? first * score.x : 0.0f;
          W[half][1] = j < i + 1 ? second * score.y : 0.0f;
          over_i[half] += W[half][0] + W[half][1];
        }
        over_j[2 * i8] = W[0][0] + W[1][0];
        over_j[2 * i8 + 1] = W[0][1] + W[1][1];
      }
      *reinterpret_cast<float2*>(&sum.row_total[row_tile][8 * g + 2 * q]) = column_sums(over_j);

      products_done_but<0>();
      touch(V);
      uint32_t x[8][2];
      float early[2] = {0, 0}, direct[2] = {0, 0};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float to_end = decay_of(last - lambda_j[half]);
#pragma unroll
        for (int p8 = 0; p8 < 8; ++p8) {
          x[p8][half] = *reinterpret_cast<const uint32_t*>(panel_element(stage, low + 8 * half, 8 * p8 + 2 * q));
          const float2 x_pair = unpack(x[p8][half]);
          V[p8][2 * half] *= to_end;
          V[p8][2 * half + 1] *= to_end;
          early[half] += V[p8][2 * half] * x_pair.x + V[p8][2 * half + 1] * x_pair.y;
        }
      }
      products_begin();
#pragma unroll
      for (int k16 = 0; k16 < kChunk / 16; ++k16) multiply_panels<Summed::across_rows>(V, M[k16], operand<Summed::across_rows>(dY, k16));
      products_close();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(over_i[half]), early_total = quad_sum(early[half]);
        if (q == 0) {
          sum.column_total[low + 8 * half] = total;
          sum.early[low + 8 * half] = early_total * dt_j[half];
        }
      }
      products_done_but<0>();
      touch(V);
      // dx_j = dt_j V_j + D dY_j
#pragma unroll
      for (int p8 = 0; p8 < 8; ++p8) {
        const int p = 8 * p8 + 2 * q;
        float2 D = make_float2(D_head, D_head);
        if (a.D_per_channel && p < a.P) D = make_float2(a.D_skip[h * a.P + p], a.D_skip[h * a.P + p + 1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = low + 8 * half;
          const float2 x_pair = unpack(x[p8][half]);
          const float2 dY_pair = load_two(panel_element(dY, j, p));
          const float first = V[p8][2 * half], second = V[p8][2 * half + 1];
          direct[half] += first * x_pair.x + second * x_pair.y;
          store_two(panel_element(out, j, p), dt_j[half] * first + D.x * dY_pair.x, dt_j[half] * second + D.y * dY_pair.y, true, true);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(direct[half]);
        if (q == 0) sum.direct[low + 8 * half] = total;
      }
      head_done(n);
      if (a.grad_x.data != nullptr) {
        Bf16* const to = a.grad_x.data + b * a.grad_x.batch + t0 * a.grad_x.token + h * a.P;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = 16 * row_tile + 4 * k + lane / 8, p = lane % 8 * 8;
          if (row < valid && p < a.P)
            *reinterpret_cast<uint4*>(to + row * a.grad_x.token + p) = *reinterpret_cast<const uint4*>(panel_element(out, row, p));
        }
      }
      __syncwarp();  // this warp's rows of `out` may be written again
    }
#pragma unroll
    for (int i8 = 0; i8 < 8; ++i8)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_two(panel_element(out, low + 8 * half, 8 * i8 + 2 * q), grad_scores[i8][2 * half], grad_scores[i8][2 * half + 1], true, true);
    publish_to_tensor_cores();
    workers_sync();
  } else {  // dB_j += rho_j dt_j R' x_j, <R, S>, dD
    float grad_B[tiles][4];
    clear(grad_B);
    for (int n = 0; n < count; ++n) {
      const unsigned char* const stage = stage_of(n);
      const float *const dt = dt_of(n), *const lambda = dt + kChunk;
      head_arrived(n);
      HeadSums& sum = *sums_to_write(n);
      const float last = lambda[kChunk - 1];
      const float weight[2] = {decay_of(last - lambda[low]) * dt[low], decay_of(last - lambda[low + 8]) * dt[low + 8]};
      Left<Bf16> x[4];
#pragma unroll
      for (int k16 = 0; k16 < kChunk / 16; ++k16) {
        x[k16] = left_from_panels(stage, 16 * row_tile, 16 * k16);
        x[k16].scale_rows(weight[0], weight[1]);
      }
      products_begin();
#pragma unroll
      for (int k16 = 0; k16 < kChunk / 16; ++k16)
        multiply_panels<Summed::across_rows>(grad_B, x[k16], operand<Summed::across_rows>(stage + L::R_place, k16));
      products_close();

      float inner = 0;
#pragma unroll 2
      for (int unit = thread; unit < kChunk * kN / 8; unit += kWarpgroup) {
        const Pack<Bf16, 8> R = load_pack<8>(reinterpret_cast<const Bf16*>(stage + L::R_place) + 8 * unit),
                            S = load_pack<8>(reinterpret_cast<const Bf16*>(stage + L::S_place) + 8 * unit);
#pragma unroll
        for (int e = 0; e < 8; ++e) inner += widen(R.at[e]) * widen(S.at[e]);
      }
      inner = warp_sum(inner);
      if (lane == 0) sum.inner[row_tile] = inner;

      float columns[8] = {};  // 8 channels from 8 * (thread % 8), 4 rows
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = thread / 8 + 16 * k, p = thread % 8 * 8;
        const Pack<Bf16, 8> x8 = load_pack<8>(panel_element(stage, row, p)), dY8 = load_pack<8>(panel_element(stage + L::dY_place, row, p));
#pragma unroll
        for (int e = 0; e < 8; ++e) columns[e] += widen(x8.at[e]) * widen(dY8.at[e]);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        columns[e] += __shfl_xor_sync(kAllLanes, columns[e], 8);
        columns[e] += __shfl_xor_sync(kAllLanes, columns[e], 16);
      }
      if (lane < 8) {
        float4* const to = reinterpret_cast<float4*>(&sum.column_D[row_tile][8 * lane]);
        to[0] = make_float4(columns[0], columns[1], columns[2], columns[3]);
        to[1] = make_float4(columns[4], columns[5], columns[6], columns[7]);
      }
      products_done_but<0>();
      touch(grad_B);
      head_done(n);
    }
    workers_sync();
    products_begin();
#pragma unroll
    for (int k16 = 0; k16 < kChunk / 16; ++k16)  // dB_j += sum_{i >= j} d(C B')_ij C_i
      multiply_panels<Summed::along_rows, Summed::across_rows>(grad_B, operand<Summed::along_rows>(out, k16),
                                                               operand<Summed::across_rows>(C_tile, k16), true);
    products_close();
    products_done_but<0>();
    touch(grad_B);
    store(grad_B, a.grad_B, a.parts_B);
  }
#endif
}

template <int kN>
bool launch_chunks(const SsdChunkBwdArgs<Bf16>& args, const CudaContext& context) {
  if (!has_warpgroup_instructions(&ssd_chunk_bwd_warpgroups_kernel<kN>, context)) return false;
  const dim3 grid(static_cast<unsigned>(args.B * args.chunks * args.G * args.parts));
  launch(&ssd_chunk_bwd_warpgroups_kernel<kN>, "ssd_chunk_bwd_warpgroups_kernel", grid, dim3(kThreads),
         static_cast<size_t>(Layout<kN>::total_bytes), context, args);
  return true;
}

}  // namespace

bool launch_ssd_chunk_bwd_warpgroups(const SsdChunkBwdArgs<Bf16>& a, const CudaContext& context) {
  const bool vectors = a.x.vectors && a.grad_y.vectors && a.B_t.vectors && a.C_t.vectors && (a.grad_x.data == nullptr || a.grad_x.vectors);
  if (!vectors || a.P > kChunk || a.N > 128) return false;
  if (Layout<128>::total_bytes > context.shared_memory_per_block) return false;
  return a.N <= 64 ? launch_chunks<64>(a, context) : launch_chunks<128>(a, context);
}

}  // namespace longhand
