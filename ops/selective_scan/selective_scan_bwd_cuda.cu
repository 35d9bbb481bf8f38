// The selective scan on CUDA, backward: gradients of everything, in one walk over the tokens from the last to the first, begun from the
// states that forward has kept in front of every 32 tokens.
//
// selective_scan_bwd_segments_kernel: what a segment does to the gradient of a state; only where rows and channels are too few
// moves   dt, z, grad_y in
// flops   N exponentials and 3 N others per token and channel: the gradient of the state, walked back from zero
// split   as in the forward walk; connect_segments_kernel puts the whole scan together
//
// selective_scan_bwd_walk_kernel: the gradients
// moves   x, dt, z, grad_y in, grad_x, grad_dt, grad_z out: 14 bytes per token and channel in bf16, dt and x once more, and the states of
//         chunks; 2 N f32 of partial sums of grad_B_t and grad_C_t per token and 64 channels
// flops   2 N exponentials, 15 N others per token and channel, and about as many again to move and to add up
// floor   the same shape: about 33 instructions for each state and token: 1.6 ms of issue at 1.97 GHz; 0.9 ms of ex2
// split   N <= 16: four lanes share two channels, a lane has a quarter of the entries of both, a block 64 channels of one segment. It goes
//         through its chunks from the last to the first: first forward, leaving the state in front of every fourth token in shared
//         memory; then for four tokens at a time, last first, forward once more with states and decays kept in registers, and back with the
//         gradient of the state. Sums over the entries of a channel go through shuffles, sums over the channels of a warp through shared
//         memory, and what the four warps have for 16 tokens is added up together. Three blocks share an SM: registers are what there are
//         too few of, and eight states in a lane leave room for a third warp on every scheduler where sixteen do not
// needs   N <= 256; any strides over B and T (how far tokens may be apart: scan_rows)
// agrees  with the CPU reference: kSelectiveScanToleranceF32; bf16 adds one rounding of each result
// order   sums over channels: lanes, then warps, then blocks of 64 channels (sum_blocks_kernel), each in a fixed order; sums over tokens:
//         one partial per segment, then sum_partials. No atomics; the number of segments depends on the GPU
#include <algorithm>

#include "ops/common/sum_partials.h"
#include "ops/selective_scan/selective_scan_cuda.cuh"

