// Causal depthwise convolution kernels; causal_conv1d.h and causal_conv1d_kernels.h have the formulas. The sums run over `taps` inputs, 4
// or 8: a narrower filter has zeros in front, which meet only inputs that the caller can see (or zeros), never past the window.
//
// causal_conv1d_fwd_runs_kernel
// moves   x in, y out: 4 bytes per element in bf16; the windows and weights are small
// flops   about 16, an exponential and a reciprocal per element: memory bound
// floor   B32 T2048 C1536 bf16: 403 MB / 3.0 TB/s = 0.13 ms on an H100 SXM
// split   a warp owns 32 packs of neighbouring channels and a run of time steps, with the last taps-1 inputs in registers; the taps-1
// inputs in
//         front of a run are read again. Neighbouring warps own neighbouring channels of the same run
// needs   packs of 8 (bf16) or 4 channels where C, the strides and the addresses allow, else one channel per thread; strides are free
// agrees  with the CPU reference: kCausalConv1dToleranceF32; bf16 adds one rounding of the output
// order   one thread sums an output, tap after tap
//
// causal_conv1d_bwd_ranges_kernel
// moves   x and grad_y in, grad_x out: 6 bytes per element in bf16: 0.20 ms at the shape above
// split   as many warps as fit the GPU; those of one channel tile share the B * T positions in equal contiguous ranges and keep grad_weight
// and
//         grad_bias in registers; each leaves one partial row and sum_partials adds them. Inside a range pre is computed again; grad_pre of
//         the taps-1 positions behind the range is computed twice
// order   ranges follow from the shape, the build and the GPU; no atomics
#include <algorithm>

#include "core/cuda_context.h"
#include "core/error.h"
#include "ops/causal_conv1d/causal_conv1d_kernels.h"
#include "ops/common/copies_ahead.cuh"
#include "ops/common/cuda_math.cuh"
#include "ops/common/strided_rows.h"
#include "ops/common/sum_partials.h"

namespace longhand {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarpsPerBlock * kWarp;
constexpr int kAhead = 4;        // time steps that are asked for together
constexpr int kStages = 3;       // groups of them: one in work, the others on their way
constexpr int kShortestRun = 8;  // forward: 3 of 11 inputs are read twice
constexpr int64_t kShortestRange = 16;
constexpr int kBackwardBlocks = 4;  // per SM: caps the registers

// [B, time, C] with contiguous channels; null stands for zeros or for "not wanted".
template <class T>
struct Series {
  T* data = nullptr;
  int64_t batch_stride = 0, time_stride = 0;
  __device__ T* at(int64_t b, int t) const { return data + b * batch_stride + t * time_stride; }
};
template <class T>
Series<T> series_of(const Tensor& t) {
  return t.defined() ? Series<T>{static_cast<T*>(t.raw()), t.stride(0), t.stride(1)} : Series<T>{};
}

template <class T>
struct Problem {
  Series<T> x, window0;
  const float *weight, *bias;  // bias may be null
  int64_t batch, channels;
  int time;
  int width;      // W <= taps
  int64_t tiles;  // groups of 32 packs of channels
};

// Packs on their way from global memory, each for the thread that asked for it: no barrier is needed.
template <class T, int vec>
struct Staged {
  Pack<T, vec> at[kStages][kAhead][kThreads];
  __device__ void ask(int stage, int s, const T* from) { copy_pack_async(&at[stage][s][threadIdx.x], from); }
  __device__ const Pack<T, vec>& get(int stage, int s) const { return at[stage][s][threadIdx.x]; }
};

// Whole groups of kAhead time steps between begin and end, asked for kStages - 1 groups before they are used.
// ask(stage, s, t): asks for step t, the s-th of the group that lies in `stage`
template <class Ask>
class GroupsAhead {
 public:
  __device__ GroupsAhead(int begin, int end, Ask ask) : ask_(ask), at_(begin), end_(end) {
#pragma unroll
    for (int stage = 0; stage + 1 < kStages; ++stage) ask_for(stage);
  }
  // The stage of the next group, which has come.
  __device__ int next() {
    const int now = stage_, before = now == 0 ? kStages - 1 : now - 1;
    ask_for(before);
    copies_arrived_but<kStages - 1>();
    stage_ = now + 1 == kStages ? 0 : now + 1;
    return now;
  }

