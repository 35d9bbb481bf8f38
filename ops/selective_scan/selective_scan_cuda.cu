// The selective scan on CUDA, forward.
//
// selective_scan_fwd_walk_kernel
// moves   x, dt, z in, y out: 8 bytes per token and channel in bf16, and B_t, C_t once per 32 channels (from L2)
// flops   N exponentials and 5 N others per token and channel; 3 more of the special-function unit for softplus and silu
// floor   B32 T2048 D1536 N16 bf16: 805 MB / 3.0 TB/s = 0.27 ms, and 1.9e9 special functions at 16 per clock and SM = 0.52 ms on an H100
//         SXM: bound by ex2
// split   N <= 16: four lanes share a channel with four states each in registers, a warp has 8 channels, a block 32; tiles of 32 tokens
//         are staged in shared memory as f32 (dt, dt x, B_t, C_t), y returns through it. Wider states take 16 or 32 lanes. Softplus and
//         gate belong to the staging, where each is computed once. Few rows and channels: the sequence is cut into segments, whose end
//         states (Walk::ends, a second set of exponentials) are connected first
// needs   N <= 256, any strides over B and T. Four elements are moved at a time where addresses, strides and widths are multiples of
//         four, else one
// agrees  with the CPU reference: kSelectiveScanToleranceF32 (ex2.approx in decays, in softplus and in silu, rcp.approx in silu); bf16 adds
//         one rounding of y
// order   y is summed over the four entries of a lane, then over lanes in a tree. No atomics; the number of segments depends on the GPU
//
// connect_segments_kernel
// moves   two f32 per segment and state; a thread per state walks over the segments
#include <algorithm>

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
  float *ends, *dt_sum;
};

enum class Walk { outputs, ends };

template <class Split>
struct WalkShared {
  static constexpr int kYStride = Split::kBlockChannels + 8;  // lanes that write four tokens at a time meet different banks
  alignas(16) float steps[kScanTile<Split>][Split::kBlockChannels][2];
  alignas(16) float B_t[kScanTile<Split>][Split::kN];
  alignas(16) float C_t[kScanTile<Split>][Split::kN];
  alignas(16) float y[kScanTile<Split>][kYStride];
};

