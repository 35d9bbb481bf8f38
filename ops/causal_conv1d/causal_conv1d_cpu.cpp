// The reference of causal_conv1d_silu in f32 and f64; see causal_conv1d.h and causal_conv1d_kernels.h for the formulas.
#include <algorithm>
#include <vector>

#include "ops/causal_conv1d/causal_conv1d_kernels.h"
#include "ops/common/activations.h"

namespace longhand {
namespace {

constexpr int64_t kChannelsPerBlock = 64;  // a thread owns a block of channels: sums over batch and time have one order

// The row of [B, time, C] at (b, t).
template <class T>
T* row(const Tensor& t, int64_t b, int64_t time) {
  return t.data<T>() + b * t.stride(0) + time * t.stride(1);
}

// The input at position t of [-(W-1), T): x, or window0, or null for zeros.
template <class T>
const T* input(const Tensor& x, const Tensor& window0, int64_t b, int64_t t, int64_t W) {
  if (t >= 0) return row<T>(x, b, t);
  return window0.defined() ? row<T>(window0, b, t + W - 1) : nullptr;
}

// The taps as [W, C], so that the loops over channels are contiguous.
template <class T>
std::vector<T> taps_by_channel(const Tensor& weight) {
  const int64_t C = weight.dim(0), W = weight.dim(2);
  std::vector<T> taps(static_cast<std::size_t>(W * C));
  for (int64_t c = 0; c < C; ++c)
    for (int64_t j = 0; j < W; ++j) taps[static_cast<std::size_t>(j * C + c)] = weight.data<T>()[c * W + j];
  return taps;
}

// pre[c] = bias[c] + sum_j taps[j, c] * x[t - (W-1) + j, c] for the channels [begin, end)
template <class T>
void convolve(const Tensor& x, const Tensor& window0, const Tensor& bias, const T* taps, int64_t C, int64_t W, int64_t b, int64_t t,
              int64_t begin, int64_t end, T* pre) {
  if (bias.defined()) std::copy(bias.data<T>() + begin, bias.data<T>() + end, pre);
  else std::fill(pre, pre + (end - begin), T(0));
  for (int64_t j = 0; j < W; ++j) {
    const T* in = input<T>(x, window0, b, t - (W - 1) + j, W);
    if (in == nullptr) continue;
    for (int64_t c = begin; c < end; ++c) pre[c - begin] += taps[j * C + c] * in[c];
  }
}

template <class T>
void forward(const CausalConv1dForward& f) {
  const int64_t B = f.x.dim(0), time = f.x.dim(1), C = f.x.dim(2), W = f.weight.dim(2);
  const std::vector<T> taps = taps_by_channel<T>(f.weight);
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < time; ++t) {
      T* y = row<T>(f.y, b, t);
      convolve(f.x, f.window0, f.bias, taps.data(), C, W, b, t, 0, C, y);
      for (int64_t c = 0; c < C; ++c) y[c] = silu(y[c]);
    }
  }
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < W - 1; ++i) {
      const T* last = input<T>(f.x, f.window0, b, time - (W - 1) + i, W);
      T* window = row<T>(f.window, b, i);
      for (int64_t c = 0; c < C; ++c) window[c] = last != nullptr ? last[c] : T(0);
    }
  }
}

template <class T>
void backward(const CausalConv1dBackward& g) {
  const int64_t B = g.x.dim(0), time = g.x.dim(1), C = g.x.dim(2), W = g.weight.dim(2),
                blocks = (C + kChannelsPerBlock - 1) / kChannelsPerBlock;
  const std::vector<T> taps = taps_by_channel<T>(g.weight);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kChannelsPerBlock, end = std::min(C, begin + kChannelsPerBlock), n = end - begin;
    T grad_weight[kMaxConvWidth][kChannelsPerBlock] = {}, grad_bias[kChannelsPerBlock] = {}, sum[kChannelsPerBlock];
    T ring[kMaxConvWidth][kChannelsPerBlock];  // grad_pre of the last W positions; position t lies at t mod W
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t t = 0; t < time + W - 1; ++t) {  // at t the gradient of position q = t - (W-1) becomes known
        T* grad_pre = ring[t % W];
        if (t < time) {
          convolve(g.x, g.window0, g.bias, taps.data(), C, W, b, t, begin, end, grad_pre);
          const T* grad_y = row<T>(g.grad_y, b, t) + begin;
          for (int64_t c = 0; c < n; ++c) grad_pre[c] = grad_y[c] * silu_slope(grad_pre[c]);
          for (int64_t c = 0; c < n; ++c) grad_bias[c] += grad_pre[c];
          for (int64_t j = 0; j < W; ++j) {
            const T* in = input<T>(g.x, g.window0, b, t - (W - 1) + j, W);
            if (in == nullptr) continue;
            for (int64_t c = 0; c < n; ++c) grad_weight[j][c] += grad_pre[c] * in[begin + c];
          }
        }
        const int64_t q = t - (W - 1), from_window = q - (time - (W - 1));
        const Tensor& target = q >= 0 ? g.grad_x : g.grad_window0;
        if (!target.defined()) continue;
        std::fill(sum, sum + n, T(0));
        for (int64_t j = 0; j < W; ++j) {
          const int64_t at = q + (W - 1) - j;
          if (at < 0 || at >= time) continue;
          for (int64_t c = 0; c < n; ++c) sum[c] += taps[static_cast<std::size_t>(j * C + begin + c)] * ring[at % W][c];
        }
        if (from_window >= 0 && g.grad_window.defined()) {
          const T* grad_window = row<T>(g.grad_window, b, from_window) + begin;
          for (int64_t c = 0; c < n; ++c) sum[c] += grad_window[c];
        }
        std::copy(sum, sum + n, row<T>(target, b, q >= 0 ? q : q + W - 1) + begin);
      }
    }
    const auto write = [](const Accumulation& to, int64_t at, T value) {
      T& place = to.destination.data<T>()[at];
      place = to.beta == 0 ? value : static_cast<T>(to.beta) * place + value;
    };
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t j = 0; j < W; ++j)
        if (g.grad_weight) write(*g.grad_weight, (begin + c) * W + j, grad_weight[j][c]);
      if (g.grad_bias) write(*g.grad_bias, begin + c, grad_bias[c]);
    }
  }
}

}  // namespace

void causal_conv1d_fwd_cpu(const CausalConv1dForward& f) {
  f.x.dtype() == Dtype::f64 ? forward<double>(f) : forward<float>(f);
}
void causal_conv1d_bwd_cpu(const CausalConv1dBackward& g) {
  g.x.dtype() == Dtype::f64 ? backward<double>(g) : backward<float>(g);
}

}  // namespace longhand
