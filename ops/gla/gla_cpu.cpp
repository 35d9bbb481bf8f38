// GLA on the CPU: the recurrence in plain loops, and the chunked form with its backward, in f32 and f64.
//
// Inside a chunk of 64 tokens the pairs (i, j), j <= i, are covered by squares at several scales. At scale w the tokens fall into blocks of
// w; the pairs with j in an even block and i in the odd block behind it form a square, and for those the decay between j and i splits at
// the border of the two blocks,
//   exp(g[j+1] + .. + g[i]) = to_end[j] * from_begin[i],        to_end[j] = exp(sum of g behind j in its block)
//                                                               from_begin[i] = exp(sum of g in its block through i)
// so that the square is one matrix product of decayed queries and keys. Squares of 16 and 32 tokens leave the triangles of 16 tokens on the
// diagonal; these are formed token by token with running products of exp(g). Everything before the chunk is the square at scale 64, with
// the state in place of the keys. Only sums of gates of one sign are ever formed, never a difference of two sums: no exponent is above 0,
// and a gate of -1e4 costs the decays beside it no digit. The unit of work is one head of one row; results do not depend on the number of
// threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/common/activations.h"
#include "ops/common/small_product.h"
#include "ops/gla/gla_kernels.h"

namespace longhand {
namespace {

constexpr int64_t kChunkTokens = 64, kLeafTokens = 16, kLeaves = kChunkTokens / kLeafTokens;

/// e^g for g <= 0; below the smallest normal number it is 0, also for g = -inf.
double decay_of(double g) {
  return std::exp(g);
}
float decay_of(float g) {
  return g < -87.0f ? 0.0f : exp_of(g);
}

template <class T>
std::vector<T> buffer(int64_t count) {
  return std::vector<T>(static_cast<std::size_t>(count));
}

/// The inputs as pointers and strides.
template <class T>
struct Operands {
  GlaSizes s;
  const T *q, *k, *v, *gate, *h0;
  TokenStrides sq, sk, sv, sgate;
  bool logit;
  T normalizer, gate_min, scale;

  Operands(const GlaInputs& in, const GlaRule& rule)
      : s(in.sizes()),
        q(in.q.data<T>()),
        k(in.k.data<T>()),
        v(in.v.data<T>()),
        gate(in.gate.data<T>()),
        h0(in.h0 ? in.h0.data<T>() : nullptr),
        sq(token_strides(in.q)),
        sk(token_strides(in.k)),
        sv(token_strides(in.v)),
        sgate(token_strides(in.gate)),
        logit(rule.logit),
        normalizer(static_cast<T>(rule.normalizer)),
        gate_min(static_cast<T>(rule.gate_min)),
        scale(static_cast<T>(rule.scale)) {}

  const T* q_at(int64_t b, int64_t t, int64_t h) const { return q + sq.at(b, t) + h * s.Dk; }
  const T* k_at(int64_t b, int64_t t, int64_t h) const { return k + sk.at(b, t) + h * s.Dk; }
  const T* v_at(int64_t b, int64_t t, int64_t h) const { return v + sv.at(b, t) + h * s.Dv; }
  const T* gate_at(int64_t b, int64_t t, int64_t h) const { return gate + sgate.at(b, t) + h * s.Dk; }
  int64_t state_size() const { return s.Dk * s.Dv; }

  T unclamped(T y) const { return (std::min(y, T(0)) - std::log1p(std::exp(-std::abs(y)))) / normalizer; }
  T log_gate(T given) const { return logit ? std::max(unclamped(given), gate_min) : given; }
  /// d log_gate / d given
  T slope(T given) const {
    if (!logit) return 1;
    return unclamped(given) >= gate_min ? T(1) / ((T(1) + std::exp(given)) * normalizer) : T(0);
  }

