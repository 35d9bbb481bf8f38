// One step of a recurrence of each family; token_step.h has the formulas.
//
// mamba1_token_kernel, mamba2_token_kernel, mamba2_many_rows_kernel, gla_token_kernel
// moves   the state in and out once: 8*H*P*N bytes a row (2.1 MB at H 32, P 64, N 128)
// split   mamba1: four lanes a channel, which share N and the columns of dt's projection
//         mamba2: a block owns 64 channels (16) of one head of one row, a warp four of them; lanes share N. The convolution of B and C is
//                 computed again by every block; its inputs and silu(z) are dealt to the threads, dt to one that has the fewest
//         many    blocks stay and take state after state (one head of one row), which the copy engine brings to shared memory and takes
//         rows:   from there: two are on their way while one is at work. The same sums
//         gla:    a block owns 16 columns of the state of one head of one row; a thread has a quad of columns of every 32nd key
//         Until the kernel in front has ended, states, windows, filters and small parameters are loaded
// order   fixed sums, no atomics: the same bits every time
// agrees  with the ops that they join: kTokenStepToleranceF32, kTokenStepToleranceBf16
#include <algorithm>

#include "core/error.h"
#include "ops/common/box_copies.cuh"
#include "ops/common/cuda_math.cuh"
#include "ops/token_step/token_launch_cuda.cuh"
#include "ops/token_step/token_step.h"

namespace longhand {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

/// `count` elements to shared memory, both aligned to 16 bytes.
template <class T>
__device__ void copy_to_shared(T* to, const T* from, int count) {
  constexpr int vec = 16 / static_cast<int>(sizeof(T));
  const int packs = count / vec;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kThreads) store_pack(to + i * vec, load_pack<vec>(from + i * vec));
  for (int i = packs * vec + static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}

// --- Mamba-1 --------------------------------------------------------------------------------------------------

constexpr int kLanesOfChannel = 4, kScanChannels = kThreads / kLanesOfChannel;

struct Mamba1Args {
  const void *x, *selected, *dt_weight;
  const float *A_log, *D_skip, *dt_bias;
  float* state;
  void* y;
  int channels, rank, d_state;
};

template <class T, int quads>  // 16 entries of N a channel's lanes hold in a quad each
__global__ void __launch_bounds__(kThreads) mamba1_token_kernel(Mamba1Args p) {
  let_next_kernel_start();
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  T* const dt_weight = reinterpret_cast<T*>(shared_bytes);                               // [channels of the block, rank]
  float* const selected = reinterpret_cast<float*>(dt_weight + kScanChannels * p.rank);  // dt's input, B, C
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanesOfChannel, N = p.d_state, R = p.rank;
  const int first = static_cast<int>(blockIdx.x) * kScanChannels, count = min(kScanChannels, p.channels - first);
  const int in_block = min(thread / kLanesOfChannel, count - 1), c = first + in_block;  // lanes past the end repeat the last channel
  const int64_t b = blockIdx.y;

  copy_to_shared(dt_weight, static_cast<const T*>(p.dt_weight) + static_cast<int64_t>(first) * R, count * R);
  float* const states = p.state + (b * p.channels + c) * N;
  Pack<float, 4> state[quads], A[quads];
#pragma unroll
  for (int q = 0; q < quads; ++q)
    if (const int n = (q * kLanesOfChannel + lane) * 4; n < N) {
      state[q] = load_pack<4>(states + n);
      A[q] = load_pack<4>(p.A_log + static_cast<int64_t>(c) * N + n);
#pragma unroll
      for (int j = 0; j < 4; ++j) A[q].at[j] = -expf(A[q].at[j]);
    }
  const float dt_bias = p.dt_bias[c], D_skip = p.D_skip[c];

  wait_for_kernel_in_front();
  const float x = to_f32(static_cast<const T*>(p.x)[b * p.channels + c]);
  for (int i = thread; i < R + 2 * N; i += kThreads) selected[i] = to_f32(static_cast<const T*>(p.selected)[b * (R + 2 * N) + i]);
  __syncthreads();
  float dt = 0;
  for (int r = lane; r < R; r += kLanesOfChannel) dt = fmaf(to_f32(dt_weight[in_block * R + r]), selected[r], dt);
#pragma unroll
  for (int apart = kLanesOfChannel / 2; apart > 0; apart /= 2) dt += __shfl_xor_sync(0xffffffffu, dt, apart);
  dt = softplus(to_f32(static_cast<T>(dt)) + dt_bias);  // rounded where the projection by itself rounds
  float y = 0;
#pragma unroll
  for (int q = 0; q < quads; ++q) {
    const int n = (q * kLanesOfChannel + lane) * 4;
    if (n >= N) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      state[q].at[j] = fmaf(expf(dt * A[q].at[j]), state[q].at[j], dt * x * selected[R + n + j]);
      y = fmaf(state[q].at[j], selected[R + N + n + j], y);
    }
  }
#pragma unroll
  for (int apart = kLanesOfChannel / 2; apart > 0; apart /= 2) y += __shfl_xor_sync(0xffffffffu, y, apart);
  if (thread / kLanesOfChannel >= count) return;
#pragma unroll
  for (int q = 0; q < quads; ++q)
    if (const int n = (q * kLanesOfChannel + lane) * 4; n < N) store_pack(states + n, state[q]);
  if (lane == 0) static_cast<T*>(p.y)[b * p.channels + c] = static_cast<T>(fmaf(D_skip, x, y));
}