namespace longhand {
namespace {

constexpr int kRun = 4;                         // tokens walked back at a time; their states and decays are in registers
constexpr int kRuns = kScanChunk / kRun;        // of a chunk
constexpr int64_t kPartialBytes = 512ll << 20;  // limit of the partial sums of grad_B_t and grad_C_t

/// The activations that a lane owns of the tokens worked on together.
template <class T, int n>
struct OwnedBack {
  Fetched<T> x[n], dt[n], z[n], grad_y[n];
};

// --- segments -------------------------------------------------------------------------------------------------

constexpr int kSegmentTile = 8;  // tokens

template <class Split>
struct SegmentShared {
  alignas(16) float C_t[kScanChunk][Split::kN];
  float2 steps[kScanWarps][kSegmentTile][Split::kWarpChannels];  // dt, grad_r
};

template <class T, class Split>
__global__ void __launch_bounds__(kScanThreads, Split::kN <= 64 ? 4 : 2)
    selective_scan_bwd_segments_kernel(const ScanProblem<T> p, const ScanRows<const T> grad_y, float* grads, float* dt_sums,
                                       int64_t groups) {
  constexpr int kTokens = kSegmentTile, kEntries = Split::kEntries, kOwned = Split::template owned<kTokens>();
  constexpr int kTiles = kScanChunk / kTokens;
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<SegmentShared<Split>*>(shared_bytes);
  const ScanPlace<Split, T> place(p, 0, groups, 1, p.segments - 1);  // what the first one does to a gradient reaches nobody
  const int warp = static_cast<int>(threadIdx.x) / kWarp, n0 = Split::first_entry(), own = Split::own_channel();
  const int token0 = first_owned<Split, kTokens>();
  const int64_t own_channel = place.first_channel + warp * Split::kWarpChannels + own, channel[2] = {own_channel, own_channel ^ 1};
  const bool own_real = own_channel < p.channels, gated = p.z.data != nullptr, graded = grad_y.data != nullptr;
  const float bias = own_real ? p.dt_bias[own_channel] : 0.0f;
  auto& steps = shared.steps[warp];

  const int64_t tiles = (place.end - place.begin + kTokens - 1) / kTokens, last = place.begin + (tiles - 1) * kTokens;
  OwnedAt<const T> dt_at(p.dt, place.b, last + token0, own_channel), z_at(p.z, place.b, last + token0, own_channel),
      grad_at(grad_y, place.b, last + token0, own_channel);
  OwnedBack<T, kOwned> next;
  const auto fetch = [&](int64_t tile) {
    const int there = static_cast<int>(min(static_cast<int64_t>(kTokens), place.end - (place.begin + tile * kTokens)));
    choose(place.whole(p) && there == kTokens, [&](auto whole) {
      const int left = own_real ? there - token0 : 0;
      dt_at.template read<whole>(next.dt, left, -INFINITY);
      if (graded) grad_at.template read<whole>(next.grad_y, left, 0.0f);
      if (gated) z_at.template read<whole>(next.z, left, 0.0f);
    });
    dt_at.move(-kTokens);
    grad_at.move(-kTokens);
    z_at.move(-kTokens);
  };
  fetch(tiles - 1);

  float A2[2][kEntries], carry[2][kEntries] = {}, dt_sum = 0;
  load_A2<Split>(p, channel, A2);
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int in_chunk = static_cast<int>(tile % kTiles) * kTokens;
    if (tile == tiles - 1 || tile % kTiles == kTiles - 1) {
      __syncthreads();
      stage_entries<Split>(p.C_t, p, place.b, place.begin + tile / kTiles * kScanChunk, place.end, kScanChunk, shared.C_t[0]);
      __syncthreads();
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const float dt = softplus_approx(next.dt[i].f32() + bias);
      float grad = graded ? next.grad_y[i].f32() : 0.0f;
      if (gated) grad *= silu(next.z[i].f32());
      if (Split::template owns<kTokens>()) steps[token0 + i][own] = make_float2(dt, grad);
      dt_sum += dt;
    }
    if (tile > 0) fetch(tile - 1);
    __syncwarp();
#pragma unroll
    for (int k = kTokens - 1; k >= 0; --k) {
      float C_t[kEntries];
      read_floats(&shared.C_t[in_chunk + k][n0], C_t);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 step = steps[k][own ^ j];
#pragma unroll
        for (int e = 0; e < kEntries; ++e) carry[j][e] = exp2_approx(step.x * A2[j][e]) * (C_t[e] * step.y + carry[j][e]);
      }
    }
  }
  const int64_t at = place.segment_index(p) * p.channels;
  store_states<Split>(grads + at * Split::kN, channel, p.channels, carry);
  dt_sum = sum_of_owners<Split, kTokens>(dt_sum);
  if (Split::part() < 2 && own_real) dt_sums[at + own_channel] = dt_sum;
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

/// Blocks of the walk back that share an SM: as many as registers and shared memory allow.
template <class Split>
constexpr int kWalkBackBlocks = Split::kN > 16 ? 1 : 3;
template <class Split>
constexpr ScanCost kWalkBackCost = Split::kN > 16 ? ScanCost{1, 1.0, 1.0, 1.2} : ScanCost{3, 2.5, 1.0, 1.2};

template <class Split>
struct WalkBackShared {
  static constexpr int kC = Split::kWarpChannels, kN = Split::kN, kQuads = Split::kEntries / 4;
  static constexpr int kForward = 8;                    // tokens whose steps are formed together on the way forward through a chunk
  static constexpr int kSpan = kN <= 64 ? 16 : kRun;    // tokens whose grad_B_t and grad_C_t the warps of a block add up together
  static constexpr int kSlot = 2 * kQuads * kWarp * 4;  // a state of every lane
  // What lanes have for four entries of a token; padded, so that lanes that read different tokens meet different banks.
  static constexpr int kShareRow = kWarp * 4 + (Split::kLanes <= 4 ? 4 * Split::kLanes : 0);
  static constexpr int kShares = kRun * kQuads * kShareRow;
  struct Step {
    float dt, dt_x, grad_r, unused;
  };
  // The state in front of every run of the chunk, [2 * quads, lanes, 4]; while a run is walked back, what its lanes have for the gradients
  // of the entries lies where its own state and those behind were, [kRun, quads, kShareRow].
  alignas(16) float slots[kScanWarps][(kRuns - 1) * kSlot + (kShares > kSlot ? kShares : kSlot)];
  alignas(16) float B_t[kScanChunk][kN], C_t[kScanChunk][kN];
  float dt[kScanWarps][kScanChunk][kC];  // after bias and softplus
  union alignas(16) Steps {
    float2 forward[kForward][kC];  // dt, dt x
    Step back[kRun][kC];
  };
  Steps steps[kScanWarps];
  alignas(16) float by_warp[kScanWarps][kSpan][2][kN];  // the warp's share of grad_B_t and of grad_C_t
};

/// Adds what the lanes of a warp have left for the entries over its channels, for all tokens of a run: `shares` [kRun, quads, kShareRow].
template <class Split>
__device__ void sum_over_channels(const float* shares, float (*to)[2][Split::kN], int which) {
  constexpr int kQuads = Split::kEntries / 4, kLanes = Split::kLanes, kRows = kWarp / kLanes, kPairs = Split::kN / 2;
  __syncwarp();
#pragma unroll
  for (int turn = 0; turn < kRun * kPairs / kWarp; ++turn) {
    const int task = turn * kWarp + Split::lane();  // two entries of one token
    const int half = task % 2, part = task / 2 % kLanes, quad = task / (2 * kLanes) % kQuads, token = task / kPairs;
    const float* from = shares + (token * kQuads + quad) * WalkBackShared<Split>::kShareRow + part * 4 + half * 2;
    float sum[2] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float share[2];
      read_floats(from + r * kLanes * 4, share);
      sum[0] += share[0];
      sum[1] += share[1];
    }
    store_pack(&to[token][which][part * Split::kEntries + quad * 4 + half * 2], Pack<float, 2>{{sum[0], sum[1]}});
  }
  __syncwarp();
}