  void start_state(int64_t b, int64_t h, T* state) const {
    if (h0 != nullptr) std::copy_n(h0 + (b * s.H + h) * state_size(), state_size(), state);
    else std::fill_n(state, state_size(), T(0));
  }
};

GlaResult make_result(const GlaInputs& in) {
  const auto [B, T, H, Dk, Dv] = in.sizes();
  const Dtype sums = in.q.dtype() == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  return {Tensor::empty(in.q.device(), in.q.dtype(), {B, T, H, Dv}), Tensor::empty(in.q.device(), sums, {B, H, Dk, Dv})};
}

// --- recurrent ------------------------------------------------------------------------------------------------

template <class T>
void recurrent(const GlaInputs& in, const GlaRule& rule, const GlaResult& out) {
  const Operands<T> op(in, rule);
  const auto [B, T_, H, Dk, Dv] = op.s;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h) {
      T* state = out.h_T.data<T>() + (b * H + h) * Dk * Dv;
      op.start_state(b, h, state);
      for (int64_t t = 0; t < T_; ++t) {
        const T *q = op.q_at(b, t, h), *k = op.k_at(b, t, h), *v = op.v_at(b, t, h), *gate = op.gate_at(b, t, h);
        T* o = out.o.data<T>() + ((b * T_ + t) * H + h) * Dv;
        std::fill_n(o, Dv, T(0));
        for (int64_t m = 0; m < Dk; ++m) {
          const T decay = decay_of(op.log_gate(gate[m])), query = op.scale * q[m], key = k[m];
          T* row = state + m * Dv;
          for (int64_t n = 0; n < Dv; ++n) {
            row[n] = decay * row[n] + key * v[n];
            o[n] += query * row[n];
          }
        }
      }
    }
}

// --- chunked --------------------------------------------------------------------------------------------------

/// to[i, m] = a[i, m] * b[i, m]
template <class T>
void multiply_into(int64_t count, const T* a, const T* b, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = a[i] * b[i];
}
template <class T>
void add_multiplied(int64_t count, const T* a, const T* b, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += a[i] * b[i];
}

/// One chunk of one head: its rows, its decays at the scale reached so far, and scratch space. Matrices are [64, Dk] unless told.
template <class T>
struct Chunk {
  int64_t Dk, n = 0;                                     // n tokens
  std::vector<T> q, k;                                   // scale * q, and k
  std::vector<T> alpha;                                  // exp(g)
  std::vector<T> from_begin, to_end;                     // within the blocks of the current scale
  std::vector<T> leaf_sums;                              // [4, Dk] sums of g
  std::vector<T> whole;                                  // [Dk] decay over the chunk
  std::vector<T> scores;                                 // A [64, 64]: scale * sum_m q_i k_j decay, 0 for j > i
  std::vector<T> decayed_q, decayed_k, transposed, row;  // scratch

  explicit Chunk(int64_t Dk_)
      : Dk(Dk_),
        q(buffer<T>(kChunkTokens * Dk)),
        k(q),
        alpha(q),
        from_begin(q),
        to_end(q),
        leaf_sums(buffer<T>(kLeaves * Dk)),
        whole(buffer<T>(Dk)),
        scores(buffer<T>(kChunkTokens * kChunkTokens)),
        decayed_q(q),
        decayed_k(q),
        transposed(q),
        row(whole) {}

  /// Reads the chunk and forms the decays inside its blocks of 16.
  void load(const Operands<T>& op, int64_t b, int64_t h, int64_t t0) {
    n = std::min(kChunkTokens, op.s.T - t0);
    std::fill(leaf_sums.begin(), leaf_sums.end(), T(0));
    for (int64_t i = 0; i < n; ++i) {
      const T *q_row = op.q_at(b, t0 + i, h), *gate_row = op.gate_at(b, t0 + i, h);
      for (int64_t m = 0; m < Dk; ++m) q[at(i, m)] = op.scale * q_row[m];
      std::copy_n(op.k_at(b, t0 + i, h), Dk, k.data() + i * Dk);
      T *g = to_end.data() + i * Dk, *sums = leaf_sums.data() + i / kLeafTokens * Dk;
      for (int64_t m = 0; m < Dk; ++m) g[m] = op.log_gate(gate_row[m]);
      for (int64_t m = 0; m < Dk; ++m) {
        sums[m] += g[m];
        alpha[at(i, m)] = decay_of(g[m]);
        from_begin[at(i, m)] = decay_of(sums[m]);
      }
    }
    for (int64_t i = n - 1; i >= 0; --i) {  // to_end holds g: sums of what is behind take its place
      if (i % kLeafTokens == kLeafTokens - 1 || i == n - 1) std::fill(row.begin(), row.end(), T(0));
      T *g = to_end.data() + i * Dk, *behind = row.data();
      for (int64_t m = 0; m < Dk; ++m) {
        const T own = g[m];
        g[m] = decay_of(behind[m]);
        behind[m] += own;
      }
    }
    for (int64_t m = 0; m < Dk; ++m) {
      T sum = 0;
      for (int64_t leaf = 0; leaf < kLeaves; ++leaf) sum += leaf_sums[at(leaf, m)];
      whole[static_cast<std::size_t>(m)] = decay_of(sum);
    }
  }

