// The selective scan on CUDA, backward: gradients of everything, in one walk over the tokens from the last to the first, begun from the
// states that forward has kept in front of every 32 tokens. Where rows and channels are few, segments of the sequence are walked at once,
// once the gradients of the states between them are known (selective_scan_segment_grads).
//
// selective_scan_bwd_walk_kernel
// moves   x, dt, z, grad_y in, grad_x, grad_dt, grad_z out: 14 bytes per token and channel in bf16, dt and x once more, and the states of
//         chunks; 2 N f32 of partial sums of grad_B_t and grad_C_t per token and 64 channels. Before that, for each channel, N f32 of every
//         piece of the segments behind its own, from L2: segments are few, 16 for one long row of 1536 channels on 132 SMs
// flops   2 N exponentials, 15 N others per token and channel, and about as many again to move and to add up
// floor   the same shape: about 29 instructions for each state and token: 1.4 ms of issue at 1.97 GHz; 0.9 ms of ex2
// split   N <= 16: four lanes share two channels, a lane has a quarter of the entries of both, a block 64 channels of one segment. It goes
//         through its chunks from the last to the first: first forward, leaving the state in front of every fourth token in shared
//         memory; then for four tokens at a time, last first, forward once more with states and decays kept in registers, and back with the
//         gradient of the state. Sums over the entries of a channel go through shuffles, sums over the channels of a warp through shared
//         memory, and what the four warps have for 16 tokens is added up together, half a run later, so that no warp waits for another that
//         is a little behind. Three blocks share an SM: registers are what there are too few of, and eight states in a lane leave room for
//         a third warp on every scheduler where sixteen do not. They leave little to the L1 cache: what is spilled comes from L2
// needs   N <= 256; any strides over B and T (how far tokens may be apart: scan_rows)
// agrees  with the CPU reference: kSelectiveScanToleranceF32; bf16 adds one rounding of each result
// order   sums over channels: lanes, then warps, then blocks of 64 channels, each in a fixed order; sums over tokens: one partial per
//         segment, then the segments of all rows (selective_scan_bwd_sums_kernel adds blocks and segments). No atomics; the number of
//         segments depends on the GPU
#include <algorithm>

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

// --- gradients ------------------------------------------------------------------------------------------------

/// What pieces of segments do to the gradient of a state (SegmentGrads).
struct Pieces {
  const float *grads, *dt_sums;  // [B, count, D, kN] and [B, count, D]
  int count, per_segment;        // none where there is one segment
};

/// Carries a lane's gradients back through the pieces from `last` to `first` of row b. What several do is asked for at a time.
template <class Split>
__device__ void carry_through(const Pieces& pieces, int64_t b, int first, int last, const int64_t (&channel)[2], int64_t channels,
                              const float (&A2)[2][Split::kEntries], float (&carry)[2][Split::kEntries]) {
  constexpr int kAtOnce = 32 / Split::kEntries;
#pragma unroll 1
  for (int i = last; i >= first; i -= kAtOnce) {
    float added[kAtOnce][2][Split::kEntries], dt_sum[kAtOnce][2];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t row = (b * pieces.count + max(i - k, first)) * channels;
      load_states<Split>(pieces.grads + row * Split::kN, channel, channels, added[k]);
#pragma unroll
      for (int j = 0; j < 2; ++j) dt_sum[k][j] = channel[j] < channels ? pieces.dt_sums[row + channel[j]] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (i - k >= first)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < Split::kEntries; ++e) carry[j][e] = added[k][j][e] + exp2_approx(A2[j][e] * dt_sum[k][j]) * carry[j][e];
  }
}

template <class T>
struct WalkBack {
  ScanRows<const T> grad_y;
  ScanRows<T> grad_x, grad_dt, grad_z;  // null data: not wanted
  const float* grad_h_T;                // [B, D, N] or null for zeros
  Pieces pieces;
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
constexpr ScanCost kWalkBackCost = Split::kN > 16 ? ScanCost{1, 1.0, 1.0, 1.3} : ScanCost{3, 2.5, 1.0, 1.3};

/// A barrier of the block in shared memory of which a thread says that it has arrived long before it asks for the others. `round` counts
/// its uses from 0.
struct LaterBarrier {
  uint64_t state;
  __device__ uint32_t at() { return static_cast<uint32_t>(__cvta_generic_to_shared(&state)); }
  __device__ void create() { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at()), "r"(kScanThreads) : "memory"); }
  __device__ void arrive() { asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(at()) : "memory"); }
  __device__ void wait(int round) {
    asm volatile(
        "{\n .reg .pred over;\n"
        "again:\n mbarrier.test_wait.parity.shared.b64 over, [%0], %1;\n @!over bra again;\n}" ::"r"(at()),
        "r"(round % 2)
        : "memory");
  }
};