// --- Mamba-2 --------------------------------------------------------------------------------------------------

constexpr int kChannelsOfWarp = 4;

struct Mamba2Args {
  const void *projected, *window;
  const float *conv_weight, *conv_bias, *A_log, *D_skip, *dt_bias;
  float* state;
  void* y;
  int64_t projected_stride;
  float dt_min, dt_max;
  int heads, headdim, d_state, groups, width, channels;  // width W, channels C
  bool skip_per_channel, gate;
};

/// The sums over the lanes of what they have of a warp's channels: a lane gets that of channel lane / kLanesOfSum. Half of the lanes go on
/// with half of the channels, so that there is less to exchange than in a warp_sum() of each; the same pairs are added.
constexpr int kLanesOfSum = kWarp / kChannelsOfWarp;
__device__ inline float sum_of_channel(const float (&y)[kChannelsOfWarp], int lane) {
  static_assert(kChannelsOfWarp == 4);
  const auto halved = [&](float first, float second, int apart) {
    const bool upper = (lane & apart) != 0;
    return (upper ? second : first) + __shfl_xor_sync(0xffffffffu, upper ? first : second, apart);
  };
  float sum = halved(halved(y[0], y[2], 16), halved(y[1], y[3], 16), 8);
#pragma unroll
  for (int apart = kLanesOfSum / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
  return sum;
}

/// y of a channel, gated or not.
template <class T>
__device__ void put_output(const Mamba2Args& p, int64_t at, float y) {
  if (p.gate) static_cast<float*>(p.y)[at] = y;
  else static_cast<T*>(p.y)[at] = static_cast<T>(y);
}

/// Registers of a thread. With 48, blocks of the products before and behind find room on a multiprocessor beside two of 16 warps.
template <class T>
constexpr int registers_of_token(int quads, int warps) {
  return quads > 1 ? 128 : warps == 16 && sizeof(T) == 2 ? 48 : 80;
}

template <class T, int quads, int warps>  // 128 entries of N a warp holds in a quad a lane
__global__ void __maxnreg__(registers_of_token<T>(quads, warps)) mamba2_token_kernel(Mamba2Args p) {
  let_next_kernel_start();
  constexpr int kBlockThreads = warps * kWarp, kTokenChannels = warps * kChannelsOfWarp;
  constexpr int kMostInputs = (2 * kTokenChannels + 2 * quads * 128 + kBlockThreads - 1) / kBlockThreads;
  __shared__ __align__(16) float inputs[2 * kTokenChannels + 2 * quads * 128];  // after the convolution x, B, C; then silu(z)
  __shared__ float dt_and_decay[2];
  const int h = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.z;
  const int warp = thread / kWarp, lane = thread % kWarp, N = p.d_state, group = h / (p.heads / p.groups), inner = p.heads * p.headdim;
  const int count = kTokenChannels + 2 * N, begin = h * p.headdim + static_cast<int>(blockIdx.x) * kTokenChannels;
  const int first = begin + warp * kChannelsOfWarp, mine = first + lane / kLanesOfSum;  // channels

  auto channel_of = [&](int i) {  // of the convolution
    if (i < kTokenChannels) return begin + i;
    i -= kTokenChannels;
    return i < N ? inner + group * N + i : inner + p.groups * N + group * N + i - N;
  };

  // All loads are under way together: with few rows the first ones, of what no kernel of this token has written, while the kernel in front
  // is still at work; with many rows a block waits for memory once.
  Pack<float, 4> state[kChannelsOfWarp][quads];
  float* const states = p.state + (b * inner + first) * N;
#pragma unroll
  for (int i = 0; i < kChannelsOfWarp; ++i)
#pragma unroll
    for (int q = 0; q < quads; ++q)
      if (const int n = (q * kWarp + lane) * 4; n < N) state[i][q] = load_pack<4>(states + i * N + n);
  constexpr int kFilter = 4;  // taps that models have: read whole
  Pack<float, kFilter> taps[kMostInputs];
  T past[kMostInputs][kFilter - 1], now[kMostInputs];
  float bias[kMostInputs];
  const T* const windows = static_cast<const T*>(p.window) + b * (p.width - 1) * p.channels;
#pragma unroll
  for (int k = 0; k < kMostInputs; ++k) {
    const int c = channel_of(min(thread + k * kBlockThreads, count - 1));
    bias[k] = p.conv_bias != nullptr ? p.conv_bias[c] : 0.0f;
    if (p.width != kFilter) continue;
    taps[k] = load_pack<kFilter>(p.conv_weight + static_cast<int64_t>(c) * kFilter);
#pragma unroll
    for (int j = 0; j + 1 < kFilter; ++j) past[k][j] = windows[static_cast<int64_t>(j) * p.channels + c];
  }
  const float D_skip = p.D_skip[p.skip_per_channel ? mine : h];
  const bool has_dt = thread == kBlockThreads - kWarp;  // of the warp with the fewest inputs
  const float dt_bias = has_dt ? p.dt_bias[h] : 0.0f, A = has_dt ? -expf(p.A_log[h]) : 0.0f;
  const T* const projected = static_cast<const T*>(p.projected) + b * p.projected_stride;
  int place[kMostInputs];  // in it, known before the wait
#pragma unroll
  for (int k = 0; k < kMostInputs; ++k) {
    const int i = thread + k * kBlockThreads;
    place[k] = not_hoisted(i < count ? inner + channel_of(i) : begin + min(i - count, kTokenChannels - 1));
  }

  wait_for_kernel_in_front();
#pragma unroll
  for (int k = 0; k < kMostInputs; ++k) now[k] = projected[place[k]];
  const T dt_in = has_dt ? projected[inner + p.channels + h] : T{};
#pragma unroll
  for (int k = 0; k < kMostInputs; ++k) {
    const int i = thread + k * kBlockThreads;
    if (i >= count + kTokenChannels) continue;
    float sum = bias[k];
    if (p.width == kFilter) {
#pragma unroll
      for (int j = 0; j + 1 < kFilter; ++j) sum = fmaf(taps[k].at[j], to_f32(past[k][j]), sum);
      sum = fmaf(taps[k].at[kFilter - 1], to_f32(now[k]), sum);
    } else {
      const int c = channel_of(min(i, count - 1));
      const float* weight = p.conv_weight + static_cast<int64_t>(c) * p.width;
      for (int j = 0; j + 1 < p.width; ++j) sum = fmaf(weight[j], to_f32(windows[static_cast<int64_t>(j) * p.channels + c]), sum);
      sum = fmaf(weight[p.width - 1], to_f32(now[k]), sum);
    }
    const float active = silu(i < count ? sum : to_f32(now[k]));
    inputs[i] = i < count ? to_f32(static_cast<T>(active)) : active;  // rounded where the convolution by itself rounds
  }
  if (has_dt) {
    const float dt = fminf(fmaxf(softplus(to_f32(dt_in) + dt_bias), p.dt_min), p.dt_max);
    dt_and_decay[0] = dt;
    dt_and_decay[1] = expf(A * dt);
  }
  __syncthreads();
  const float dt = dt_and_decay[0], decay = dt_and_decay[1];
  float y[kChannelsOfWarp] = {};
#pragma unroll
  for (int q = 0; q < quads; ++q) {
    const int n = (q * kWarp + lane) * 4;
    if (n >= N) continue;
    const Pack<float, 4> B = load_pack<4>(inputs + kTokenChannels + n), C = load_pack<4>(inputs + kTokenChannels + N + n);
#pragma unroll
    for (int i = 0; i < kChannelsOfWarp; ++i) {
      const float added = dt * inputs[warp * kChannelsOfWarp + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        state[i][q].at[j] = fmaf(decay, state[i][q].at[j], added * B.at[j]);
        y[i] = fmaf(state[i][q].at[j], C.at[j], y[i]);
      }
    }
  }
  const float out = fmaf(D_skip, inputs[warp * kChannelsOfWarp + lane / kLanesOfSum], sum_of_channel(y, lane));
  if (lane % kLanesOfSum == 0) put_output<T>(p, b * inner + mine, p.gate ? out * inputs[count + mine - begin] : out);
  const int apart = not_hoisted(N);
#pragma unroll
  for (int i = 0; i < kChannelsOfWarp; ++i)
#pragma unroll
    for (int q = 0; q < quads; ++q)
      if (const int n = (q * kWarp + lane) * 4; n < N) store_pack(states + i * apart + n, state[i][q]);
}

// --- Mamba-2, many rows -----------------------------------------------------------------------------------------

constexpr int kManyThreads = 512, kManyHead = 64, kManyState = 128, kManyTaps = 4;  // P, N, W
constexpr int kManyBlocks = 2;                                                      // of a multiprocessor
constexpr int kStates = 3;  // of a block: on their way in, at work, on their way out
constexpr int kStateFloats = kManyHead * kManyState;

template <class T>
__global__ void __launch_bounds__(kManyThreads, kManyBlocks) mamba2_many_rows_kernel(Mamba2Args p, int count) {
#if __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  constexpr int kInputs = kManyHead + 2 * kManyState, kTaps = kManyTaps;
  constexpr unsigned kBytes = kStateFloats * sizeof(float);
  float* const states = reinterpret_cast<float*>(shared_memory());
  __shared__ __align__(16) float inputs[2][kInputs];  // of this state and of the next: after the convolution x, B, C
  __shared__ float gate[2][kManyHead], skip[2][kManyHead], dt_and_decay[2][2];
  __shared__ uint64_t arrived[kStates];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, apart = static_cast<int>(gridDim.x);
  const int inner = p.heads * kManyHead, C = p.channels;
  const auto load_state = [&](int turn) {
    const int64_t at = blockIdx.x + static_cast<int64_t>(turn) * apart;
    if (at >= count) return;
    barrier_expect(arrived + turn % kStates, kBytes);
    copy_run_async(states + turn % kStates * kStateFloats, p.state + at * kStateFloats, kBytes, arrived + turn % kStates);
  };
  if (thread == 0) {
    for (int i = 0; i < kStates; ++i) barrier_create(arrived + i, 1);
    publish_barriers();
    for (int i = 0; i < kStates; ++i) load_state(i);
  }

  // A thread has one of the inputs; it asks for the next state's while this one's are at work.
  Pack<float, kTaps> taps;
  T past[kTaps - 1], now;
  float bias, other;
  const auto ask = [&](int at) {
    if (at >= count) return;
    const int b = at / p.heads, h = at - b * p.heads, group = h / (p.heads / p.groups), i = thread - kManyHead;
    const T* const projected = static_cast<const T*>(p.projected) + b * p.projected_stride;
    if (thread < kInputs) {
      const int c =
          i < 0 ? h * kManyHead + thread : inner + group * kManyState + (i < kManyState ? i : p.groups * kManyState + i - kManyState);
      taps = load_pack<kTaps>(p.conv_weight + c * kTaps);
      bias = p.conv_bias != nullptr ? p.conv_bias[c] : 0.0f;
      if (thread < kManyHead) other = p.D_skip[p.skip_per_channel ? c : h];
#pragma unroll
      for (int j = 0; j + 1 < kTaps; ++j) past[j] = static_cast<const T*>(p.window)[(static_cast<int64_t>(b) * (kTaps - 1) + j) * C + c];
      now = projected[inner + c];
    } else if (thread < kInputs + kManyHead) {
      now = projected[h * kManyHead + thread - kInputs];
    } else if (thread == kInputs + kManyHead) {
      now = projected[inner + C + h];
      bias = p.dt_bias[h];
      other = p.A_log[h];
    }
  };
  const auto put = [&](int to) {
    if (thread < kInputs) {
      float sum = bias;
#pragma unroll
      for (int j = 0; j + 1 < kTaps; ++j) sum = fmaf(taps.at[j], to_f32(past[j]), sum);
      sum = fmaf(taps.at[kTaps - 1], to_f32(now), sum);
      inputs[to][thread] = to_f32(static_cast<T>(silu(sum)));  // rounded where the convolution by itself rounds
      if (thread < kManyHead) skip[to][thread] = other;
    } else if (thread < kInputs + kManyHead) {
      gate[to][thread - kInputs] = silu(to_f32(now));
    } else if (thread == kInputs + kManyHead) {
      const float dt = fminf(fmaxf(softplus(to_f32(now) + bias), p.dt_min), p.dt_max);
      dt_and_decay[to][0] = dt;
      dt_and_decay[to][1] = expf(-expf(other) * dt);
    }
  };
  wait_for_kernel_in_front();
  int at = static_cast<int>(blockIdx.x);
  ask(at);
  put(0);
  ask(at + apart);
  __syncthreads();
  for (int turn = 0; at < count; ++turn, at += apart) {
    const int set = turn % 2;
    float* const state = states + turn % kStates * kStateFloats;
    barrier_wait(arrived + turn % kStates, turn / kStates % 2);
    const float dt = dt_and_decay[set][0], decay = dt_and_decay[set][1];
    const Pack<float, 4> B = load_pack<4>(inputs[set] + kManyHead + lane * 4),
                         C_t = load_pack<4>(inputs[set] + kManyHead + kManyState + lane * 4);
    float y[kChannelsOfWarp];
#pragma unroll
    for (int i = 0; i < kChannelsOfWarp; ++i) {
      float* const of_channel = state + (warp * kChannelsOfWarp + i) * kManyState + lane * 4;
      Pack<float, 4> h = load_pack<4>(of_channel);
      const float added = dt * inputs[set][warp * kChannelsOfWarp + i];
      y[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        h.at[j] = fmaf(decay, h.at[j], added * B.at[j]);
        y[i] = fmaf(h.at[j], C_t.at[j], y[i]);
      }
      store_pack(of_channel, h);
    }
    const int channel = warp * kChannelsOfWarp + lane / kLanesOfSum;
    const float out = fmaf(skip[set][channel], inputs[set][channel], sum_of_channel(y, lane));
    if (lane % kLanesOfSum == 0) put_output<T>(p, static_cast<int64_t>(at) * kManyHead + channel, p.gate ? out * gate[set][channel] : out);
    put(1 - set);
    ask(at + 2 * apart);
    publish_to_tensor_cores();  // and to the copy engine
    __syncthreads();
    if (thread != 0) continue;
    store_run_async(p.state + static_cast<int64_t>(at) * kStateFloats, state, kBytes);
    close_boxes();
    if (turn == 0) continue;
    boxes_read_but<1>();
    load_state(turn - 1 + kStates);
  }
  if (thread == 0) boxes_stored();
#endif
}

/// Whether this build has the kernel: built for an older GPU its body is empty.
bool has_many_rows_kernel() {
  static const bool built = [] {
    cudaFuncAttributes attributes{};
    cuda_check(cudaFuncGetAttributes(&attributes, &mamba2_many_rows_kernel<float>), "cudaFuncGetAttributes");
    return attributes.ptxVersion >= 90;
  }();
  return built;
}

// --- GLA ------------------------------------------------------------------------------------------------------

constexpr int kColumns = 16, kQuads = kColumns / 4, kKeysAtOnce = kThreads / kQuads, kMostKeys = 256;

struct GlaArgs {
  const void *q, *k, *v, *gate_input, *gate_weight;
  const float* gate_bias;
  float* state;
  void* y;
  int64_t stride;  // between rows of q, k, v, gate_input
  float normalizer, gate_min, scale;
  int heads, Dk, Dv, rank;
};

template <class T>
__global__ void __launch_bounds__(kThreads) gla_token_kernel(GlaArgs p) {
  let_next_kernel_start();
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  T* const gate_weight = reinterpret_cast<T*>(shared_bytes);                        // [rank, Dk] of the head
  float* const gate_input = reinterpret_cast<float*>(gate_weight + p.Dk * p.rank);  // [rank]
  __shared__ float q[kMostKeys], k[kMostKeys], decay[kMostKeys], of_warp[kWarps][kColumns];
  const int thread = static_cast<int>(threadIdx.x), h = static_cast<int>(blockIdx.y), warp = thread / kWarp;
  const int column = static_cast<int>(blockIdx.x) * kColumns + thread % kQuads * 4, first_key = thread / kQuads;
  const int64_t b = blockIdx.z;
  const bool inside = column < p.Dv;

  constexpr int kPack = 16 / static_cast<int>(sizeof(T));
  for (int i = thread * kPack; i < p.Dk * p.rank; i += kThreads * kPack) {
    const Pack<T, kPack> weights = load_pack<kPack>(static_cast<const T*>(p.gate_weight) + static_cast<int64_t>(h) * p.Dk * p.rank + i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) gate_weight[(i + j) % p.rank * p.Dk + (i + j) / p.rank] = weights.at[j];
  }
  float* const states = p.state + (b * p.heads + h) * p.Dk * p.Dv + column;
  constexpr int kTurns = kMostKeys / kKeysAtOnce;
  Pack<float, 4> state[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i)
    if (const int m = first_key + i * kKeysAtOnce; inside && m < p.Dk) state[i] = load_pack<4>(states + static_cast<int64_t>(m) * p.Dv);
  float bias[kMostKeys / kThreads];
#pragma unroll
  for (int i = 0; i < kMostKeys / kThreads; ++i)
    if (const int m = thread + i * kThreads; m < p.Dk) bias[i] = p.gate_bias[h * p.Dk + m];

  wait_for_kernel_in_front();
  T v_in[4] = {}, q_in[kMostKeys / kThreads], k_in[kMostKeys / kThreads];  // all under way together
  if (inside)
#pragma unroll
    for (int j = 0; j < 4; ++j) v_in[j] = static_cast<const T*>(p.v)[b * p.stride + h * p.Dv + column + j];
#pragma unroll
  for (int i = 0; i < kMostKeys / kThreads; ++i)
    if (const int m = thread + i * kThreads; m < p.Dk) {
      q_in[i] = static_cast<const T*>(p.q)[b * p.stride + h * p.Dk + m];
      k_in[i] = static_cast<const T*>(p.k)[b * p.stride + h * p.Dk + m];
    }
  for (int r = thread; r < p.rank; r += kThreads) gate_input[r] = to_f32(static_cast<const T*>(p.gate_input)[b * p.stride + r]);
  __syncthreads();
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = to_f32(v_in[j]);
#pragma unroll
  for (int i = 0; i < kMostKeys / kThreads; ++i)
    if (const int m = thread + i * kThreads; m < p.Dk) {
      q[m] = p.scale * to_f32(q_in[i]);
      k[m] = to_f32(k_in[i]);
      float logit = 0;
      for (int r = 0; r < p.rank; ++r) logit = fmaf(to_f32(gate_weight[r * p.Dk + m]), gate_input[r], logit);
      logit = to_f32(static_cast<T>(logit + bias[i]));  // rounded where the projection by itself rounds
      decay[m] = expf(fmaxf(-softplus(-logit) / p.normalizer, p.gate_min));
    }
  __syncthreads();
  float o[4] = {};
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int m = first_key + i * kKeysAtOnce;
    if (!inside || m >= p.Dk) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      state[i].at[j] = fmaf(decay[m], state[i].at[j], k[m] * v[j]);
      o[j] = fmaf(state[i].at[j], q[m], o[j]);
    }
    store_pack(states + static_cast<int64_t>(m) * p.Dv, state[i]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int apart = kWarp / 2; apart >= kQuads; apart /= 2) o[j] += __shfl_xor_sync(0xffffffffu, o[j], apart);
    if (thread % kWarp < kQuads) of_warp[warp][thread % kWarp * 4 + j] = o[j];
  }
  __syncthreads();
  const int of_head = static_cast<int>(blockIdx.x) * kColumns + thread;
  if (thread >= kColumns || of_head >= p.Dv) return;
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += of_warp[w][thread];
  static_cast<T*>(p.y)[(b * p.heads + h) * p.Dv + of_head] = static_cast<T>(sum);
}

}  // namespace

