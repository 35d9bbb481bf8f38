// The selective scan on CUDA: forward, and the walks over segments that forward and backward begin with where rows and channels are few.
//
// selective_scan_walk_kernel
// moves   x, dt, z in, y out: 8 bytes per token and channel in bf16, and B_t, C_t once per 32 channels (from L2)
// flops   N exponentials and 4 N others per token and channel; 3 more of the special-function unit and about 35 others for softplus
//         and silu
// floor   B32 T2048 D1536 N16 bf16: 805 MB / 3.0 TB/s = 0.27 ms, and 1.9e9 special functions at 16 per clock and SM = 0.46 ms at
//         1.97 GHz: bound by ex2, with 8 instructions for each beside it
// split   N <= 16: two neighbouring lanes share two channels; a lane has half of the entries of both in registers, forms the steps of its
//         own channel, and hands over half of a sum for the other: one exchange per token. 32 channels a warp; warps know nothing of each
//         other. Wider states take 8 or 32 lanes for two channels, whose tokens their lanes own in turn. So do fewer rows and channels with
//         4, and fewer still with 4 for one channel: more instructions, and more warps. Where those do not fill the GPU either, the
//         sequence is cut into segments, whose end states (Walk::ends, a second set of exponentials) are connected first. Backward does
//         likewise with the gradients of states (Walk::grads)
// waits   A warp works on one tile of tokens, forms the steps of the next, and has asked for the one or two behind that: one stretch of
//         instructions without a branch, so that what one part waits for another fills
// needs   N <= 256, any strides over B and T (how far tokens may be apart: scan_rows). B_t and C_t are read four at a time where addresses,
//         strides and widths allow it, else one by one
// agrees  with the CPU reference: kSelectiveScanToleranceF32 (ex2.approx in decays, in softplus and in silu, rcp.approx in silu); bf16 adds
//         one rounding of y
// order   y is summed over the entries of a lane, then over lanes in a tree. No atomics; the number of segments depends on the GPU
//
// With keep_borders the state in front of every 32 tokens goes out as well, N / 8 bytes per token and channel.
//
// connect_segments_kernel
// moves   two f32 per segment and state; a thread per state walks over the segments, or 8 threads where segments are many
#include <algorithm>
#include <bit>

#include "ops/selective_scan/selective_scan_cuda.cuh"