  /// From blocks of `width` tokens to blocks of twice that: an odd block's from_begin passes through the block before it, an even block's
  /// to_end through the block behind it.
  void widen(int64_t width) {
    for (int64_t begin = 0; begin < n; begin += width) {
      const int64_t block = begin / width, neighbour = block ^ 1, end = std::min(begin + width, n);
      if (neighbour * width >= n) continue;
      std::fill(row.begin(), row.end(), T(0));
      for (int64_t leaf = neighbour * width / kLeafTokens; leaf < (neighbour + 1) * width / kLeafTokens; ++leaf)
        for (int64_t m = 0; m < Dk; ++m) row[static_cast<std::size_t>(m)] += leaf_sums[at(leaf, m)];
      for (T& sum : row) sum = decay_of(sum);
      T* decays = (block % 2 == 1 ? from_begin : to_end).data();
      for (int64_t i = begin; i < end; ++i) multiply_into(Dk, decays + i * Dk, row.data(), decays + i * Dk);
    }
  }

  /// The triangles of 16 tokens: keys decay as the queries go by.
  void leaf_scores() {
    std::fill(scores.begin(), scores.end(), T(0));
    std::copy_n(k.data(), n * Dk, decayed_k.data());
    for (int64_t i = 0; i < n; ++i) {
      const T *query = q.data() + i * Dk, *decay = alpha.data() + i * Dk;
      for (int64_t j = i / kLeafTokens * kLeafTokens; j <= i; ++j) {
        T* key = decayed_k.data() + j * Dk;
        if (j < i) multiply_into(Dk, key, decay, key);
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t m = 0; m < Dk; ++m) sum += query[m] * key[m];
        score(i, j) = sum;
      }
    }
  }

  /// Calls visit(begin, middle, end) for every square of the scale `width`: keys [begin, middle), queries [middle, end); decayed_q and
  /// decayed_k hold the operands.
  template <class Visit>
  void each_square(int64_t width, Visit&& visit) {
    for (int64_t begin = 0; begin + width < n; begin += 2 * width) {
      const int64_t middle = begin + width, end = std::min(middle + width, n);
      multiply_into((end - middle) * Dk, q.data() + middle * Dk, from_begin.data() + middle * Dk, decayed_q.data() + middle * Dk);
      multiply_into(width * Dk, k.data() + begin * Dk, to_end.data() + begin * Dk, decayed_k.data() + begin * Dk);
      visit(begin, middle, end);
    }
  }
  void square_scores(int64_t begin, int64_t middle, int64_t end) {
    const int64_t width = middle - begin;
    transpose(width, Dk, decayed_k.data() + begin * Dk, Dk, transposed.data(), width);
    add_product<T>(end - middle, width, Dk, {decayed_q.data() + middle * Dk, Dk, 1}, transposed.data(), width, &score(middle, begin),
                   kChunkTokens);
  }

  /// After the last scale: operands against the state before the chunk, and for the state behind it.
  void decay_to_borders() {
    multiply_into(n * Dk, q.data(), from_begin.data(), decayed_q.data());
    multiply_into(n * Dk, k.data(), to_end.data(), decayed_k.data());
  }

  T& score(int64_t i, int64_t j) {
    return scores[static_cast<std::size_t>(i * kChunkTokens + j)];
  }
  std::size_t at(int64_t i, int64_t m) const {
    return static_cast<std::size_t>(i * Dk + m);
  }
};

/// rows[m, :] *= factors[m]
template <class T>
void decay_rows(int64_t Dk, int64_t Dv, const std::vector<T>& factors, T* rows) {
  for (int64_t m = 0; m < Dk; ++m)
    for (int64_t n = 0; n < Dv; ++n) rows[m * Dv + n] *= factors[static_cast<std::size_t>(m)];
}

