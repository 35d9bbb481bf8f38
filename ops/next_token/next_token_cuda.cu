// next_token_kernel; next_token.h says what is drawn.
//
// moves   a row's logits once, and 4 V bytes of keys in L2 once more for every step of a search: 200 KB a row at V = 50,277
// split   one block a row: a row is short, and rows are independent
// order   counts and sums are whole numbers, so the same bits whatever the order
//
// A logit becomes a key, a 32-bit number in the same order. Each filter then is the least key that it keeps, which is found from the
// highest bits down: two bits at a time, by counting what lies at or above three candidates. Where several tokens equal the last one that
// top-p keeps, only the first of them, by their ids, are kept.
#include <cfloat>
#include <cmath>

#include "core/cuda_context.h"
#include "core/philox.h"
#include "ops/common/cuda_math.cuh"
#include "ops/next_token/next_token.h"

namespace longhand {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
constexpr uint32_t kImpossible = 0;  // the key of -inf

struct Args {
  const float* logits;
  int64_t logits_stride;
  const uint8_t* never;
  uint8_t* seen;   // null without a penalty
  uint32_t* keys;  // [B, V] scratch; null at temperature 0
  const int64_t* key;
  int64_t* position;
  int32_t* ids;
  int vocab, scale_bits;
  float penalty;
  double temperature, top_p, log_min_p;  // log_min_p -inf: off
  int64_t top_k;
};

/// A number in the order of the logits; 0 for -inf, which no finite logit becomes.
__device__ uint32_t key_of(float logit) {
  if (logit == -INFINITY) return kImpossible;
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0: they are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float logit_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

template <class T>
__device__ T warp_total(T v) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) v += __shfl_xor_sync(0xffffffffu, v, apart);
  return v;
}

/// Sums over the block, in every thread. All threads call it.
template <int n>
__device__ void block_totals(unsigned long long (&v)[n]) {
  __shared__ unsigned long long of_warp[n][kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncthreads();  // what the call before left has been read
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const unsigned long long total = warp_total(v[i]);
    if (lane == 0) of_warp[i][warp] = total;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = warp_total(of_warp[i][lane]);
}

/// The largest key for which measure(tokens at or above it) is at least `goal`; 1 when there is none.
template <class Measure>
__device__ uint32_t least_kept(const uint32_t* keys, int vocab, uint32_t floor, double goal, const Measure& measure) {
  uint32_t found = 0;
  for (int shift = 30; shift >= 0; shift -= 2) {
    unsigned long long sums[3] = {};
    for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kThreads) {
      const uint32_t key = keys[i];
      if (key < floor || key < (found | 1u << shift)) continue;
      const unsigned long long m = measure(key);
#pragma unroll
      for (uint32_t j = 0; j < 3; ++j)
        if (key >= (found | (j + 1) << shift)) sums[j] += m;
    }
    block_totals(sums);
    uint32_t digit = 0;
#pragma unroll
    for (uint32_t j = 0; j < 3; ++j)
      if (static_cast<double>(sums[j]) >= goal) digit = j + 1;
    found |= digit << shift;
  }
  return found > floor ? found : floor;
}

