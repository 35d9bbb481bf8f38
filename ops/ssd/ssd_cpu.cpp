// SSD on the CPU: the recurrence in plain loops, and the chunked form with its backward, in f32 and f64.
// The unit of work is a few heads of one group in one row of the batch: they share C B', which is formed once per chunk. Units run in
// parallel; how heads are gathered depends on the shapes alone, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/common/small_product.h"
#include "ops/ssd/ssd.h"
#include "ops/ssd/ssd_layout.h"

namespace longhand {
namespace {

template <class T>
T softplus(T v) {
  return v > T(20) ? v : std::log1p(std::exp(v));
}
template <class T>
T softplus_slope(T v) {
  return v > T(20) ? T(1) : T(1) / (T(1) + std::exp(-v));
}

/// The inputs as pointers and strides.
template <class T>
struct Operands {
  SsdSizes s;
  const T *x, *dt, *A_log, *B_t, *C_t, *D_skip, *dt_bias, *h0;
  TokenStrides sx, sdt, sB, sC;
  bool D_per_channel;
  T dt_min, dt_max;

  Operands(const SsdInputs& in, const SsdOptions& options)
      : s(ssd_sizes(in.x, in.B_t)),
        x(in.x.data<T>()),
        dt(in.dt.data<T>()),
        A_log(in.A_log.data<T>()),
        B_t(in.B_t.data<T>()),
        C_t(in.C_t.data<T>()),
        D_skip(in.D_skip ? in.D_skip.data<T>() : nullptr),
        dt_bias(in.dt_bias.data<T>()),
        h0(in.h0 ? in.h0.data<T>() : nullptr),
        sx(token_strides(in.x)),
        sdt(token_strides(in.dt)),
        sB(token_strides(in.B_t)),
        sC(token_strides(in.C_t)),
        D_per_channel(in.D_skip && in.D_skip.rank() == 2),
        dt_min(static_cast<T>(options.dt_min)),
        dt_max(static_cast<T>(options.dt_max)) {}

  const T* x_at(int64_t b, int64_t t, int64_t h) const { return x + sx.at(b, t) + h * s.P; }
  const T* B_at(int64_t b, int64_t t, int64_t g) const { return B_t + sB.at(b, t) + g * s.N; }
  const T* C_at(int64_t b, int64_t t, int64_t g) const { return C_t + sC.at(b, t) + g * s.N; }
  T dt_raw(int64_t b, int64_t t, int64_t h) const { return dt[sdt.at(b, t) + h] + dt_bias[h]; }
  T step_size(int64_t b, int64_t t, int64_t h) const { return std::clamp(softplus(dt_raw(b, t, h)), dt_min, dt_max); }
  T A(int64_t h) const { return -std::exp(A_log[h]); }
  T D(int64_t h, int64_t p) const { return D_skip == nullptr ? T(0) : D_skip[D_per_channel ? h * s.P + p : h]; }
  int64_t group_of(int64_t h) const { return h / s.heads_per_group(); }
  int64_t state_size() const { return s.P * s.N; }
};

Dtype sums_dtype(const Tensor& x) {
  return x.dtype() == Dtype::f64 ? Dtype::f64 : Dtype::f32;
}

SsdResult make_result(const SsdInputs& in) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  return {Tensor::empty(in.x.device(), in.x.dtype(), {s.B, s.T, s.H, s.P}),
          Tensor::empty(in.x.device(), sums_dtype(in.x), {s.B, s.H, s.P, s.N})};
}

template <class T>
void start_state(const Operands<T>& op, int64_t b, int64_t h, T* state) {
  const int64_t size = op.state_size();
  if (op.h0 != nullptr) std::copy_n(op.h0 + (b * op.s.H + h) * size, size, state);
  else std::fill_n(state, size, T(0));
}

// --- recurrent ------------------------------------------------------------------------------------------------

template <class T>
void recurrent(const SsdInputs& in, const SsdOptions& options, const SsdResult& out) {
  const Operands<T> op(in, options);
  const auto [B, T_, H, P, G, N] = op.s;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h) {
      T* state = out.h_T.data<T>() + (b * H + h) * P * N;
      start_state(op, b, h, state);
      for (int64_t t = 0; t < T_; ++t) {
        const T dt = op.step_size(b, t, h), decay = std::exp(dt * op.A(h));
        const T *x = op.x_at(b, t, h), *B_t = op.B_at(b, t, op.group_of(h)), *C_t = op.C_at(b, t, op.group_of(h));
        T* y = out.y.data<T>() + ((b * T_ + t) * H + h) * P;
        for (int64_t p = 0; p < P; ++p) {
          T* row = state + p * N;
          const T input = dt * x[p];
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t n = 0; n < N; ++n) {
            row[n] = decay * row[n] + input * B_t[n];
            sum += row[n] * C_t[n];
          }
          y[p] = sum + op.D(h, p) * x[p];
        }
      }
    }
}

