// The selective scan on CUDA, forward.
//
// selective_scan_fwd_walk_kernel
// moves   x, dt, z in, y out: 8 bytes per token and channel in bf16, and B_t, C_t once per 32 channels (from L2)
// flops   N exponentials and 4 N others per token and channel; 3 more of the special-function unit and about 35 others for softplus and
// silu floor   B32 T2048 D1536 N16 bf16: 805 MB / 3.0 TB/s = 0.27 ms, and 1.9e9 special functions at 16 per clock and SM = 0.46 ms at 1.97
// GHz:
//         bound by ex2, with 9 instructions for each beside it
// split   N <= 16: two neighbouring lanes share two channels; a lane has half of the entries of both in registers, forms the steps of its
// own
//         channel, and hands over half of a sum for the other: one exchange per token. 32 channels a warp; warps know nothing of each
//         other. Wider states take 8 or 32 lanes for two channels, whose tokens their lanes own in turn, and so do few rows and channels
//         with 4. Fewer still: the sequence is cut into segments, whose end states (Walk::ends, a second set of exponentials) are connected
//         first
// needs   N <= 256, any strides over B and T (how far tokens may be apart: scan_rows). B_t and C_t are read four at a time where addresses,
//         strides and widths allow it, else one by one
// agrees  with the CPU reference: kSelectiveScanToleranceF32 (ex2.approx in decays, in softplus and in silu, rcp.approx in silu); bf16 adds
//         one rounding of y
// order   y is summed over the entries of a lane, then over lanes in a tree. No atomics; the number of segments depends on the GPU
//
// With keep_borders the state in front of every 32 tokens goes out as well, N / 8 bytes per token and channel.
//
// connect_segments_kernel
// moves   two f32 per segment and state; a thread per state walks over the segments
#include <algorithm>

#include "ops/selective_scan/selective_scan_cuda.cuh"