__global__ void __launch_bounds__(kThreads) next_token_kernel(Args a) {
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const float* logits = a.logits + row * a.logits_stride;
  uint8_t* seen = a.seen != nullptr ? a.seen + row * a.vocab : nullptr;
  uint32_t* keys = a.keys != nullptr ? a.keys + row * a.vocab : nullptr;

  // The largest, and among equals the lowest id; at temperature 0 that is all.
  unsigned long long best = 0;  // key, then the complement of the id
  int bad = 0;
  const auto look_at = [&](int i, float logit, bool never) {
    bad |= !(logit <= FLT_MAX);
    if (seen != nullptr && seen[i] != 0) logit = logit < 0 ? logit * a.penalty : __fdiv_rn(logit, a.penalty);
    const uint32_t key = never ? kImpossible : key_of(logit);
    if (keys != nullptr) keys[i] = key;
    const unsigned long long mine = static_cast<unsigned long long>(key) << 32 | ~static_cast<uint32_t>(i);
    best = mine > best ? mine : best;
  };
  const bool in_fours = reinterpret_cast<uintptr_t>(logits) % 16 == 0 && reinterpret_cast<uintptr_t>(a.never) % 4 == 0;
  const int fours = in_fours ? a.vocab / 4 : 0;
  constexpr int kTurns = 4;  // whose loads are under way together
  for (int first = thread; first < fours; first += kTurns * kThreads) {
    Pack<float, 4> logit[kTurns];
    Pack<uint8_t, 4> never[kTurns];
#pragma unroll
    for (int u = 0; u < kTurns; ++u) {
      const int i = first + u * kThreads < fours ? first + u * kThreads : first;
      logit[u] = load_pack<4>(logits + i * 4);
      never[u] = load_pack<4>(a.never + i * 4);
    }
#pragma unroll
    for (int u = 0; u < kTurns; ++u)
      if (const int i = first + u * kThreads; i < fours)
#pragma unroll
        for (int j = 0; j < 4; ++j) look_at(i * 4 + j, logit[u].at[j], never[u].at[j] != 0);
  }
  for (int i = fours * 4 + thread; i < a.vocab; i += kThreads) look_at(i, logits[i], a.never[i] != 0);
  __shared__ unsigned long long best_of_warp[kWarps];
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const unsigned long long other = __shfl_xor_sync(0xffffffffu, best, apart);
    best = other > best ? other : best;
  }
  if (lane == 0) best_of_warp[warp] = best;
  bad = __syncthreads_or(bad);
  for (int w = 0; w < kWarps; ++w) best = best_of_warp[w] > best ? best_of_warp[w] : best;
  const auto top_key = static_cast<uint32_t>(best >> 32);
  int32_t drawn = static_cast<int32_t>(~static_cast<uint32_t>(best));
  if (bad != 0 || top_key == kImpossible) {
    if (thread == 0) a.ids[row] = bad != 0 ? kNotANumber : kNothingPossible;
    return;
  }

  if (keys != nullptr) {
    const float top = logit_of(top_key);
    const auto per_octave = static_cast<float>(1.4426950408889634 / a.temperature);
    const auto unit = static_cast<float>(1ull << a.scale_bits);
    auto mass = [&](uint32_t key) {  // exp((logit - top) / temperature), a whole number of 2^-scale_bits
      return static_cast<unsigned long long>(__float2ull_rn(unit * exp2_approx((logit_of(key) - top) * per_octave)));
    };
    uint32_t least = kImpossible + 1;
    if (a.top_k > 0 && a.top_k < a.vocab)
      least = least_kept(keys, a.vocab, least, static_cast<double>(a.top_k), [](uint32_t) { return 1ull; });
    uint32_t last_of_top_p = kImpossible;  // of its equals only `equals` are kept
    unsigned long long equals = 0;
    if (a.top_p < 1) {
      unsigned long long all[1] = {};
      for (int i = thread; i < a.vocab; i += kThreads)
        if (keys[i] >= least) all[0] += mass(keys[i]);
      block_totals(all);
      const double goal = a.top_p * static_cast<double>(all[0]);
      least = last_of_top_p = least_kept(keys, a.vocab, least, goal, mass);
      unsigned long long above[1] = {};
      for (int i = thread; i < a.vocab; i += kThreads)
        if (keys[i] > least) above[0] += mass(keys[i]);
      block_totals(above);
      const unsigned long long one = mass(least);
      equals = one == 0
                   ? ~0ull
                   : static_cast<unsigned long long>(fmax(1.0, ceil((goal - static_cast<double>(above[0])) / static_cast<double>(one))));
    }
    if (a.log_min_p > -INFINITY) {  // the least logit that is kept, up to a rounding that is then looked after
      const double floor = static_cast<double>(top) / a.temperature + a.log_min_p;
      auto keeps = [&](uint32_t key) { return static_cast<double>(logit_of(key)) / a.temperature >= floor; };
      uint32_t key = key_of(static_cast<float>(floor * a.temperature));
      if (key < least) key = least;
      while (key > least && keeps(key - 1)) --key;
      while (key < top_key && !keeps(key)) ++key;
      least = key;
    }

    // A warp has a stretch of ids: what of it is kept, then in which of them the drawn one lies, then where there.
    const int stretch = (a.vocab + kWarps - 1) / kWarps, begin = warp * stretch,
              end = begin + stretch < a.vocab ? begin + stretch : a.vocab;
    __shared__ unsigned long long kept_of_warp[kWarps], equals_of_warp[kWarps];
    const unsigned long long one = last_of_top_p != kImpossible ? mass(last_of_top_p) : 0;
    unsigned long long kept = 0, same = 0;
    for (int i = begin + lane; i < end; i += kWarp) {
      const uint32_t key = keys[i];
      if (key < least) continue;
      if (key == last_of_top_p) ++same;
      else kept += mass(key);
    }
    kept = warp_total(kept);
    same = warp_total(same);
    if (lane == 0) kept_of_warp[warp] = kept, equals_of_warp[warp] = same;
    __syncthreads();
    unsigned long long equals_before = 0, mass_before = 0, all = 0, of_mine = 0;
    {
      unsigned long long passed = 0;
      for (int w = 0; w < kWarps; ++w) {
        const unsigned long long left = equals > passed ? equals - passed : 0, taken = equals_of_warp[w] < left ? equals_of_warp[w] : left;
        const unsigned long long of_warp = kept_of_warp[w] + taken * one;
        if (w == warp) equals_before = passed, mass_before = all, of_mine = of_warp;
        passed += equals_of_warp[w];
        all += of_warp;
      }
    }
    const int64_t position = a.position[row] + 1;
    const double u =
        (static_cast<double>(philox_u64(static_cast<uint64_t>(a.key[row]), static_cast<uint64_t>(position)) >> 12) + 0.5) * 0x1p-52;
    const double threshold = u * static_cast<double>(all);
    __shared__ int32_t found;
    if (thread == 0) found = drawn;  // only if rounding left the whole sum at the threshold
    __syncthreads();
    if (static_cast<double>(mass_before) <= threshold && static_cast<double>(mass_before + of_mine) > threshold) {
      unsigned long long passed = mass_before, same_passed = equals_before;
      for (int from = begin; from < end; from += kWarp) {
        const uint32_t key = from + lane < end ? keys[from + lane] : kImpossible;
        const bool is_same = key >= least && key == last_of_top_p;
        const uint32_t sames = __ballot_sync(0xffffffffu, is_same);
        unsigned long long m = key < least ? 0 : mass(key);
        if (is_same && same_passed + static_cast<unsigned>(__popc(sames & ((1u << lane) - 1u))) >= equals) m = 0;
        unsigned long long up_to = m;
#pragma unroll
        for (int apart = 1; apart < kWarp; apart *= 2) {
          const unsigned long long other = __shfl_up_sync(0xffffffffu, up_to, apart);
          if (lane >= apart) up_to += other;
        }
        const uint32_t over = __ballot_sync(0xffffffffu, m > 0 && static_cast<double>(passed + up_to) > threshold);
        if (over != 0) {
          if (lane == 0) found = from + __ffs(static_cast<int>(over)) - 1;
          break;
        }
        passed += __shfl_sync(0xffffffffu, up_to, kWarp - 1);
        same_passed += static_cast<unsigned>(__popc(sames));
      }
    }
    __syncthreads();
    drawn = found;
    if (thread == 0) a.position[row] = position;
  }
  if (thread == 0) {
    a.ids[row] = drawn;
    if (seen != nullptr) seen[drawn] = 1;
  }
}

}  // namespace