namespace longhand {
namespace {

/// What walks over tokens are for:
///   outputs  y and the last state, from the states at the beginning of segments
///   ends     what a segment does to a state: the state at its end, from zero at its beginning
///   grads    what a segment does to the gradient of a state: that at its beginning, from zero at its end, last token first
enum class Walk { outputs, ends, grads };

template <class T>
struct WalkOutputs {
  ScanRows<T> y;
  float* h_T;            // [B, D, N]; outputs of the last segment
  const float* starts;   // states at the beginning of each segment, [B, segments, D, row] or null for zeros
  int64_t starts_row;    // N or kN
  float* borders;        // [B, chunks, D, kN]: the state in front of each chunk of kScanChunk tokens, or null
  float *ends, *dt_sum;  // [B, segments, D, kN], of grads as well; [B, segments, D]
  ScanRows<const T> grad_y;
};

/// What a warp has in shared memory.
template <class T, class Split, Walk walk>
struct WalkShared {
  static constexpr int kEntryInputs = walk == Walk::outputs ? 2 : 1, kC = Split::kWarpChannels;
  static constexpr int kTokens = Split::kN > 64 ? 4 : kC <= 8 && Split::kN <= 16 ? 16 : 8;
  /// A lane that owns all tokens of a channel finishes each result at once, from x and z as they are in memory; with several owners what
  /// that takes is formed with the steps.
  static constexpr bool kAtOnce = walk == Walk::outputs && Split::kOwners == 1;
  // Owners of different tokens of a channel meet different banks.
  static constexpr int kPad = Split::kOwners > 1 ? 16 / kTokens : 0, kRawPad = Split::kOwners == 2 ? 16 / static_cast<int>(sizeof(T)) : 0;
  /// As it is in memory, of tiles that are on their way.
  struct Raw {
    alignas(16) T x[kTokens][kC + kRawPad];  // grad_y for grads
    alignas(16) T dt[kTokens][kC + kRawPad];
    alignas(16) T z[walk == Walk::ends ? 1 : kTokens][kC + kRawPad];
    alignas(16) T entries[kEntryInputs][kTokens][Split::kN];  // B_t, C_t; only C_t for grads
  };
  /// For the walk.
  struct Tile {
    alignas(16) float entries[kEntryInputs][kTokens][Split::kN];
    alignas(16) float2 steps[kTokens][kC + kPad];  // dt after bias and softplus, dt x; for grads dt, grad_r
    alignas(16) float2 ends[walk == Walk::outputs && !kAtOnce ? kTokens : 1][kC + kPad];  // D_skip x, silu(z): for the result
  };
  static constexpr int kAhead = kTokens == 16 ? 2 : 3;
  static constexpr int kRaws = kAhead + (kAtOnce ? 1 : 0);
  Raw raw[kRaws];
  Tile tiles[2];  // one that is worked on, one that is filled
};

/// The second walk costs as many exponentials again.
template <class Split>
constexpr ScanCost kForwardCost = Split::kN > 16          ? ScanCost{2, 1.45, 1.0, 1.9}
                                  : Split::kLanes == 2    ? ScanCost{3, 1.45, 1.0, 1.9}
                                  : Split::kChannels == 2 ? ScanCost{3, 1.45, 0.58, 1.9}
                                                          : ScanCost{4, 1.6, 0.31, 1.9};

template <class T, class Split, Walk walk>
__global__ void __launch_bounds__(kScanThreads, kForwardCost<Split>.at_once)
    selective_scan_walk_kernel(const ScanProblem<T> p, const WalkOutputs<T> out, int64_t groups, int64_t first_segment, int64_t segments) {
  using Shared = WalkShared<T, Split, walk>;
  using Raw = typename Shared::Raw;
  using Tile = typename Shared::Tile;
  constexpr int kTokens = Shared::kTokens, kN = Split::kN, kEntries = Split::kEntries, kOwned = Split::template owned<kTokens>();
  constexpr int kC = Split::kWarpChannels, kChannels = Split::kChannels, kAhead = Shared::kAhead;
  constexpr bool outputs = walk == Walk::outputs, at_once = Shared::kAtOnce, back = walk == Walk::grads, gates = walk != Walk::ends;
  extern __shared__ __align__(16) char shared_bytes[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = Split::lane();
  auto& shared = reinterpret_cast<Shared*>(shared_bytes)[warp];
  const ScanPlace<Split, T> place(p, 0, groups, first_segment, segments);
  const int n0 = Split::first_entry(), own = Split::own_channel(), token0 = first_owned<Split, kTokens>();
  const int64_t first_channel = place.first_channel + warp * kC, own_channel = first_channel + own;
  const bool own_real = own_channel < p.channels;
  int64_t channel[kChannels];  // [0]: the lane's own, [1]: the other
#pragma unroll
  for (int j = 0; j < kChannels; ++j) channel[j] = own_channel ^ j;

  float A2[kChannels][kEntries], h[kChannels][kEntries], dt_sum = 0;
  load_A2<Split>(p, channel, A2);
#pragma unroll
  for (int j = 0; j < kChannels; ++j)
#pragma unroll
    for (int e = 0; e < kEntries; ++e)
      h[j][e] = outputs && out.starts != nullptr && channel[j] < p.channels && n0 + e < p.N
                    ? out.starts[(place.segment_index(p) * p.channels + channel[j]) * out.starts_row + n0 + e]
                    : 0.0f;
  const float bias = own_real ? p.dt_bias[own_channel] : 0.0f;
  const float D_skip = outputs && own_real && p.D_skip != nullptr ? p.D_skip[own_channel] : 0.0f;
  const bool gated = gates && p.z.data != nullptr;
  const float gate_scale = gated ? 1.0f : 0.0f, no_gate = 1.0f - gate_scale;  // instead of a branch

  // Tiles in the order in which they are walked.
  const int tiles = static_cast<int>((place.end - place.begin + kTokens - 1) / kTokens), last_tile = back ? 0 : tiles - 1;
  const int last_tokens = static_cast<int>(place.end - place.begin - static_cast<int64_t>(tiles - 1) * kTokens);
  const auto begin_of = [&](int tile) { return place.begin + static_cast<int64_t>(back ? tiles - 1 - tile : tile) * kTokens; };
  const auto tokens_of = [&](int tile) { return tile == last_tile ? last_tokens : tile < tiles ? kTokens : 0; };

  // Inputs travel to shared memory by themselves, 16 bytes each, while the tiles in front of them are worked on: a warp need not keep
  // registers for them, nor wait for one of them because it waits for another. Where not all of a tile is there, or not in 16 bytes, lanes
  // carry what is theirs.
  const ScanRows<const T>&x_rows = back ? out.grad_y : p.x, &entry_rows = back ? p.C_t : p.B_t;
  const bool all_channels = place.whole(p);
  const bool copies = kC * sizeof(T) % 16 == 0 && all_channels && p.N == kN && gated == gates && x_rows.sixteens && p.dt.sixteens &&
                      (!gates || p.z.sixteens) && entry_rows.sixteens && (!outputs || p.C_t.sixteens);
  constexpr int kPitch = kC + Shared::kRawPad;
  TileCopy<T, kTokens, kC, kPitch> x_copy(x_rows, place.b, begin_of(0), first_channel), dt_copy(p.dt, place.b, begin_of(0), first_channel),
      z_copy(p.z, place.b, begin_of(0), first_channel);
  TileCopy<T, kTokens, kN> entries_copy(entry_rows, place.b, begin_of(0), 0), C_copy(p.C_t, place.b, begin_of(0), 0);
  const auto carry = [&](const ScanRows<const T>& rows, int64_t begin, int tokens, float behind, T(&to)[kTokens][kPitch]) {
    if (!Split::template owns<kTokens>()) return;
#pragma unroll
    for (int i = 0; i < kOwned; ++i)
      to[token0 + i][own] = own_real && token0 + i < tokens && rows.data != nullptr ? rows.at(place.b, begin + token0 + i)[own_channel]
                                                                                    : static_cast<T>(behind);
  };
  const auto carry_entries = [&](const ScanRows<const T>& rows, int64_t begin, int tokens, T(&to)[kTokens][kN]) {
    for (int i = lane; i < kTokens * kN; i += kWarp)
      to[i / kN][i % kN] = i / kN < tokens && i % kN < p.N ? rows.at(place.b, begin + i / kN)[i % kN] : static_cast<T>(0.0f);
  };
  const auto fetch = [&](int tile, Raw& to) {
    const int tokens = tokens_of(tile);
    if (copies && tokens == kTokens) {
      x_copy.start(to.x);
      dt_copy.start(to.dt);
      if constexpr (gates) z_copy.start(to.z);
      entries_copy.start(to.entries[0]);
      if constexpr (outputs) C_copy.start(to.entries[1]);
    } else {
      const int64_t begin = begin_of(tile);
      carry(x_rows, begin, tokens, 0.0f, to.x);
      carry(p.dt, begin, tokens, -INFINITY, to.dt);  // a step of zero keeps the state: behind the last token
      if constexpr (gates) carry(p.z, begin, tokens, 0.0f, to.z);
      carry_entries(entry_rows, begin, tokens, to.entries[0]);
      if constexpr (outputs) carry_entries(p.C_t, begin, tokens, to.entries[1]);
    }
    commit_copies();
    constexpr int kNext = back ? -kTokens : kTokens;
    x_copy.move(kNext);
    dt_copy.move(kNext);
    z_copy.move(kNext);
    entries_copy.move(kNext);
    C_copy.move(kNext);
  };

  const auto gate_of = [&](const Raw& raw, int t) { return gate_scale * silu(to_f32(raw.z[gates ? t : 0][own])) + no_gate; };
  const auto form_owned = [&](const Raw& raw, int i, Tile& tile) {
    if (!Split::template owns<kTokens>()) return;
    const float dt = softplus_approx(to_f32(raw.dt[token0 + i][own]) + bias), x = to_f32(raw.x[token0 + i][own]);
    tile.steps[token0 + i][own] = make_float2(dt, back ? x * gate_of(raw, token0 + i) : dt * x);
    if constexpr (outputs && !at_once) tile.ends[token0 + i][own] = make_float2(D_skip * x, gate_of(raw, token0 + i));
    if constexpr (!outputs) dt_sum += dt;
  };
  constexpr int kPacks = kTokens * kN / (4 * kWarp);  // of four entries
  const auto form_entries = [&](const Raw& raw, Tile& tile) {
#pragma unroll
    for (int which = 0; which < Shared::kEntryInputs; ++which)
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int at = (k * kWarp + lane) * 4;
        const auto pack = load_pack<4>(&raw.entries[which][0][0] + at);
        store_pack(&tile.entries[which][0][0] + at,
                   Pack<float, 4>{{to_f32(pack.at[0]), to_f32(pack.at[1]), to_f32(pack.at[2]), to_f32(pack.at[3])}});
      }
  };
  struct TokenInputs {
    float entries[Shared::kEntryInputs][kEntries];
    float2 step[kChannels];
  };
  const auto read_token = [&](const Tile& tile, int t) {
    TokenInputs in;
#pragma unroll
    for (int which = 0; which < Shared::kEntryInputs; ++which) read_floats(&tile.entries[which][t][n0], in.entries[which]);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) in.step[j] = tile.steps[t][own ^ j];
    return in;
  };

#pragma unroll
  for (int k = 0; k < kAhead; ++k) fetch(k, shared.raw[k]);
  wait_for_copies<kAhead - 1>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kOwned; ++i) form_owned(shared.raw[0], i, shared.tiles[0]);
  form_entries(shared.raw[0], shared.tiles[0]);
  wait_for_copies<kAhead - 2>();
  __syncwarp();