template <class T, class Split>
struct WalkBackShared {
  static constexpr int kC = Split::kWarpChannels, kN = Split::kN, kQuads = Split::kEntries / 4;
  static constexpr int kForward = 8;                    // tokens whose steps are formed together on the way forward through a chunk
  static constexpr int kSpan = kN <= 64 ? 16 : kRun;    // tokens whose grad_B_t and grad_C_t the warps of a block add up together
  static constexpr int kSlot = 2 * kQuads * kWarp * 4;  // a state of every lane
  // What lanes have for four entries of a token, for grad_B_t, and 16 banks on for grad_C_t.
  static constexpr int kShareRow = kWarp * 4, kShareC = kRun * kQuads * kShareRow + kWarp / 2,
                       kShares = kShareC + kRun * kQuads * kShareRow;
  struct Step {
    float dt, dt_x, grad_r, unused;
  };
  // Inputs as they are in memory: all tokens of a chunk for the way forward through it, those of a run for the way back.
  struct RawChunk {
    alignas(16) T x[kScanChunk][kC], dt[kScanChunk][kC];
  };
  struct RawRun {
    T of[4][kRun][kC];  // x, dt, z, grad_y
  };
  // The state in front of every run of the chunk, [2 * quads, lanes, 4]; while a run is walked back, what its lanes have for the gradients
  // of the entries lies where its own state and those behind were, [2, kRun, quads, kShareRow]. Behind what the runs of the first half
  // need, the next chunk's inputs arrive meanwhile.
  static constexpr int kSlots = (kRuns - 1) * kSlot + (kShares > kSlot ? kShares : kSlot);
  static constexpr int kRawChunkAt = kSlots - static_cast<int>(sizeof(RawChunk) / sizeof(float)), kArrivesAt = kRuns / 2 - 1;
  static_assert(kArrivesAt * kSlot + kShares <= kRawChunkAt && (kRuns - 2) * kSlot <= kRawChunkAt);
  // In front of them, where there is room: the state in front of the chunk, and 16 bytes of B_t or C_t for each lane.
  static constexpr int kStateAt = kRawChunkAt - kSlot, kEntriesAt = kStateAt - kWarp * 4;
  static constexpr bool kStateArrives = sizeof(T) == 2 && kN == 16 && kArrivesAt * kSlot + kShares <= kEntriesAt;
  alignas(16) float slots[kScanWarps][kSlots];
  alignas(16) float B_t[kScanChunk][kN], C_t[kScanChunk][kN];
  float dt[kScanWarps][kScanChunk][kC];  // after bias and softplus
  union alignas(16) Steps {
    float2 forward[2][kForward][kC + 2];  // dt, dt x; of those that are walked and of the next. Two more: other banks for the next token
    struct {
      Step of[kRun][kC + 2];
      alignas(16) RawRun raw[2];  // of the run that is walked and of the next; that of a chunk's last run is in by_warp
    } back;
  };
  Steps steps[kScanWarps];
  alignas(16) float by_warp[kScanWarps][kSpan][2][kN];  // the warp's share of grad_B_t and of grad_C_t
  LaterBarrier shares_written, shares_read;             // of all spans of a chunk but the first
};

/// Adds what the lanes of a warp have left for the entries over its channels, for all tokens of a run: `shares` [2, kRun, quads,
/// kShareRow].
template <class Shared, class Split>
__device__ void sum_over_channels(const float* shares, float (*to)[2][Split::kN]) {
  constexpr int kQuads = Split::kEntries / 4, kLanes = Split::kLanes, kRows = kWarp / kLanes, kPerToken = kLanes * kQuads;
  __syncwarp();
#pragma unroll
  for (int turn = 0; turn < 2 * kRun * kPerToken / kWarp; ++turn) {
    const int task = turn * kWarp + Split::lane();  // four entries of one token, for one of the two
    const int part = task % kLanes, which = task / kLanes % 2, quad = task / (2 * kLanes) % kQuads, token = task / (2 * kPerToken);
    const float* from = shares + which * Shared::kShareC + (token * kQuads + quad) * Shared::kShareRow + part * 4;
    float sum[4] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float share[4];
      read_floats(from + r * kLanes * 4, share);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += share[i];
    }
    write_floats(&to[token][which][part * Split::kEntries + quad * 4], sum);
  }
}