// --- chunked --------------------------------------------------------------------------------------------------

/// Heads [begin, end) of one group in row b.
struct Unit {
  int64_t b, g, h_begin, h_end, part;  // part: which of the group's gatherings
};

/// Few units of many heads share more work; many units spread better. At least 16 units where the heads allow it.
int64_t heads_per_unit(const SsdSizes& s) {
  int64_t heads = s.heads_per_group();
  while (heads > 1 && s.B * s.G * ((s.heads_per_group() + heads - 1) / heads) < 16) heads = (heads + 1) / 2;
  return std::min<int64_t>(heads, 8);
}

std::vector<Unit> units_of(const SsdSizes& s) {
  const int64_t heads = heads_per_unit(s), per_group = s.heads_per_group();
  std::vector<Unit> units;
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t g = 0; g < s.G; ++g)
      for (int64_t h = 0; h < per_group; h += heads)
        units.push_back({b, g, g * per_group + h, g * per_group + std::min(h + heads, per_group), h / heads});
  return units;
}

/// What one head needs of the time steps of one chunk of q tokens.
template <class T>
struct ChunkDecay {
  std::vector<T> dt;          // [q]
  std::vector<T> from_begin;  // e^{Lambda_i}: decay from the chunk's beginning through token i
  std::vector<T> to_end;      // rho_j: decay from behind token j to the chunk's end
  std::vector<T> between;     // E[i, j] = decay from behind token j through token i for j <= i, else 0;  [Q, Q]
  T whole = 1;

  explicit ChunkDecay(int64_t Q)
      : dt(static_cast<std::size_t>(Q)), from_begin(dt.size()), to_end(dt.size()), between(static_cast<std::size_t>(Q * Q)) {}

  /// Running products of decays, each at most 1: nothing can overflow, and no difference of large sums is formed.
  void set(const Operands<T>& op, int64_t b, int64_t h, int64_t t0, int64_t q, int64_t Q) {
    const T A = op.A(h);
    whole = 1;
    for (int64_t i = 0; i < q; ++i) {
      const T step = op.step_size(b, t0 + i, h), decay = std::exp(step * A);
      dt[static_cast<std::size_t>(i)] = step;
      whole *= decay;
      from_begin[static_cast<std::size_t>(i)] = whole;
      T* row = between.data() + i * Q;
      for (int64_t j = 0; j < i; ++j) row[j] = (row - Q)[j] * decay;
      row[i] = 1;
      std::fill(row + i + 1, row + q, T(0));
    }
    std::copy_n(between.data() + (q - 1) * Q, q, to_end.data());
  }
};

/// to[i, :] = scale[i] * from[i, :]
template <class T>
void scale_rows(int64_t m, int64_t n, const T* scale, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) to[i * to_stride + j] = scale[i] * from[i * from_stride + j];
}

template <class T>
void multiply_all(T* values, int64_t count, T factor) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

template <class T>
std::vector<T> buffer(int64_t count) {
  return std::vector<T>(static_cast<std::size_t>(count));
}

