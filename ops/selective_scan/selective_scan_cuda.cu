// The selective scan on CUDA, forward.
//
// selective_scan_fwd_walk_kernel
// moves   x, dt, z in, y out: 8 bytes per token and channel in bf16, and B_t, C_t once per 32 channels (from L2)
// flops   N exponentials and 5 N others per token and channel; 3 more of the special-function unit for softplus and silu
// floor   B32 T2048 D1536 N16 bf16: 805 MB / 3.0 TB/s = 0.27 ms, and 1.9e9 special functions at 16 per clock and SM = 0.52 ms on an H100
//         SXM: bound by ex2
// split   N <= 16: four lanes share channels with four states each in registers, a warp has 8 or 16 channels, a block four warps that know
//         nothing of each other. A warp's tiles of 16 tokens arrive in shared memory one ahead of the work; softplus and gate are computed
//         once per token and channel, between the tiles, and y takes the place of the steps. Wider states take 16 or 32 lanes. Few rows
//         and channels: the sequence is cut into segments, whose end states (Walk::ends, a second set of exponentials) are connected first
// needs   N <= 256, any strides over B and T. Up to 16 bytes are moved at a time where addresses, strides and widths allow it, else one
//         element
// agrees  with the CPU reference: kSelectiveScanToleranceF32 (ex2.approx in decays, in softplus and in silu, rcp.approx in silu); bf16 adds
//         one rounding of y
// order   y is summed over the four entries of a lane, then over lanes in a tree. No atomics; the number of segments depends on the GPU
//
// With keep_borders the state in front of every 64 tokens goes out as well, N / 16 bytes per token and channel.
//
// connect_segments_kernel
// moves   two f32 per segment and state; a thread per state walks over the segments
#include <algorithm>

#include "ops/common/matrix_instructions.cuh"
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

/// What a warp has in shared memory. B_t and C_t come in as they are while the tile before is worked on, and are then widened.
template <class T, class Split, Walk walk>
struct WarpTiles {
  static constexpr int kTokens = Split::kN <= 64 ? 8 : 4;
  static constexpr int kEntryInputs = walk == Walk::outputs ? 2 : 1;
  alignas(16) T raw[kEntryInputs][kTokens][Split::kN];  // B_t, C_t
  alignas(16) float entries[kEntryInputs][kTokens][Split::kN];
  alignas(16) float2 steps[kTokens][Split::kWarpChannels];  // dt after bias and softplus, dt x
};

