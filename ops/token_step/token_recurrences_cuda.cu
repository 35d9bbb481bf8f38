// One step of a recurrence of each family; token_step.h has the formulas.
//
// mamba1_token_kernel, mamba2_token_kernel, gla_token_kernel
// moves   the state in and out once: 8*H*P*N bytes a row (2.1 MB at H 32, P 64, N 128)
// split   mamba1: four lanes a channel, which share N and the columns of dt's projection
//         mamba2: a block owns 64 channels (16) of one head of one row, a warp four of them; lanes share N. The convolution of B and C is
//                 computed again by every block
//         gla:    a block owns 16 columns of the state of one head of one row; a thread has a quad of columns of every 32nd key
//         Until the kernel in front has ended, states, windows, filters and small parameters are loaded
// order   fixed sums, no atomics: the same bits every time
// agrees  with the ops that they join: kTokenStepToleranceF32, kTokenStepToleranceBf16
#include <algorithm>

#include "core/error.h"
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

template <class T, int quads, int warps>  // 128 entries of N a warp holds in a quad a lane
__global__ void __launch_bounds__(warps* kWarp) mamba2_token_kernel(Mamba2Args p) {
  let_next_kernel_start();
  constexpr int kBlockThreads = warps * kWarp, kTokenChannels = warps * kChannelsOfWarp;
  constexpr int kMostInputs = (kTokenChannels + 2 * quads * 128 + kBlockThreads - 1) / kBlockThreads;
  __shared__ __align__(16) float inputs[kTokenChannels + 2 * quads * 128];  // after the convolution: x, B, C
  const int h = static_cast<int>(blockIdx.y), part = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.z;
  const int warp = thread / kWarp, lane = thread % kWarp, N = p.d_state, group = h / (p.heads / p.groups), inner = p.heads * p.headdim;
  const int count = kTokenChannels + 2 * N;
  auto channel_of = [&](int i) {  // of the convolution
    if (i < kTokenChannels) return h * p.headdim + part * kTokenChannels + i;
    i -= kTokenChannels;
    return i < N ? inner + group * N + i : inner + p.groups * N + group * N + i - N;
  };

  // What no kernel of this token has written. Loads do not wait for one another: the filters of four taps that models have are read whole.
  float pre[kMostInputs], last_tap[kMostInputs];
  const T* const windows = static_cast<const T*>(p.window) + b * (p.width - 1) * p.channels;
  if (p.width == 4) {
    Pack<float, 4> taps[kMostInputs];
    T past[kMostInputs][3];
#pragma unroll
    for (int k = 0; k < kMostInputs; ++k) {
      const int c = channel_of(min(thread + k * kBlockThreads, count - 1));
      taps[k] = load_pack<4>(p.conv_weight + static_cast<int64_t>(c) * 4);
      pre[k] = p.conv_bias != nullptr ? p.conv_bias[c] : 0.0f;
#pragma unroll
      for (int j = 0; j < 3; ++j) past[k][j] = windows[static_cast<int64_t>(j) * p.channels + c];
    }
#pragma unroll
    for (int k = 0; k < kMostInputs; ++k) {
#pragma unroll
      for (int j = 0; j < 3; ++j) pre[k] = fmaf(taps[k].at[j], to_f32(past[k][j]), pre[k]);
      last_tap[k] = taps[k].at[3];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kMostInputs; ++k) {
      const int c = channel_of(min(thread + k * kBlockThreads, count - 1));
      const float* weight = p.conv_weight + static_cast<int64_t>(c) * p.width;
      pre[k] = p.conv_bias != nullptr ? p.conv_bias[c] : 0.0f;
      for (int j = 0; j + 1 < p.width; ++j) pre[k] = fmaf(weight[j], to_f32(windows[static_cast<int64_t>(j) * p.channels + c]), pre[k]);
      last_tap[k] = weight[p.width - 1];
    }
  }
  Pack<float, 4> state[kChannelsOfWarp][quads];
  const int first = part * kTokenChannels + warp * kChannelsOfWarp;  // channel of the head
  float* const states = p.state + ((b * p.heads + h) * p.headdim + first) * N;
#pragma unroll
  for (int i = 0; i < kChannelsOfWarp; ++i)
#pragma unroll
    for (int q = 0; q < quads; ++q)
      if (const int n = (q * kWarp + lane) * 4; n < N) state[i][q] = load_pack<4>(states + i * N + n);

  const float dt_bias = p.dt_bias[h], A = -expf(p.A_log[h]);
  float D_skip[kChannelsOfWarp];
#pragma unroll
  for (int i = 0; i < kChannelsOfWarp; ++i) D_skip[i] = p.D_skip[p.skip_per_channel ? h * p.headdim + first + i : h];

  wait_for_kernel_in_front();
  const T* projected = static_cast<const T*>(p.projected) + b * p.projected_stride;
  T now[kMostInputs], z[kChannelsOfWarp] = {};  // again all under way together
#pragma unroll
  for (int k = 0; k < kMostInputs; ++k) now[k] = projected[inner + channel_of(min(thread + k * kBlockThreads, count - 1))];
  const T dt_in = projected[inner + p.channels + h];
  if (p.gate)
#pragma unroll
    for (int i = 0; i < kChannelsOfWarp; ++i) z[i] = projected[h * p.headdim + first + i];
#pragma unroll
  for (int k = 0; k < kMostInputs; ++k)
    if (const int i = thread + k * kBlockThreads; i < count)
      inputs[i] =
          to_f32(static_cast<T>(silu(fmaf(last_tap[k], to_f32(now[k]), pre[k]))));  // rounded where the convolution by itself rounds
  const float dt = fminf(fmaxf(softplus(to_f32(dt_in) + dt_bias), p.dt_min), p.dt_max);
  const float decay = expf(A * dt);
  __syncthreads();
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
#pragma unroll
  for (int i = 0; i < kChannelsOfWarp; ++i) y[i] = fmaf(D_skip[i], inputs[warp * kChannelsOfWarp + i], warp_sum(y[i]));
#pragma unroll
  for (int i = 0; i < kChannelsOfWarp; ++i) {
    const int64_t at = b * inner + h * p.headdim + first + i;
    if (lane != i) continue;
    if (p.gate) static_cast<float*>(p.y)[at] = y[i] * silu(to_f32(z[i]));
    else static_cast<T*>(p.y)[at] = static_cast<T>(y[i]);
  }
#pragma unroll
  for (int i = 0; i < kChannelsOfWarp; ++i)
#pragma unroll
    for (int q = 0; q < quads; ++q)
      if (const int n = (q * kWarp + lane) * 4; n < N) store_pack(states + i * N + n, state[i][q]);
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
