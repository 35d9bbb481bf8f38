// The selective scan on the CPU: the definition in plain loops, and the same walk over blocks of channels with its backward, f32 and f64.
// The innermost loops run over the channels of a block, whose states lie side by side. Blocks of one row of the batch are gathered into
// units, which run in parallel; how they are gathered depends on the shapes alone, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/common/activations.h"
#include "ops/selective_scan/selective_scan_kernels.h"

namespace longhand {
namespace {

constexpr int64_t kWidth = 32;  // channels of a block; a last block is filled up with channels that do nothing
constexpr int64_t kChunk = 32;  // tokens between two states that backward keeps

// --- softplus -------------------------------------------------------------------------------------------------

double softplus(double v) {
  return v > 20 ? v : std::log1p(std::exp(v));
}
double softplus_slope(double v) {
  return v > 20 ? 1 : 1 / (1 + std::exp(-v));
}

/// max(v, 0) + log(1 + e), e = exp(-|v|); log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1/3, by its series up to s^13, whose remainder is
/// below 2e-8 of the sum. Keeps its relative precision for very negative v; below -87, where e leaves the range of f32, it is 0.
float softplus(float v) {
  const float e = exp_of(v > 0 ? -v : v), s = e / (2.0f + e), s2 = s * s;
  float p = 1.0f / 13;
  p = p * s2 + 1.0f / 11;
  p = p * s2 + 1.0f / 9;
  p = p * s2 + 1.0f / 7;
  p = p * s2 + 1.0f / 5;
  p = p * s2 + 1.0f / 3;
  p = p * s2 + 1.0f;
  const float sum = (v > 0 ? v : 0.0f) + 2.0f * s * p;
  return v < -87.0f ? 0.0f : v != v ? v : sum;
}
float softplus_slope(float v) {
  return v < -87.0f ? 0.0f : sigmoid(v);
}

// --- operands -------------------------------------------------------------------------------------------------

template <class T>
T* token(const Tensor& t, int64_t b, int64_t i) {
  return t.data<T>() + b * t.stride(0) + i * t.stride(1);
}

template <class T>
const T* optional_data(const Tensor& t) {
  return t ? t.data<T>() : nullptr;
}

SelectiveScanResult make_result(const SelectiveScanInputs& in) {
  return {Tensor::empty(in.x.device(), in.x.dtype(), in.x.shape()),
          Tensor::empty(in.x.device(), in.A_log.dtype(), {in.x.dim(0), in.x.dim(2), in.A_log.dim(1)})};
}

template <class T>
std::vector<T> buffer(int64_t count) {
  return std::vector<T>(static_cast<std::size_t>(count));
}

/// One row of numbers, a channel each.
template <class T>
struct Lanes {
  alignas(64) T at[kWidth];
  T& operator[](int64_t c) { return at[c]; }
  T operator[](int64_t c) const { return at[c]; }
};

template <class T>
T dot(const Lanes<T>& a, const Lanes<T>& b) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < kWidth; ++c) sum += a[c] * b[c];
  return sum;
}

/// Channels [first, first + count) in row b.
template <class T>
struct Block {
  const SelectiveScanInputs& in;
  int64_t b, first, count, N;
  Lanes<T> D_skip, dt_bias;
  std::vector<Lanes<T>> A;  // [N]

  Block(const SelectiveScanInputs& inputs, int64_t row, int64_t block)
      : in(inputs),
        b(row),
        first(block * kWidth),
        count(std::min(kWidth, inputs.x.dim(2) - first)),
        N(inputs.A_log.dim(1)),
        A(static_cast<std::size_t>(N)) {
    const T *A_log = in.A_log.data<T>() + first * N, *D = optional_data<T>(in.D_skip), *bias = in.dt_bias.data<T>() + first;
    for (int64_t c = 0; c < kWidth; ++c) {
      D_skip[c] = D != nullptr && c < count ? D[first + c] : T(0);
      dt_bias[c] = c < count ? bias[c] : T(0);
      for (int64_t n = 0; n < N; ++n) A[static_cast<std::size_t>(n)][c] = c < count ? -std::exp(A_log[c * N + n]) : T(0);
    }
  }

