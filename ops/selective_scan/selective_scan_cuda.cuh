// What the two CUDA files of the selective scan share: how channels and state entries are dealt to threads, how activations reach a
// block, and the walk that gives the states of segments of the sequence.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/cuda_context.h"
#include "core/error.h"
#include "ops/common/cuda_math.cuh"
#include "ops/common/launch.cuh"
#include "ops/common/strided_rows.h"
#include "ops/selective_scan/selective_scan_kernels.h"

namespace longhand {

constexpr int kScanWarps = 4, kScanThreads = kScanWarps * kWarp;
constexpr int kScanChunk = 32;  // tokens between two states that backward keeps in memory
constexpr float kLn2 = 0.693147181f;

/// Which lanes share channels. When 32 lanes read 8 or 16 bytes each from shared memory, it takes half as many turns where all lanes that
/// differ in bit 0 of their number, or all that differ in bit 1, read the same. So four lanes `apart` differ in bits 0 and 2: lanes that
/// differ in bit 1 read the same entries, and those that differ in bit 0 the same steps.
enum class Lanes { neighbours, apart };

/// `lanes` lanes share `channels` channels, two or one, each with `entries` entries of the states of all of them. One of them is the lane's
/// own (of two, even parts have the first): it forms the steps and the results of that channel, for some of the tokens that are worked on
/// together.
template <int lanes, int entries, int channels = 2, Lanes which = Lanes::neighbours>
struct ScanSplit {
  static constexpr int kLanes = lanes, kEntries = entries, kN = lanes * entries;  // kN: N rounded up; entries behind N have A = B = C = 0
  static constexpr int kChannels = channels, kWarpChannels = channels * kWarp / lanes, kBlockChannels = kScanWarps * kWarpChannels;
  static constexpr int kOwners = lanes / channels;  // of a channel
  static constexpr bool kApart = which == Lanes::apart;
  static_assert(entries % 4 == 0 && kWarp % lanes == 0 && lanes % channels == 0 && channels <= 2 && (!kApart || lanes == 4));

  static __device__ int lane() { return static_cast<int>(threadIdx.x % kWarp); }
  /// The bit of a lane's number that is bit `bit` of its part. Of lanes apart, owners of the same channel differ in bit 0.
  static constexpr int lane_bit(int bit) { return !kApart ? bit : (bit == 1) == (channels == 1) ? 1 : 4; }
  static __device__ int part() {  // which entries
    if constexpr (!kApart) return lane() % lanes;
    else if constexpr (channels == 1) return (lane() & 1) | (lane() >> 1 & 2);
    else return (lane() >> 2 & 1) | (lane() & 1) << 1;
  }
  static __device__ int set() {  // which channels
    if constexpr (!kApart) return lane() / lanes;
    else if constexpr (channels == 1) return (lane() >> 1 & 1) | (lane() >> 2 & 6);
    else return (lane() >> 1 & 1) | (lane() >> 3) << 1;
  }
  /// The value of the lane whose part differs in `bit`.
  static __device__ float other_part(float v, int bit) { return __shfl_xor_sync(0xffffffffu, v, lane_bit(bit)); }
  static __device__ int first_entry() { return part() * entries; }
  static __device__ int own_channel() { return set() * channels + part() % channels; }  // in the warp; another one is its neighbour
  /// How many of `tokens` tokens a lane owns; with more owners than tokens several own the same, and one of them writes.
  template <int tokens>
  static constexpr int owned() {
    return kOwners < tokens ? tokens / kOwners : 1;
  }
  template <int tokens>
  static __device__ bool owns() {
    return kOwners <= tokens || part() / channels < tokens;
  }
};

/// Calls f with the splits, of forward and of the walk back, for states of N entries.
template <class F>
void split_for(int64_t N, F&& f) {
  if (N <= 16) return f(ScanSplit<2, 8>{}, ScanSplit<4, 4, 2, Lanes::apart>{});
  if (N <= 64) return f(ScanSplit<8, 8>{}, ScanSplit<8, 8>{});
  static_assert(kSelectiveScanMaxStateDim <= 256);
  f(ScanSplit<32, 8>{}, ScanSplit<32, 8>{});
}

/// The sums over the lanes of a channel, given for each token what neighbours of different parity have in common: lanes exchange halves of
/// the tokens that they have left, so that each ends with the sums of its own tokens in v[0 .. owned).
template <class Split, int tokens>
__device__ void sum_over_owners(float (&v)[tokens]) {
#pragma unroll
  for (int level = 1; level < Split::kOwners; level *= 2) {
    const int half = tokens / (2 * level), apart = Split::kChannels * level;
    if (half == 0) {
      v[0] += Split::other_part(v[0], apart);
      continue;
    }
    const bool upper = (Split::part() & apart) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? v[i] : v[i + half], kept = upper ? v[i + half] : v[i];
      v[i] = kept + Split::other_part(sent, apart);
    }
  }
}
/// The first of the tokens that sum_over_owners leaves with this lane.
template <class Split, int tokens>
__device__ int first_owned() {
  int first = 0;
#pragma unroll
  for (int level = 1; level < Split::kOwners && 2 * level <= tokens; level *= 2)
    first += (Split::part() & (Split::kChannels * level)) != 0 ? tokens / (2 * level) : 0;
  return first;
}
/// The sum of what the owners of a channel have for their tokens.
template <class Split, int tokens>
__device__ float sum_of_owners(float v) {
#pragma unroll
  for (int level = 1; level < Split::kOwners && level < tokens; level *= 2) v += Split::other_part(v, Split::kChannels * level);
  return v;
}