template <class T, class Split>
__global__ void __launch_bounds__(kScanThreads, kWalkBackBlocks<Split>)
    selective_scan_bwd_walk_kernel(const ScanProblem<T> p, const WalkBack<T> g) {
  constexpr int kEntries = Split::kEntries, kN = Split::kN, kOwned = Split::template owned<kRun>();
  using Shared = WalkBackShared<Split>;
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const ScanPlace<Split, T> place(p, g.first_group, g.groups, 0, p.segments);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / kWarp, lane = Split::lane();
  const int n0 = Split::first_entry(), own = Split::own_channel(), token0 = first_owned<Split, kRun>();
  const int64_t own_channel = place.first_channel + warp * Split::kWarpChannels + own, channel[2] = {own_channel, own_channel ^ 1};
  const bool own_real = own_channel < p.channels;
  const bool gated = p.z.data != nullptr, graded = g.grad_y.data != nullptr;
  const int64_t in_segments = place.segment_index(p) * p.channels;
  float* const slots = shared.slots[warp];
  constexpr int kSlot = Shared::kSlot;
  auto& steps = shared.steps[warp];

  const float bias = own_real ? p.dt_bias[own_channel] : 0.0f;
  const float D_skip = own_real && p.D_skip != nullptr ? p.D_skip[own_channel] : 0.0f;

  float A2[2][kEntries], carry[2][kEntries], sum_A[2][kEntries] = {}, sum_D = 0, sum_bias = 0;  // sum_A: sum_t dt lambda p
  load_A2<Split>(p, channel, A2);
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < kEntries; ++e)
      carry[j][e] = g.carries != nullptr && channel[j] < p.channels && n0 + e < p.N
                        ? g.carries[(in_segments + channel[j]) * g.carries_row + n0 + e]
                        : 0.0f;

  const bool all_channels = place.whole(p);
  for (int64_t chunk = (place.end - 1) / kScanChunk; chunk >= place.begin / kScanChunk; --chunk) {
    const int64_t begin = chunk * kScanChunk;
    const int tokens = static_cast<int>(min(static_cast<int64_t>(kScanChunk), place.end - begin)), runs = (tokens + kRun - 1) / kRun;
    const int own_tokens = own_real ? tokens : 0;  // without a channel there is no token either
    float* const partials = kept(g.BC_partials + ((place.group * p.batch + place.b) * p.tokens + begin) * 2 * g.N4);
    const float* const border = kept(g.borders + (place.b * p.chunks + chunk) * p.channels * kN);

    // What a run needs is fetched while the one behind it is worked on, what the last one needs before the way forward. All these addresses
    // go back from run to run.
    const int64_t last = begin + (runs - 1) * kRun + token0;
    OwnedAt<const T> x_at(p.x, place.b, last, own_channel), dt_at(p.dt, place.b, last, own_channel), z_at(p.z, place.b, last, own_channel),
        grad_at(g.grad_y, place.b, last, own_channel);
    OwnedAt<T> grad_x_at(g.grad_x, place.b, last, own_channel), grad_dt_at(g.grad_dt, place.b, last, own_channel),
        grad_z_at(g.grad_z, place.b, last, own_channel);
    OwnedBack<T, kOwned> next;
    const auto fetch = [&](int run) {
      choose(all_channels && (run + 1) * kRun <= tokens, [&](auto whole) {
        const int left = own_tokens - run * kRun - token0;
        x_at.template read<whole>(next.x, left, 0.0f);
        dt_at.template read<whole>(next.dt, left, 0.0f);
        if (gated) z_at.template read<whole>(next.z, left, 0.0f);
        if (graded) grad_at.template read<whole>(next.grad_y, left, 0.0f);
      });
      x_at.move(-kRun);
      dt_at.move(-kRun);
      z_at.move(-kRun);
      grad_at.move(-kRun);
    };
    fetch(runs - 1);

    // Forward: the state in front of every run.
    {
      constexpr int kForward = Shared::kForward, kForwardOwned = Split::template owned<kForward>();
      const int forward0 = first_owned<Split, kForward>();
      OwnedAt<const T> forward_x(p.x, place.b, begin + forward0, own_channel), forward_dt(p.dt, place.b, begin + forward0, own_channel);
      Fetched<T> x[kForwardOwned], raw_dt[kForwardOwned];
      const auto fetch_forward = [&](int t) {
        choose(all_channels && t + kForward <= tokens, [&](auto whole) {
          forward_x.template read<whole>(x, own_tokens - t - forward0, 0.0f);
          forward_dt.template read<whole>(raw_dt, own_tokens - t - forward0, -INFINITY);
        });
        forward_x.move(kForward);
        forward_dt.move(kForward);
      };
      fetch_forward(0);
      float h[2][kEntries];
      load_states<Split>(in_global_memory(border), channel, p.channels, h);
      __syncthreads();  // everybody has done with the chunk before
      stage_entries<Split>(p.B_t, p, place.b, begin, place.end, kScanChunk, shared.B_t[0]);
      stage_entries<Split>(p.C_t, p, place.b, begin, place.end, kScanChunk, shared.C_t[0]);
      __syncthreads();
#pragma unroll 1
      for (int t = 0; t < tokens; t += kForward) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kForwardOwned; ++i) {
          const float dt = softplus_approx(raw_dt[i].f32() + bias);
          if (Split::template owns<kForward>()) {
            shared.dt[warp][t + forward0 + i][own] = dt;
            steps.forward[forward0 + i][own] = make_float2(dt, dt * x[i].f32());
          }
        }
        if (t + kForward < tokens) fetch_forward(t + kForward);
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kForward; ++k) {
          if (k % kRun == 0)
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
              for (int e = 0; e < kEntries; e += 4)
                store_pack(slots + (t + k) / kRun * kSlot + ((j * kEntries + e) / 4 * kWarp + lane) * 4,
                           Pack<float, 4>{{h[j][e], h[j][e + 1], h[j][e + 2], h[j][e + 3]}});
          if (k % kRun == 0 && t + k + kRun >= tokens) break;  // the last run's own walk follows below
          float B_t[kEntries];
          read_floats(&shared.B_t[t + k][n0], B_t);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float2 step = steps.forward[k][own ^ j];
#pragma unroll
            for (int e = 0; e < kEntries; ++e) h[j][e] = exp2_approx(step.x * A2[j][e]) * h[j][e] + step.y * B_t[e];
          }
        }
      }
    }