namespace longhand {
namespace {

template <class T>
struct WalkOutputs {
  ScanRows<T> y;
  float* h_T;           // [B, D, N]; outputs of the last segment
  const float* starts;  // states at the beginning of each segment, [B, segments, D, row] or null for zeros
  int64_t starts_row;   // N or kN
  float* borders;       // [B, chunks, D, kN]: the state in front of each chunk of kScanChunk tokens, or null
  float *ends, *dt_sum;
};

enum class Walk { outputs, ends };

/// What a warp has in shared memory of the tokens that it works on together.
template <class Split, Walk walk>
struct WarpTile {
  static constexpr int kTokens = Split::kN <= 64 ? 8 : 4, kEntryInputs = walk == Walk::outputs ? 2 : 1;
  alignas(16) float entries[kEntryInputs][kTokens][Split::kN];  // B_t, C_t
  alignas(16) float2 steps[kTokens][Split::kWarpChannels];      // dt after bias and softplus, dt x
};

/// The activations that a lane owns in a tile.
template <class T, int n>
struct Owned {
  Fetched<T> x[n], dt[n], z[n];
};

/// The second walk costs as many exponentials again.
template <class Split>
constexpr ScanCost kForwardCost = Split::kN > 16         ? ScanCost{2, 1.45, 1.0, 1.9}
                                  : Split::kEntries == 8 ? ScanCost{3, 1.45, 1.0, 1.9}
                                                         : ScanCost{4, 2.25, 0.55, 1.9};

template <class T, class Split, Walk walk>
__global__ void __launch_bounds__(kScanThreads, kForwardCost<Split>.at_once)
    selective_scan_fwd_walk_kernel(const ScanProblem<T> p, const WalkOutputs<T> out, int64_t groups, int64_t segments) {
  using Tile = WarpTile<Split, walk>;
  constexpr int kTokens = Tile::kTokens, kN = Split::kN, kEntries = Split::kEntries, kOwned = Split::template owned<kTokens>();
  constexpr bool outputs = walk == Walk::outputs;
  extern __shared__ __align__(16) char shared_bytes[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = Split::lane();
  Tile& tile = reinterpret_cast<Tile*>(shared_bytes)[warp];
  const ScanPlace<Split, T> place(p, 0, groups, 0, segments);
  const int n0 = Split::first_entry(), own = Split::own_channel(), token0 = first_owned<Split, kTokens>();
  const int64_t own_channel = place.first_channel + warp * Split::kWarpChannels + own;
  const bool own_real = own_channel < p.channels;
  const int64_t channel[2] = {own_channel, own_channel ^ 1};

  float A2[2][kEntries], h[2][kEntries], dt_sum = 0;  // [0]: the lane's own channel, [1]: the other
  load_A2<Split>(p, channel, A2);
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < kEntries; ++e)
      h[j][e] = outputs && out.starts != nullptr && channel[j] < p.channels && n0 + e < p.N
                    ? out.starts[(place.segment_index(p) * p.channels + channel[j]) * out.starts_row + n0 + e]
                    : 0.0f;
  const float bias = own_real ? p.dt_bias[own_channel] : 0.0f;
  const float D_skip = outputs && own_real && p.D_skip != nullptr ? p.D_skip[own_channel] : 0.0f;
  const bool gated = outputs && p.z.data != nullptr;

  // B_t and C_t of the next tile, four entries at a time.
  constexpr int kEntryPacks = kTokens * kN / (4 * kWarp);
  FetchedFour<T> entries[Tile::kEntryInputs][kEntryPacks];
  const auto fetch_entries = [&](int64_t begin) {
#pragma unroll
    for (int k = 0; k < kEntryPacks; ++k) {
      const int at = (k * kWarp + lane) * 4;
      const int64_t t = begin + at / kN;
      entries[0][k].fetch(p.B_t, place.b, t, at % kN, p.N, t < place.end);
      if constexpr (outputs) entries[1][k].fetch(p.C_t, place.b, t, at % kN, p.N, t < place.end);
    }
  };
  // Where the lane's own activations are, of the tile that is fetched next and of the tile that is written.
  const int64_t first = place.begin + token0;
  OwnedAt<const T> x_at(p.x, place.b, first, own_channel), dt_at(p.dt, place.b, first, own_channel), z_at(p.z, place.b, first, own_channel);
  OwnedAt<T> y_at(out.y, place.b, first, own_channel);
  const bool all_channels = place.whole(p);
  const auto with_tile = [&](int64_t begin, auto&& f) {  // f(whole, how many tokens from its first one on are there for the lane)
    const int tokens = static_cast<int>(min(static_cast<int64_t>(kTokens), place.end - begin));
    choose(all_channels && tokens == kTokens, [&](auto whole) { f(whole, own_real ? tokens - token0 : 0); });
  };
  const auto fetch_owned = [&](int64_t begin, Owned<T, kOwned>& to) {
    with_tile(begin, [&](auto whole, int left) {
      x_at.template read<whole>(to.x, left, 0.0f);
      dt_at.template read<whole>(to.dt, left, -INFINITY);  // a step of zero keeps the state: behind the last token
      if (gated) z_at.template read<whole>(to.z, left, 0.0f);
    });
    x_at.move(kTokens);
    dt_at.move(kTokens);
    z_at.move(kTokens);
  };

  Owned<T, kOwned> next;
  fetch_owned(place.begin, next);
  fetch_entries(place.begin);
  for (int64_t begin = place.begin; begin < place.end; begin += kTokens) {
    if constexpr (outputs)
      if (out.borders != nullptr && begin % kScanChunk == 0)
        store_states<Split>(out.borders + (place.b * p.chunks + begin / kScanChunk) * p.channels * kN, channel, p.channels, h);

    // The steps of the tile, each by its owner.
    const Owned<T, kOwned> now = next;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const float dt = softplus_approx(now.dt[i].f32() + bias);
      if (Split::template owns<kTokens>()) tile.steps[token0 + i][own] = make_float2(dt, dt * now.x[i].f32());
      if constexpr (!outputs) dt_sum += dt;
    }
#pragma unroll
    for (int which = 0; which < Tile::kEntryInputs; ++which)
#pragma unroll
      for (int k = 0; k < kEntryPacks; ++k) {
        float widened[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) widened[i] = entries[which][k].f32(i);
        write_floats(&tile.entries[which][0][0] + (k * kWarp + lane) * 4, widened);
      }
    fetch_owned(begin + kTokens, next);
    fetch_entries(begin + kTokens);
    __syncwarp();

    float y[kTokens];  // of the own channel, over the entries of this lane and its neighbour
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float B_t[kEntries], C_t[kEntries], sum[2];
      read_floats(&tile.entries[0][t][n0], B_t);
      if constexpr (outputs) read_floats(&tile.entries[1][t][n0], C_t);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 step = tile.steps[t][own ^ j];
        sum[j] = 0;
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          h[j][e] = exp2_approx(step.x * A2[j][e]) * h[j][e] + step.y * B_t[e];
          if constexpr (outputs) sum[j] += C_t[e] * h[j][e];
        }
      }
      if constexpr (outputs) y[t] = sum[0] + __shfl_xor_sync(0xffffffffu, sum[1], 1);
    }
    __syncwarp();  // everybody has done with the tile

    if constexpr (outputs) {
      sum_over_owners<Split>(y);
      float results[kOwned];
#pragma unroll
      for (int i = 0; i < kOwned; ++i) results[i] = y[i] + D_skip * now.x[i].f32();
      if (gated)
#pragma unroll
        for (int i = 0; i < kOwned; ++i) results[i] *= silu(now.z[i].f32());
      if (Split::template owns<kTokens>()) with_tile(begin, [&](auto whole, int left) { y_at.template write<whole>(results, left); });
      y_at.move(kTokens);
    }
  }

  if constexpr (!outputs) {
    store_states<Split>(out.ends + place.segment_index(p) * p.channels * kN, channel, p.channels, h);
    dt_sum = sum_of_owners<Split, kTokens>(dt_sum);
    if (Split::part() < 2 && own_real) out.dt_sum[place.segment_index(p) * p.channels + own_channel] = dt_sum;
  } else if (place.end == p.tokens) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < kEntries; ++e)
        if (channel[j] < p.channels && n0 + e < p.N) out.h_T[(place.b * p.channels + channel[j]) * p.N + n0 + e] = h[j][e];
  }
}

