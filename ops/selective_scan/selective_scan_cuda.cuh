// What the two CUDA files of the selective scan share: how channels and state entries are dealt to threads, how activations reach a
// block, and the walk that gives the states of segments of the sequence.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "core/cuda_context.h"
#include "ops/common/cuda_math.cuh"
#include "ops/common/launch.cuh"
#include "ops/common/strided_rows.h"
#include "ops/selective_scan/selective_scan_kernels.h"

namespace longhand {

constexpr int kScanWarps = 4, kScanThreads = kScanWarps * kWarp;
constexpr int kScanChunk = 64;  // tokens between two states that backward keeps in memory
constexpr int kScanAtOnce = 4;  // tokens whose sums over lanes are formed together
constexpr float kLn2 = 0.693147181f;

/// `lanes` neighbours-in-state share a channel, each with `entries` entries of its state, and each does so for `channels` neighbouring
/// channels. Lane = (which entries) * kAcross + (which channels): 8-lane phases of shared memory read one address of B_t and C_t.
template <int lanes, int entries, int channels>
struct ScanSplit {
  static constexpr int kLanes = lanes, kEntries = entries, kChannels = channels;
  static constexpr int kHeld = entries * channels;  // states in the registers of a thread
  static constexpr int kN = lanes * entries;        // N rounded up; entries behind N have A = B = C = 0
  static constexpr int kAcross = kWarp / lanes;
  static constexpr int kWarpChannels = kAcross * channels, kBlockChannels = kScanWarps * kWarpChannels;
  static_assert(entries % 4 == 0 && kWarp % lanes == 0);