template <class T, class Split>
__global__ void __launch_bounds__(kScanThreads, kWalkBackBlocks<Split>)
    selective_scan_bwd_walk_kernel(const ScanProblem<T> p, const WalkBack<T> g) {
  constexpr int kEntries = Split::kEntries, kN = Split::kN, kOwned = Split::template owned<kRun>();
  using Shared = WalkBackShared<T, Split>;
  using RawChunk = typename Shared::RawChunk;
  using RawRun = typename Shared::RawRun;
  constexpr int kC = Split::kWarpChannels;
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const ScanPlace<Split, T> place(p, g.first_group, g.groups, 0, p.segments);
  const int tid = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.x / kWarp), lane = Split::lane();
  const int n0 = kept(Split::first_entry()), own = kept(Split::own_channel()), token0 = kept(first_owned<Split, kRun>());
  const int own_channel = static_cast<int>(place.first_channel) + warp * Split::kWarpChannels + own;
  const int64_t channel[2] = {own_channel, own_channel ^ 1};
  const bool own_real = own_channel < p.channels;
  const bool gated = p.z.data != nullptr, graded = g.grad_y.data != nullptr;
  const int64_t in_segments = place.segment_index(p) * p.channels;
  float* const slots = shared.slots[warp];
  constexpr int kSlot = Shared::kSlot;
  auto& steps = shared.steps[warp];
  const int place_of_share = kept(Split::set() * Split::kLanes + Split::part());

  const float bias = own_real ? p.dt_bias[own_channel] : 0.0f;
  const float D_skip = own_real && p.D_skip != nullptr ? p.D_skip[own_channel] : 0.0f;

  float A2[2][kEntries], carry[2][kEntries], sum_A[2][kEntries] = {}, sum_D = 0, sum_bias = 0;  // sum_A: sum_t dt lambda p
  load_A2<Split>(p, channel, A2);
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < kEntries; ++e)
      carry[j][e] = g.grad_h_T != nullptr && channel[j] < p.channels && n0 + e < p.N
                        ? g.grad_h_T[(place.b * p.channels + channel[j]) * p.N + n0 + e]
                        : 0.0f;
  // Through all pieces behind this segment.
  carry_through<Split>(g.pieces, place.b, (static_cast<int>(place.segment) + 1) * g.pieces.per_segment, g.pieces.count - 1, channel,
                       p.channels, A2, carry);

  const int first_chunk = static_cast<int>(place.begin / kScanChunk), last_chunk = static_cast<int>((place.end - 1) / kScanChunk);
  const auto begin_of = [](int chunk) { return static_cast<int64_t>(chunk) * kScanChunk; };
  const auto border = [&](int chunk) {  // the state in front of it
    return in_global_memory(g.borders + (place.b * p.chunks + chunk) * p.channels * kN);
  };

  const bool all_channels = place.whole(p);

  // Inputs travel to shared memory by themselves, as in the forward walk: those of a run while the one behind it is walked, x and dt of a
  // chunk, for the way forward through it, during the second half of the one behind. Where not all of a run is there, or not in 16 bytes,
  // lanes carry what is theirs.
  const bool copies =
      kC * sizeof(T) % 16 == 0 && all_channels && gated && graded && p.x.sixteens && p.dt.sixteens && p.z.sixteens && g.grad_y.sixteens;
  const int64_t first_channel = place.first_channel + warp * kC;
  const auto input = [&](int which) {
    ScanRows<const T> rows = p.x;
    if (which == 1) rows = p.dt;
    if (which == 2) rows = p.z;
    if (which == 3) rows = g.grad_y;
    return rows;
  };
  constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kRow = kC < kPer ? 1 : kC / kPer, kRunCopies = 4 * kRun * kRow;
  const int64_t last_run = (place.end - 1) / kRun * kRun;
  const auto at_copy = [&](auto rows, int copy) {  // where 16 bytes of the inputs or results of a run are; from run to run they go back
    return OwnedAt(rows, place.b, last_run + copy / kRow % kRun, first_channel + copy % kRow * kPer);
  };
  const auto source = [&](int copy) { return at_copy(input(copy / (kRun * kRow)), copy); };
  const auto target = [&](int copy) {
    ScanRows<T> rows = g.grad_x;
    if (copy / (kRun * kRow) == 1) rows = g.grad_dt;
    if (copy / (kRun * kRow) == 2) rows = g.grad_z;
    return at_copy(rows, copy);
  };
  static_assert(kRunCopies <= 2 * kWarp);
  OwnedAt run_source = source(lane % kRunCopies), second_source = source(lane + kRunCopies / 2);
  OwnedAt run_target = target(lane % kRunCopies), second_target = target(lane + kRunCopies / 2);
  const auto carry_in = [&](int which, int64_t begin, int tokens, float behind, T* to, int rows) {
    const ScanRows<const T> from = input(which);
    for (int i = lane; i < rows * kC; i += kWarp)
      to[i] = i / kC < tokens && first_channel + i % kC < p.channels && from.data != nullptr
                  ? from.at(place.b, begin + i / kC)[first_channel + i % kC]
                  : static_cast<T>(behind);
  };
  const auto fetch_run = [&](auto whole, int64_t begin, int tokens, RawRun& to) {
    if (whole || (copies && tokens == kRun)) {
      const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(&to)) + static_cast<uint32_t>(lane) * 16;
      if (kRunCopies >= kWarp || lane < kRunCopies) copy_16_bytes(at, run_source[0]);
      if (kRunCopies > kWarp) copy_16_bytes(at + kWarp * 16, second_source[0]);
    } else {
#pragma unroll
      for (int which = 0; which < 4; ++which) carry_in(which, begin, tokens, 0.0f, &to.of[which][0][0], kRun);
    }
    run_source.move(-kRun);
    second_source.move(-kRun);
  };
  RawChunk& raw_chunk = *reinterpret_cast<RawChunk*>(slots + Shared::kRawChunkAt);
  const bool state_arrives = Shared::kStateArrives && copies && p.N == kN && p.B_t.sixteens && p.C_t.sixteens;
  constexpr int kEntryCopies = kScanChunk * kN / 8;                  // of B_t
  const auto fetch_state = [&](int64_t begin, const float* state) {  // of the chunk that begins there
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(slots)) + static_cast<uint32_t>(lane) * 16;
    const float* const from = state + first_channel * kN + lane * 4;
