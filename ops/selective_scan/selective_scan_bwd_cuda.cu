// The selective scan on CUDA, backward: gradients of everything, in one walk over the tokens from the last to the first, begun from the
// states that forward has kept in front of every 64 tokens.
//
// selective_scan_bwd_segments_kernel: what a segment does to the gradient of a state; only where rows and channels are too few
// moves   dt, z, grad_y in
// flops   N exponentials and 4 N others per token and channel: sum_t (prod_{s<=t} a_s) C_t grad_r_t, walking forward with the product
// split   as in the forward walk; connect_segments_kernel puts the whole scan together
//
// selective_scan_bwd_walk_kernel: the gradients
// moves   x, dt, z, grad_y in, grad_x, grad_dt, grad_z out: 14 bytes per token and channel in bf16, dt and x once more, and the states of
//         chunks; 2 N f32 of partial sums of grad_B_t and grad_C_t per token and 64 channels
// flops   2.4 N exponentials, about 20 N others per token and channel
// floor   the same shape: 1.0 ms of ex2, about 1.4 ms of instructions
// split   N <= 16: a thread holds four states of two channels, four lanes share the channels, a block has 64 channels of one segment. It
//         goes through its chunks from the last to the first: first forward, leaving the state in front of every eighth token in shared
//         memory; then for eight tokens at a time, last first, forward once more with p = exp(dt A) h[t-1] (and half of the decays) kept
//         in registers, and back with the gradient of the state. Sums over the entries of a channel go through shuffles, sums over the
//         channels of a block through shared memory
// needs   N <= 256; any strides over B and T
// agrees  with the CPU reference: kSelectiveScanToleranceF32; bf16 adds one rounding of each result
// order   sums over channels: lanes, then warps, then blocks of 64 channels (sum_blocks_kernel), each in a fixed order; sums over tokens:
//         one partial per segment, then sum_partials. No atomics; the number of segments depends on the GPU
#include <algorithm>

#include "ops/common/sum_partials.h"
#include "ops/selective_scan/selective_scan_cuda.cuh"