  Lanes<T> load(const Tensor& t, int64_t i, T rest = 0) const {
    Lanes<T> lanes;
    const T* from = token<T>(t, b, i) + first;
    for (int64_t c = 0; c < count; ++c) lanes[c] = from[c];
    for (int64_t c = count; c < kWidth; ++c) lanes[c] = rest;
    return lanes;
  }
  void store(const Tensor& t, int64_t i, const Lanes<T>& lanes) const { std::copy_n(lanes.at, count, token<T>(t, b, i) + first); }

  /// dt before softplus, bias added; channels that are not there stand still.
  Lanes<T> raw_steps(int64_t i) const {
    Lanes<T> raw = load(in.dt, i, -std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < kWidth; ++c) raw[c] += dt_bias[c];
    return raw;
  }

  /// [D, N] of row b <-> [N] lanes; an undefined tensor gives zeros.
  void load_state(const Tensor& t, std::vector<Lanes<T>>& state) const {
    for (int64_t n = 0; n < N; ++n)
      for (int64_t c = 0; c < kWidth; ++c)
        state[static_cast<std::size_t>(n)][c] = t && c < count ? t.data<T>()[(b * in.x.dim(2) + first + c) * N + n] : T(0);
  }
  void store_state(const Tensor& t, const std::vector<Lanes<T>>& state) const {
    for (int64_t n = 0; n < N; ++n)
      for (int64_t c = 0; c < count; ++c) t.data<T>()[(b * in.x.dim(2) + first + c) * N + n] = state[static_cast<std::size_t>(n)][c];
  }
};

template <class T>
Lanes<T> steps(const Lanes<T>& raw) {
  Lanes<T> dt;
  for (int64_t c = 0; c < kWidth; ++c) dt[c] = softplus(raw[c]);
  return dt;
}
template <class T>
Lanes<T> product(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> lanes;
  for (int64_t c = 0; c < kWidth; ++c) lanes[c] = a[c] * b[c];
  return lanes;
}

// --- recurrent ------------------------------------------------------------------------------------------------

template <class T>
void recurrent(const SelectiveScanInputs& in, const SelectiveScanResult& out) {
  const int64_t B = in.x.dim(0), T_ = in.x.dim(1), D = in.x.dim(2), N = in.A_log.dim(1);
  const T *A_log = in.A_log.data<T>(), *dt_bias = in.dt_bias.data<T>(), *D_skip = optional_data<T>(in.D_skip);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t d = 0; d < D; ++d) {
      T* h = out.h_T.data<T>() + (b * D + d) * N;
      for (int64_t n = 0; n < N; ++n) h[n] = in.h0 ? in.h0.data<T>()[(b * D + d) * N + n] : T(0);
      for (int64_t t = 0; t < T_; ++t) {
        const T raw = token<T>(in.dt, b, t)[d] + dt_bias[d], dt = raw > 20 ? raw : std::log1p(std::exp(raw));
        const T x = token<T>(in.x, b, t)[d], *B_t = token<T>(in.B_t, b, t), *C_t = token<T>(in.C_t, b, t);
        T y = D_skip != nullptr ? D_skip[d] * x : T(0);
        for (int64_t n = 0; n < N; ++n) {
          h[n] = std::exp(-dt * std::exp(A_log[d * N + n])) * h[n] + dt * B_t[n] * x;
          y += C_t[n] * h[n];
        }
        if (in.z) {
          const T z = token<T>(in.z, b, t)[d];
          y *= z / (1 + std::exp(-z));
        }
        token<T>(out.y, b, t)[d] = y;
      }
    }
}

// --- forward --------------------------------------------------------------------------------------------------