 private:
  __device__ void ask_for(int stage) {
    if (at_ + kAhead <= end_) {
#pragma unroll
      for (int s = 0; s < kAhead; ++s) ask_(stage, s, at_ + s);
    }
    close_copies();
    at_ += kAhead;
  }
  Ask ask_;
  int at_, end_, stage_ = 0;
};

// A thread's weights, with zeros in front of the real taps.
template <class T, int vec, int taps>
__device__ void load_filter(const Problem<T>& p, int64_t c, float (&weight)[taps][vec], float (&bias)[vec]) {
  const int missing = taps - p.width;
#pragma unroll
  for (int i = 0; i < vec; ++i) {
    bias[i] = p.bias != nullptr ? p.bias[c + i] : 0.0f;
#pragma unroll
    for (int j = 0; j < taps; ++j) weight[j][i] = j >= missing ? p.weight[(c + i) * p.width + j - missing] : 0.0f;
  }
}

// past[k] = input at t - (taps-1) + k: x, window0, or zero in front of it.
template <class T, int vec, int taps>
__device__ void load_past(const Problem<T>& p, int64_t b, int t, int64_t c, float (&past)[taps - 1][vec]) {
#pragma unroll
  for (int k = 0; k < taps - 1; ++k) {
    const int at = t - (taps - 1) + k, in_window = at + p.width - 1;
    const T* from = at >= 0 ? p.x.at(b, at) : p.window0.data != nullptr && in_window >= 0 ? p.window0.at(b, in_window) : nullptr;
    Pack<T, vec> in{};
    if (from != nullptr) in = load_pack<vec>(from + c);
#pragma unroll
    for (int i = 0; i < vec; ++i) past[k][i] = from != nullptr ? to_f32(in.at[i]) : 0.0f;
  }
}

template <int vec, int taps>
__device__ void convolve(const float (&weight)[taps][vec], const float (&bias)[vec], const float (&past)[taps - 1][vec],
                         const float (&now)[vec], float (&pre)[vec]) {
#pragma unroll
  for (int i = 0; i < vec; ++i) {
    pre[i] = bias[i];
#pragma unroll
    for (int j = 0; j < taps - 1; ++j) pre[i] += weight[j][i] * past[j][i];
    pre[i] += weight[taps - 1][i] * now[i];
  }
}

template <int vec, int length>
__device__ void push(float (&past)[length][vec], const float (&now)[vec]) {
#pragma unroll
  for (int i = 0; i < vec; ++i) {
#pragma unroll
    for (int k = 0; k + 1 < length; ++k) past[k][i] = past[k + 1][i];
    past[length - 1][i] = now[i];
  }
}

// y at one time; the input moves into the past.
template <class T, int vec, int taps>
__device__ Pack<T, vec> forward_step(const float (&weight)[taps][vec], const float (&bias)[vec], float (&past)[taps - 1][vec],
                                     const Pack<T, vec>& in) {
  float now[vec], out[vec];
#pragma unroll
  for (int i = 0; i < vec; ++i) now[i] = to_f32(in.at[i]);
  convolve(weight, bias, past, now, out);
#pragma unroll
  for (int i = 0; i < vec; ++i) out[i] = silu(out[i]);
  push(past, now);
  return round_to<T>(out);
}

template <class T, int vec, int taps>
__global__ void __launch_bounds__(kThreads, taps == 4 ? 4 : 1)
    causal_conv1d_fwd_runs_kernel(const Problem<T> p, const Series<T> y, const Series<T> window, int run, int64_t runs) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  const int64_t tile = warp % p.tiles, item = warp / p.tiles, b = item / runs;
  const int64_t c = (tile * kWarp + threadIdx.x % kWarp) * vec;
  if (b >= p.batch || c >= p.channels) return;
  const int begin = static_cast<int>(item - b * runs) * run, end = begin + min(p.time - begin, run);

  float weight[taps][vec], bias[vec], past[taps - 1][vec];
  load_filter(p, c, weight, bias);
  load_past<T, vec, taps>(p, b, begin, c, past);
  int t = begin;
  Pack<T, vec> in[kAhead], ahead[kAhead];  // the group in work, and the next one on its way
  const auto ask = [&](Pack<T, vec>(&group)[kAhead], int from) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) group[s] = load_pack<vec>(p.x.at(b, from + s) + c);
  };
  if (t + kAhead <= end) ask(in, t);
  for (; t + kAhead <= end; t += kAhead) {
    if (t + 2 * kAhead <= end) ask(ahead, t + kAhead);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      store_pack(y.at(b, t + s) + c, forward_step(weight, bias, past, in[s]));
      in[s] = ahead[s];
    }
  }
  for (; t < end; ++t) store_pack(y.at(b, t) + c, forward_step(weight, bias, past, load_pack<vec>(p.x.at(b, t) + c)));

  if (end != p.time) return;  // past holds the last inputs of the sequence: they are the window