#pragma unroll
    for (int i = 0; i < kSlot / (kWarp * 4); ++i) copy_16_bytes(to + (Shared::kStateAt + i * kWarp * 4) * 4, from + i * kWarp * 4);
    const int copy = tid % kEntryCopies;
    copy_16_bytes(to + Shared::kEntriesAt * 4,
                  (tid < kEntryCopies ? p.B_t : p.C_t).at(place.b, begin + copy / (kN / 8)) + copy % (kN / 8) * 8);
  };
  const auto fetch_chunk = [&](auto whole, int64_t begin, int tokens) {
    if (whole || (copies && tokens == kScanChunk)) {
      TileCopy<T, kScanChunk, kC>(p.x, place.b, begin, first_channel).start(raw_chunk.x);
      TileCopy<T, kScanChunk, kC>(p.dt, place.b, begin, first_channel).start(raw_chunk.dt);
    } else {
      carry_in(0, begin, tokens, 0.0f, &raw_chunk.x[0][0], kScanChunk);
      carry_in(1, begin, tokens, -INFINITY, &raw_chunk.dt[0][0], kScanChunk);  // a step of zero keeps the state: behind the last token
    }
  };
  if (tid == 0) {
    shared.shares_written.create();
    shared.shares_read.create();
  }
  int rounds = 0;  // of the two barriers; the first __syncthreads below is between
  fetch_chunk(std::false_type{}, begin_of(last_chunk), static_cast<int>(place.end - begin_of(last_chunk)));
  commit_copies();

  // `whole`: all tokens, channels, entries and tensors are there, and arrive by themselves; nothing of that is asked again and again.
  const auto walk_chunk = [&](auto whole, int chunk) {
    const int64_t begin = begin_of(chunk);
    const int tokens = whole ? kScanChunk : static_cast<int>(min(static_cast<int64_t>(kScanChunk), place.end - begin)),
              runs = (tokens + kRun - 1) / kRun;
    const int own_tokens = own_real ? tokens : 0;  // without a channel there is no token either

    auto& raw_last_run = *reinterpret_cast<RawRun*>(&shared.by_warp[warp]);
    static_assert(sizeof(RawRun) <= sizeof(shared.by_warp[0]));
    // Where its results leave from there, too, they do not meet the run's own shares, which are the last of their span.
    static_assert(kC * sizeof(T) % 16 != 0 || sizeof(RawRun) <= (Shared::kSpan - kRun) * sizeof(shared.by_warp[0][0]));

    // Forward: the state in front of every run. The steps of tokens are formed while those before them are walked.
    {
      constexpr int kForward = Shared::kForward, kForwardOwned = Split::template owned<kForward>();
      const int forward0 = first_owned<Split, kForward>(), last_forward = (tokens - 1) / kForward * kForward;
      const auto form_forward = [&](int i, int t, int turn) {
        if (!Split::template owns<kForward>()) return;
        const int at = t + forward0 + i;
        const float dt = softplus_approx(to_f32(raw_chunk.dt[at][own]) + bias);
        shared.dt[warp][at][own] = dt;
        steps.forward[turn][forward0 + i][own] = make_float2(dt, dt * to_f32(raw_chunk.x[at][own]));
      };
      float h[2][kEntries];
      const auto keep_state = [&](int run) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < kEntries; e += 4)
            store_pack(slots + run * kSlot + ((j * kEntries + e) / 4 * kWarp + lane) * 4,
                       Pack<float, 4>{{h[j][e], h[j][e + 1], h[j][e + 2], h[j][e + 3]}});
      };
      const auto walk_token = [&](int t, int turn) {
        float B_t[kEntries];
        read_floats(&shared.B_t[t][n0], B_t);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 step = steps.forward[turn][t % kForward][own ^ j];
#pragma unroll
          for (int e = 0; e < kEntries; ++e) h[j][e] = exp2_approx(step.x * A2[j][e]) * h[j][e] + step.y * B_t[e];
        }
      };
      const bool arrived = (whole ? Shared::kStateArrives : state_arrives) && chunk < last_chunk;
      if (!arrived) {
        load_states<Split>(border(chunk), channel, p.channels, h);
        stage_entries<Split>(p.B_t, p, place.b, begin, place.end, kScanChunk, shared.B_t[0]);  // everybody has done with the chunk before
        stage_entries<Split>(p.C_t, p, place.b, begin, place.end, kScanChunk, shared.C_t[0]);
      }
      wait_for_copies<0>();  // x and dt are there
      __syncwarp();
      if (arrived) {
#pragma unroll
        for (int j = 0; j < 2; ++j) read_floats(slots + Shared::kStateAt + (own ^ j) * kN + n0, h[j]);
        const auto words = load_pack<4>(reinterpret_cast<const uint32_t*>(slots + Shared::kEntriesAt) + lane * 4);
        float wide[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) wide[i] = __uint_as_float(i % 2 == 0 ? words.at[i / 2] << 16 : words.at[i / 2] & 0xffff0000u);
        write_floats((tid < kEntryCopies ? shared.B_t[0] : shared.C_t[0]) + tid % kEntryCopies * 8, wide);
      }