template <class T, class Split, Walk walk>
__global__ void __launch_bounds__(kScanThreads, Split::kN <= 16 ? 6 : 4)
    selective_scan_fwd_walk_kernel(const ScanProblem<T> p, const WalkOutputs<T> out, int64_t groups, int64_t segments) {
  static_assert(Split::kChannels == 1);
  constexpr int kPacksPerRow = Split::kBlockChannels / 4, kPacks = kScanTile<Split> * kPacksPerRow,
                kPerThread = (kPacks + kScanThreads - 1) / kScanThreads;
  __shared__ WalkShared<Split> shared;
  const ScanPlace<Split, T> place(p, 0, groups, segments);
  const int c = Split::first_channel(), n0 = Split::first_entry();
  const int64_t channel = place.first_channel + c;

  float A2[Split::kHeld], h[Split::kHeld], dt_sum = 0;
  load_A2<Split>(p, channel, A2);
#pragma unroll
  for (int i = 0; i < Split::kHeld; ++i) {
    h[i] = 0;
    if (walk == Walk::outputs && out.starts != nullptr && channel < p.channels && n0 + i < p.N)
      h[i] = out.starts[(place.segment_index(p) * p.channels + channel) * out.starts_row + n0 + i];
  }

  for (int64_t begin = place.begin; begin < place.end; begin += kScanTile<Split>) {
    Pack<T, 4> x[kPerThread], z[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int i = k * kScanThreads + static_cast<int>(threadIdx.x), row = i / kPacksPerRow, column = i % kPacksPerRow * 4;
      const int64_t t = begin + row;
      const bool there = i < kPacks && t < place.end;
      x[k] = load_four(p.x, place.b, t, place.first_channel + column, p.channels, there);
      const Pack<T, 4> dt = load_four(p.dt, place.b, t, place.first_channel + column, p.channels, there);
      if (walk == Walk::outputs) z[k] = load_four(p.z, place.b, t, place.first_channel + column, p.channels, there);
      if (i < kPacks) stage_steps(p, x[k], dt, place.first_channel + column, there, shared.steps[row][column]);
    }
    stage_entries<Split>(p.B_t, p, place.b, begin, place.end, kScanTile<Split>, shared.B_t[0]);
    if (walk == Walk::outputs) stage_entries<Split>(p.C_t, p, place.b, begin, place.end, kScanTile<Split>, shared.C_t[0]);
    __syncthreads();

    const int count = static_cast<int>(min(static_cast<int64_t>(kScanTile<Split>), place.end - begin));
    for (int t = 0; t < count; t += kScanAtOnce) {  // tokens behind the end keep the state
      float y[kScanAtOnce];
#pragma unroll
      for (int k = 0; k < kScanAtOnce; ++k) {
        float step[2], B_t[Split::kEntries], C_t[Split::kEntries];
        read_floats(shared.steps[t + k][c], step);
        read_floats(&shared.B_t[t + k][n0], B_t);
        if (walk == Walk::outputs) read_floats(&shared.C_t[t + k][n0], C_t);
        y[k] = 0;
#pragma unroll
        for (int i = 0; i < Split::kHeld; ++i) {
          h[i] = exp2_approx(step[0] * A2[i]) * h[i] + step[1] * B_t[i];
          if (walk == Walk::outputs) y[k] += C_t[i] * h[i];
        }
        dt_sum += step[0];
      }
      if (walk == Walk::outputs) {
        const int first = sum_over_lanes<Split>(y);
        static_assert(Split::kLanes >= kScanAtOnce);  // a lane ends with one token
        if (Split::part() < kScanAtOnce) shared.y[t + first][c] = y[0];
      }
    }
    __syncthreads();

    if (walk == Walk::outputs) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        const int i = k * kScanThreads + static_cast<int>(threadIdx.x), row = i / kPacksPerRow, column = i % kPacksPerRow * 4;
        if (i >= kPacks || begin + row >= place.end) continue;
        float y[4];
        read_floats(&shared.y[row][column], y);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t d = place.first_channel + column + j;
          if (p.D_skip != nullptr && d < p.channels) y[j] += p.D_skip[d] * to_f32(x[k].at[j]);
          if (p.z.data != nullptr) y[j] *= silu(to_f32(z[k].at[j]));
        }
        store_four(out.y, place.b, begin + row, place.first_channel + column, p.channels, y);
      }
    }
  }

  if (walk == Walk::ends) {
    store_states<Split>(out.ends + place.segment_index(p) * p.channels * Split::kN, channel, p.channels, h);
    if (n0 == 0 && channel < p.channels) out.dt_sum[place.segment_index(p) * p.channels + channel] = dt_sum;
  } else if (place.end == p.tokens && channel < p.channels) {
#pragma unroll
    for (int i = 0; i < Split::kHeld; ++i)
      if (n0 + i < p.N) out.h_T[(place.b * p.channels + channel) * p.N + n0 + i] = h[i];
  }
}

struct ConnectArgs {
  float *ends, *grads;  // [B, segments, D, kN]; grads may be null
  const float *dt_sum, *A_log, *h0, *grad_h_T;
  float* grad_h0;
  int64_t batch, segments, channels, N, kN;
};

__global__ void connect_segments_kernel(const ConnectArgs a) {
  constexpr int kAhead = 8;  // segments whose loads are in flight together
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, per_row = a.channels * a.kN;
  if (i >= a.batch * per_row) return;
  const int64_t b = i / per_row, d = i % per_row / a.kN, n = i % a.kN;
  const bool real = n < a.N;
  const int64_t packed = (b * a.channels + d) * a.N + n;
  const float A2 = real ? -expf(a.A_log[d * a.N + n]) * kLog2e : 0.0f;
  const auto at = [&](int64_t s) { return ((b * a.segments + s) * a.channels + d) * a.kN + n; };
  const auto decay = [&](int64_t s) { return exp2_approx(A2 * a.dt_sum[(b * a.segments + s) * a.channels + d]); };

  // The decay and the end of the last segment are not needed on the way forward (and not known in a forward scan).
  float h = real && a.h0 != nullptr ? a.h0[packed] : 0.0f;
  for (int64_t s = 0; s < a.segments; s += kAhead) {
    float end[kAhead], kept[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      end[k] = s + k + 1 < a.segments ? a.ends[at(s + k)] : 0.0f;
      kept[k] = s + k + 1 < a.segments ? decay(s + k) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (s + k < a.segments) a.ends[at(s + k)] = h;
      h = end[k] + kept[k] * h;
    }
  }
  if (a.grads == nullptr) return;

  float grad = real && a.grad_h_T != nullptr ? a.grad_h_T[packed] : 0.0f;
  for (int64_t s = a.segments - 1; s >= 0; s -= kAhead) {
    float begin[kAhead], kept[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      begin[k] = s - k >= 0 ? a.grads[at(s - k)] : 0.0f;
      kept[k] = s - k >= 0 ? decay(s - k) : 1.0f;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (s - k >= 0) a.grads[at(s - k)] = grad;
      grad = begin[k] + kept[k] * grad;
    }
  }
  if (real && a.grad_h0 != nullptr) a.grad_h0[packed] = grad;
}