  OwnedAt<T> y_at(out.y, place.b, begin_of(0) + token0, own_channel);
  int turn = 0, raw_turn = 0;  // the tile that is walked; where its inputs were
  float* border = out.borders + (place.b * p.chunks + place.begin / kScanChunk) * p.channels * kN;
#pragma unroll 1
  for (int number = 0; number < tiles; ++number) {
    if constexpr (outputs)
      if (out.borders != nullptr && number % (kScanChunk / kTokens) == 0) {
        store_states<Split>(border, channel, p.channels, h);
        border += p.channels * kN;
      }
    [[maybe_unused]] const Raw& raw = shared.raw[raw_turn];
    fetch(number + kAhead, shared.raw[!at_once ? raw_turn : raw_turn > 0 ? raw_turn - 1 : kAhead]);  // one that nobody needs any more
    raw_turn = raw_turn + 1 < Shared::kRaws ? raw_turn + 1 : 0;

    // Through the tile, while the steps of the next one are formed: one stretch of instructions, so that the waits of one part are filled
    // by another.
    const Tile& tile = shared.tiles[turn];
    Tile& next_tile = shared.tiles[turn ^ 1];
    const Raw& next_raw = shared.raw[raw_turn];
    turn ^= 1;
    [[maybe_unused]] float y[kTokens];  // of the own channel, over the entries of this lane and its neighbour
    const auto token = [](int step) { return back ? kTokens - 1 - step : step; };
    TokenInputs in = read_token(tile, token(0));
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const TokenInputs now = in;
      if (t + 1 < kTokens) in = read_token(tile, token(t + 1));
      float sum[kChannels];
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        sum[j] = 0;
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          const float decay = exp2_approx(now.step[j].x * A2[j][e]), added = now.step[j].y * now.entries[0][e];
          h[j][e] = back ? decay * (h[j][e] + added) : decay * h[j][e] + added;
          if constexpr (outputs) sum[j] += now.entries[1][e] * h[j][e];
        }
      }
      if constexpr (outputs) y[t] = sum[0];
      if constexpr (outputs && kChannels == 2) y[t] += Split::other_part(sum[1], 1);
      if constexpr (at_once) y[t] = (y[t] + D_skip * to_f32(raw.x[t][own])) * gate_of(raw, t);
      if (t == 0) form_entries(next_raw, next_tile);