namespace longhand {
namespace {

constexpr int kRun = 8;                   // tokens walked back at a time
constexpr int kRuns = kScanChunk / kRun;  // of a chunk
constexpr int kKeptDecays = 4;        // of the 8 states of a thread: decays kept in registers for the way back, the others computed again
constexpr int kStagedTokens = 32;     // on the way forward through a chunk
constexpr int64_t kBlocksAtOnce = 3;  // on an SM
constexpr int64_t kBlocksPerSm = 6 * kBlocksAtOnce;
constexpr int64_t kPartialBytes = 512ll << 20;  // limit of the partial sums of grad_B_t and grad_C_t

// --- segments -------------------------------------------------------------------------------------------------

template <class Split>
struct SegmentShared {
  alignas(16) float dt[kScanTile<Split>][Split::kBlockChannels];
  alignas(16) float grad_r[kScanTile<Split>][Split::kBlockChannels];
  alignas(16) float C_t[kScanTile<Split>][Split::kN];
};

/// grad_r = grad_y silu(z) of four channels; zeros where the token is not there.
template <class T>
__device__ void gated_gradient(const ScanProblem<T>& p, const Pack<T, 4>& grad_y, const Pack<T, 4>& z, float (&grad_r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) grad_r[i] = to_f32(grad_y.at[i]) * (p.z.data != nullptr ? silu(to_f32(z.at[i])) : 1.0f);
}

template <class T, class Split>
__global__ void __launch_bounds__(kScanThreads, Split::kN <= 16 ? 6 : 3)
    selective_scan_bwd_segments_kernel(const ScanProblem<T> p, const ScanRows<const T> grad_y, float* grads, float* dt_sums,
                                       int64_t groups) {
  static_assert(Split::kChannels == 1);
  constexpr int kPacksPerRow = Split::kBlockChannels / 4, kPacks = kScanTile<Split> * kPacksPerRow;
  __shared__ SegmentShared<Split> shared;
  const ScanPlace<Split, T> place(p, 0, groups, p.segments);
  const int c = Split::first_channel(), n0 = Split::first_entry();
  const int64_t channel = place.first_channel + c;

  float A2[Split::kHeld], passed[Split::kHeld], grad[Split::kHeld], dt_sum = 0;
  load_A2<Split>(p, channel, A2);
#pragma unroll
  for (int i = 0; i < Split::kHeld; ++i) {
    grad[i] = 0;
    passed[i] = 1;
  }

  for (int64_t begin = place.begin; begin < place.end; begin += kScanTile<Split>) {
    for (int i = static_cast<int>(threadIdx.x); i < kPacks; i += kScanThreads) {
      const int row = i / kPacksPerRow, column = i % kPacksPerRow * 4;
      const int64_t t = begin + row, d = place.first_channel + column;
      const bool there = t < place.end;
      const Pack<T, 4> dt = load_four(p.dt, place.b, t, d, p.channels, there), dy = load_four(grad_y, place.b, t, d, p.channels, there),
                       z = load_four(p.z, place.b, t, d, p.channels, there);
      float grad_r[4];
      gated_gradient(p, dy, z, grad_r);
      Pack<float, 4> steps;
#pragma unroll
      for (int k = 0; k < 4; ++k) steps.at[k] = there && d + k < p.channels ? softplus(to_f32(dt.at[k]) + p.dt_bias[d + k]) : 0.0f;
      store_pack(&shared.dt[row][column], steps);
      store_pack(&shared.grad_r[row][column], Pack<float, 4>{{grad_r[0], grad_r[1], grad_r[2], grad_r[3]}});
    }
    stage_entries<Split>(p.C_t, p, place.b, begin, place.end, kScanTile<Split>, shared.C_t[0]);
    __syncthreads();

    const int count = static_cast<int>(min(static_cast<int64_t>(kScanTile<Split>), place.end - begin));
#pragma unroll 4
    for (int t = 0; t < count; ++t) {
      float C_t[Split::kEntries];
      read_floats(&shared.C_t[t][n0], C_t);
      const float dt = shared.dt[t][c], grad_r = shared.grad_r[t][c];
#pragma unroll
      for (int i = 0; i < Split::kHeld; ++i) {
        passed[i] *= exp2_approx(dt * A2[i]);
        grad[i] += passed[i] * (C_t[i] * grad_r);
      }
      dt_sum += dt;
    }
    __syncthreads();
  }

  const int64_t at = place.segment_index(p) * p.channels;
  store_states<Split>(grads + at * Split::kN, channel, p.channels, grad);
  if (n0 == 0 && channel < p.channels) dt_sums[at + channel] = dt_sum;
}

// --- gradients ------------------------------------------------------------------------------------------------

template <class T>
struct WalkBack {
  ScanRows<const T> grad_y;
  ScanRows<T> grad_x, grad_dt, grad_z;             // null data: not wanted
  const float* carries;                            // [B, segments, D, carries_row]: gradient of the state at the end, or null for zeros
  int64_t carries_row;                             // N or kN
  const float* borders;                            // [B, chunks, D, kN]: the state in front of each chunk
  float* grad_h0;                                  // [B, D, N] or null
  float *A_partials, *D_partials, *bias_partials;  // [B * segments, D, N], [B * segments, D] twice
  float* BC_partials;                              // [groups of this launch, B * T, 2, N4]
  int64_t N4;                                      // N rounded up to a multiple of 4
  int64_t first_group, groups;
};

template <class Split>
struct WalkBackShared {
  static constexpr int kC = Split::kBlockChannels, kN = Split::kN, kQuads = Split::kEntries / 4;
  static constexpr int kSumStride = kC + 16;  // lanes that write four tokens at a time meet different banks
  struct Forward {                            // while the chunk is walked through without keeping anything
    float steps[kStagedTokens][kC][2];
    float B_t[kStagedTokens][kN];
  };
  struct Back {
    float steps[kRun][kC][2];  // dt, dt x
    float grad_r[kRun][kC];
    float B_t[kRun][kN], C_t[kRun][kN];
    float over_entries[3][kRun][kSumStride];            // <C_t, h>, <B_t, lambda>, <A2, lambda p>
    float by_lane[kScanWarps][kRun][kQuads][kWarp][4];  // a thread's share of grad_C_t, then of grad_B_t
    float by_warp[2][kScanWarps][kRun][kN];             // the warp's share of grad_B_t and of grad_C_t
  };
  alignas(16) float run_states[kRuns][Split::kHeld / 4][kScanThreads][4];  // state in front of every run of the chunk
  union alignas(16) {
    Forward forward;
    Back back;
  };
  alignas(16) float channel_sums[2][kScanThreads][4];  // a thread's shares of grad_D_skip and of grad_dt_bias
};

/// Adds what the lanes of a warp have left in by_lane over its channels, for all tokens of a run and all entries.
template <class Split>
__device__ void sum_over_channels(const float (&by_lane)[kRun][Split::kEntries / 4][kWarp][4], float (&to)[kRun][Split::kN]) {
  constexpr int kQuads = Split::kEntries / 4, kPerRun = Split::kLanes * kQuads;  // packs of four entries of a token
  __syncwarp();
#pragma unroll
  for (int o = static_cast<int>(threadIdx.x) % kWarp; o < kRun * kPerRun; o += kWarp) {
    const int t = o / kPerRun, n = o % kPerRun * 4, part = n / Split::kEntries, quad = n % Split::kEntries / 4;
    float sum[4] = {};
#pragma unroll
    for (int j = 0; j < Split::kAcross; ++j) {
      const int across = (j + o) % Split::kAcross;  // every lane begins elsewhere, so that they meet different banks
      float share[4];
      read_floats(by_lane[t][quad][part * Split::kAcross + across], share);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += share[k];
    }
    store_pack(&to[t][n], Pack<float, 4>{{sum[0], sum[1], sum[2], sum[3]}});
  }
  __syncwarp();
}

/// Walks forward through `count` staged tokens with the states, keeping nothing.
template <class Split>
__device__ void advance(const typename WalkBackShared<Split>::Forward& staged, int first, int count, const float (&A2)[Split::kHeld],
                        float (&h)[Split::kHeld]) {
  const int c = Split::first_channel(), n0 = Split::first_entry();
#pragma unroll 4
  for (int t = first; t < first + count; ++t) {
    float steps[2 * Split::kChannels], B_t[Split::kEntries];
    read_floats(staged.steps[t][c], steps);
    read_floats(&staged.B_t[t][n0], B_t);
#pragma unroll
    for (int i = 0; i < Split::kHeld; ++i) {
      const int channel = i / Split::kEntries;
      h[i] = exp2_approx(steps[2 * channel] * A2[i]) * h[i] + steps[2 * channel + 1] * B_t[i % Split::kEntries];
    }
  }
}

template <class T, class Split>
__global__ void __launch_bounds__(kScanThreads, Split::kN <= 16 ? 3 : 1)
    selective_scan_bwd_walk_kernel(const ScanProblem<T> p, const WalkBack<T> g) {
  constexpr int kHeld = Split::kHeld, kEntries = Split::kEntries, kChannels = Split::kChannels, kC = Split::kBlockChannels;
  static_assert(kHeld == 8);
  constexpr int kPacksPerRow = kC / 4, kPacks = kRun * kPacksPerRow;
  static_assert(kPacks <= kScanThreads && kScanThreads % kPacksPerRow == 0);
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<WalkBackShared<Split>*>(shared_bytes);
  auto& back = shared.back;
  const ScanPlace<Split, T> place(p, g.first_group, g.groups, p.segments);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / kWarp, lane = tid % kWarp;
  const int c = Split::first_channel(), n0 = Split::first_entry();
  const int64_t channel = place.first_channel + c, in_segments = place.segment_index(p) * p.channels;

  // For staging and results a thread has four channels of one token of each run, always the same channels.
  const int row = tid / kPacksPerRow, column = tid % kPacksPerRow * 4;
  const int64_t d0 = place.first_channel + column;
  store_pack(shared.channel_sums[0][tid], Pack<float, 4>{});
  store_pack(shared.channel_sums[1][tid], Pack<float, 4>{});

  float A2[kHeld], carry[kHeld], sum_A[kHeld] = {};  // sum_A: sum_t dt lambda p
  load_A2<Split>(p, channel, A2);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t d = channel + i / kEntries, n = n0 + i % kEntries;
    carry[i] = g.carries != nullptr && d < p.channels && n < p.N ? g.carries[(in_segments + d) * g.carries_row + n] : 0.0f;
  }