#pragma unroll
  for (int k = 0; k < taps - 1; ++k) {
    const int i = k - (taps - p.width);
    if (i >= 0) store_pack(window.at(b, i) + c, round_to<T>(past[k]));
  }
}

template <class T>
struct Gradients {
  Series<T> grad_y, grad_window;           // in; grad_window may be null
  Series<T> grad_x, grad_window0;          // out; may be null
  float *weight_partials, *bias_partials;  // [ranges, C, W] and [ranges, C]; may be null
  int64_t ranges;
};

// What a thread of the backward carries from step to step.
template <int vec, int taps>
struct BackwardState {
  float weight[taps][vec], bias[vec];
  float grad_weight[taps][vec], grad_bias[vec];
  float past[taps - 1][vec], grad_past[taps - 1][vec];  // inputs and grad_pre at t-(taps-1) .. t-1

  // grad_pre at t; where `owned`, it counts for the weights (positions behind the range belong to the next one).
  template <class T>
  __device__ void grad_pre(const Pack<T, vec>& in, const Pack<T, vec>& grad_in, bool owned, float (&result)[vec]) {
    float now[vec], pre[vec];
#pragma unroll
    for (int i = 0; i < vec; ++i) now[i] = to_f32(in.at[i]);
    convolve(weight, bias, past, now, pre);
#pragma unroll
    for (int i = 0; i < vec; ++i) result[i] = to_f32(grad_in.at[i]) * silu_slope(pre[i], sigmoid(pre[i]));
    if (owned) {
#pragma unroll
      for (int i = 0; i < vec; ++i) {
        grad_bias[i] += result[i];
#pragma unroll
        for (int j = 0; j < taps - 1; ++j) grad_weight[j][i] += result[i] * past[j][i];
        grad_weight[taps - 1][i] += result[i] * now[i];
      }
    }
    push(past, now);
  }

  // The gradient of the input at t - (taps-1), which the taps reach from there to t.
  __device__ void grad_oldest(const float (&now)[vec], float (&result)[vec]) const {
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      result[i] = weight[0][i] * now[i];
#pragma unroll
      for (int j = 1; j < taps; ++j) result[i] += weight[j][i] * grad_past[taps - 1 - j][i];
    }
  }
};