template <class T, class Split>
void forward(const SelectiveScanInputs& in, const SelectiveScanResult& out) {
  const CudaContext& cuda = in.x.device().cuda_context();
  const int64_t B = in.x.dim(0), D = in.x.dim(2), groups = (D + Split::kBlockChannels - 1) / Split::kBlockChannels;
  // A second set of exponentials pays only where the rows and channels leave multiprocessors without work.
  const int64_t wanted = groups * B >= cuda.sm_count ? 1 : cuda.sm_count * kBlocksPerSm;
  const ScanCut cut = cut_scan(in.x.dim(1), groups * B, wanted, kShortSegment);
  const ScanProblem<T> p = scan_problem<T>(in, cut.segments, cut.segment_tokens);

  WalkOutputs<T> w{scan_rows<T>(out.y), out.h_T.data<float>(), address_of<float>(in.h0), p.N, nullptr, nullptr};
  ScanSegments segments;
  if (p.segments > 1) {
    const Device& device = in.x.device();
    segments.ends = Tensor::empty(device, Dtype::f32, Shape{B, p.segments, D, Split::kN});
    segments.dt_sum = Tensor::empty(device, Dtype::f32, Shape{B, p.segments, D});
    w.ends = segments.ends.data<float>();
    w.dt_sum = segments.dt_sum.data<float>();
    launch_scan(selective_scan_fwd_walk_kernel<T, Split, Walk::ends>, "selective_scan_fwd_walk_kernel (ends)",
                groups * (p.segments - 1) * B, 0, cuda.stream, p, w, groups, p.segments - 1);
    connect_segments(segments, in.A_log, in.h0, {}, {});
    w.starts = w.ends;
    w.starts_row = Split::kN;
  }
  launch_scan(selective_scan_fwd_walk_kernel<T, Split, Walk::outputs>, "selective_scan_fwd_walk_kernel", groups * p.segments * B, 0,
              cuda.stream, p, w, groups, p.segments);
}

}  // namespace

void connect_segments(const ScanSegments& segments, const Tensor& A_log, const Tensor& h0, const Tensor& grad_h_T, const Tensor& grad_h0) {
  const Tensor& ends = segments.ends;
  const ConnectArgs a{ends.data<float>(),
                      address_of<float>(segments.grads),
                      address_of<float>(segments.dt_sum),
                      A_log.data<float>(),
                      address_of<float>(h0),
                      address_of<float>(grad_h_T),
                      address_of<float>(grad_h0),
                      ends.dim(0),
                      ends.dim(1),
                      ends.dim(2),
                      A_log.dim(1),
                      ends.dim(3)};
  launch_scan(connect_segments_kernel, "connect_segments_kernel", (a.batch * a.channels * a.kN + kScanThreads - 1) / kScanThreads, 0,
              ends.device().cuda_context().stream, a);
}

SelectiveScanResult selective_scan_fwd_cuda(const SelectiveScanInputs& in) {
  const SelectiveScanResult out{Tensor::empty(in.x.device(), in.x.dtype(), in.x.shape()),
                                Tensor::empty(in.x.device(), Dtype::f32, {in.x.dim(0), in.x.dim(2), in.A_log.dim(1)})};
  split_for(in.A_log.dim(1), [&](auto split, auto) {
    using Split = decltype(split);
    in.x.dtype() == Dtype::bf16 ? forward<__nv_bfloat16, Split>(in, out) : forward<float, Split>(in, out);
  });
  return out;
}

}  // namespace longhand