  static __device__ int part() { return static_cast<int>(threadIdx.x) % kWarp / kAcross; }  // which entries
  static __device__ int first_entry() { return part() * entries; }
  static __device__ int first_channel() {  // in the block
    return static_cast<int>(threadIdx.x) / kWarp * kWarpChannels + static_cast<int>(threadIdx.x) % kAcross * channels;
  }
};

/// Tokens that a walk stages together; divides kScanChunk.
template <class Split>
constexpr int kScanTile = Split::kN <= 16 ? 32 : (Split::kN <= 64 ? 16 : 8);

/// Calls f with the splits (forward, backward) for states of N entries.
template <class F>
void split_for(int64_t N, F&& f) {
  if (N <= 16) return f(ScanSplit<4, 4, 1>{}, ScanSplit<4, 4, 2>{});
  if (N <= 64) return f(ScanSplit<16, 4, 1>{}, ScanSplit<16, 4, 2>{});
  static_assert(kSelectiveScanMaxStateDim <= 256);
  f(ScanSplit<32, 8, 1>{}, ScanSplit<32, 8, 1>{});
}

/// A tensor [B, T, width] for kernels; null data stands for an absent tensor.
template <class T>
struct ScanRows {
  T* data = nullptr;
  int64_t batch = 0, token = 0;
  bool packs = false;  // may be moved by 4 elements
  int widest = 1;      // elements that may be moved at once, of at most 16 bytes
  __device__ T* at(int64_t b, int64_t t) const { return data + b * batch + t * token; }
};
template <class T>
ScanRows<T> scan_rows(const Tensor& t) {
  if (!t.defined()) return {};
  ScanRows<T> rows{static_cast<T*>(t.raw()), t.stride(0), t.stride(1)};
  const auto fits = [&](int elements) {
    return reinterpret_cast<std::uintptr_t>(rows.data) % (static_cast<std::size_t>(elements) * sizeof(T)) == 0 &&
           rows.batch % elements == 0 && rows.token % elements == 0 && t.dim(2) % elements == 0;
  };
  for (int elements = 2; elements * static_cast<int>(sizeof(T)) <= 16 && fits(elements); elements *= 2) rows.widest = elements;
  rows.packs = rows.widest >= 4;
  return rows;
}

/// Elements [c, c + 4) of row (b, t); zeros at and behind `width`, where `there` is false, and of an absent tensor.
template <class T>
__device__ Pack<T, 4> load_four(const ScanRows<const T>& rows, int64_t b, int64_t t, int64_t c, int64_t width, bool there) {
  Pack<T, 4> pack;
  if (there && rows.data != nullptr && rows.packs && c < width) return load_pack<4>(rows.at(b, t) + c);
#pragma unroll
  for (int i = 0; i < 4; ++i) pack.at[i] = there && rows.data != nullptr && c + i < width ? rows.at(b, t)[c + i] : static_cast<T>(0.0f);
  return pack;
}

/// Writes what lies in front of `width`.
template <class T>
__device__ void store_four(const ScanRows<T>& rows, int64_t b, int64_t t, int64_t c, int64_t width, const float (&values)[4]) {
  const Pack<T, 4> pack = round_to<T>(values);
  T* to = rows.at(b, t) + c;
  if (rows.packs) {
    if (c < width) store_pack(to, pack);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (c + i < width) to[i] = pack.at[i];
}

/// Sizes, inputs, and how the sequence is cut: segment s holds the tokens from s * segment_tokens (a multiple of kScanChunk).
template <class T>
struct ScanProblem {
  ScanRows<const T> x, dt, z, B_t, C_t;
  const float *A_log, *D_skip, *dt_bias;  // D_skip may be null
  int64_t batch, tokens, channels;
  int64_t N;
  int64_t segments, segment_tokens;
  int64_t chunks;  // of kScanChunk tokens in a sequence
};

template <class T>
ScanProblem<T> scan_problem(const SelectiveScanInputs& in, int64_t segments, int64_t segment_tokens) {
  return {scan_rows<const T>(in.x),
          scan_rows<const T>(in.dt),
          scan_rows<const T>(in.z),
          scan_rows<const T>(in.B_t),
          scan_rows<const T>(in.C_t),
          address_of<float>(in.A_log),
          address_of<float>(in.D_skip),
          address_of<float>(in.dt_bias),
          in.x.dim(0),
          in.x.dim(1),
          in.x.dim(2),
          in.A_log.dim(1),
          segments,
          segment_tokens,
          (in.x.dim(1) + kScanChunk - 1) / kScanChunk};
}

/// Cuts the sequences into segments of whole chunks so that `blocks_per_segment` blocks for one segment of all rows become about `wanted`.
struct ScanCut {
  int64_t segments, segment_tokens;
};
inline ScanCut cut_scan(int64_t tokens, int64_t blocks_per_segment, int64_t wanted, int64_t shortest) {
  const int64_t most = std::max<int64_t>(1, tokens / shortest), segments = std::min(most, (wanted - 1) / blocks_per_segment + 1);
  const int64_t each = (tokens + segments - 1) / segments, segment_tokens = (each + kScanChunk - 1) / kScanChunk * kScanChunk;
  return {(tokens + segment_tokens - 1) / segment_tokens, segment_tokens};
}

/// Which block this is: first channel, segment and row of the batch.
template <class Split, class T>
struct ScanPlace {
  int64_t group, segment, b, first_channel, begin, end;  // tokens [begin, end)
  __device__ explicit ScanPlace(const ScanProblem<T>& p, int64_t first_group, int64_t groups, int64_t segments) {
    const int64_t block = blockIdx.x;
    group = block % groups;
    segment = block / groups % segments;
    b = block / groups / segments;
    first_channel = (first_group + group) * Split::kBlockChannels;
    begin = segment * p.segment_tokens;
    end = min(p.tokens, begin + p.segment_tokens);
  }
  __device__ int64_t segment_index(const ScanProblem<T>& p) const { return b * p.segments + segment; }
};

/// A * log2(e) of a thread's states, for decays exp2(dt * A2); 0 where there is no channel or entry.
template <class Split, class T>
__device__ void load_A2(const ScanProblem<T>& p, int64_t channel, float (&A2)[Split::kHeld]) {
#pragma unroll
  for (int i = 0; i < Split::kHeld; ++i) {
    const int64_t d = channel + i / Split::kEntries, n = Split::first_entry() + i % Split::kEntries;
    A2[i] = d < p.channels && n < p.N ? -expf(p.A_log[d * p.N + n]) * kLog2e : 0.0f;
  }
}

/// A thread's states from [.., channels, kN], where `states` points at the block's row of it; zeros behind the last channel.
template <class Split>
__device__ void load_states(const float* states, int64_t channel, int64_t channels, float (&h)[Split::kHeld]) {
#pragma unroll
  for (int i = 0; i < Split::kHeld; i += 4) {
    const int64_t d = channel + i / Split::kEntries, n = Split::first_entry() + i % Split::kEntries;
    Pack<float, 4> pack{};
    if (d < channels) pack = load_pack<4>(states + d * Split::kN + n);
#pragma unroll
    for (int k = 0; k < 4; ++k) h[i + k] = pack.at[k];
  }
}
template <class Split>
__device__ void store_states(float* states, int64_t channel, int64_t channels, const float (&h)[Split::kHeld]) {
#pragma unroll
  for (int i = 0; i < Split::kHeld; i += 4) {
    const int64_t d = channel + i / Split::kEntries, n = Split::first_entry() + i % Split::kEntries;
    if (d < channels) store_pack(states + d * Split::kN + n, Pack<float, 4>{{h[i], h[i + 1], h[i + 2], h[i + 3]}});
  }
}

/// Neighbouring floats of shared memory, 16 bytes at a time.
template <int n>
__device__ void read_floats(const float* from, float (&to)[n]) {
  static_assert(n % 4 == 0 || n == 2);
  constexpr int step = n % 4 == 0 ? 4 : 2;
#pragma unroll
  for (int i = 0; i < n; i += step) {
    const Pack<float, step> pack = load_pack<step>(from + i);
#pragma unroll
    for (int k = 0; k < step; ++k) to[i + k] = pack.at[k];
  }
}

/// B_t or C_t of tokens [t, t + count) into shared memory [count, kN] as f32; zeros at and behind `end` and behind N.
template <class Split, class T>
__device__ void stage_entries(const ScanRows<const T>& rows, const ScanProblem<T>& p, int64_t b, int64_t t, int64_t end, int count,
                              float* to) {
  constexpr int packs_per_row = Split::kN / 4;
  for (int i = static_cast<int>(threadIdx.x); i < count * packs_per_row; i += kScanThreads) {
    const int64_t at = t + i / packs_per_row, n = i % packs_per_row * 4;
    const Pack<T, 4> in = load_four(rows, b, at, n, p.N, at < end);
    store_pack(to + 4 * i, Pack<float, 4>{{to_f32(in.at[0]), to_f32(in.at[1]), to_f32(in.at[2]), to_f32(in.at[3])}});
  }
}

/// dt after bias and softplus, and dt * x, of four channels of one token as neighbouring pairs; zeros (which keep the state) where the
/// token or channel is not there.
template <class T>
__device__ void stage_steps(const ScanProblem<T>& p, const Pack<T, 4>& x, const Pack<T, 4>& dt, int64_t channel, bool there, float* to) {
  float pairs[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool real = there && channel + i < p.channels;
    const float step = real ? softplus(to_f32(dt.at[i]) + p.dt_bias[channel + i]) : 0.0f;
    pairs[2 * i] = step;
    pairs[2 * i + 1] = step * to_f32(x.at[i]);
  }
  store_pack(to, Pack<float, 4>{{pairs[0], pairs[1], pairs[2], pairs[3]}});
  store_pack(to + 4, Pack<float, 4>{{pairs[4], pairs[5], pairs[6], pairs[7]}});
}

/// Adds `values` numbers over the lanes that share channels. At each level two lanes exchange halves of what they have left, so that each
/// lane ends with v[0 .. values / lanes) (at least one), the sums of the numbers from the returned index on; with more lanes than values
/// the lanes `values` apart end with the same.
template <class Split, int values>
__device__ int sum_over_lanes(float (&v)[values]) {
  const int part = Split::part();
  int first = 0;
#pragma unroll
  for (int level = 1; level < Split::kLanes; level *= 2) {
    const int half = values / (2 * level), apart = Split::kAcross * level;
    if (half == 0) {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], apart);
      continue;
    }
    const bool upper = (part & level) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? v[i] : v[i + half], kept = upper ? v[i + half] : v[i];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, apart);
    }
    first += upper ? half : 0;
  }
  return first;
}

template <class Kernel, class... Args>
void launch_scan(Kernel kernel, const char* name, int64_t blocks, size_t shared, const CudaContext& cuda, const Args&... args) {
  launch(kernel, name, dim3(static_cast<unsigned>(blocks)), dim3(kScanThreads), shared, cuda, args...);
}

/// What is known of each segment before its neighbours are: walks over it begin with zero.
struct ScanSegments {
  Tensor ends;    // [B, segments, D, kN]: state at the end; after connect_segments the state at the beginning, of the whole scan
  Tensor grads;   // or the gradient of the state at the beginning; afterwards that at the end
  Tensor dt_sum;  // [B, segments, D]
};

/// Carries states from segment to segment, from outer = h0 on, or gradients back from outer = grad_h_T.
void connect_segments(const ScanSegments& segments, const Tensor& A_log, const Tensor& outer);

}  // namespace longhand