#pragma unroll 1
    for (int run = runs - 1; run >= 0; --run) {
      const OwnedBack<T, kOwned> in = next;
      __syncwarp();
      float dt[kOwned], grad_r[kOwned], gate[kOwned];  // gate: sigmoid(z)
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        dt[i] = shared.dt[warp][run * kRun + token0 + i][own];
        gate[i] = gated ? sigmoid(in.z[i].f32()) : 1.0f;
        grad_r[i] = graded ? in.grad_y[i].f32() : 0.0f;
        if (gated) grad_r[i] *= in.z[i].f32() * gate[i];
        if (Split::template owns<kRun>()) steps.back[token0 + i][own] = {dt[i], dt[i] * in.x[i].f32(), grad_r[i], 0.0f};
      }
      float* const slot = slots + run * kSlot;
      // Forward through the run: states and decays stay in registers.
      float before[kRun][2][kEntries], decay[kRun][2][kEntries], along_C[kRun];
      {
        float h[2][kEntries];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < kEntries; e += 4) {
            const Pack<float, 4> pack = load_pack<4>(slot + ((j * kEntries + e) / 4 * kWarp + lane) * 4);
#pragma unroll
            for (int k = 0; k < 4; ++k) h[j][e + k] = pack.at[k];
          }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          float B_t[kEntries], C_t[kEntries], share[kEntries], along[2] = {};
          read_floats(&shared.B_t[run * kRun + k][n0], B_t);
          read_floats(&shared.C_t[run * kRun + k][n0], C_t);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const typename Shared::Step step = steps.back[k][own ^ j];