/// state' [N, P] <- whole * state' + B' (rho dt X); scratch holds [Q, P].
template <class T>
void advance_state(const Operands<T>& op, const ChunkDecay<T>& decay, int64_t b, int64_t h, int64_t t0, int64_t q, T* state, T* scratch) {
  const int64_t P = op.s.P, N = op.s.N;
  for (int64_t j = 0; j < q; ++j) {
    const T weight = decay.to_end[static_cast<std::size_t>(j)] * decay.dt[static_cast<std::size_t>(j)];
    const T* x = op.x_at(b, t0 + j, h);
    for (int64_t p = 0; p < P; ++p) scratch[j * P + p] = weight * x[p];
  }
  multiply_all(state, N * P, decay.whole);
  add_product<T>(N, P, q, {op.B_at(b, t0, op.group_of(h)), 1, op.sB.token}, scratch, P, state, P);
}

/// C B' of one chunk, [q, q] with row stride Q.
template <class T>
void chunk_scores(const Operands<T>& op, int64_t b, int64_t g, int64_t t0, int64_t q, int64_t Q, T* B_transposed, T* scores) {
  transpose(q, op.s.N, op.B_at(b, t0, g), op.sB.token, B_transposed, Q);
  std::fill_n(scores, q * Q, T(0));
  add_product<T>(q, q, op.s.N, {op.C_at(b, t0, g), op.sC.token, 1}, B_transposed, Q, scores, Q);
}

template <class T>
void chunked_fwd(const SsdInputs& in, const SsdOptions& options, const SsdResult& out) {
  const Operands<T> op(in, options);
  const auto [B, T_, H, P, G, N] = op.s;
  const int64_t Q = std::min(options.chunk_size, T_), size = op.state_size();
  const std::vector<Unit> units = units_of(op.s);
  const auto count = static_cast<int64_t>(units.size());
#pragma omp parallel
  {
    auto states = buffer<T>(heads_per_unit(op.s) * size), first = buffer<T>(size), scratch = buffer<T>(Q * std::max(P, N));
    auto B_transposed = buffer<T>(N * Q), scores = buffer<T>(Q * Q), mixing = buffer<T>(Q * Q);
    ChunkDecay<T> decay(Q);
#pragma omp for schedule(dynamic)
    for (int64_t u = 0; u < count; ++u) {
      const Unit unit = units[static_cast<std::size_t>(u)];
      for (int64_t h = unit.h_begin; h < unit.h_end; ++h) {
        start_state(op, unit.b, h, first.data());
        transpose(P, N, first.data(), N, states.data() + (h - unit.h_begin) * size, P);
      }
      for (int64_t t0 = 0; t0 < T_; t0 += Q) {
        const int64_t q = std::min(Q, T_ - t0);
        chunk_scores(op, unit.b, unit.g, t0, q, Q, B_transposed.data(), scores.data());
        for (int64_t h = unit.h_begin; h < unit.h_end; ++h) {
          T* state = states.data() + (h - unit.h_begin) * size;  // [N, P]
          decay.set(op, unit.b, h, t0, q, Q);
          for (int64_t i = 0; i < q; ++i)
            for (int64_t j = 0; j < q; ++j)
              mixing[static_cast<std::size_t>(i * Q + j)] = scores[static_cast<std::size_t>(i * Q + j)] *
                                                            decay.between[static_cast<std::size_t>(i * Q + j)] *
                                                            decay.dt[static_cast<std::size_t>(j)];

          T* y = out.y.data<T>() + ((unit.b * T_ + t0) * H + h) * P;
          for (int64_t i = 0; i < q; ++i) {
            const T* x = op.x_at(unit.b, t0 + i, h);
            for (int64_t p = 0; p < P; ++p) y[i * H * P + p] = op.D(h, p) * x[p];
          }
          add_lower_product<T>(q, P, mixing.data(), Q, op.x_at(unit.b, t0, h), op.sx.token, y, H * P);
          scale_rows(q, N, decay.from_begin.data(), op.C_at(unit.b, t0, unit.g), op.sC.token, scratch.data(), N);
          add_product<T>(q, P, N, {scratch.data(), N, 1}, state, P, y, H * P);
          advance_state(op, decay, unit.b, h, t0, q, state, scratch.data());
        }
      }
      for (int64_t h = unit.h_begin; h < unit.h_end; ++h)
        transpose(N, P, states.data() + (h - unit.h_begin) * size, P, out.h_T.data<T>() + (unit.b * H + h) * size, N);
    }
  }
}