template <class T, int vec, int taps>
__global__ void __launch_bounds__(kThreads, taps == 4 ? kBackwardBlocks : 1)
    causal_conv1d_bwd_ranges_kernel(const Problem<T> p, const Gradients<T> g) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  const int64_t tile = warp % p.tiles, range = warp / p.tiles;
  const int64_t c = (tile * kWarp + threadIdx.x % kWarp) * vec;
  if (range >= g.ranges || c >= p.channels) return;
  const int64_t positions = p.batch * p.time, range_end = positions / g.ranges * (range + 1) + min(range + 1, positions % g.ranges);
  int64_t position = positions / g.ranges * range + min(range, positions % g.ranges);

  __shared__ Staged<T, vec> x_staged, grad_staged;
  BackwardState<vec, taps> state{};
  load_filter(p, c, state.weight, state.bias);
  while (position < range_end) {  // one sequence, or the part of it that lies in the range: times [begin, end)
    const int64_t b = position / p.time;
    const int begin = static_cast<int>(position - b * p.time),
              end = begin + static_cast<int>(min(static_cast<int64_t>(p.time - begin), range_end - position));
    position += end - begin;
    load_past<T, vec, taps>(p, b, begin, c, state.past);
#pragma unroll
    for (int k = 0; k < taps - 1; ++k)
#pragma unroll
      for (int i = 0; i < vec; ++i) state.grad_past[k][i] = 0;

    // One step with every border looked at: t may lie behind the range, behind the sequence, or reach inputs in front of them.
    const auto border_step = [&](int t) {
      float grad_pre[vec] = {}, grad[vec];
      if (t < p.time) state.grad_pre(load_pack<vec>(p.x.at(b, t) + c), load_pack<vec>(g.grad_y.at(b, t) + c), t < end, grad_pre);
      state.grad_oldest(grad_pre, grad);
      push(state.grad_past, grad_pre);

      const int q = t - (taps - 1);
      if (q < begin && (begin > 0 || q < 1 - p.width)) return;  // the range in front gives it, or nobody asks
      T* to = q >= 0 ? (g.grad_x.data != nullptr ? g.grad_x.at(b, q) : nullptr)
                     : (g.grad_window0.data != nullptr ? g.grad_window0.at(b, q + p.width - 1) : nullptr);
      if (to == nullptr) return;
      const int in_window = q - (p.time - (p.width - 1));
      if (in_window >= 0 && g.grad_window.data != nullptr) {
        const Pack<T, vec> from_window = load_pack<vec>(g.grad_window.at(b, in_window) + c);
#pragma unroll
        for (int i = 0; i < vec; ++i) grad[i] += to_f32(from_window.at[i]);
      }
      store_pack(to + c, round_to<T>(grad));
    };

    int t = begin;
    for (; t < min(begin + taps - 1, end); ++t) border_step(t);
    GroupsAhead ahead(t, end, [&](int stage, int s, int at) {
      x_staged.ask(stage, s, p.x.at(b, at) + c);
      grad_staged.ask(stage, s, g.grad_y.at(b, at) + c);
    });
    for (; t + kAhead <= end; t += kAhead) {  // inside: x[t - (taps-1)] belongs to the range and has no share in the window
      const int stage = ahead.next();
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        float grad_pre[vec], grad[vec];
        state.grad_pre(x_staged.get(stage, s), grad_staged.get(stage, s), true, grad_pre);
        state.grad_oldest(grad_pre, grad);
        if (g.grad_x.data != nullptr) store_pack(g.grad_x.at(b, t + s - (taps - 1)) + c, round_to<T>(grad));
        push(state.grad_past, grad_pre);
      }
    }
    for (; t < end + taps - 1; ++t) border_step(t);
  }

#pragma unroll
  for (int i = 0; i < vec; ++i) {
#pragma unroll
    for (int j = 0; j < taps; ++j) {
      const int real = j - (taps - p.width);
      if (real >= 0 && g.weight_partials != nullptr)
        g.weight_partials[(range * p.channels + c + i) * p.width + real] = state.grad_weight[j][i];
    }
    if (g.bias_partials != nullptr) g.bias_partials[range * p.channels + c + i] = state.grad_bias[i];
  }
}

bool fits(const Tensor& t, int64_t vec) {
  if (!t.defined() || t.numel() == 0) return true;
  return reinterpret_cast<std::uintptr_t>(t.raw()) % static_cast<std::uintptr_t>(vec * size_of(t.dtype())) == 0 && t.stride(0) % vec == 0 &&
         t.stride(1) % vec == 0 && t.dim(2) % vec == 0;
}
bool fit(std::initializer_list<const Tensor*> tensors, int64_t vec) {
  return std::all_of(tensors.begin(), tensors.end(), [vec](const Tensor* t) { return fits(*t, vec); });
}

template <class T, int vec>
Problem<T> problem_of(const Tensor& x, const Tensor& window0, const Tensor& weight, const Tensor& bias) {
  const int64_t channels = x.dim(2), per_tile = static_cast<int64_t>(kWarp) * vec;
  return {series_of<T>(x),
          series_of<T>(window0.numel() > 0 ? window0 : Tensor()),
          address_of<float>(weight),
          address_of<float>(bias),
          x.dim(0),
          channels,
          static_cast<int>(x.dim(1)),
          static_cast<int>(weight.dim(2)),
          (channels + per_tile - 1) / per_tile};
}

template <class Kernel>
int64_t warps_at_a_time(Kernel kernel, const CudaContext& cuda) {
  int resident = 0;  // blocks that one SM holds
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return static_cast<int64_t>(resident) * cuda.sm_count * kWarpsPerBlock;
}