  for (int64_t chunk = (place.end - 1) / kScanChunk; chunk >= place.begin / kScanChunk; --chunk) {
    const int64_t begin = chunk * kScanChunk, border = (place.b * p.chunks + chunk) * p.channels;
    const int tokens = static_cast<int>(min(static_cast<int64_t>(kScanChunk), place.end - begin)), runs = (tokens + kRun - 1) / kRun;

    // Forward: the state in front of every run.
    {
      float h[kHeld];
      load_states<Split>(g.borders + border * Split::kN, channel, p.channels, h);
      for (int first = 0; first < tokens; first += kStagedTokens) {
        __syncthreads();  // everybody has done with what lies there
        for (int i = tid; i < kStagedTokens * kPacksPerRow; i += kScanThreads) {
          const int staged_row = i / kPacksPerRow, staged_column = i % kPacksPerRow * 4;
          const int64_t t = begin + first + staged_row, d = place.first_channel + staged_column;
          const bool there = t < place.end;
          const Pack<T, 4> x = load_four(p.x, place.b, t, d, p.channels, there), dt = load_four(p.dt, place.b, t, d, p.channels, there);
          stage_steps(p, x, dt, d, there, shared.forward.steps[staged_row][staged_column]);
        }
        stage_entries<Split>(p.B_t, p, place.b, begin + first, place.end, kStagedTokens, shared.forward.B_t[0]);
        __syncthreads();
        for (int t = 0; t < kStagedTokens && first + t < tokens; t += kRun) {
          const int run = (first + t) / kRun;
#pragma unroll
          for (int i = 0; i < kHeld; i += 4)
            store_pack(shared.run_states[run][i / 4][tid], Pack<float, 4>{{h[i], h[i + 1], h[i + 2], h[i + 3]}});
          if (run + 1 < runs) advance<Split>(shared.forward, t, kRun, A2, h);
        }
      }
      __syncthreads();
    }

    for (int run = runs - 1; run >= 0; --run) {
      const int64_t first = begin + run * kRun, t_mine = first + row;
      const bool mine = tid < kPacks, there = mine && t_mine < place.end;
      const Pack<T, 4> x = load_four(p.x, place.b, t_mine, d0, p.channels, there),
                       raw = load_four(p.dt, place.b, t_mine, d0, p.channels, there),
                       dy = load_four(g.grad_y, place.b, t_mine, d0, p.channels, there),
                       z = load_four(p.z, place.b, t_mine, d0, p.channels, there);
      if (mine) {
        stage_steps(p, x, raw, d0, there, back.steps[row][column]);
        float grad_r[4];
        gated_gradient(p, dy, z, grad_r);
        store_pack(&back.grad_r[row][column], Pack<float, 4>{{grad_r[0], grad_r[1], grad_r[2], grad_r[3]}});
      }
      stage_entries<Split>(p.B_t, p, place.b, first, place.end, kRun, back.B_t[0]);
      stage_entries<Split>(p.C_t, p, place.b, first, place.end, kRun, back.C_t[0]);
      __syncthreads();

      // Forward through the run: p = exp(dt A) h[t-1] stays in registers.
      float kept[kRun][kHeld], decays[kRun][kKeptDecays];
      {
        float h[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i += 4) {
          const Pack<float, 4> pack = load_pack<4>(shared.run_states[run][i / 4][tid]);
#pragma unroll
          for (int k = 0; k < 4; ++k) h[i + k] = pack.at[k];
        }
        float along_C[kChannels][kScanAtOnce];
#pragma unroll
        for (int t = 0; t < kRun; ++t) {
          float steps[2 * kChannels], B_t[kEntries], C_t[kEntries], grad_r[kChannels], share[kEntries];
          read_floats(back.steps[t][c], steps);
          read_floats(&back.B_t[t][n0], B_t);
          read_floats(&back.C_t[t][n0], C_t);
#pragma unroll
          for (int k = 0; k < kChannels; ++k) {
            grad_r[k] = back.grad_r[t][c + k];
            along_C[k][t % kScanAtOnce] = 0;
          }
#pragma unroll
          for (int i = 0; i < kHeld; ++i) {
            const int k = i / kEntries, e = i % kEntries;
            const float decay = exp2_approx(steps[2 * k] * A2[i]);
            if (i < kKeptDecays) decays[t][i % kKeptDecays] = decay;
            kept[t][i] = decay * h[i];
            h[i] = kept[t][i] + steps[2 * k + 1] * B_t[e];
            along_C[k][t % kScanAtOnce] += C_t[e] * h[i];
            share[e] = k == 0 ? grad_r[k] * h[i] : share[e] + grad_r[k] * h[i];
          }
#pragma unroll
          for (int e = 0; e < kEntries; e += 4)
            store_pack(back.by_lane[warp][t][e / 4][lane], Pack<float, 4>{{share[e], share[e + 1], share[e + 2], share[e + 3]}});
          if (t % kScanAtOnce == kScanAtOnce - 1) {
#pragma unroll
            for (int k = 0; k < kChannels; ++k) {
              const int token = t - (kScanAtOnce - 1) + sum_over_lanes<Split>(along_C[k]);
              if (Split::part() < kScanAtOnce) back.over_entries[0][token][c + k] = along_C[k][0];
            }
          }
        }
      }
      sum_over_channels<Split>(back.by_lane[warp], back.by_warp[1][warp]);

      // Back through the run with the gradient of the state. Tokens behind the end have dt = B = C = grad_r = 0: they pass the gradient on.
      float along_B[kChannels][kScanAtOnce], along_A[kChannels][kScanAtOnce];
#pragma unroll
      for (int t = kRun - 1; t >= 0; --t) {
        float steps[2 * kChannels], B_t[kEntries], C_t[kEntries], grad_r[kChannels], share[kEntries];
        read_floats(back.steps[t][c], steps);
        read_floats(&back.B_t[t][n0], B_t);
        read_floats(&back.C_t[t][n0], C_t);
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
          grad_r[k] = back.grad_r[t][c + k];
          along_B[k][t % kScanAtOnce] = along_A[k][t % kScanAtOnce] = 0;
        }
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          const int k = i / kEntries, e = i % kEntries;
          const float lambda = C_t[e] * grad_r[k] + carry[i], decayed = lambda * kept[t][i];
          along_B[k][t % kScanAtOnce] += lambda * B_t[e];
          along_A[k][t % kScanAtOnce] += A2[i] * decayed;
          sum_A[i] += steps[2 * k] * decayed;
          share[e] = k == 0 ? steps[2 * k + 1] * lambda : share[e] + steps[2 * k + 1] * lambda;
          carry[i] = lambda * (i < kKeptDecays ? decays[t][i % kKeptDecays] : exp2_approx(steps[2 * k] * A2[i]));
        }
#pragma unroll
        for (int e = 0; e < kEntries; e += 4)
          store_pack(back.by_lane[warp][t][e / 4][lane], Pack<float, 4>{{share[e], share[e + 1], share[e + 2], share[e + 3]}});
        if (t % kScanAtOnce == 0) {
#pragma unroll
          for (int k = 0; k < kChannels; ++k) {
            const int token = t + sum_over_lanes<Split>(along_B[k]);
            sum_over_lanes<Split>(along_A[k]);
            if (Split::part() < kScanAtOnce) {
              back.over_entries[1][token][c + k] = along_B[k][0];
              back.over_entries[2][token][c + k] = along_A[k][0];
            }
          }
        }
      }
      sum_over_channels<Split>(back.by_lane[warp], back.by_warp[0][warp]);
      __syncthreads();