// --- backward -------------------------------------------------------------------------------------------------

/// da_t = sum_{i >= t > j} pairs[i, j] + sum_{i >= t} late_i + sum_{j < t} early_j + whole. Sums of like terms throughout; pairs is
/// overwritten.
template <class T>
void decay_gradient(int64_t q, int64_t Q, T* pairs, const T* late, const T* early, T whole, T* da) {
  for (int64_t i = q - 2; i >= 0; --i)  // pairs[t, j] <- sum_{i >= t} pairs[i, j]
    for (int64_t j = 0; j < q; ++j) pairs[i * Q + j] += pairs[(i + 1) * Q + j];
  T behind = 0;
  for (int64_t t = q - 1; t >= 0; --t) {
    behind += late[t];
    da[t] = behind + whole;
  }
  T before = 0;
  for (int64_t t = 0; t < q; ++t) {
    T sum = before;
    for (int64_t j = 0; j < t; ++j) sum += pairs[t * Q + j];
    da[t] += sum;
    before += early[t];
  }
}

/// to[i] = <a[i, :], b[i, :]>
template <class T>
void row_dots(int64_t m, int64_t n, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* to) {
  for (int64_t i = 0; i < m; ++i) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += a[i * a_stride + j] * b[i * b_stride + j];
    to[i] = sum;
  }
}