template <class T>
void forward(const SelectiveScanInputs& in, const SelectiveScanResult& out) {
  const int64_t B = in.x.dim(0), T_ = in.x.dim(1), D = in.x.dim(2), N = in.A_log.dim(1), blocks = (D + kWidth - 1) / kWidth;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < blocks; ++k) {
      const Block<T> block(in, b, k);
      std::vector<Lanes<T>> state(static_cast<std::size_t>(N));
      block.load_state(in.h0, state);
      for (int64_t t = 0; t < T_; ++t) {
        const Lanes<T> x = block.load(in.x, t), dt = steps(block.raw_steps(t)), input = product(dt, x);
        const T *B_t = token<T>(in.B_t, b, t), *C_t = token<T>(in.C_t, b, t);
        Lanes<T> y = product(block.D_skip, x);
        for (int64_t n = 0; n < N; ++n) {
          const Lanes<T>& A = block.A[static_cast<std::size_t>(n)];
          Lanes<T>& h = state[static_cast<std::size_t>(n)];
          for (int64_t c = 0; c < kWidth; ++c) {
            h[c] = exp_of(dt[c] * A[c]) * h[c] + input[c] * B_t[n];
            y[c] += C_t[n] * h[c];
          }
        }
        if (in.z) {
          const Lanes<T> z = block.load(in.z, t);
          for (int64_t c = 0; c < kWidth; ++c) y[c] *= silu(z[c]);
        }
        block.store(out.y, t, y);
      }
      block.store_state(out.h_T, state);
    }
}

// --- backward -------------------------------------------------------------------------------------------------

/// What backward keeps of one chunk while it walks back through it.
template <class T>
struct ChunkHistory {
  std::vector<Lanes<T>> decay, kept;                // [kChunk, N]: exp(dt A), and p = exp(dt A) h[t-1]
  std::vector<Lanes<T>> x, raw, dt, input, grad_r;  // [kChunk]; input = dt x
  explicit ChunkHistory(int64_t N)
      : decay(static_cast<std::size_t>(kChunk * N)),
        kept(decay.size()),
        x(kChunk),
        raw(kChunk),
        dt(kChunk),
        input(kChunk),
        grad_r(kChunk) {}
};

/// Sums over what one row of the batch gives; the rows are added in order afterwards.
template <class T>
struct RowSums {
  std::vector<T> A_log, D_skip, dt_bias;  // [B, D, N], [B, D], [B, D]
};

/// Walks through tokens [begin, end) with the state, keeping nothing.
template <class T>
void advance(const Block<T>& block, int64_t begin, int64_t end, std::vector<Lanes<T>>& state) {
  for (int64_t t = begin; t < end; ++t) {
    const Lanes<T> dt = steps(block.raw_steps(t)), input = product(dt, block.load(block.in.x, t));
    const T* B_t = token<T>(block.in.B_t, block.b, t);
    for (int64_t n = 0; n < block.N; ++n) {
      const Lanes<T>& A = block.A[static_cast<std::size_t>(n)];
      Lanes<T>& h = state[static_cast<std::size_t>(n)];
      for (int64_t c = 0; c < kWidth; ++c) h[c] = exp_of(dt[c] * A[c]) * h[c] + input[c] * B_t[n];
    }
  }
}

/// Walks through a chunk with the state, fills the history, adds to dC [T, N] and writes grad_z.
template <class T>
void remember(const SelectiveScanBackward& g, const Block<T>& block, int64_t begin, int64_t end, std::vector<Lanes<T>>& state,
              ChunkHistory<T>& history, T* dC) {
  const SelectiveScanInputs& in = g.in;
  const int64_t N = block.N;
  for (int64_t t = begin; t < end; ++t) {
    const auto i = static_cast<std::size_t>(t - begin);
    const Lanes<T> x = history.x[i] = block.load(in.x, t), raw = history.raw[i] = block.raw_steps(t), dt = history.dt[i] = steps(raw),
                   input = history.input[i] = product(dt, x);
    const Lanes<T> grad_y = g.grad_y ? block.load(g.grad_y, t) : Lanes<T>{}, z = in.z ? block.load(in.z, t) : Lanes<T>{};
    Lanes<T>& grad_r = history.grad_r[i] = grad_y;
    if (in.z)
      for (int64_t c = 0; c < kWidth; ++c) grad_r[c] *= silu(z[c]);
    Lanes<T> r = product(block.D_skip, x);
    const T *B_t = token<T>(in.B_t, block.b, t), *C_t = token<T>(in.C_t, block.b, t);
    for (int64_t n = 0; n < N; ++n) {
      const auto in_chunk = static_cast<std::size_t>((t - begin) * N + n);
      const Lanes<T>& A = block.A[static_cast<std::size_t>(n)];
      Lanes<T>&h = state[static_cast<std::size_t>(n)], &decay = history.decay[in_chunk], &p = history.kept[in_chunk];
      for (int64_t c = 0; c < kWidth; ++c) {
        decay[c] = exp_of(dt[c] * A[c]);
        p[c] = decay[c] * h[c];
        h[c] = p[c] + input[c] * B_t[n];
        r[c] += C_t[n] * h[c];
      }
      dC[t * N + n] += dot(grad_r, h);
    }
    if (g.grad_z) {
      Lanes<T> grad_z;
      for (int64_t c = 0; c < kWidth; ++c) grad_z[c] = grad_y[c] * r[c] * silu_slope(z[c]);
      block.store(g.grad_z, t, grad_z);
    }
  }
}