#pragma unroll
      for (int i = t * kOwned / kTokens; i < (t + 1) * kOwned / kTokens; ++i) form_owned(next_raw, i, next_tile);
    }
    [[maybe_unused]] float2 ends[kOwned];
    if constexpr (outputs && !at_once)
#pragma unroll
      for (int i = 0; i < kOwned; ++i) ends[i] = tile.ends[Split::template owns<kTokens>() ? token0 + i : 0][own];
    wait_for_copies<kAhead - 2>();  // the inputs of the tile behind the next one are there
    __syncwarp();                   // everybody's; and the next tile

    if constexpr (outputs) {
      sum_over_owners<Split>(y);
      float results[kOwned];
#pragma unroll
      for (int i = 0; i < kOwned; ++i) results[i] = at_once ? y[i] : (y[i] + ends[i].x) * ends[i].y;
      const int tokens = tokens_of(number), left = own_real ? tokens - token0 : 0;
      if (Split::template owns<kTokens>())
        choose(all_channels && tokens == kTokens, [&](auto whole) { y_at.template write<whole>(results, left); });
      y_at.move(kTokens);
    }
  }

  if constexpr (!outputs) {
    store_states<Split>(out.ends + place.segment_index(p) * p.channels * kN, channel, p.channels, h);
    dt_sum = sum_of_owners<Split, kTokens>(dt_sum);
    if (Split::part() < kChannels && own_real) out.dt_sum[place.segment_index(p) * p.channels + own_channel] = dt_sum;
  } else if (place.end == p.tokens) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j)