/// A tensor [B, T, width] for kernels; null data stands for an absent tensor.
template <class T>
struct ScanRows {
  T* data = nullptr;
  int64_t batch = 0;
  int token = 0;
  bool fours = false;     // may be read by 4 elements
  bool sixteens = false;  // and by 16 bytes, from each element that is a multiple of 16 bytes in its row
  __device__ T* at(int64_t b, int64_t t) const { return data + b * batch + t * token; }
};
template <class T>
ScanRows<T> scan_rows(const Tensor& t) {
  if (!t.defined()) return {};
  constexpr int64_t kFarthest = INT32_MAX / (kScanChunk * static_cast<int64_t>(sizeof(T)));  // kernels reach over a chunk in 32 bits
  const int64_t token = t.dim(1) > 1 ? t.stride(1) : 0;
  if (token > kFarthest)
    throw ValueError("selective_scan: the tokens of a view are too far apart",
                     {{"view", t.describe()}, {"limit", "a stride of " + std::to_string(kFarthest) + " elements over T on CUDA"}});
  T* const data = static_cast<T*>(t.raw());
  const auto multiples = [&](int64_t elements) {
    return reinterpret_cast<std::uintptr_t>(data) % (static_cast<std::uintptr_t>(elements) * sizeof(T)) == 0 &&
           t.stride(0) % elements == 0 && token % elements == 0;
  };
  return {data, t.stride(0), static_cast<int>(token), multiples(4) && t.dim(2) % 4 == 0, multiples(16 / static_cast<int64_t>(sizeof(T)))};
}

/// An element that has been fetched and is widened only when it is used, so that nothing waits for it before. Takes a register of its own:
/// two bf16 in one would have to be put together and taken apart.
template <class T>
struct Fetched {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  uint32_t bits;
  __device__ static Fetched from(const T* at) { return {*reinterpret_cast<const Bits*>(at)}; }
  __device__ float f32() const { return __uint_as_float(bits << (32 - 8 * sizeof(T))); }
};