      if (there) {
        float along_C[4], by_B[4], by_A[4], grad_r[4], grad_x[4], grad_dt[4], grad_z[4], sum_D[4], sum_bias[4], steps[8];
        read_floats(&back.over_entries[0][row][column], along_C);
        read_floats(&back.over_entries[1][row][column], by_B);
        read_floats(&back.over_entries[2][row][column], by_A);
        read_floats(&back.grad_r[row][column], grad_r);
        read_floats(back.steps[row][column], steps);
        read_floats(shared.channel_sums[0][tid], sum_D);
        read_floats(shared.channel_sums[1][tid], sum_bias);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const bool real = d0 + k < p.channels;
          const float in = to_f32(x.at[k]), D_skip = real && p.D_skip != nullptr ? p.D_skip[d0 + k] : 0.0f;
          const float bias = real ? p.dt_bias[d0 + k] : 0.0f, gate = to_f32(z.at[k]);
          grad_x[k] = D_skip * grad_r[k] + steps[2 * k] * by_B[k];
          // softplus' = sigmoid, which is 1 in f32 where softplus is linear
          grad_dt[k] = (in * by_B[k] + kLn2 * by_A[k]) * sigmoid(to_f32(raw.at[k]) + bias);
          grad_z[k] = to_f32(dy.at[k]) * (along_C[k] + D_skip * in) * silu_slope(gate, sigmoid(gate));
          sum_D[k] += grad_r[k] * in;
          sum_bias[k] += grad_dt[k];
        }
        if (g.grad_x.data != nullptr) store_four(g.grad_x, place.b, t_mine, d0, p.channels, grad_x);
        if (g.grad_dt.data != nullptr) store_four(g.grad_dt, place.b, t_mine, d0, p.channels, grad_dt);
        if (g.grad_z.data != nullptr) store_four(g.grad_z, place.b, t_mine, d0, p.channels, grad_z);
        store_pack(shared.channel_sums[0][tid], Pack<float, 4>{{sum_D[0], sum_D[1], sum_D[2], sum_D[3]}});
        store_pack(shared.channel_sums[1][tid], Pack<float, 4>{{sum_bias[0], sum_bias[1], sum_bias[2], sum_bias[3]}});
      }
      for (int o = tid; o < 2 * kRun * (Split::kN / 4); o += kScanThreads) {
        const int which = o / (kRun * (Split::kN / 4)), t = o / (Split::kN / 4) % kRun, n = o % (Split::kN / 4) * 4;
        if (first + t >= place.end || n >= g.N4) continue;
        float sum[4] = {};
#pragma unroll
        for (int w = 0; w < kScanWarps; ++w) {
          float share[4];
          read_floats(&back.by_warp[which][w][t][n], share);
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[k] += share[k];
        }
        float* to = g.BC_partials + (((place.group * p.batch + place.b) * p.tokens + first + t) * 2 + which) * g.N4 + n;
        store_pack(to, Pack<float, 4>{{sum[0], sum[1], sum[2], sum[3]}});
      }
    }
  }

  __syncthreads();
  if (tid < kC && place.first_channel + tid < p.channels) {  // the threads that had this channel, in order of their tokens
    float sum_D = 0, sum_bias = 0;
    for (int r = 0; r < kRun; ++r) {
      const int from = r * kPacksPerRow + tid / 4;
      sum_D += shared.channel_sums[0][from][tid % 4];
      sum_bias += shared.channel_sums[1][from][tid % 4];
    }
    g.D_partials[in_segments + place.first_channel + tid] = sum_D;
    g.bias_partials[in_segments + place.first_channel + tid] = sum_bias;
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t d = channel + i / kEntries, n = n0 + i % kEntries;
    if (d >= p.channels || n >= p.N) continue;
    g.A_partials[(in_segments + d) * p.N + n] = kLn2 * A2[i] * sum_A[i];
    if (g.grad_h0 != nullptr && place.begin == 0) g.grad_h0[(place.b * p.channels + d) * p.N + n] = carry[i];
  }
}