struct ConnectArgs {
  float *ends, *grads;  // [B, segments, D, kN]; one of them null
  const float *dt_sum, *A_log;
  const float* outer;  // [B, D, N]: h0, or grad_h_T; null for zeros
  int64_t batch, segments, channels, N, kN;
};

/// What a segment does to a state (ends) or, from the last to the first, to the gradient of one (grads): after this, what reaches it.
__global__ void connect_segments_kernel(const ConnectArgs a) {
  constexpr int kAhead = 8;  // segments whose loads are in flight together
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, per_row = a.channels * a.kN;
  if (i >= a.batch * per_row) return;
  const int64_t b = i / per_row, d = i % per_row / a.kN, n = i % a.kN;
  const bool real = n < a.N, forwards = a.ends != nullptr;
  const float A2 = real ? -expf(a.A_log[d * a.N + n]) * kLog2e : 0.0f;
  float* const values = forwards ? a.ends : a.grads;
  const auto segment = [&](int64_t turn) { return forwards ? turn : a.segments - 1 - turn; };
  const auto at = [&](int64_t turn) { return ((b * a.segments + segment(turn)) * a.channels + d) * a.kN + n; };
  const auto decay = [&](int64_t turn) { return exp2_approx(A2 * a.dt_sum[(b * a.segments + segment(turn)) * a.channels + d]); };

  float reached = real && a.outer != nullptr ? a.outer[(b * a.channels + d) * a.N + n] : 0.0f;
  for (int64_t turn = 0; turn < a.segments; turn += kAhead) {
    float own[kAhead], kept[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {  // what the last one does reaches nobody, and need not be known
      own[k] = turn + k + 1 < a.segments ? values[at(turn + k)] : 0.0f;
      kept[k] = turn + k + 1 < a.segments ? decay(turn + k) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (turn + k < a.segments) values[at(turn + k)] = reached;
      reached = own[k] + kept[k] * reached;
    }
  }
}

template <class T, class Split, Walk walk>
void launch_walk(const ScanProblem<T>& p, const WalkOutputs<T>& w, int64_t segments, const CudaContext& cuda) {
  const int64_t groups = (p.channels + Split::kBlockChannels - 1) / Split::kBlockChannels;
  launch_scan(selective_scan_fwd_walk_kernel<T, Split, walk>, "selective_scan_fwd_walk_kernel", groups * segments * p.batch,
              kScanWarps * sizeof(WarpTile<Split, walk>), cuda, p, w, groups, segments);
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
      scan_rows<T>(out.y), out.h_T.data<float>(), address_of<float>(in.h0), p.N, address_of<float>(out.borders), nullptr, nullptr};
  ScanSegments segments;
  if (p.segments > 1) {
    const Device& device = in.x.device();
    segments.ends = Tensor::empty(device, Dtype::f32, Shape{B, p.segments, D, Split::kN});
    segments.dt_sum = Tensor::empty(device, Dtype::f32, Shape{B, p.segments, D});
    w.ends = segments.ends.data<float>();
    w.dt_sum = segments.dt_sum.data<float>();
    launch_walk<T, Split, Walk::ends>(p, w, p.segments - 1, cuda);
    connect_segments(segments, in.A_log, in.h0);
    w.starts = w.ends;
    w.starts_row = Split::kN;
  }
  launch_walk<T, Split, Walk::outputs>(p, w, p.segments, cuda);
}

}  // namespace

void connect_segments(const ScanSegments& segments, const Tensor& A_log, const Tensor& outer) {
  const Tensor& values = segments.ends.defined() ? segments.ends : segments.grads;
  const ConnectArgs a{address_of<float>(segments.ends),
                      address_of<float>(segments.grads),
                      segments.dt_sum.data<float>(),
                      A_log.data<float>(),
                      address_of<float>(outer),
                      values.dim(0),
                      values.dim(1),
                      values.dim(2),
                      A_log.dim(1),
                      values.dim(3)};
  launch_scan(connect_segments_kernel, "connect_segments_kernel", (a.batch * a.channels * a.kN + kScanThreads - 1) / kScanThreads, 0,
              values.device().cuda_context(), a);
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
      using Finer = ScanSplit<4, 4>;
      if (cut_forward<Finer>(in).time < cut_forward<Split>(in).time) return run(Finer{});
    }
    run(split);
  });
  return out;
}

}  // namespace longhand