/// Walks back through a chunk with the gradient of the state, adds to dB [T, N] and to the sums, and writes grad_x and grad_dt.
template <class T>
void walk_back(const SelectiveScanBackward& g, const Block<T>& block, int64_t begin, int64_t end, std::vector<Lanes<T>>& carry,
               const ChunkHistory<T>& history, T* dB, std::vector<Lanes<T>>& sum_A, Lanes<T>& sum_D, Lanes<T>& sum_bias) {
  const int64_t N = block.N;
  for (int64_t t = end - 1; t >= begin; --t) {
    const auto i = static_cast<std::size_t>(t - begin);
    const Lanes<T>&x = history.x[i], &dt = history.dt[i], &input = history.input[i], &grad_r = history.grad_r[i];
    const T *B_t = token<T>(g.in.B_t, block.b, t), *C_t = token<T>(g.in.C_t, block.b, t);
    Lanes<T> along_B{}, along_A{};  // <B_t, lambda> and <A, lambda p>
    for (int64_t n = 0; n < N; ++n) {
      const auto in_chunk = static_cast<std::size_t>((t - begin) * N + n), at = static_cast<std::size_t>(n);
      const Lanes<T>&A = block.A[at], &decay = history.decay[in_chunk], &p = history.kept[in_chunk];
      Lanes<T>&next = carry[at], &sum = sum_A[at];
      Lanes<T> lambda;
      for (int64_t c = 0; c < kWidth; ++c) {
        lambda[c] = C_t[n] * grad_r[c] + next[c];
        const T kept = A[c] * lambda[c] * p[c];
        along_B[c] += lambda[c] * B_t[n];
        along_A[c] += kept;
        sum[c] += kept * dt[c];
        next[c] = decay[c] * lambda[c];
      }
      dB[t * N + n] += dot(lambda, input);
    }
    Lanes<T> grad_x, grad_dt;
    for (int64_t c = 0; c < kWidth; ++c) {
      grad_x[c] = block.D_skip[c] * grad_r[c] + dt[c] * along_B[c];
      grad_dt[c] = (x[c] * along_B[c] + along_A[c]) * softplus_slope(history.raw[i][c]);
      sum_D[c] += grad_r[c] * x[c];
      sum_bias[c] += grad_dt[c];
    }
    if (g.grad_x) block.store(g.grad_x, t, grad_x);
    if (g.grad_dt) block.store(g.grad_dt, t, grad_dt);
  }
}

template <class T>
void backward_block(const SelectiveScanBackward& g, const Block<T>& block, T* dB, T* dC, RowSums<T>& rows) {
  const int64_t T_ = g.in.x.dim(1), D = g.in.x.dim(2), N = block.N, chunks = (T_ + kChunk - 1) / kChunk;
  std::vector<std::vector<Lanes<T>>> borders(static_cast<std::size_t>(chunks));
  std::vector<Lanes<T>> state(static_cast<std::size_t>(N)), carry(state.size()), sum_A(state.size());
  block.load_state(g.in.h0, state);
  for (int64_t k = 0; k < chunks; ++k) {
    borders[static_cast<std::size_t>(k)] = state;
    if (k + 1 < chunks) advance(block, k * kChunk, (k + 1) * kChunk, state);
  }
  block.load_state(g.grad_h_T, carry);
  ChunkHistory<T> history(N);
  Lanes<T> sum_D{}, sum_bias{};
  for (int64_t k = chunks - 1; k >= 0; --k) {
    const int64_t begin = k * kChunk, end = std::min(T_, begin + kChunk);
    remember(g, block, begin, end, borders[static_cast<std::size_t>(k)], history, dC);
    walk_back(g, block, begin, end, carry, history, dB, sum_A, sum_D, sum_bias);
  }
  if (g.grad_h0) block.store_state(g.grad_h0, carry);
  for (int64_t c = 0; c < block.count; ++c) {
    const int64_t channel = block.b * D + block.first + c;
    rows.D_skip[static_cast<std::size_t>(channel)] = sum_D[c];
    rows.dt_bias[static_cast<std::size_t>(channel)] = sum_bias[c];
    for (int64_t n = 0; n < N; ++n) rows.A_log[static_cast<std::size_t>(channel * N + n)] = sum_A[static_cast<std::size_t>(n)][c];
  }
}