template <class T, int vec, int taps>
void forward(const CausalConv1dForward& f) {
  const Problem<T> p = problem_of<T, vec>(f.x, f.window0, f.weight, f.bias);
  const CudaContext& cuda = f.x.device().cuda_context();
  const auto kernel = &causal_conv1d_fwd_runs_kernel<T, vec, taps>;
  // As many runs as the GPU works on at a time: a second wave that does not fill it would take as long as the first.
  const int64_t time = f.x.dim(1), wanted = std::clamp<int64_t>(warps_at_a_time(kernel, cuda) / (p.tiles * p.batch), 1, time);
  const int run = static_cast<int>(std::max<int64_t>(kShortestRun, (time + wanted - 1) / wanted));
  const int64_t runs = (time + run - 1) / run;
  const dim3 grid(static_cast<unsigned>((p.tiles * p.batch * runs + kWarpsPerBlock - 1) / kWarpsPerBlock)), block(kThreads);
  kernel<<<grid, block, 0, cuda.stream>>>(p, series_of<T>(f.y), series_of<T>(f.window), run, runs);
  launch_check("causal_conv1d_fwd_runs_kernel", grid, block);
}

template <class T, int vec, int taps>
void backward(const CausalConv1dBackward& b) {
  const Problem<T> p = problem_of<T, vec>(b.x, b.window0, b.weight, b.bias);
  const CudaContext& cuda = b.x.device().cuda_context();
  const auto kernel = &causal_conv1d_bwd_ranges_kernel<T, vec, taps>;
  const int64_t warps = warps_at_a_time(kernel, cuda);
  const int64_t ranges = std::max<int64_t>(1, std::min(warps / p.tiles, (p.batch * b.x.dim(1) + kShortestRange - 1) / kShortestRange));

  Tensor weight_partials, bias_partials;
  if (b.grad_weight) weight_partials = Tensor::empty(b.x.device(), Dtype::f32, Shape{ranges, p.channels * p.width});
  if (b.grad_bias) bias_partials = Tensor::empty(b.x.device(), Dtype::f32, Shape{ranges, p.channels});
  const Gradients<T> g{series_of<T>(b.grad_y),
                       series_of<T>(b.grad_window),
                       series_of<T>(b.grad_x),
                       series_of<T>(b.grad_window0),
                       address_of<float>(weight_partials),
                       address_of<float>(bias_partials),
                       ranges};
  const dim3 grid(static_cast<unsigned>((p.tiles * ranges + kWarpsPerBlock - 1) / kWarpsPerBlock)), block(kThreads);
  kernel<<<grid, block, 0, cuda.stream>>>(p, g);
  launch_check("causal_conv1d_bwd_ranges_kernel", grid, block);
  if (b.grad_weight) sum_partials_cuda(weight_partials, *b.grad_weight);
  if (b.grad_bias) sum_partials_cuda(bias_partials, *b.grad_bias);
}

// Calls f(pack width, taps), both as integral constants.
template <int vec, class F>
void choose_taps(int64_t width, F&& f) {
  width <= 4 ? f(std::integral_constant<int, vec>(), std::integral_constant<int, 4>())
             : f(std::integral_constant<int, vec>(), std::integral_constant<int, 8>());
}

template <class T>
void forward(const CausalConv1dForward& f) {
  const auto run = [&](auto vec, auto taps) { forward<T, vec(), taps()>(f); };
  const auto all_fit = [&](int64_t vec) { return fit({&f.x, &f.window0, &f.y, &f.window}, vec); };
  const int64_t width = f.weight.dim(2);
  if constexpr (sizeof(T) == 2) {
    if (all_fit(8)) return choose_taps<8>(width, run);
  }
  all_fit(4) ? choose_taps<4>(width, run) : choose_taps<1>(width, run);
}

template <class T>
void backward(const CausalConv1dBackward& b) {
  const auto run = [&](auto vec, auto taps) { backward<T, vec(), taps()>(b); };
  const bool packs = fit({&b.x, &b.window0, &b.grad_y, &b.grad_window, &b.grad_x, &b.grad_window0}, 4);
  packs ? choose_taps<4>(b.weight.dim(2), run) : choose_taps<1>(b.weight.dim(2), run);
}

}  // namespace

void causal_conv1d_fwd_cuda(const CausalConv1dForward& f) {
  f.x.dtype() == Dtype::bf16 ? forward<__nv_bfloat16>(f) : forward<float>(f);
}
void causal_conv1d_bwd_cuda(const CausalConv1dBackward& b) {
  b.x.dtype() == Dtype::bf16 ? backward<__nv_bfloat16>(b) : backward<float>(b);
}

}  // namespace longhand