#pragma unroll
      for (int i = 0; i < kForwardOwned; ++i) form_forward(i, 0, 0);
      __syncthreads();
      fetch_run(whole, begin + (runs - 1) * kRun, tokens - (runs - 1) * kRun, raw_last_run);
      commit_copies();
      int turn = 0;
#pragma unroll 1
      for (int t = 0; t < last_forward; t += kForward) {
#pragma unroll
        for (int k = 0; k < kForward; ++k) {
          if (k % kRun == 0) keep_state((t + k) / kRun);
          walk_token(t + k, turn);
#pragma unroll
          for (int i = k * kForwardOwned / kForward; i < (k + 1) * kForwardOwned / kForward; ++i) form_forward(i, t + kForward, turn ^ 1);
        }
        turn ^= 1;
        __syncwarp();
      }
      keep_state(last_forward / kRun);
      if (last_forward / kRun + 1 < runs) {  // the last run's own walk follows below
#pragma unroll
        for (int k = 0; k < kRun; ++k) walk_token(last_forward + k, turn);
        keep_state(last_forward / kRun + 1);
      }
    }

    // What the warps have for the span of tokens that begins with a run.
    const auto sum_over_warps = [&](int run) {
      constexpr int kQuadsPerRow = kN / 4, kTasks = 2 * Shared::kSpan * kQuadsPerRow;
      const int rows = 2 * (tokens - run * kRun), N4 = whole ? kN : static_cast<int>(g.N4);  // grad_B_t and grad_C_t in turn
      float* const partials =
          in_global_memory(g.BC_partials + ((place.group * p.batch + place.b) * p.tokens + begin + run * kRun) * 2 * N4);
#pragma unroll
      for (int turn = 0; turn < (kTasks + kScanThreads - 1) / kScanThreads; ++turn) {
        const int task = turn * kScanThreads + tid, row = task / kQuadsPerRow, n = task % kQuadsPerRow * 4;
        if (task >= kTasks || (!whole && (row >= rows || n >= N4))) continue;
        float sum[4] = {};
#pragma unroll
        for (int w = 0; w < kScanWarps; ++w) {
          float share[4];
          read_floats(&shared.by_warp[w][0][0][0] + 4 * task, share);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] += share[i];
        }
        store_pack(partials + row * N4 + n, Pack<float, 4>{{sum[0], sum[1], sum[2], sum[3]}});
      }
    };

    // Back through a run.
    const auto walk_run = [&](int run, RawRun& raw) {
      OwnedBack<T, kOwned> in;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        in.x[i] = Fetched<T>::from(&raw.of[0][token0 + i][own]);
        in.dt[i] = Fetched<T>::from(&raw.of[1][token0 + i][own]);
        in.z[i] = Fetched<T>::from(&raw.of[2][token0 + i][own]);
        in.grad_y[i] = Fetched<T>::from(&raw.of[3][token0 + i][own]);
      }
      float dt[kOwned], grad_r[kOwned], gate[kOwned];  // gate: sigmoid(z)
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        dt[i] = shared.dt[warp][run * kRun + token0 + i][own];
        gate[i] = whole || gated ? sigmoid(in.z[i].f32()) : 1.0f;
        grad_r[i] = whole || graded ? in.grad_y[i].f32() : 0.0f;
        if (whole || gated) grad_r[i] *= in.z[i].f32() * gate[i];
        if (Split::template owns<kRun>()) steps.back.of[token0 + i][own] = {dt[i], dt[i] * in.x[i].f32(), grad_r[i], 0.0f};
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
            const typename Shared::Step step = steps.back.of[k][own ^ j];