template <class T>
void chunked_fwd(const GlaInputs& in, const GlaRule& rule, const GlaResult& out) {
  const Operands<T> op(in, rule);
  const auto [B, T_, H, Dk, Dv] = op.s;
#pragma omp parallel
  {
    Chunk<T> chunk(Dk);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h) {
        T* state = out.h_T.data<T>() + (b * H + h) * Dk * Dv;
        op.start_state(b, h, state);
        for (int64_t t0 = 0; t0 < T_; t0 += kChunkTokens) {
          chunk.load(op, b, h, t0);
          chunk.leaf_scores();
          for (const int64_t width : {kLeafTokens, 2 * kLeafTokens}) {
            chunk.each_square(width, [&](int64_t begin, int64_t middle, int64_t end) { chunk.square_scores(begin, middle, end); });
            chunk.widen(width);
          }
          chunk.decay_to_borders();
          const T* v = op.v_at(b, t0, h);
          T* o = out.o.data<T>() + ((b * T_ + t0) * H + h) * Dv;
          for (int64_t i = 0; i < chunk.n; ++i) std::fill_n(o + i * H * Dv, Dv, T(0));
          add_product<T>(chunk.n, Dv, Dk, {chunk.decayed_q.data(), Dk, 1}, state, Dv, o, H * Dv);
          add_lower_product<T>(chunk.n, Dv, chunk.scores.data(), kChunkTokens, v, op.sv.token, o, H * Dv);
          decay_rows(Dk, Dv, chunk.whole, state);
          add_product<T>(Dk, Dv, chunk.n, {chunk.decayed_k.data(), 1, Dk}, v, op.sv.token, state, Dv);
        }
      }
  }
}

// --- backward -------------------------------------------------------------------------------------------------

/// The part of grad_q and grad_k that comes from pairs inside the chunk, without the pairs i = j: those have no decay in them.
/// grad_scores  [64, 64]; grad_q is the gradient of scale * q
template <class T>
struct PairGradients {
  std::vector<T> grad_q, grad_k, between, product;  // [64, Dk]

  explicit PairGradients(int64_t Dk) : grad_q(buffer<T>(kChunkTokens * Dk)), grad_k(grad_q), between(grad_q), product(grad_q) {}

  void leaves(const Chunk<T>& chunk, const T* grad_scores) {
    const int64_t Dk = chunk.Dk;
    std::fill(grad_q.begin(), grad_q.end(), T(0));
    std::fill(grad_k.begin(), grad_k.end(), T(0));
    std::fill(between.begin(), between.end(), T(1));  // decay from behind token j through token i
    for (int64_t i = 0; i < chunk.n; ++i) {
      const T *q = chunk.q.data() + i * Dk, *alpha = chunk.alpha.data() + i * Dk;
      for (int64_t j = i / kLeafTokens * kLeafTokens; j < i; ++j) {
        const T grad = grad_scores[i * kChunkTokens + j], *k = chunk.k.data() + j * Dk;
        T *decay = between.data() + j * Dk, *to_q = grad_q.data() + i * Dk, *to_k = grad_k.data() + j * Dk;
        for (int64_t m = 0; m < Dk; ++m) {
          decay[m] *= alpha[m];
          to_q[m] += grad * decay[m] * k[m];
          to_k[m] += grad * decay[m] * q[m];
        }
      }
    }
  }

  void square(const Chunk<T>& chunk, const T* grad_scores, int64_t begin, int64_t middle, int64_t end) {
    const int64_t Dk = chunk.Dk, width = middle - begin, rows = end - middle;
    const T* grad = grad_scores + middle * kChunkTokens + begin;
    std::fill_n(product.data(), rows * Dk, T(0));
    add_product<T>(rows, Dk, width, {grad, kChunkTokens, 1}, chunk.decayed_k.data() + begin * Dk, Dk, product.data(), Dk);
    add_multiplied(rows * Dk, product.data(), chunk.from_begin.data() + middle * Dk, grad_q.data() + middle * Dk);
    std::fill_n(product.data(), width * Dk, T(0));
    add_product<T>(width, Dk, rows, {grad, 1, kChunkTokens}, chunk.decayed_q.data() + middle * Dk, Dk, product.data(), Dk);
    add_multiplied(width * Dk, product.data(), chunk.to_end.data() + begin * Dk, grad_k.data() + begin * Dk);
  }
};

