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

constexpr int64_t kShortSegment = 256;  // tokens; shorter segments do not pay for their ends
constexpr int64_t kBlocksPerSm = 12;    // two rounds of the six that fit

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

/// What a warp has in shared memory. Tiles of the inputs come in as they are, one ahead of the work; then B_t and C_t are widened and the
/// steps formed.
template <class T, class Split, Walk walk>
struct WarpTiles {
  static constexpr int kTokens = Split::kN <= 64 ? 16 : 4, kC = Split::kWarpChannels, kN = Split::kN;
  static constexpr int kInputs = walk == Walk::outputs ? 3 : 2, kEntryInputs = walk == Walk::outputs ? 2 : 1;
  struct Raw {
    alignas(16) T channels[kInputs][kTokens][kC];      // x, dt, z
    alignas(16) T entries[kEntryInputs][kTokens][kN];  // B_t, C_t
  };
  Raw raw[2];
  alignas(16) float entries[kEntryInputs][kTokens][kN];
  alignas(16) float dt[kTokens][kC];  // after bias and softplus; later y
  alignas(16) float dt_x[kTokens][kC];
};

/// `count` rows of `width` elements from `first` on into a tile, by a warp; zeros at and behind `valid` rows and behind `last` elements.
template <int count, int width, class T>
__device__ void fetch_tile(T* tile, const ScanRows<const T>& rows, int64_t b, int64_t t, int64_t first, int64_t last, int valid) {
  constexpr int row_bytes = width * static_cast<int>(sizeof(T)), bytes = row_bytes < 16 ? row_bytes : 16;
  constexpr int unit = bytes / static_cast<int>(sizeof(T)), units = width / unit;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const T* from = rows.data + b * rows.batch + t * rows.token + first;
  if constexpr (bytes >= 4) {
    if (rows.widest * static_cast<int>(sizeof(T)) >= bytes) {
#pragma unroll
      for (int i = lane; i < count * units; i += kWarp) {
        const int row = i / units, column = i % units * unit;
        copy_or_zero_async<bytes>(tile + row * width + column, from + row * rows.token + column, row < valid && first + column < last);
      }
      return;
    }
  }
  for (int i = lane; i < count * width; i += kWarp) {
    const int row = i / width, column = i % width;
    tile[i] = rows.data != nullptr && row < valid && first + column < last ? from[row * rows.token + column] : static_cast<T>(0.0f);
  }
}