#pragma unroll
            for (int e = 0; e < kEntries; ++e) {
              before[k][j][e] = h[j][e];
              decay[k][j][e] = exp2_approx(step.dt * A2[j][e]);
              h[j][e] = decay[k][j][e] * h[j][e] + step.dt_x * B_t[e];
              along[j] += C_t[e] * h[j][e];
              share[e] = j == 0 ? step.grad_r * h[j][e] : share[e] + step.grad_r * h[j][e];
            }
          }
          along_C[k] = along[0] + Split::other_part(along[1], 1);
#pragma unroll
          for (int e = 0; e < kEntries; e += 4)
            store_pack(slot + Shared::kShareC + (k * Shared::kQuads + e / 4) * Shared::kShareRow + place_of_share * 4,
                       Pack<float, 4>{{share[e], share[e + 1], share[e + 2], share[e + 3]}});
        }
      }
      const int in_span = run * kRun % Shared::kSpan;
      sum_over_owners<Split>(along_C);
      // The span behind has been left for now, when the other warps have long done with it, too.
      const bool span_behind = run < runs - 1 && (run + 1) * kRun % Shared::kSpan == 0;
      if (span_behind) {
        shared.shares_written.wait(rounds);
        sum_over_warps(run + 1);
        shared.shares_read.arrive();
      }

      // Back through the run with the gradient of the state. Tokens behind the end have dt = B = C = grad_r = 0: they pass the gradient on.
      float along_B[kRun], along_A[kRun];