template <class T>
void chunked_bwd(const GlaInputs& in, const GlaRule& rule, const Tensor& grad_o, const Tensor& grad_h_T, const GlaGradients& out) {
  const Operands<T> op(in, rule);
  const auto [B, T_, H, Dk, Dv] = op.s;
  const int64_t size = op.state_size(), chunks = (T_ + kChunkTokens - 1) / kChunkTokens;
  const TokenStrides s_grad_o = token_strides(grad_o), s_q = token_strides(out.q), s_k = token_strides(out.k), s_v = token_strides(out.v),
                     s_gate = token_strides(out.gate);
#pragma omp parallel
  {
    Chunk<T> chunk(Dk);
    PairGradients<T> pairs(Dk);
    auto borders = buffer<T>(std::max<int64_t>(1, chunks) * size), R = buffer<T>(size), turned = buffer<T>(size);
    auto dO = buffer<T>(kChunkTokens * Dv), dV = dO, V_transposed = dO;
    auto grad_scores = buffer<T>(kChunkTokens * kChunkTokens);
    auto early_q = buffer<T>(kChunkTokens * Dk), late_k = early_q, grad_gate = early_q, sums = buffer<T>(Dk);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h) {
        op.start_state(b, h, borders.data());  // the state at every chunk's beginning, [Dk, Dv]
        for (int64_t c = 0; c + 1 < chunks; ++c) {
          T* next = borders.data() + (c + 1) * size;
          std::copy_n(next - size, size, next);
          chunk.load(op, b, h, c * kChunkTokens);
          for (const int64_t width : {kLeafTokens, 2 * kLeafTokens}) chunk.widen(width);
          chunk.decay_to_borders();
          decay_rows(Dk, Dv, chunk.whole, next);
          add_product<T>(Dk, Dv, chunk.n, {chunk.decayed_k.data(), 1, Dk}, op.v_at(b, c * kChunkTokens, h), op.sv.token, next, Dv);
        }
        if (grad_h_T) std::copy_n(grad_h_T.data<T>() + (b * H + h) * size, size, R.data());  // gradient of the state at a chunk's end
        else std::fill(R.begin(), R.end(), T(0));

        for (int64_t c = chunks - 1; c >= 0; --c) {
          const int64_t t0 = c * kChunkTokens;
          const T *S = borders.data() + c * size, *v = op.v_at(b, t0, h);
          chunk.load(op, b, h, t0);
          const int64_t n = chunk.n;
          for (int64_t i = 0; i < n; ++i) {
            if (grad_o) std::copy_n(grad_o.data<T>() + s_grad_o.at(b, t0 + i) + h * Dv, Dv, dO.data() + i * Dv);
            else std::fill_n(dO.data() + i * Dv, Dv, T(0));
          }

          // dA = dO V'; with it grad_q and grad_k inside the chunk, beside A itself
          transpose(n, Dv, v, op.sv.token, V_transposed.data(), kChunkTokens);
          std::fill(grad_scores.begin(), grad_scores.end(), T(0));
          add_product<T>(n, n, Dv, {dO.data(), Dv, 1}, V_transposed.data(), kChunkTokens, grad_scores.data(), kChunkTokens);
          chunk.leaf_scores();
          pairs.leaves(chunk, grad_scores.data());
          for (const int64_t width : {kLeafTokens, 2 * kLeafTokens}) {
            chunk.each_square(width, [&](int64_t begin, int64_t middle, int64_t end) {
              chunk.square_scores(begin, middle, end);
              pairs.square(chunk, grad_scores.data(), begin, middle, end);
            });
            chunk.widen(width);
          }
          chunk.decay_to_borders();

          // dv_j = sum_{i >= j} A_ij dO_i + R' (k_j to_end_j)
          if (out.v) {
            std::fill(dV.begin(), dV.end(), T(0));
            add_product<T>(n, Dv, Dk, {chunk.decayed_k.data(), Dk, 1}, R.data(), Dv, dV.data(), Dv);
            add_lower_transposed_product<T>(n, Dv, chunk.scores.data(), kChunkTokens, dO.data(), Dv, dV.data(), Dv);
            for (int64_t i = 0; i < n; ++i) std::copy_n(dV.data() + i * Dv, Dv, out.v.data<T>() + s_v.at(b, t0 + i) + h * Dv);
          }

          // through the state before the chunk, from_begin (S dO_i); through the state behind it, to_end (R v_j)
          transpose(Dk, Dv, S, Dv, turned.data(), Dk);
          std::fill(early_q.begin(), early_q.end(), T(0));
          add_product<T>(n, Dk, Dv, {dO.data(), Dv, 1}, turned.data(), Dk, early_q.data(), Dk);
          multiply_into(n * Dk, early_q.data(), chunk.from_begin.data(), early_q.data());
          transpose(Dk, Dv, R.data(), Dv, turned.data(), Dk);
          std::fill(late_k.begin(), late_k.end(), T(0));
          add_product<T>(n, Dk, Dv, {v, op.sv.token, 1}, turned.data(), Dk, late_k.data(), Dk);
          multiply_into(n * Dk, late_k.data(), chunk.to_end.data(), late_k.data());

          // dg_t: pairs i >= t > j of the chunk, tokens i >= t with the state before, tokens j < t with the state behind, and the two
          // states
          for (int64_t m = 0; m < Dk; ++m) {
            T inner = 0;
#pragma omp simd reduction(+ : inner)
            for (int64_t p = 0; p < Dv; ++p) inner += R[static_cast<std::size_t>(m * Dv + p)] * S[m * Dv + p];
            sums[static_cast<std::size_t>(m)] = inner * chunk.whole[static_cast<std::size_t>(m)];
          }
          for (int64_t t = n - 1; t >= 0; --t)
            for (int64_t m = 0; m < Dk; ++m) {
              const std::size_t at = chunk.at(t, m);
              sums[static_cast<std::size_t>(m)] += chunk.q[at] * (pairs.grad_q[at] + early_q[at]) - chunk.k[at] * pairs.grad_k[at];
              grad_gate[at] = sums[static_cast<std::size_t>(m)];
            }
          std::fill(sums.begin(), sums.end(), T(0));
          for (int64_t t = 0; t < n; ++t)
            for (int64_t m = 0; m < Dk; ++m) {
              const std::size_t at = chunk.at(t, m);
              grad_gate[at] += sums[static_cast<std::size_t>(m)];
              sums[static_cast<std::size_t>(m)] += chunk.k[at] * late_k[at];
            }

          for (int64_t i = 0; i < n; ++i) {
            const T diagonal = grad_scores[static_cast<std::size_t>(i * kChunkTokens + i)];
            if (out.q) {
              T* to = out.q.data<T>() + s_q.at(b, t0 + i) + h * Dk;
              for (int64_t m = 0; m < Dk; ++m)
                to[m] = op.scale * (pairs.grad_q[chunk.at(i, m)] + early_q[chunk.at(i, m)] + diagonal * chunk.k[chunk.at(i, m)]);
            }
            if (out.k) {
              T* to = out.k.data<T>() + s_k.at(b, t0 + i) + h * Dk;
              for (int64_t m = 0; m < Dk; ++m)
                to[m] = pairs.grad_k[chunk.at(i, m)] + late_k[chunk.at(i, m)] + diagonal * chunk.q[chunk.at(i, m)];
            }
            if (out.gate) {
              T* to = out.gate.data<T>() + s_gate.at(b, t0 + i) + h * Dk;
              const T* given = op.gate_at(b, t0 + i, h);
              for (int64_t m = 0; m < Dk; ++m)  // a decay of 0 passes nothing on: there dg is alpha times something
                to[m] = chunk.alpha[chunk.at(i, m)] == 0 ? T(0) : grad_gate[chunk.at(i, m)] * op.slope(given[m]);
            }
          }

          // R <- whole R + sum_i (scale q_i from_begin_i) dO_i'
          decay_rows(Dk, Dv, chunk.whole, R.data());
          add_product<T>(Dk, Dv, n, {chunk.decayed_q.data(), 1, Dk}, dO.data(), Dv, R.data(), Dv);
        }
        if (out.h0) std::copy_n(R.data(), size, out.h0.data<T>() + (b * H + h) * size);
      }
  }
}

/// Below this many tokens the recurrence is the faster form on a CPU.
constexpr int64_t kRecurrentTokens = 4;

}  // namespace

GlaResult gla_recurrent(const GlaInputs& in, const GlaRule& rule) {
  const GlaResult out = make_result(in);
  in.q.dtype() == Dtype::f64 ? recurrent<double>(in, rule, out) : recurrent<float>(in, rule, out);
  return out;
}

GlaResult gla_fwd_cpu(const GlaInputs& in, const GlaRule& rule) {
  if (in.q.dim(1) <= kRecurrentTokens) return gla_recurrent(in, rule);
  const GlaResult out = make_result(in);
  in.q.dtype() == Dtype::f64 ? chunked_fwd<double>(in, rule, out) : chunked_fwd<float>(in, rule, out);
  return out;
}

void gla_bwd_cpu(const GlaInputs& in, const GlaRule& rule, const GlaPrepared&, const Tensor& grad_o, const Tensor& grad_h_T,
                 const GlaGradients& out) {
  in.q.dtype() == Dtype::f64 ? chunked_bwd<double>(in, rule, grad_o, grad_h_T, out) : chunked_bwd<float>(in, rule, grad_o, grad_h_T, out);
}

}  // namespace longhand