/// An address that is kept: the compiler would rather form it anew, of a dozen instructions, wherever it is used.
template <class T>
__device__ T* kept(T* address) {
  asm("" : "+l"(address));
  return address;
}
/// A number likewise.
__device__ inline int kept(int number) {
  asm("" : "+r"(number));
  return number;
}
/// Says that an address is one of global memory where the compiler can no longer see it.
template <class T>
__device__ T* in_global_memory(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

/// A lane's own elements of neighbouring tokens, those of one channel. `whole` says for a block that all of its tokens and channels are
/// there; if not, a lane has `left` tokens, none without a channel.
template <class T>
struct OwnedAt {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  Byte* at;    // of the first token
  int stride;  // bytes from one token to the next; this way an address is one instruction
  __device__ OwnedAt(const ScanRows<T>& rows, int64_t b, int64_t t, int64_t channel)
      : at(kept(reinterpret_cast<Byte*>(rows.at(b, t) + channel))), stride(rows.token * static_cast<int>(sizeof(T))) {}
  __device__ void move(int tokens) { at += static_cast<int64_t>(tokens) * stride; }
  __device__ T* operator[](int i) const { return in_global_memory(reinterpret_cast<T*>(at + static_cast<int64_t>(i) * stride)); }
  /// Tokens [0, n), of which `left` are there.
  template <bool whole, int n>
  __device__ void write(const float (&from)[n], int left) const {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (whole || i < left) *(*this)[i] = static_cast<T>(from[i]);
  }
};

/// Copies on their way from global to shared memory: those of a thread since the last commit are a group; waits until at most `pending` of
/// its groups are on their way.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int pending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ inline void copy_16_bytes(uint32_t to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}

/// Copies of tiles of [tokens, width] elements, 16 bytes at a time, by a warp; the lane's part of one. A row takes `pitch` elements of
/// shared memory.
template <class T, int tokens, int width, int pitch = width>
struct TileCopy {
  static constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kRow = width < kPer ? 1 : width / kPer, kChunks = tokens * kRow;
  static_assert((kWarp % kRow == 0 || kRow % kWarp == 0) && (pitch == width || kWarp % kRow == 0));
  OwnedAt<const T> from;
  __device__ TileCopy(const ScanRows<const T>& rows, int64_t b, int64_t t, int64_t channel)
      : from(rows, b, t + lane() / kRow, channel + lane() % kRow * kPer) {}
  static __device__ int lane() { return static_cast<int>(threadIdx.x % kWarp); }
  __device__ void move(int by) { from.move(by); }
  __device__ void start(T (&to)[tokens][pitch]) const {
    const int first = pitch == width ? lane() * kPer : lane() / kRow * pitch + lane() % kRow * kPer;
#pragma unroll
    for (int k = 0; k < (kChunks + kWarp - 1) / kWarp; ++k) {
      if (kChunks % kWarp != 0 && k * kWarp + lane() >= kChunks) break;
      const int further = pitch == width ? k * kWarp * kPer : k * kWarp / kRow * pitch;
      const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(&to[0][0] + first + further));
      copy_16_bytes(at, from[k * kWarp / kRow] + k * kWarp % kRow * kPer);
    }
  }
};

/// f(std::true_type) or f(std::false_type)
template <class F>
__device__ void choose(bool condition, F&& f) {
  condition ? f(std::true_type{}) : f(std::false_type{});
}

/// Four elements likewise.
template <class T>
struct FetchedFour {
  Pack<uint32_t, sizeof(T)> words;  // lower element first
  __device__ float f32(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words.at[i]);
    else return __uint_as_float(i % 2 == 0 ? words.at[i / 2] << 16 : words.at[i / 2] & 0xffff0000u);
  }
  /// Elements [c, c + 4) of row (b, t); zeros at and behind `width` and where `there` is false.
  __device__ void fetch(const ScanRows<const T>& rows, int64_t b, int64_t t, int64_t c, int64_t width, bool there) {
    fetch<false>(rows.at(b, t) + c, rows.fours, there ? static_cast<int>(width - c) : 0);
  }
  /// Those at `from`, of which `left` are in the row; zeros for the others. `at_once`: says that `fours` is true.
  template <bool at_once>
  __device__ void fetch(const T* from, bool fours, int left) {
    words = {};
    if (left <= 0) return;
    if constexpr (at_once) {
      words = load_pack<sizeof(T)>(reinterpret_cast<const uint32_t*>(from));
    } else if (fours) {
      words = load_pack<sizeof(T)>(reinterpret_cast<const uint32_t*>(from));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < left) words.at[i * sizeof(T) / 4] |= Fetched<T>::from(from + i).bits << (i * 8 * sizeof(T) % 32);
    }
  }
};

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