#pragma unroll
            for (int e = 0; e < kEntries; ++e) {
              before[k][j][e] = h[j][e];
              decay[k][j][e] = exp2_approx(step.dt * A2[j][e]);
              h[j][e] = decay[k][j][e] * h[j][e] + step.dt_x * B_t[e];
              along[j] += C_t[e] * h[j][e];
              share[e] = j == 0 ? step.grad_r * h[j][e] : share[e] + step.grad_r * h[j][e];
            }
          }
          along_C[k] = along[0] + __shfl_xor_sync(0xffffffffu, along[1], 1);
#pragma unroll
          for (int e = 0; e < kEntries; e += 4)
            store_pack(slot + (k * Shared::kQuads + e / 4) * Shared::kShareRow + lane * 4,
                       Pack<float, 4>{{share[e], share[e + 1], share[e + 2], share[e + 3]}});
        }
      }
      const int in_span = run * kRun % Shared::kSpan;
      sum_over_owners<Split>(along_C);
      sum_over_channels<Split>(slot, shared.by_warp[warp] + in_span, 1);

      // Back through the run with the gradient of the state. Tokens behind the end have dt = B = C = grad_r = 0: they pass the gradient on.
      float along_B[kRun], along_A[kRun];
#pragma unroll
      for (int k = kRun - 1; k >= 0; --k) {
        float B_t[kEntries], C_t[kEntries], share[kEntries], by_B[2] = {}, by_A[2] = {};
        read_floats(&shared.B_t[run * kRun + k][n0], B_t);
        read_floats(&shared.C_t[run * kRun + k][n0], C_t);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const typename Shared::Step step = steps.back[k][own ^ j];
#pragma unroll
          for (int e = 0; e < kEntries; ++e) {
            const float lambda = C_t[e] * step.grad_r + carry[j][e];
            carry[j][e] = lambda * decay[k][j][e];
            const float kept = carry[j][e] * before[k][j][e];  // lambda p
            by_B[j] += lambda * B_t[e];
            by_A[j] += A2[j][e] * kept;
            sum_A[j][e] += step.dt * kept;
            share[e] = j == 0 ? step.dt_x * lambda : share[e] + step.dt_x * lambda;
          }
        }
        along_B[k] = by_B[0] + __shfl_xor_sync(0xffffffffu, by_B[1], 1);
        along_A[k] = by_A[0] + __shfl_xor_sync(0xffffffffu, by_A[1], 1);