// --- sums over blocks of channels -----------------------------------------------------------------------------

template <class T>
struct BlockSums {
  const float* partials;  // [count, rows, 2, N4]
  float* totals;          // [rows, 2, N4]: sums of the launches before, null when there is one launch only
  ScanRows<T> grad_B_t, grad_C_t;
  int64_t count, rows, tokens, N, N4;
  bool first, last;
};

template <class T>
__global__ void sum_blocks_kernel(const BlockSums<T> a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, width = a.rows * 2 * a.N4;
  if (i >= width) return;
  float sum = a.first ? 0.0f : a.totals[i];
#pragma unroll 8
  for (int64_t k = 0; k < a.count; ++k) sum += a.partials[k * width + i];
  if (!a.last) {
    a.totals[i] = sum;
    return;
  }
  const int64_t n = i % a.N4, at = i / a.N4, row = at / 2;
  const bool is_B = at % 2 == 0;
  T* to = is_B ? a.grad_B_t.data : a.grad_C_t.data;
  if (to == nullptr || n >= a.N) return;
  const int64_t batch = is_B ? a.grad_B_t.batch : a.grad_C_t.batch, token = is_B ? a.grad_B_t.token : a.grad_C_t.token;
  to[row / a.tokens * batch + row % a.tokens * token + n] = static_cast<T>(sum);
}