void next_token_cuda(const NextToken& p) {
  const int64_t B = p.logits.dim(0), V = p.never.dim(0);
  if (B == 0) return;
  const CudaContext& cuda = p.logits.device().cuda_context();
  const bool draws = p.temperature != 0;
  const Tensor keys = draws ? Tensor::empty(p.logits.device(), Dtype::i32, {B, V}) : Tensor();
  int vocab_bits = 0;
  while (int64_t{1} << vocab_bits <= V) ++vocab_bits;
  const Args args{p.logits.data<float>(),
                  p.logits.stride(0),
                  p.never.data<uint8_t>(),
                  p.repetition_penalty != 1 ? p.seen.data<uint8_t>() : nullptr,
                  draws ? reinterpret_cast<uint32_t*>(keys.data<int32_t>()) : nullptr,
                  draws ? p.key.data<int64_t>() : nullptr,
                  draws ? p.position.data<int64_t>() : nullptr,
                  p.ids.data<int32_t>(),
                  static_cast<int>(V),
                  62 - vocab_bits,
                  static_cast<float>(p.repetition_penalty),
                  p.temperature,
                  p.top_p,
                  p.min_p > 0 ? std::log(p.min_p) : -std::numeric_limits<double>::infinity(),
                  p.top_k};
  const dim3 grid(static_cast<unsigned>(B));
  next_token_kernel<<<grid, kThreads, 0, cuda.stream>>>(args);
  launch_check("next_token_kernel", grid, kThreads);
}

}  // namespace longhand