template <class T>
void chunked_bwd(const SsdInputs& in, const SsdOptions& options, const Tensor& grad_y, const Tensor& grad_h_T, const SsdGradients& out) {
  const Operands<T> op(in, options);
  const int64_t B = op.s.B, T_ = op.s.T, H = op.s.H, P = op.s.P, G = op.s.G, N = op.s.N;  // plain: lambdas below capture them
  const int64_t Q = std::max<int64_t>(1, std::min(options.chunk_size, T_)), size = op.state_size(), chunks = (T_ + Q - 1) / Q;
  const std::vector<Unit> units = units_of(op.s);
  const auto count = static_cast<int64_t>(units.size());
  const int64_t heads = heads_per_unit(op.s), parts = (op.s.heads_per_group() + heads - 1) / heads;
  const TokenStrides s_grad_y = token_strides(grad_y), s_out_x = token_strides(out.x), s_out_dt = token_strides(out.dt),
                     s_out_B = token_strides(out.B_t), s_out_C = token_strides(out.C_t);
  const bool want_BC = out.B_t || out.C_t;

  // Sums over the heads of a group beyond one unit, and over rows: parts first, then in fixed order.
  const Dtype dtype = in.x.dtype();
  const Tensor parts_B = want_BC && parts > 1 ? Tensor::empty(in.x.device(), dtype, {parts, B, T_, G, N}) : Tensor();
  const Tensor parts_C = want_BC && parts > 1 ? Tensor::empty(in.x.device(), dtype, {parts, B, T_, G, N}) : Tensor();
  auto rows_A = buffer<T>(B * H), rows_bias = buffer<T>(B * H), rows_D = buffer<T>(B * H * P);

#pragma omp parallel
  {
    auto borders = buffer<T>(heads * std::max<int64_t>(1, chunks) * size), grads = buffer<T>(heads * size), state = buffer<T>(size),
         grad_transposed = buffer<T>(size);
    auto wide = buffer<T>(Q * std::max(P, N)), dY = buffer<T>(Q * P), V = buffer<T>(Q * P), X_transposed = buffer<T>(P * Q);
    auto B_transposed = buffer<T>(N * Q), scores = buffer<T>(Q * Q), pairs = buffer<T>(Q * Q), mixing = buffer<T>(Q * Q);
    auto dB = buffer<T>(Q * N), dC = buffer<T>(Q * N), from_state = buffer<T>(Q * N);
    auto late = buffer<T>(Q), early = buffer<T>(Q), direct = buffer<T>(Q), da = buffer<T>(Q);
    ChunkDecay<T> decay(Q);
#pragma omp for schedule(dynamic)
    for (int64_t u = 0; u < count; ++u) {
      const Unit unit = units[static_cast<std::size_t>(u)];
      const int64_t b = unit.b, g = unit.g;
      for (int64_t h = unit.h_begin; h < unit.h_end; ++h) {  // the state at every chunk's beginning, [P, N]
        T* mine = borders.data() + (h - unit.h_begin) * chunks * size;
        start_state(op, b, h, mine);
        transpose(P, N, mine, N, state.data(), P);
        for (int64_t c = 0; c + 1 < chunks; ++c) {
          decay.set(op, b, h, c * Q, Q, Q);
          advance_state(op, decay, b, h, c * Q, Q, state.data(), wide.data());
          transpose(N, P, state.data(), P, mine + (c + 1) * size, N);
        }
        T* grad = grads.data() + (h - unit.h_begin) * size;
        if (grad_h_T) std::copy_n(grad_h_T.data<T>() + (b * H + h) * size, size, grad);
        else std::fill_n(grad, size, T(0));
      }
      for (int64_t c = chunks - 1; c >= 0; --c) {
        const int64_t t0 = c * Q, q = std::min(Q, T_ - t0);
        const T *B_t = op.B_at(b, t0, g), *C_t = op.C_at(b, t0, g);
        chunk_scores(op, b, g, t0, q, Q, B_transposed.data(), scores.data());
        std::fill(dB.begin(), dB.end(), T(0));
        std::fill(dC.begin(), dC.end(), T(0));
        for (int64_t h = unit.h_begin; h < unit.h_end; ++h) {
          const T* S = borders.data() + ((h - unit.h_begin) * chunks + c) * size;  // state at the chunk's beginning
          T* R = grads.data() + (h - unit.h_begin) * size;                         // gradient of the state at its end
          decay.set(op, b, h, t0, q, Q);
          const T *dt = decay.dt.data(), *x = op.x_at(b, t0, h);
          for (int64_t i = 0; i < q; ++i) {
            if (grad_y) std::copy_n(grad_y.data<T>() + s_grad_y.at(b, t0 + i) + h * P, P, dY.data() + i * P);
            else std::fill_n(dY.data() + i * P, P, T(0));
          }

          // d(C B') = (dY X') E dt;  pairs = d(C B') * C B';  mixing = C B' * E
          transpose(q, P, x, op.sx.token, X_transposed.data(), Q);
          std::fill_n(pairs.data(), q * Q, T(0));
          add_product<T>(q, q, P, {dY.data(), P, 1}, X_transposed.data(), Q, pairs.data(), Q);
          for (int64_t i = 0; i < q; ++i) {
            T *pair = pairs.data() + i * Q, *mix = mixing.data() + i * Q;
            const T *score = scores.data() + i * Q, *E = decay.between.data() + i * Q;
            for (int64_t j = 0; j < q; ++j) {
              pair[j] *= E[j] * dt[j];
              mix[j] = score[j] * E[j];
            }
          }

          // dC_i = sum_j d(C B')_ij B_j + e^{Lambda_i} S' dY_i;  late_i = <C_i, the second part>
          scale_rows(q, P, decay.from_begin.data(), dY.data(), P, wide.data(), P);
          std::fill_n(from_state.data(), q * N, T(0));
          add_product<T>(q, N, P, {wide.data(), P, 1}, S, N, from_state.data(), N);
          row_dots(q, N, from_state.data(), N, C_t, op.sC.token, late.data());
          for (int64_t k = 0; k < q * N; ++k) dC[static_cast<std::size_t>(k)] += from_state[static_cast<std::size_t>(k)];
          add_lower_product<T>(q, N, pairs.data(), Q, B_t, op.sB.token, dC.data(), N);

          // V_j = rho_j R B_j + sum_{i >= j} (C B' E)_ij dY_i;  early_j = dt_j <x_j, the first part>
          transpose(P, N, R, N, grad_transposed.data(), P);
          scale_rows(q, N, decay.to_end.data(), B_t, op.sB.token, wide.data(), N);
          std::fill_n(V.data(), q * P, T(0));
          add_product<T>(q, P, N, {wide.data(), N, 1}, grad_transposed.data(), P, V.data(), P);
          row_dots(q, P, V.data(), P, x, op.sx.token, early.data());
          for (int64_t j = 0; j < q; ++j) early[static_cast<std::size_t>(j)] *= dt[j];
          add_lower_transposed_product<T>(q, P, mixing.data(), Q, dY.data(), P, V.data(), P);
          row_dots(q, P, V.data(), P, x, op.sx.token, direct.data());

          // dB_j = sum_{i >= j} d(C B')_ij C_i + rho_j dt_j R' x_j
          for (int64_t j = 0; j < q; ++j) {
            const T weight = decay.to_end[static_cast<std::size_t>(j)] * dt[j];
            for (int64_t p = 0; p < P; ++p) wide[static_cast<std::size_t>(j * P + p)] = weight * x[j * op.sx.token + p];
          }
          add_product<T>(q, N, P, {wide.data(), P, 1}, R, N, dB.data(), N);
          add_lower_transposed_product<T>(q, N, pairs.data(), Q, C_t, op.sC.token, dB.data(), N);

          if (out.x)
            for (int64_t j = 0; j < q; ++j) {
              T* dx = out.x.data<T>() + s_out_x.at(b, t0 + j) + h * P;
              for (int64_t p = 0; p < P; ++p)
                dx[p] = dt[j] * V[static_cast<std::size_t>(j * P + p)] + op.D(h, p) * dY[static_cast<std::size_t>(j * P + p)];
            }
          for (int64_t j = 0; j < q; ++j)
            for (int64_t p = 0; p < P; ++p)
              rows_D[static_cast<std::size_t>((b * H + h) * P + p)] += dY[static_cast<std::size_t>(j * P + p)] * x[j * op.sx.token + p];

          // The decays, and through them dt, A and the bias.
          for (int64_t i = 0; i < q; ++i)  // the diagonal has no decay in it
            pairs[static_cast<std::size_t>(i * Q + i)] = 0;
          for (int64_t i = 0; i < q; ++i)
            for (int64_t j = 0; j < i; ++j) pairs[static_cast<std::size_t>(i * Q + j)] *= scores[static_cast<std::size_t>(i * Q + j)];
          T inner = 0;
#pragma omp simd reduction(+ : inner)
          for (int64_t k = 0; k < size; ++k) inner += R[k] * S[k];
          decay_gradient(q, Q, pairs.data(), late.data(), early.data(), decay.whole * inner, da.data());
          T sum_A = 0, sum_bias = 0;
          for (int64_t t = 0; t < q; ++t) {
            const T raw = op.dt_raw(b, t0 + t, h), unclamped = softplus(raw);
            const bool inside = unclamped >= op.dt_min && unclamped <= op.dt_max;
            const T grad_dt =
                inside ? (direct[static_cast<std::size_t>(t)] + op.A(h) * da[static_cast<std::size_t>(t)]) * softplus_slope(raw) : T(0);
            sum_A += dt[t] * da[static_cast<std::size_t>(t)];
            sum_bias += grad_dt;
            if (out.dt) out.dt.data<T>()[s_out_dt.at(b, t0 + t) + h] = grad_dt;
          }
          rows_A[static_cast<std::size_t>(b * H + h)] += sum_A * op.A(h);
          rows_bias[static_cast<std::size_t>(b * H + h)] += sum_bias;

          // R <- e^{Lambda_Q} R + sum_i e^{Lambda_i} dY_i C_i'
          multiply_all(R, size, decay.whole);
          scale_rows(q, N, decay.from_begin.data(), C_t, op.sC.token, wide.data(), N);
          add_product<T>(P, N, q, {dY.data(), 1, P}, wide.data(), N, R, N);
        }
        auto store = [&](const Tensor& result, const TokenStrides& strides, const Tensor& partial, const std::vector<T>& from) {
          if (!result) return;
          for (int64_t i = 0; i < q; ++i) {
            T* to = parts > 1 ? partial.data<T>() + (((unit.part * B + b) * T_ + t0 + i) * G + g) * N
                              : result.data<T>() + strides.at(b, t0 + i) + g * N;
            std::copy_n(from.data() + i * N, N, to);
          }
        };
        store(out.B_t, s_out_B, parts_B, dB);
        store(out.C_t, s_out_C, parts_C, dC);
      }
      if (out.h0)
        for (int64_t h = unit.h_begin; h < unit.h_end; ++h)
          std::copy_n(grads.data() + (h - unit.h_begin) * size, size, out.h0.data<T>() + (b * H + h) * size);
    }
  }

  auto sum_parts = [&](const Tensor& result, const TokenStrides& strides, const Tensor& partial) {
    if (!result || parts == 1) return;
    const T* from = partial.data<T>();
    T* to = result.data<T>();
    const int64_t width = G * N, part_size = B * T_ * width;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < T_; ++t) {
        T* sums = to + strides.at(b, t);
        const T* terms = from + (b * T_ + t) * width;
        std::copy_n(terms, width, sums);
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t k = 0; k < width; ++k) sums[k] += terms[part * part_size + k];
      }
  };
  sum_parts(out.B_t, s_out_B, parts_B);
  sum_parts(out.C_t, s_out_C, parts_C);

  auto sum_rows = [&](const Tensor& result, const std::vector<T>& rows, int64_t width) {  // [B, H * width] -> [H] or [H, width]
    if (!result) return;
    std::fill_n(result.data<T>(), result.numel(), T(0));
    const int64_t inner = H * width / std::max<int64_t>(1, result.numel());  // channels summed into one value
    for (int64_t b = 0; b < B; ++b)
      for (int64_t k = 0; k < H * width; ++k) result.data<T>()[k / inner] += rows[static_cast<std::size_t>(b * H * width + k)];
  };
  sum_rows(out.A_log, rows_A, 1);
  sum_rows(out.dt_bias, rows_bias, 1);
  sum_rows(out.D_skip, rows_D, P);
}

/// Below this many tokens the recurrence is the faster form on a CPU.
constexpr int64_t kRecurrentTokens = 4;

}  // namespace

SsdResult ssd_recurrent(const SsdInputs& in, const SsdOptions& options) {
  const SsdResult out = make_result(in);
  in.x.dtype() == Dtype::f64 ? recurrent<double>(in, options, out) : recurrent<float>(in, options, out);
  return out;
}

SsdResult ssd_fwd_cpu(const SsdInputs& in, const SsdOptions& options) {
  if (in.x.dim(1) <= kRecurrentTokens) return ssd_recurrent(in, options);
  const SsdResult out = make_result(in);
  in.x.dtype() == Dtype::f64 ? chunked_fwd<double>(in, options, out) : chunked_fwd<float>(in, options, out);
  return out;
}

void ssd_bwd_cpu(const SsdInputs& in, const SsdOptions& options, const Tensor& grad_y, const Tensor& grad_h_T, const SsdGradients& out) {
  in.x.dtype() == Dtype::f64 ? chunked_bwd<double>(in, options, grad_y, grad_h_T, out)
                             : chunked_bwd<float>(in, options, grad_y, grad_h_T, out);
}

}  // namespace longhand