/// What a walk costs on an SM, as measured: `block` a token for each of its blocks, up to `at_once` of which fill each other's pauses;
/// fewer than `alone` take as long as that many would, more follow in rounds. Walking segments first for what they do to a state, and again
/// for the results, costs `dearer` times as much as walking whole sequences.
struct ScanCost {
  int64_t at_once;
  double alone, block, dearer;
};

/// How the sequences are cut into segments of whole chunks, all walked at once. Segments pay where the blocks of whole sequences leave SMs
/// without work, in the last round at least: what counts is the SM that has most blocks. Of equal cuts the coarsest is taken.
struct ScanCut {
  int64_t segments, segment_tokens;
  double time;
};
constexpr int64_t kShortestSegment = 256, kMostScanBlocksPerSm = 12;
/// What `blocks` that go through `tokens` tokens each take.
inline double walk_time(int64_t blocks, int64_t tokens, const ScanCost& cost, int64_t sm_count) {
  const int64_t on_one = (blocks + sm_count - 1) / sm_count, last_round = on_one % cost.at_once;
  const double shares =
      static_cast<double>(on_one - last_round) + (last_round > 0 ? std::max(static_cast<double>(last_round), cost.alone) : 0);
  return cost.block * shares * static_cast<double>(tokens);
}
inline ScanCut cut_scan(int64_t tokens, int64_t blocks, const ScanCost& cost, int64_t sm_count) {
  const auto cut = [&](int64_t wanted) {
    const int64_t chunks = (tokens + kScanChunk - 1) / kScanChunk, each = (chunks + wanted - 1) / wanted,
                  segments = (chunks + each - 1) / each;
    return ScanCut{segments, each * kScanChunk,
                   (segments > 1 ? cost.dearer : 1.0) * walk_time(blocks * segments, each * kScanChunk, cost, sm_count)};
  };
  ScanCut best = cut(1);
  for (int64_t wanted = 2; wanted <= tokens / kShortestSegment && blocks * (wanted - 1) < kMostScanBlocksPerSm * sm_count; ++wanted)
    if (const ScanCut next = cut(wanted); next.time < best.time) best = next;
  return best;
}

/// Which block this is: first channel, segment and row of the batch.
template <class Split, class T>
struct ScanPlace {
  int64_t group, segment, b, first_channel, begin, end;  // tokens [begin, end)
  /// segments  how many are walked, from first_segment on
  __device__ ScanPlace(const ScanProblem<T>& p, int64_t first_group, int64_t groups, int64_t first_segment, int64_t segments) {
    const int64_t block = blockIdx.x;
    group = block % groups;
    segment = first_segment + block / groups % segments;
    b = block / groups / segments;
    first_channel = (first_group + group) * Split::kBlockChannels;
    begin = segment * p.segment_tokens;
    end = min(p.tokens, begin + p.segment_tokens);
  }
  __device__ int64_t segment_index(const ScanProblem<T>& p) const { return b * p.segments + segment; }
  __device__ bool whole(const ScanProblem<T>& p) const { return first_channel + Split::kBlockChannels <= p.channels; }
};

/// log(1 + e^x) without a branch: max(x, 0) + log1p(e) with e = e^-|x| by exp2_approx and log1p(e) / e by a polynomial (1.9e-7 on [0, 1]).
/// Relative error about (4 + |x| / 2) * 2^-23 below 0, 3 * 2^-23 above.
__device__ inline float softplus_approx(float x) {
  constexpr float c[] = {0.9999998057f, -0.4999740537f, 0.3327547944f,  -0.2449546106f,
                         0.1774523694f, -0.107681653f,  0.04408959149f, -0.008539197802f};
  const float e = exp2_approx(-kLog2e * fabsf(x));
  float log1p_over_e = c[7];
#pragma unroll
  for (int i = 6; i >= 0; --i) log1p_over_e = log1p_over_e * e + c[i];
  return log1p_over_e * e + fmaxf(x, 0.0f);
}