void mamba1_token_cuda(const Mamba1Token& p) {
  if (p.state.numel() == 0) return;
  const CudaContext& cuda = p.state.device().cuda_context();
  const auto B = static_cast<unsigned>(p.state.dim(0));
  const int channels = static_cast<int>(p.state.dim(1)), d_state = static_cast<int>(p.state.dim(2)),
            rank = static_cast<int>(p.dt_weight.dim(1));
  const Mamba1Args args{p.x.raw(),
                        p.selected.raw(),
                        p.dt_weight.raw(),
                        p.A_log.data<float>(),
                        p.D_skip.data<float>(),
                        p.dt_bias.data<float>(),
                        p.state.data<float>(),
                        p.y.raw(),
                        channels,
                        rank,
                        d_state};
  const dim3 grid(static_cast<unsigned>((channels + kScanChannels - 1) / kScanChannels), B);
  const size_t shared =
      static_cast<size_t>(kScanChannels * rank * size_of(p.x.dtype())) + static_cast<size_t>(rank + 2 * d_state) * sizeof(float);
  const auto start = [&](auto kernel) { launch_overlapping(kernel, "mamba1_token_kernel", grid, kThreads, shared, cuda, args); };
  const bool narrow = d_state <= 4 * kLanesOfChannel;
  if (p.x.dtype() == Dtype::f32) narrow ? start(&mamba1_token_kernel<float, 1>) : start(&mamba1_token_kernel<float, 4>);
  else narrow ? start(&mamba1_token_kernel<__nv_bfloat16, 1>) : start(&mamba1_token_kernel<__nv_bfloat16, 4>);
}