/// target = beta * target + sum_b rows[b, :]
template <class T>
void add_rows(const std::optional<Accumulation>& target, const std::vector<T>& rows) {
  if (!target) return;
  const int64_t width = target->destination.numel(), count = static_cast<int64_t>(rows.size()) / width;
  T* to = target->destination.data<T>();
  for (int64_t i = 0; i < width; ++i) {
    T sum = 0;
    for (int64_t b = 0; b < count; ++b) sum += rows[static_cast<std::size_t>(b * width + i)];
    to[i] = target->beta == 0 ? sum : static_cast<T>(target->beta) * to[i] + sum;
  }
}

template <class T>
void backward(const SelectiveScanBackward& g) {
  const int64_t B = g.in.x.dim(0), T_ = g.in.x.dim(1), D = g.in.x.dim(2), N = g.in.A_log.dim(1), blocks = (D + kWidth - 1) / kWidth;
  const int64_t units_per_row = std::min(blocks, (16 + B - 1) / B);  // about 16 units: enough for the threads, few partial sums
  RowSums<T> rows{buffer<T>(B * D * N), buffer<T>(B * D), buffer<T>(B * D)};
  auto parts_B = buffer<T>(units_per_row * B * T_ * N), parts_C = buffer<T>(units_per_row * B * T_ * N);  // [unit, B, T, N]
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < B; ++b)
    for (int64_t unit = 0; unit < units_per_row; ++unit) {
      const int64_t part = (unit * B + b) * T_ * N;
      for (int64_t k = unit * blocks / units_per_row; k < (unit + 1) * blocks / units_per_row; ++k)
        backward_block(g, Block<T>(g.in, b, k), parts_B.data() + part, parts_C.data() + part, rows);
    }
  const auto add_parts = [&](const Tensor& target, const std::vector<T>& parts) {
    if (!target) return;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < T_; ++t) {
        T* to = token<T>(target, b, t);
        std::fill_n(to, N, T(0));
        for (int64_t unit = 0; unit < units_per_row; ++unit)
          for (int64_t n = 0; n < N; ++n) to[n] += parts[static_cast<std::size_t>(((unit * B + b) * T_ + t) * N + n)];
      }
  };
  add_parts(g.grad_B_t, parts_B);
  add_parts(g.grad_C_t, parts_C);
  add_rows(g.grad_A_log, rows.A_log);
  add_rows(g.grad_D_skip, rows.D_skip);
  add_rows(g.grad_dt_bias, rows.dt_bias);
}

}  // namespace

SelectiveScanResult selective_scan_recurrent(const SelectiveScanInputs& in) {
  const SelectiveScanResult out = make_result(in);
  in.x.dtype() == Dtype::f64 ? recurrent<double>(in, out) : recurrent<float>(in, out);
  return out;
}

SelectiveScanResult selective_scan_fwd_cpu(const SelectiveScanInputs& in, bool) {
  const SelectiveScanResult out = make_result(in);
  in.x.dtype() == Dtype::f64 ? forward<double>(in, out) : forward<float>(in, out);
  return out;
}

void selective_scan_bwd_cpu(const SelectiveScanBackward& g) {
  g.in.x.dtype() == Dtype::f64 ? backward<double>(g) : backward<float>(g);
}

}  // namespace longhand