/// `count` rows of `width` elements from `first` on into a tile, by a warp; zeros at and behind `valid` rows and behind `last` elements.
template <int count, int width, class T>
__device__ void fetch_tile(T* tile, const ScanRows<const T>& rows, int64_t b, int64_t t, int64_t first, int64_t last, int valid) {
  constexpr int row_bytes = width * static_cast<int>(sizeof(T)), bytes = row_bytes < 16 ? row_bytes : 16;
  constexpr int unit = bytes / static_cast<int>(sizeof(T)), units = width / unit;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const T* from = rows.data + b * rows.batch + t * rows.token + first;
  if (rows.widest * static_cast<int>(sizeof(T)) >= bytes) {
#pragma unroll
    for (int i = lane; i < count * units; i += kWarp) {
      const int row = i / units, column = i % units * unit;
      copy_or_zero_async<bytes>(tile + row * width + column, from + row * rows.token + column, row < valid && first + column < last);
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < count * width; i += kWarp) {
    const int row = i / width, column = i % width;
    tile[i] = row < valid && first + column < last ? from[row * rows.token + column] : static_cast<T>(0.0f);
  }
}

/// The activations that a lane owns in a tile.
template <class T, int n>
struct Owned {
  T x[n], dt[n], z[n];
};

template <class T, class Split, Walk walk>
__global__ void __launch_bounds__(kScanThreads, Split::kN <= 16 ? 3 : 2)
    selective_scan_fwd_walk_kernel(const ScanProblem<T> p, const WalkOutputs<T> out, int64_t groups, int64_t segments) {
  using Tiles = WarpTiles<T, Split, walk>;
  constexpr int kTokens = Tiles::kTokens, kN = Split::kN, kEntries = Split::kEntries, kOwned = Split::template owned<kTokens>();
  constexpr bool outputs = walk == Walk::outputs;
  extern __shared__ __align__(16) char shared_bytes[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = Split::lane();
  Tiles& tiles = reinterpret_cast<Tiles*>(shared_bytes)[warp];
  const ScanPlace<Split, T> place(p, 0, groups, segments);
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
  const float bias = own_real ? p.dt_bias[own_channel] : -INFINITY;
  const float D_skip = outputs && own_real && p.D_skip != nullptr ? p.D_skip[own_channel] : 0.0f;
  const bool gated = outputs && p.z.data != nullptr;

  const auto fetch_entries = [&](int64_t begin) {
    const int valid = static_cast<int>(min(static_cast<int64_t>(kTokens), place.end - begin));
    fetch_tile<kTokens, kN>(tiles.raw[0][0], p.B_t, place.b, begin, 0, p.N, valid);
    if constexpr (outputs) fetch_tile<kTokens, kN>(tiles.raw[1][0], p.C_t, place.b, begin, 0, p.N, valid);
    close_copies();
  };
  // Where the lane's own activations are, of the tile that is fetched next and of the tile that is written. A lane without a channel reads
  // its neighbours' and takes no steps: its bias is minus infinity.
  const int64_t first_token = place.begin + token0, readable_channel = min(own_channel, p.channels - 1);
  const T *x_at = p.x.at(place.b, first_token) + readable_channel, *dt_at = p.dt.at(place.b, first_token) + readable_channel;
  const T* z_at = gated ? p.z.at(place.b, first_token) + readable_channel : nullptr;
  T* y_at = outputs ? out.y.at(place.b, first_token) + own_channel : nullptr;
  const auto fetch_owned = [&](int64_t begin, Owned<T, kOwned>& to) {
    if (begin + kTokens <= place.end) {
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        to.x[i] = x_at[i * p.x.token];
        to.dt[i] = dt_at[i * p.dt.token];
        if (gated) to.z[i] = z_at[i * p.z.token];
      }
    } else {  // a step of zero keeps the state: behind the last token
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        const bool there = begin + token0 + i < place.end;
        to.x[i] = there ? x_at[i * p.x.token] : static_cast<T>(0.0f);
        to.dt[i] = there ? dt_at[i * p.dt.token] : static_cast<T>(-INFINITY);
        if (gated) to.z[i] = there ? z_at[i * p.z.token] : static_cast<T>(0.0f);
      }
    }
    x_at += kTokens * p.x.token;
    dt_at += kTokens * p.dt.token;
    z_at += kTokens * p.z.token;
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
      const float dt = softplus_approx(to_f32(now.dt[i]) + bias);
      if (Split::template owns<kTokens>()) tiles.steps[token0 + i][own] = make_float2(dt, dt * to_f32(now.x[i]));
      if constexpr (!outputs) dt_sum += dt;
    }
    fetch_owned(begin + kTokens, next);
    copies_arrived_but<0>();
    __syncwarp();
#pragma unroll
    for (int i = lane; i < Tiles::kEntryInputs * kTokens * kN / 4; i += kWarp) {
      const Pack<T, 4> in = load_pack<4>(tiles.raw[0][0] + 4 * i);
      store_pack(tiles.entries[0][0] + 4 * i, Pack<float, 4>{{to_f32(in.at[0]), to_f32(in.at[1]), to_f32(in.at[2]), to_f32(in.at[3])}});
    }
    __syncwarp();
    if (begin + kTokens < place.end) fetch_entries(begin + kTokens);

    float y[kTokens];  // of the own channel, over the entries of this lane and its neighbour
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float B_t[kEntries], C_t[kEntries], sum[2];
      read_floats(&tiles.entries[0][t][n0], B_t);
      if constexpr (outputs) read_floats(&tiles.entries[1][t][n0], C_t);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 step = tiles.steps[t][own ^ j];
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
#pragma unroll
      for (int i = 0; i < kOwned; ++i) y[i] += D_skip * to_f32(now.x[i]);
      if (gated)
#pragma unroll
        for (int i = 0; i < kOwned; ++i) y[i] *= silu(to_f32(now.z[i]));
      if (own_real) {
        if (begin + kTokens <= place.end) {
#pragma unroll
          for (int i = 0; i < kOwned; ++i) y_at[i * out.y.token] = static_cast<T>(y[i]);
        } else {
#pragma unroll
          for (int i = 0; i < kOwned; ++i)
            if (begin + token0 + i < place.end) y_at[i * out.y.token] = static_cast<T>(y[i]);
        }
      }
      y_at += kTokens * out.y.token;
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
              kScanWarps * sizeof(WarpTiles<T, Split, walk>), cuda, p, w, groups, segments);
}

template <class T, class Split>
void forward(const SelectiveScanInputs& in, const SelectiveScanResult& out) {
  const CudaContext& cuda = in.x.device().cuda_context();
  const int64_t B = in.x.dim(0), D = in.x.dim(2), groups = (D + Split::kBlockChannels - 1) / Split::kBlockChannels;
  const ScanCut cut = cut_scan(in.x.dim(1), groups * B, Split::kN <= 16 ? 3 : 2, 1.9, cuda.sm_count);
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
  split_for(N, [&](auto split) {
    using Split = decltype(split);
    if (keep_borders) out.borders = Tensor::empty(in.x.device(), Dtype::f32, {B, (T + kScanChunk - 1) / kScanChunk, D, int64_t{Split::kN}});
    in.x.dtype() == Dtype::bf16 ? forward<__nv_bfloat16, Split>(in, out) : forward<float, Split>(in, out);
  });
  return out;
}

}  // namespace longhand