template <class T, class Walk, class Split>
void backward(const SelectiveScanBackward& g) {
  static_assert(Walk::kN == Split::kN);
  const SelectiveScanInputs& in = g.in;
  const Device& device = in.x.device();
  const CudaContext& cuda = device.cuda_context();
  const int64_t B = in.x.dim(0), tokens = in.x.dim(1), D = in.x.dim(2), N = in.A_log.dim(1);
  const int64_t groups = (D + Split::kBlockChannels - 1) / Split::kBlockChannels;
  // A second set of exponentials pays only where the rows and channels leave multiprocessors without work.
  const int64_t wanted = groups * B >= kBlocksAtOnce * cuda.sm_count ? 1 : cuda.sm_count * kBlocksPerSm;
  const ScanCut cut = cut_scan(tokens, groups * B, wanted, kScanChunk);
  const ScanProblem<T> p = scan_problem<T>(in, cut.segments, cut.segment_tokens);
  const auto f32 = [&](Shape shape) { return Tensor::empty(device, Dtype::f32, shape); };
  const ScanRows<const T> grad_y = scan_rows<const T>(g.grad_y);

  ScanSegments segments;
  if (p.segments > 1) {
    segments.grads = f32(Shape{B, p.segments, D, Split::kN});
    segments.dt_sum = f32(Shape{B, p.segments, D});
    const int64_t walk_groups = (D + Walk::kBlockChannels - 1) / Walk::kBlockChannels;
    launch_scan(selective_scan_bwd_segments_kernel<T, Walk>, "selective_scan_bwd_segments_kernel", walk_groups * p.segments * B, 0, cuda, p,
                grad_y, segments.grads.data<float>(), segments.dt_sum.data<float>(), walk_groups);
    connect_segments(segments, in.A_log, g.grad_h_T);
  }

  const int64_t N4 = (N + 3) / 4 * 4, per_group = B * tokens * 2 * N4;
  const int64_t at_once = std::clamp<int64_t>(kPartialBytes / (4 * per_group), 1, groups);
  const Tensor A_partials = f32(Shape{B * p.segments, D * N}), D_partials = f32(Shape{B * p.segments, D}),
               bias_partials = f32(Shape{B * p.segments, D});
  const Tensor BC_partials = f32(Shape{at_once, per_group}), BC_totals = at_once < groups ? f32(Shape{per_group}) : Tensor();
  WalkBack<T> w{grad_y,
                scan_rows<T>(g.grad_x),
                scan_rows<T>(g.grad_dt),
                scan_rows<T>(g.grad_z),
                address_of<float>(p.segments > 1 ? segments.grads : g.grad_h_T),
                p.segments > 1 ? Split::kN : N,
                g.borders.data<float>(),
                address_of<float>(g.grad_h0),
                A_partials.data<float>(),
                D_partials.data<float>(),
                bias_partials.data<float>(),
                BC_partials.data<float>(),
                N4,
                0,
                0};
  for (int64_t first = 0; first < groups; first += at_once) {
    w.first_group = first;
    w.groups = std::min(at_once, groups - first);
    launch_scan(selective_scan_bwd_walk_kernel<T, Split>, "selective_scan_bwd_walk_kernel", w.groups * p.segments * B,
                sizeof(WalkBackShared<Split>), cuda, p, w);
    const BlockSums<T> sums{BC_partials.data<float>(),
                            address_of<float>(BC_totals),
                            scan_rows<T>(g.grad_B_t),
                            scan_rows<T>(g.grad_C_t),
                            w.groups,
                            B * tokens,
                            tokens,
                            N,
                            N4,
                            first == 0,
                            first + w.groups == groups};
    launch_scan(sum_blocks_kernel<T>, "sum_blocks_kernel", (per_group + kScanThreads - 1) / kScanThreads, 0, cuda, sums);
  }
  if (g.grad_A_log) sum_partials_cuda(A_partials, *g.grad_A_log);
  if (g.grad_D_skip) sum_partials_cuda(D_partials, *g.grad_D_skip);
  if (g.grad_dt_bias) sum_partials_cuda(bias_partials, *g.grad_dt_bias);
}

}  // namespace

void selective_scan_bwd_cuda(const SelectiveScanBackward& g) {
  split_for(g.in.A_log.dim(1), [&](auto walk, auto split) {
    using Walk = decltype(walk);
    using Split = decltype(split);
    g.in.x.dtype() == Dtype::bf16 ? backward<__nv_bfloat16, Walk, Split>(g) : backward<float, Walk, Split>(g);
  });
}

}  // namespace longhand