/// A * log2(e) of a lane's states, for decays exp2(dt * A2); 0 where there is no channel or entry.
template <class Split, class T>
__device__ void load_A2(const ScanProblem<T>& p, const int64_t (&channel)[Split::kChannels],
                        float (&A2)[Split::kChannels][Split::kEntries]) {
#pragma unroll
  for (int j = 0; j < Split::kChannels; ++j)
#pragma unroll
    for (int e = 0; e < Split::kEntries; ++e) {
      const int64_t n = Split::first_entry() + e;
      A2[j][e] = channel[j] < p.channels && n < p.N ? -expf(p.A_log[channel[j] * p.N + n]) * kLog2e : 0.0f;
    }
}

/// Neighbouring floats, 16 bytes at a time.
template <int n>
__device__ void read_floats(const float* from, float (&to)[n]) {
  static_assert(n % 4 == 0);
#pragma unroll
  for (int i = 0; i < n; i += 4) {
    const Pack<float, 4> pack = load_pack<4>(from + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[i + k] = pack.at[k];
  }
}

template <int n>
__device__ void write_floats(float* to, const float (&from)[n]) {
  static_assert(n % 4 == 0);
#pragma unroll
  for (int i = 0; i < n; i += 4) store_pack(to + i, Pack<float, 4>{{from[i], from[i + 1], from[i + 2], from[i + 3]}});
}

/// A lane's states from [.., channels, kN], where `states` points at the first channel of a row; zeros behind the last channel.
template <class Split>
__device__ void load_states(const float* states, const int64_t (&channel)[Split::kChannels], int64_t channels,
                            float (&h)[Split::kChannels][Split::kEntries]) {
#pragma unroll
  for (int j = 0; j < Split::kChannels; ++j) {
#pragma unroll
    for (int e = 0; e < Split::kEntries; ++e) h[j][e] = 0;
    if (channel[j] < channels) read_floats(states + channel[j] * Split::kN + Split::first_entry(), h[j]);
  }
}
template <class Split>
__device__ void store_states(float* states, const int64_t (&channel)[Split::kChannels], int64_t channels,
                             const float (&h)[Split::kChannels][Split::kEntries]) {
#pragma unroll
  for (int j = 0; j < Split::kChannels; ++j)
    if (channel[j] < channels) write_floats(states + channel[j] * Split::kN + Split::first_entry(), h[j]);
}

/// B_t or C_t of tokens [t, t + count) into shared memory [count, kN] as f32; zeros at and behind `end` and behind N.
template <class Split, class T>
__device__ void stage_entries(const ScanRows<const T>& rows, const ScanProblem<T>& p, int64_t b, int64_t t, int64_t end, int count,
                              float* to) {
  constexpr int packs_per_row = Split::kN / 4;
  for (int i = static_cast<int>(threadIdx.x); i < count * packs_per_row; i += kScanThreads) {
    const int64_t at = t + i / packs_per_row, n = i % packs_per_row * 4;
    FetchedFour<T> in;
    in.fetch(rows, b, at, n, p.N, at < end);
    store_pack(to + 4 * i, Pack<float, 4>{{in.f32(0), in.f32(1), in.f32(2), in.f32(3)}});
  }
}

template <class Kernel, class... Args>
void launch_scan(Kernel kernel, const char* name, int64_t blocks, size_t shared, const CudaContext& cuda, const Args&... args) {
  launch(kernel, name, dim3(static_cast<unsigned>(blocks)), dim3(kScanThreads), shared, cuda, args...);
}

/// What a segment does to the gradient of a state: exp(A dt_sum) times that at its end, and grads. Segments are cut into `per_segment`
/// pieces each, the last one into as many as it needs; those of the first segment reach nobody and are not written.
struct SegmentGrads {
  Tensor grads;    // [B, count, D, kN]: the gradient at the beginning of a piece, from zero at its end
  Tensor dt_sums;  // [B, count, D]
  int64_t count = 0, per_segment = 1;
};
SegmentGrads selective_scan_segment_grads(const SelectiveScanInputs& in, const Tensor& grad_y, int64_t segments, int64_t segment_tokens);

}  // namespace longhand