#pragma unroll
        for (int e = 0; e < kEntries; e += 4)
          store_pack(slot + (k * Shared::kQuads + e / 4) * Shared::kShareRow + lane * 4,
                     Pack<float, 4>{{share[e], share[e + 1], share[e + 2], share[e + 3]}});
      }
      if (run > 0) fetch(run - 1);
      sum_over_owners<Split>(along_B);
      sum_over_owners<Split>(along_A);
      sum_over_channels<Split>(slot, shared.by_warp[warp] + in_span, 0);

      float grad_x[kOwned], grad_dt[kOwned], grad_z[kOwned];
      const int left = own_tokens - run * kRun - token0;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        const float x = in.x[i].f32();
        grad_x[i] = D_skip * grad_r[i] + dt[i] * along_B[i];
        // softplus' = sigmoid, which is 1 in f32 where softplus is linear
        grad_dt[i] = (x * along_B[i] + kLn2 * along_A[i]) * sigmoid(in.dt[i].f32() + bias);
        grad_z[i] = along_C[i] + D_skip * x;
        sum_D += grad_r[i] * x;  // grad_r is 0 behind the end, grad_dt is not
        sum_bias += i < left ? grad_dt[i] : 0.0f;
      }
      if (g.grad_z.data != nullptr)
#pragma unroll
        for (int i = 0; i < kOwned; ++i) grad_z[i] *= graded ? in.grad_y[i].f32() * silu_slope(in.z[i].f32(), gate[i]) : 0.0f;
      if (Split::template owns<kRun>())
        choose(all_channels && (run + 1) * kRun <= tokens, [&](auto whole) {
          if (g.grad_x.data != nullptr) grad_x_at.template write<whole>(grad_x, left);
          if (g.grad_dt.data != nullptr) grad_dt_at.template write<whole>(grad_dt, left);
          if (g.grad_z.data != nullptr) grad_z_at.template write<whole>(grad_z, left);
        });

      grad_x_at.move(-kRun);
      grad_dt_at.move(-kRun);
      grad_z_at.move(-kRun);

      if (in_span != 0) continue;
      __syncthreads();
      constexpr int kQuadsPerRow = kN / 4, kTasks = 2 * Shared::kSpan * kQuadsPerRow;
      const int rows = 2 * (tokens - run * kRun), N4 = static_cast<int>(g.N4);  // grad_B_t and grad_C_t in turn
#pragma unroll
      for (int turn = 0; turn < (kTasks + kScanThreads - 1) / kScanThreads; ++turn) {
        const int task = turn * kScanThreads + tid, row = task / kQuadsPerRow, n = task % kQuadsPerRow * 4;
        if (task >= kTasks || row >= rows || n >= N4) continue;
        float sum[4] = {};
#pragma unroll
        for (int w = 0; w < kScanWarps; ++w) {
          float share[4];
          read_floats(&shared.by_warp[w][0][0][0] + 4 * task, share);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] += share[i];
        }
        store_pack(in_global_memory(partials + (run * kRun * 2 + row) * N4 + n), Pack<float, 4>{{sum[0], sum[1], sum[2], sum[3]}});
      }
      __syncthreads();
    }
  }

  sum_D = sum_of_owners<Split, kRun>(sum_D);
  sum_bias = sum_of_owners<Split, kRun>(sum_bias);
  if (Split::part() < 2 && own_real) {
    g.D_partials[in_segments + own_channel] = sum_D;
    g.bias_partials[in_segments + own_channel] = sum_bias;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (channel[j] >= p.channels || n0 + e >= p.N) continue;
      g.A_partials[(in_segments + channel[j]) * p.N + n0 + e] = kLn2 * A2[j][e] * sum_A[j][e];
      if (g.grad_h0 != nullptr && place.begin == 0) g.grad_h0[(place.b * p.channels + channel[j]) * p.N + n0 + e] = carry[j][e];
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
  const ScanCut cut = cut_scan(tokens, groups * B, kWalkBackCost<Split>, cuda.sm_count);
  const ScanProblem<T> p = scan_problem<T>(in, cut.segments, cut.segment_tokens);
  const auto f32 = [&](Shape shape) { return Tensor::empty(device, Dtype::f32, shape); };
  const ScanRows<const T> grad_y = scan_rows<const T>(g.grad_y);

  ScanSegments segments;
  if (p.segments > 1) {
    segments.grads = f32(Shape{B, p.segments, D, Split::kN});
    segments.dt_sum = f32(Shape{B, p.segments, D});
    const int64_t walk_groups = (D + Walk::kBlockChannels - 1) / Walk::kBlockChannels;
    launch_scan(selective_scan_bwd_segments_kernel<T, Walk>, "selective_scan_bwd_segments_kernel", walk_groups * (p.segments - 1) * B,
                sizeof(SegmentShared<Walk>), cuda, p, grad_y, segments.grads.data<float>(), segments.dt_sum.data<float>(), walk_groups);
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