void mamba2_token_cuda(const Mamba2Token& p) {
  if (p.state.numel() == 0) return;
  const CudaContext& cuda = p.state.device().cuda_context();
  const auto B = static_cast<unsigned>(p.state.dim(0)), H = static_cast<unsigned>(p.state.dim(1));
  const int headdim = static_cast<int>(p.state.dim(2)), d_state = static_cast<int>(p.state.dim(3));
  const Mamba2Args args{p.projected.raw(),
                        p.window.raw(),
                        p.conv_weight.data<float>(),
                        p.conv_bias ? p.conv_bias.data<float>() : nullptr,
                        p.A_log.data<float>(),
                        p.D_skip.data<float>(),
                        p.dt_bias.data<float>(),
                        p.state.data<float>(),
                        p.y.raw(),
                        p.projected.stride(0),
                        static_cast<float>(p.dt_min),
                        static_cast<float>(p.dt_max),
                        static_cast<int>(H),
                        headdim,
                        d_state,
                        static_cast<int>(p.groups),
                        static_cast<int>(p.conv_weight.dim(2)),
                        static_cast<int>(p.conv_weight.dim(0)),
                        p.D_skip.rank() == 2,
                        p.gate};
  const int64_t states = p.state.dim(0) * p.state.dim(1);
  const bool many = has_many_rows_kernel() && headdim == kManyHead && d_state == kManyState && args.width == kManyTaps &&
                    states >= 2 * kManyBlocks * cuda.sm_count;
  if (many) {
    const auto start = [&](auto kernel) {
      launch_overlapping(kernel, "mamba2_many_rows_kernel", static_cast<unsigned>(kManyBlocks * cuda.sm_count), kManyThreads,
                         kStates * kStateFloats * sizeof(float), cuda, args, static_cast<int>(states));
    };
    return p.projected.dtype() == Dtype::f32 ? start(&mamba2_many_rows_kernel<float>) : start(&mamba2_many_rows_kernel<__nv_bfloat16>);
  }
  // A whole head's channels in one block: less of the convolution is done again, and fewer blocks read the same lines at the same time.
  const bool wide = headdim % (16 * kChannelsOfWarp) == 0;
  const auto start = [&](auto kernel, int warps) {
    const dim3 grid(static_cast<unsigned>(headdim / (warps * kChannelsOfWarp)), H, B);
    launch_overlapping(kernel, "mamba2_token_kernel", grid, static_cast<unsigned>(warps * kWarp), 0, cuda, args);
  };
  const auto with_type = [&](auto element) {
    using T = decltype(element);
    if (d_state <= 128) wide ? start(&mamba2_token_kernel<T, 1, 16>, 16) : start(&mamba2_token_kernel<T, 1, 4>, 4);
    else wide ? start(&mamba2_token_kernel<T, 2, 16>, 16) : start(&mamba2_token_kernel<T, 2, 4>, 4);
  };
  p.projected.dtype() == Dtype::f32 ? with_type(0.0f) : with_type(__nv_bfloat16());
}