template <class T, class Split, Walk walk>
__global__ void __launch_bounds__(kScanThreads, Split::kN <= 16 ? 4 : 2)
    selective_scan_fwd_walk_kernel(const ScanProblem<T> p, const WalkOutputs<T> out, int64_t groups, int64_t segments) {
  using Tiles = WarpTiles<T, Split, walk>;
  constexpr int kC = Tiles::kC, kTokens = Tiles::kTokens, kN = Split::kN, kEntries = Split::kEntries, kChannels = Split::kChannels;
  constexpr int kPack = kC < 4 ? kC : 4, kPacksPerRow = kC / kPack, kPacks = kTokens * kPacksPerRow;
  constexpr bool outputs = walk == Walk::outputs;
  extern __shared__ __align__(16) char shared_bytes[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  Tiles& tiles = reinterpret_cast<Tiles*>(shared_bytes)[warp];
  const ScanPlace<Split, T> place(p, 0, groups, segments);
  const int64_t warp_channel = place.first_channel + warp * kC;
  const int c = static_cast<int>(Split::first_channel()) - warp * kC, n0 = Split::first_entry();  // c: in the warp
  const int64_t channel = warp_channel + c;

  float A2[Split::kHeld], h[Split::kHeld], dt_sum[kChannels] = {};
  load_A2<Split>(p, channel, A2);
#pragma unroll
  for (int i = 0; i < Split::kHeld; ++i) {
    const int64_t d = channel + i / kEntries, n = n0 + i % kEntries;
    h[i] = 0;
    if (outputs && out.starts != nullptr && d < p.channels && n < p.N)
      h[i] = out.starts[(place.segment_index(p) * p.channels + d) * out.starts_row + n];
  }
  // For steps and results a lane has some neighbouring channels, always the same.
  const int column = lane % kPacksPerRow * kPack;
  float bias[kPack], D_skip[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const int64_t d = warp_channel + column + i;
    bias[i] = d < p.channels ? p.dt_bias[d] : 0.0f;
    D_skip[i] = outputs && p.D_skip != nullptr && d < p.channels ? p.D_skip[d] : 0.0f;
  }

  const auto fetch = [&](int64_t begin, int turn) {
    typename Tiles::Raw& raw = tiles.raw[turn % 2];
    const int valid = static_cast<int>(place.end - begin < kTokens ? place.end - begin : kTokens);
    fetch_tile<kTokens, kC>(raw.channels[0][0], p.x, place.b, begin, warp_channel, p.channels, valid);
    fetch_tile<kTokens, kC>(raw.channels[1][0], p.dt, place.b, begin, warp_channel, p.channels, valid);
    if constexpr (outputs)
      if (p.z.data != nullptr) fetch_tile<kTokens, kC>(raw.channels[2][0], p.z, place.b, begin, warp_channel, p.channels, valid);
    fetch_tile<kTokens, kN>(raw.entries[0][0], p.B_t, place.b, begin, 0, p.N, valid);
    if constexpr (outputs) fetch_tile<kTokens, kN>(raw.entries[1][0], p.C_t, place.b, begin, 0, p.N, valid);
  };

  int turn = 0;
  fetch(place.begin, 0);
  close_copies();
  for (int64_t begin = place.begin; begin < place.end; begin += kTokens, ++turn) {
    if (begin + kTokens < place.end) fetch(begin + kTokens, turn + 1);
    close_copies();
    if (outputs && out.borders != nullptr && begin % kScanChunk == 0)
      store_states<Split>(out.borders + (place.b * p.chunks + begin / kScanChunk) * p.channels * kN, channel, p.channels, h);
    copies_arrived_but<1>();
    __syncwarp();
    const typename Tiles::Raw& raw = tiles.raw[turn % 2];
    const int count = static_cast<int>(place.end - begin < kTokens ? place.end - begin : kTokens);

#pragma unroll
    for (int i = lane; i < Tiles::kEntryInputs * kTokens * kN / 4; i += kWarp) {
      const Pack<T, 4> in = load_pack<4>(raw.entries[0][0] + 4 * i);
      store_pack(tiles.entries[0][0] + 4 * i, Pack<float, 4>{{to_f32(in.at[0]), to_f32(in.at[1]), to_f32(in.at[2]), to_f32(in.at[3])}});
    }
#pragma unroll
    for (int i = lane; i < kPacks; i += kWarp) {
      const int row = i / kPacksPerRow;
      const Pack<T, kPack> x = load_pack<kPack>(&raw.channels[0][row][column]), dt = load_pack<kPack>(&raw.channels[1][row][column]);
      Pack<float, kPack> step, step_x;
#pragma unroll
      for (int k = 0; k < kPack; ++k) {  // a step of zero keeps the state: behind the last token and channel
        const bool real = row < count && warp_channel + column + k < p.channels;
        step.at[k] = real ? softplus(to_f32(dt.at[k]) + bias[k]) : 0.0f;
        step_x.at[k] = step.at[k] * to_f32(x.at[k]);
      }
      store_pack(&tiles.dt[row][column], step);
      store_pack(&tiles.dt_x[row][column], step_x);
    }
    __syncwarp();

#pragma unroll 1
    for (int t = 0; t < count; t += kScanAtOnce) {  // tokens behind the end keep the state
      float y[kChannels][kScanAtOnce];
#pragma unroll
      for (int k = 0; k < kScanAtOnce; ++k) {
        float B_t[kEntries], C_t[kEntries];
        read_floats(&tiles.entries[0][t + k][n0], B_t);
        if constexpr (outputs) read_floats(&tiles.entries[1][t + k][n0], C_t);
        const Pack<float, kChannels> dt = load_pack<kChannels>(&tiles.dt[t + k][c]), dt_x = load_pack<kChannels>(&tiles.dt_x[t + k][c]);
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          float sum = 0;
#pragma unroll
          for (int e = 0; e < kEntries; ++e) {
            const int i = j * kEntries + e;
            h[i] = exp2_approx(dt.at[j] * A2[i]) * h[i] + dt_x.at[j] * B_t[e];
            if constexpr (outputs) sum += C_t[e] * h[i];
          }
          y[j][k] = sum;
          if constexpr (!outputs) dt_sum[j] += dt.at[j];
        }
      }
      if constexpr (outputs) {                        // in the place of dt, which every lane has read
        static_assert(Split::kLanes >= kScanAtOnce);  // a lane ends with one token
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          const int first = sum_over_lanes<Split>(y[j]);
          if (Split::part() < kScanAtOnce) tiles.dt[t + first][c + j] = y[j][0];
        }
      }
    }
    __syncwarp();

    if constexpr (outputs) {
#pragma unroll
      for (int i = lane; i < kPacks; i += kWarp) {
        const int row = i / kPacksPerRow;
        if (row >= count) continue;
        const Pack<T, kPack> x = load_pack<kPack>(&raw.channels[0][row][column]);
        const Pack<float, kPack> r = load_pack<kPack>(&tiles.dt[row][column]);
        float y[kPack];
#pragma unroll
        for (int k = 0; k < kPack; ++k) y[k] = r.at[k] + D_skip[k] * to_f32(x.at[k]);
        if (p.z.data != nullptr) {
          const Pack<T, kPack> z = load_pack<kPack>(&raw.channels[2][row][column]);
#pragma unroll
          for (int k = 0; k < kPack; ++k) y[k] *= silu(to_f32(z.at[k]));
        }
        T* to = out.y.at(place.b, begin + row) + warp_channel + column;
        const Pack<T, kPack> rounded = round_to<T>(y);
        if (out.y.widest >= kPack) {
          if (warp_channel + column < p.channels) store_pack(to, rounded);
        } else {
#pragma unroll
          for (int k = 0; k < kPack; ++k)
            if (warp_channel + column + k < p.channels) to[k] = rounded.at[k];
        }
      }
      __syncwarp();
    }
  }

  if constexpr (!outputs) {
    store_states<Split>(out.ends + place.segment_index(p) * p.channels * kN, channel, p.channels, h);
    if (n0 == 0)
#pragma unroll
      for (int j = 0; j < kChannels; ++j)
        if (channel + j < p.channels) out.dt_sum[place.segment_index(p) * p.channels + channel + j] = dt_sum[j];
  } else if (place.end == p.tokens) {
#pragma unroll
    for (int i = 0; i < Split::kHeld; ++i) {
      const int64_t d = channel + i / kEntries, n = n0 + i % kEntries;
      if (d < p.channels && n < p.N) out.h_T[(place.b * p.channels + d) * p.N + n] = h[i];
    }
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
  // A second set of exponentials pays only where the rows and channels leave multiprocessors without work.
  const int64_t wanted = groups * B >= cuda.sm_count ? 1 : cuda.sm_count * kBlocksPerSm;
  const ScanCut cut = cut_scan(in.x.dim(1), groups * B, wanted, kShortSegment);
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
  split_for(in.A_log.dim(1), [&](auto one, auto two) {  // channels of a thread
    using One = decltype(one);
    using Two = decltype(two);
    const bool bf16 = in.x.dtype() == Dtype::bf16;
    if (keep_borders) {
      const Shape shape{B, (T + kScanChunk - 1) / kScanChunk, D, int64_t{One::kN}};
      out.borders = Tensor::empty(in.x.device(), Dtype::f32, shape);
    }
    // Two channels share what is read of B_t and C_t; one where two would leave the schedulers fewer than four warps each.
    const int64_t warps = B * D / Two::kWarpChannels;
    if (warps < kScanWarps * 4 * in.x.device().cuda_context().sm_count)
      bf16 ? forward<__nv_bfloat16, One>(in, out) : forward<float, One>(in, out);
    else bf16 ? forward<__nv_bfloat16, Two>(in, out) : forward<float, Two>(in, out);
  });
  return out;
}

}  // namespace longhand