#pragma unroll
      for (int k = kRun - 1; k >= 0; --k) {
        float B_t[kEntries], C_t[kEntries], share[kEntries], by_B[2] = {}, by_A[2] = {};
        read_floats(&shared.B_t[run * kRun + k][n0], B_t);
        read_floats(&shared.C_t[run * kRun + k][n0], C_t);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const typename Shared::Step step = steps.back.of[k][own ^ j];
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
        along_B[k] = by_B[0] + Split::other_part(by_B[1], 1);
        along_A[k] = by_A[0] + Split::other_part(by_A[1], 1);
#pragma unroll
        for (int e = 0; e < kEntries; e += 4)
          store_pack(slot + (k * Shared::kQuads + e / 4) * Shared::kShareRow + place_of_share * 4,
                     Pack<float, 4>{{share[e], share[e + 1], share[e + 2], share[e + 3]}});
      }
      sum_over_owners<Split>(along_B);
      sum_over_owners<Split>(along_A);
      if (span_behind) shared.shares_read.wait(rounds++);
      sum_over_channels<Shared, Split>(slot, shared.by_warp[warp] + in_span);

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
        sum_bias += whole || i < left ? grad_dt[i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kOwned; ++i) grad_z[i] *= whole || graded ? in.grad_y[i].f32() * silu_slope(in.z[i].f32(), gate[i]) : 0.0f;
      if constexpr (whole) {  // through shared memory, where the inputs were, and on in 16 bytes
        if (Split::template owns<kRun>())
#pragma unroll
          for (int i = 0; i < kOwned; ++i) {
            raw.of[0][token0 + i][own] = static_cast<T>(grad_x[i]);
            raw.of[1][token0 + i][own] = static_cast<T>(grad_dt[i]);
            raw.of[2][token0 + i][own] = static_cast<T>(grad_z[i]);
          }
        __syncwarp();
        constexpr int kTargets = kRunCopies / 4 * 3;
        const T* const from = &raw.of[0][0][0] + lane * kPer;
        if (kTargets >= kWarp || lane < kTargets) store_pack(run_target[0], load_pack<kPer>(from));
        if (kTargets > kWarp && lane < kTargets - kWarp) store_pack(second_target[0], load_pack<kPer>(from + kWarp * kPer));
      } else if (Split::template owns<kRun>()) {
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
          const int64_t at = begin + run * kRun + token0 + i;
          if (i >= left) break;
          if (g.grad_x.data != nullptr) g.grad_x.at(place.b, at)[own_channel] = static_cast<T>(grad_x[i]);
          if (g.grad_dt.data != nullptr) g.grad_dt.at(place.b, at)[own_channel] = static_cast<T>(grad_dt[i]);
          if (g.grad_z.data != nullptr) g.grad_z.at(place.b, at)[own_channel] = static_cast<T>(grad_z[i]);
        }
      }
      run_target.move(-kRun);
      second_target.move(-kRun);
    };

    RawRun* raw = &raw_last_run;
#pragma unroll 1
    for (int run = runs - 1; run >= 0; --run) {
      __syncwarp();  // everybody has done with the run behind
      RawRun& next_raw = steps.back.raw[(run + 1) % 2];
      if (run > 0) fetch_run(whole, begin + (run - 1) * kRun, kRun, next_raw);
      if (run == min(runs - 1, Shared::kArrivesAt) && chunk > first_chunk) {
        fetch_chunk(whole, begin_of(chunk - 1), kScanChunk);
        if (whole ? Shared::kStateArrives : state_arrives) fetch_state(begin_of(chunk - 1), border(chunk - 1));
      }
      commit_copies();
      wait_for_copies<1>();  // this run's inputs are there
      __syncwarp();
      walk_run(run, *raw);
      raw = &next_raw;

      if (run > 0 && run * kRun % Shared::kSpan == 0) shared.shares_written.arrive();
    }
    __syncthreads();
    sum_over_warps(0);  // before another __syncthreads, in the next chunk, nothing is written there again
  };
  const auto sixteens = [](const ScanRows<T>& rows) { return rows.data != nullptr && rows.sixteens; };
  const bool whole_block =
      copies && sixteens(g.grad_x) && sixteens(g.grad_dt) && sixteens(g.grad_z) && p.N == kN && state_arrives == Shared::kStateArrives;
#pragma unroll 1
  for (int chunk = last_chunk; chunk >= first_chunk; --chunk)
    choose(whole_block && begin_of(chunk + 1) <= place.end, [&](auto whole) { walk_chunk(whole, chunk); });

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

// --- sums over blocks of channels, and over segments ------------------------------------------------------------

/// A gradient summed over rows and segments; width 0: not wanted.
struct SegmentSums {
  const float* partials = nullptr;  // [count, width]
  float* destination = nullptr;
  int64_t width = 0;
  float beta = 0;
};

template <class T>
struct Sums {
  const float* partials;  // [count, rows, 2, N4]
  float* totals;          // [rows, 2, N4]: sums of the launches before, null when there is one launch only
  ScanRows<T> grad_B_t, grad_C_t;
  int64_t count, rows, tokens, N, N4;
  bool first, last;
  SegmentSums by_segment[3];  // of A_log, D_skip and dt_bias, with the last launch
  int64_t segments;           // of all rows
};