#pragma unroll
      for (int e = 0; e < kEntries; ++e)
        if (channel[j] < p.channels && n0 + e < p.N) out.h_T[(place.b * p.channels + channel[j]) * p.N + n0 + e] = h[j][e];
  }
}

struct ConnectArgs {
  float* ends;  // [B, segments, D, kN]: the state at the end of each, from zero; afterwards that at its beginning, of the whole scan
  const float *dt_sum, *A_log;  // [B, segments, D]; [D, N]
  const float* h0;              // [B, D, N]; null for zeros
  int64_t segments, channels, N;
  int kN_log2;
  unsigned blocks_per_row;
};

/// Carries states from segment to segment. Several threads of a block share a state where segments are many: each puts `ahead` of them
/// together, and takes what those in front of it make.
template <int stripes, int ahead>
__global__ void __launch_bounds__(kScanThreads, stripes > 1 ? 4 : 6) connect_segments_kernel(const ConnectArgs a) {
  constexpr int kStates = kScanThreads / stripes;
  __shared__ float2 effects[stripes][kStates];  // decay, and what is added
  const int stripe = static_cast<int>(threadIdx.x) / kStates, column = static_cast<int>(threadIdx.x) % kStates;
  const int64_t b = blockIdx.x / a.blocks_per_row, i = static_cast<int64_t>(blockIdx.x % a.blocks_per_row) * kStates + column;
  const int64_t d = i >> a.kN_log2, n = i - (d << a.kN_log2);
  const bool there = d < a.channels, real = there && n < a.N;
  const float A2 = real ? -expf(a.A_log[d * a.N + n]) * kLog2e : 0.0f;
  const int64_t start = b * a.segments * a.channels, step = a.channels, value_step = step << a.kN_log2;  // from segment to segment
  float* value = a.ends + ((start + stripe * ahead * step) << a.kN_log2) + i;
  const float* dt_sum = a.dt_sum + start + stripe * ahead * step + d;

  float reached = real && a.h0 != nullptr ? a.h0[(b * a.channels + d) * a.N + n] : 0.0f;
  for (int64_t base = 0; base < a.segments; base += stripes * ahead) {
    const int64_t first = base + stripe * ahead;
    float own[ahead], kept[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) {  // what the last one does reaches nobody, and need not be known
      const bool counts = there && first + k + 1 < a.segments;
      own[k] = counts ? value[k * value_step] : 0.0f;
      kept[k] = counts ? exp2_approx(A2 * dt_sum[k * step]) : 0.0f;
    }
    float here = reached;
    if constexpr (stripes > 1) {
      float2 effect = make_float2(1, 0);
#pragma unroll
      for (int k = 0; k < ahead; ++k) effect = make_float2(kept[k] * effect.x, own[k] + kept[k] * effect.y);
      effects[stripe][column] = effect;
      __syncthreads();
#pragma unroll
      for (int s = 0; s < stripes; ++s) {
        if (s == stripe) here = reached;
        reached = effects[s][column].y + effects[s][column].x * reached;
      }
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (there && first + k < a.segments) value[k * value_step] = here;
      here = own[k] + kept[k] * here;
    }
    if constexpr (stripes == 1) reached = here;
    value += stripes * ahead * value_step;
    dt_sum += stripes * ahead * step;
  }
}