void gla_token_cuda(const GlaToken& p) {
  if (p.state.numel() == 0) return;
  const CudaContext& cuda = p.state.device().cuda_context();
  const auto B = static_cast<unsigned>(p.state.dim(0)), H = static_cast<unsigned>(p.state.dim(1));
  const int Dk = static_cast<int>(p.state.dim(2)), Dv = static_cast<int>(p.state.dim(3)), rank = static_cast<int>(p.gate_weight.dim(1));
  const GlaArgs args{p.q.raw(),
                     p.k.raw(),
                     p.v.raw(),
                     p.gate_input.raw(),
                     p.gate_weight.raw(),
                     p.gate_bias.data<float>(),
                     p.state.data<float>(),
                     p.y.raw(),
                     p.q.stride(0),
                     static_cast<float>(p.gate_normalizer),
                     static_cast<float>(p.gate_min),
                     static_cast<float>(p.scale),
                     static_cast<int>(H),
                     Dk,
                     Dv,
                     rank};
  const dim3 grid(static_cast<unsigned>((Dv + kColumns - 1) / kColumns), H, B);
  const size_t shared = static_cast<size_t>(Dk * rank * size_of(p.q.dtype())) + static_cast<size_t>(rank) * sizeof(float);
  const auto start = [&](auto kernel) { launch_overlapping(kernel, "gla_token_kernel", grid, kThreads, shared, cuda, args); };
  p.q.dtype() == Dtype::f32 ? start(&gla_token_kernel<float>) : start(&gla_token_kernel<__nv_bfloat16>);
}

}  // namespace longhand