/// A sum for each thread, in the order of the partial ones.
template <class T>
__global__ void selective_scan_bwd_sums_kernel(const Sums<T> a) {
  const int64_t width = a.rows * 2 * a.N4, blocks = (width + kScanThreads - 1) / kScanThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  if (blockIdx.x >= blocks) {
    i -= blocks * kScanThreads;
#pragma unroll
    for (const SegmentSums& of : a.by_segment) {
      if (i >= 0 && i < of.width) {
        float sum = 0;
#pragma unroll 8
        for (int64_t k = 0; k < a.segments; ++k) sum += of.partials[k * of.width + i];
        of.destination[i] = of.beta == 0 ? sum : of.beta * of.destination[i] + sum;
      }
      i -= of.width;
    }
    return;
  }
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

SegmentSums segment_sums(const Tensor& partials, const std::optional<Accumulation>& target, const char* name) {
  if (!target) return {};
  const Tensor& to = target->destination;
  if (to.numel() != partials.dim(1) || to.dtype() != Dtype::f32 || !to.is_contiguous())
    throw ShapeError("selective_scan: a gradient's destination does not fit",
                     {{"gradient of", name}, {"destination", to.describe()}, {"partial sums", partials.describe()}});
  return {partials.data<float>(), to.data<float>(), partials.dim(1), static_cast<float>(target->beta)};
}

template <class T, class Split>
void backward(const SelectiveScanBackward& g) {
  const SelectiveScanInputs& in = g.in;
  const Device& device = in.x.device();
  const CudaContext& cuda = device.cuda_context();
  const int64_t B = in.x.dim(0), tokens = in.x.dim(1), D = in.x.dim(2), N = in.A_log.dim(1);
  const int64_t groups = (D + Split::kBlockChannels - 1) / Split::kBlockChannels;
  const ScanCut cut = cut_scan(tokens, groups * B, kWalkBackCost<Split>, cuda.sm_count);
  const ScanProblem<T> p = scan_problem<T>(in, cut.segments, cut.segment_tokens);
  const auto f32 = [&](Shape shape) { return Tensor::empty(device, Dtype::f32, shape); };
  const ScanRows<const T> grad_y = scan_rows<const T>(g.grad_y);

  SegmentGrads pieces;
  if (p.segments > 1) pieces = selective_scan_segment_grads(in, g.grad_y, p.segments, p.segment_tokens);

  const int64_t N4 = (N + 3) / 4 * 4, per_group = B * tokens * 2 * N4;
  const int64_t at_once = std::clamp<int64_t>(kPartialBytes / (4 * per_group), 1, groups);
  const Tensor A_partials = f32(Shape{B * p.segments, D * N}), D_partials = f32(Shape{B * p.segments, D}),
               bias_partials = f32(Shape{B * p.segments, D});
  const Tensor BC_partials = f32(Shape{at_once, per_group}), BC_totals = at_once < groups ? f32(Shape{per_group}) : Tensor();
  WalkBack<T> w{grad_y,
                scan_rows<T>(g.grad_x),
                scan_rows<T>(g.grad_dt),
                scan_rows<T>(g.grad_z),
                address_of<float>(g.grad_h_T),
                {address_of<float>(pieces.grads), address_of<float>(pieces.dt_sums), static_cast<int>(pieces.count),
                 static_cast<int>(pieces.per_segment)},
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
                sizeof(WalkBackShared<T, Split>), cuda, p, w);
    const bool last = first + w.groups == groups;
    Sums<T> sums{BC_partials.data<float>(),
                 address_of<float>(BC_totals),
                 scan_rows<T>(g.grad_B_t),
                 scan_rows<T>(g.grad_C_t),
                 w.groups,
                 B * tokens,
                 tokens,
                 N,
                 N4,
                 first == 0,
                 last,
                 {},
                 B * p.segments};
    int64_t blocks = (per_group + kScanThreads - 1) / kScanThreads;
    if (last) {
      sums.by_segment[0] = segment_sums(A_partials, g.grad_A_log, "A_log");
      sums.by_segment[1] = segment_sums(D_partials, g.grad_D_skip, "D_skip");
      sums.by_segment[2] = segment_sums(bias_partials, g.grad_dt_bias, "dt_bias");
      blocks += (D * (N + 2) + kScanThreads - 1) / kScanThreads;
    }
    launch_scan(selective_scan_bwd_sums_kernel<T>, "selective_scan_bwd_sums_kernel", blocks, 0, cuda, sums);
  }
}

}  // namespace

void selective_scan_bwd_cuda(const SelectiveScanBackward& g) {
  split_for(g.in.A_log.dim(1), [&](auto, auto split) {
    using Split = decltype(split);
    g.in.x.dtype() == Dtype::bf16 ? backward<__nv_bfloat16, Split>(g) : backward<float, Split>(g);
  });
}

}  // namespace longhand