void connect_segments(const Tensor& ends, const Tensor& dt_sum, const Tensor& A_log, const Tensor& h0) {
  const auto kN = static_cast<unsigned>(ends.dim(3));
  ConnectArgs a{ends.data<float>(),    dt_sum.data<float>(), A_log.data<float>(),
                address_of<float>(h0), ends.dim(1),          ends.dim(2),
                A_log.dim(1),          std::countr_zero(kN), 0};
  const auto run = [&](auto kernel, int64_t stripes) {
    const int64_t states = kScanThreads / stripes, blocks_per_row = (a.channels * kN + states - 1) / states;
    a.blocks_per_row = static_cast<unsigned>(blocks_per_row);
    launch_scan(kernel, "connect_segments_kernel", ends.dim(0) * blocks_per_row, 0, ends.device().cuda_context(), a);
  };
  a.segments > 16 ? run(connect_segments_kernel<8, 16>, 8) : run(connect_segments_kernel<1, 8>, 1);
}

template <class T, class Split, Walk walk>
void launch_walk(const ScanProblem<T>& p, const WalkOutputs<T>& w, int64_t first_segment, int64_t segments, const CudaContext& cuda) {
  const int64_t groups = (p.channels + Split::kBlockChannels - 1) / Split::kBlockChannels;
  launch_scan(selective_scan_walk_kernel<T, Split, walk>, "selective_scan_walk_kernel", groups * segments * p.batch,
              kScanWarps * sizeof(WalkShared<T, Split, walk>), cuda, p, w, groups, first_segment, segments);
}

template <class Split>
ScanCut cut_forward(const SelectiveScanInputs& in) {
  const int64_t groups = (in.x.dim(2) + Split::kBlockChannels - 1) / Split::kBlockChannels;
  return cut_scan(in.x.dim(1), groups * in.x.dim(0), kForwardCost<Split>, in.x.device().cuda_context().sm_count);
}

template <class T, class Split>
void forward(const SelectiveScanInputs& in, const SelectiveScanResult& out) {
  const CudaContext& cuda = in.x.device().cuda_context();
  const int64_t B = in.x.dim(0), D = in.x.dim(2);
  const ScanCut cut = cut_forward<Split>(in);
  const ScanProblem<T> p = scan_problem<T>(in, cut.segments, cut.segment_tokens);

  WalkOutputs<T> w{
      scan_rows<T>(out.y), out.h_T.data<float>(), address_of<float>(in.h0), p.N, address_of<float>(out.borders), nullptr, nullptr, {}};
  Tensor ends, dt_sum;
  if (p.segments > 1) {
    const Device& device = in.x.device();
    ends = Tensor::empty(device, Dtype::f32, Shape{B, p.segments, D, Split::kN});
    dt_sum = Tensor::empty(device, Dtype::f32, Shape{B, p.segments, D});
    w.ends = ends.data<float>();
    w.dt_sum = dt_sum.data<float>();
    launch_walk<T, Split, Walk::ends>(p, w, 0, p.segments - 1, cuda);  // what the last one does to a state is seen by the walk below
    connect_segments(ends, dt_sum, in.A_log, in.h0);
    w.starts = w.ends;
    w.starts_row = Split::kN;
  }
  launch_walk<T, Split, Walk::outputs>(p, w, 0, p.segments, cuda);
}

}  // namespace

SegmentGrads selective_scan_segment_grads(const SelectiveScanInputs& in, const Tensor& grad_y, int64_t segments, int64_t segment_tokens) {
  const Device& device = in.x.device();
  const int64_t B = in.x.dim(0), tokens = in.x.dim(1), D = in.x.dim(2);
  SegmentGrads result;
  split_for(in.A_log.dim(1), [&](auto split, auto) {
    using Split = decltype(split);
    const int64_t blocks = (D + Split::kBlockChannels - 1) / Split::kBlockChannels * B, sm_count = device.cuda_context().sm_count;
    // This walk needs no states, so it is cut by itself: into equal pieces of segments, as many as suit the GPU. What the first segment
    // does to a gradient reaches nobody.
    const auto pieces = [&](int64_t per_segment) { return (tokens * per_segment + segment_tokens - 1) / segment_tokens; };
    const auto time = [&](int64_t per_segment) {
      return walk_time(blocks * (pieces(per_segment) - per_segment), segment_tokens / per_segment, kForwardCost<Split>, sm_count);
    };
    const int64_t chunks = segment_tokens / kScanChunk;
    int64_t best = 1;
    for (int64_t per_segment = 2;
         segment_tokens / per_segment >= kShortestSegment && blocks * pieces(per_segment) <= kMostScanBlocksPerSm * sm_count; ++per_segment)
      if (chunks % per_segment == 0 && time(per_segment) < time(best)) best = per_segment;
    result.per_segment = best;
    result.count = pieces(best);
    result.grads = Tensor::empty(device, Dtype::f32, Shape{B, result.count, D, Split::kN});
    result.dt_sums = Tensor::empty(device, Dtype::f32, Shape{B, result.count, D});
    const auto run = [&](auto element) {
      using T = decltype(element);
      WalkOutputs<T> w{};
      w.ends = result.grads.data<float>();
      w.dt_sum = result.dt_sums.data<float>();
      w.grad_y = scan_rows<const T>(grad_y);
      launch_walk<T, Split, Walk::grads>(scan_problem<T>(in, result.count, segment_tokens / best), w, best, result.count - best,
                                         device.cuda_context());
    };
    in.x.dtype() == Dtype::bf16 ? run(__nv_bfloat16{}) : run(float{});
  });
  return result;
}

SelectiveScanResult selective_scan_fwd_cuda(const SelectiveScanInputs& in, bool keep_borders) {
  const int64_t B = in.x.dim(0), T = in.x.dim(1), D = in.x.dim(2), N = in.A_log.dim(1);
  SelectiveScanResult out{
      Tensor::empty(in.x.device(), in.x.dtype(), in.x.shape()), Tensor::empty(in.x.device(), Dtype::f32, {B, D, N}), {}};
  split_for(N, [&](auto split, auto) {
    using Split = decltype(split);
    if (keep_borders) out.borders = Tensor::empty(in.x.device(), Dtype::f32, {B, (T + kScanChunk - 1) / kScanChunk, D, int64_t{Split::kN}});
    const auto run = [&](auto chosen) {
      using Chosen = decltype(chosen);
      in.x.dtype() == Dtype::bf16 ? forward<__nv_bfloat16, Chosen>(in, out) : forward<float, Chosen>(in, out);
    };
    if constexpr (Split::kN == 16) {  // few rows and channels: more lanes for each
      using Four = ScanSplit<4, 4>;
      using FourOfOne = ScanSplit<4, 4, 1, Lanes::apart>;
      const double two = cut_forward<Split>(in).time, four = cut_forward<Four>(in).time, of_one = cut_forward<FourOfOne>(in).time;
      if (of_one < std::min(two, four)) return run(FourOfOne{});
      if (four < two) return run(Four{});
    }
    run(split);
  });
  return out;
}

}  // namespace longhand
