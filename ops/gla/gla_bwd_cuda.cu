// GLA on CUDA, backward. The states at chunk beginnings, the gradients of the states at chunk ends and grad v come from two walks
// (gla_cuda.cu); with them every chunk stands alone.
//
// gla_chunk_bwd_kernel: grad q, grad k, grad gate
// moves   per token and head q, k, gate in, their gradients out, v and grad o in once per slice of Dk (from L2 when slices run together);
//         per chunk and head two turned states of Dk Dv
// flops   per chunk and head the products with the states (2 * 64 Dk Dv each), grad o v' once per slice (64 * 64 * Dv), squares of the
//         chunk (4 * 28 * 64 Dk) and its leaves of 8 tokens, pair by pair in f32
// floor   B 8, T 2048, H 4, Dk 128, Dv 256, bf16: 320 MB / 3.0 TB/s = 0.11 ms on an H100 SXM, two fifths of it states
// split   one block of 8 warps per (row, chunk, head, 64 columns of Dk). In products, warp w has token rows 16 * (w % 4) and half w / 4 of
//         the columns; by columns, a thread has one column and 16 tokens
// needs   what gla_cuda.cu needs; up to 192 KB of shared memory in f32 (one stage fewer where there is less)
// agrees  with the CPU reference to kGlaToleranceF32, kGlaToleranceBf16 (gla_kernels.h); bf16 rounds the states, grad o v' and each decayed
//         operand. The gate's gradient adds differences q grad_q - k grad_k of pairs inside the chunk, without the pairs i = j, which have
//         no decay in them: what cancels there is of the size of the gradients of the pairs themselves
// order   fixed, no atomics
// Exponentials are ex2.approx, reciprocals rcp.approx (cuda_math.cuh).
#include <algorithm>

#include "core/error.h"
#include "ops/gla/gla_cuda.cuh"

namespace longhand {
namespace {

template <class T>
struct ChunkBwdArgs {
  TokenRows<const T> q, k, v, gate, grad_o;
  TokenRows<T> grad_q, grad_k, grad_gate;  // data null: not wanted
  const T *states, *state_grads;           // [B, chunks, H, Dv, D]
  GateArgs gates;
  float scale;
  int64_t B, tokens, H, chunks;
  int Dk, Dv, D, slices, stages;
};

template <class T>
struct ChunkBwdLayout {  // shared memory; the stages and, later, what is summed over the chunk share one place
  static constexpr int stride = tile_stride<T>(kSlice), tile = kChunk * stride;
  static constexpr int stage_bytes = 4 * tile * static_cast<int>(sizeof(T)), sums_bytes = 4 * kDecayFloats * 4;
  static constexpr int columns = 3 * 4 * kSlice;  // three partial sums per column of each of four threads
  __host__ __device__ static constexpr int shared_place(int stages) {
    return stages * stage_bytes > sums_bytes ? stages * stage_bytes : sums_bytes;
  }
  __host__ __device__ static constexpr int total_bytes(int stages) {
    return shared_place(stages) + 3 * tile * static_cast<int>(sizeof(T)) + (kLeafSumFloats + columns) * 4;
  }
};

template <class T>
__global__ void __launch_bounds__(kSliceThreads, sizeof(T) == 2 ? 2 : 1) gla_chunk_bwd_kernel(const ChunkBwdArgs<T> a) {
  using Layout = ChunkBwdLayout<T>;
  constexpr int stride = Layout::stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4, row_tile = warp % 4, half = warp / 4;
  const int column = own_column(), rows = own_rows(), tile_row = 16 * row_tile, first_column = 32 * half;
  const int slice = static_cast<int>(blockIdx.x % a.slices);
  const int64_t unit = blockIdx.x / a.slices, h = unit % a.H, chunk = unit / a.H % a.chunks, b = unit / a.H / a.chunks, t0 = chunk * kChunk;
  const int valid = static_cast<int>(a.tokens - t0 < kChunk ? a.tokens - t0 : kChunk);
  const int width = a.Dk - kSlice * slice < kSlice ? a.Dk - kSlice * slice : kSlice;

  unsigned char* stages = shared_memory();
  float* sums = reinterpret_cast<float*>(stages);  // after the stages: decays, then the gradients of pairs
  T* q_tile = reinterpret_cast<T*>(stages + Layout::shared_place(a.stages));
  T* k_tile = q_tile + Layout::tile;
  T* grad_scores = k_tile + Layout::tile;  // scale * grad_o_i v_j, up to the tiles on the diagonal
  float* leaf_sums = reinterpret_cast<float*>(grad_scores + Layout::tile);
  float* state_dots = leaf_sums + kLeafSumFloats;  // [4][64] <R, S> of the column, by the four threads that share it
  float* behind_sums = state_dots + 4 * kSlice;    // [4][64]
  float* before_sums = behind_sums + 4 * kSlice;   // [4][64]
  const SliceDecays decays{sums, sums + kDecayFloats, leaf_sums};
  float* pair_q = sums + 2 * kDecayFloats;  // [64][kDecayStride] grad q from pairs j < i of the chunk
  float* pair_k = pair_q + kDecayFloats;

  const auto at_slice = [&](const auto& of) { return of.data + b * of.batch + t0 * of.token + h * a.Dk + kSlice * slice; };
  const auto fetch = [&](int p) {  // 64 columns of Dv
    T* grad_o = reinterpret_cast<T*>(stages + p % a.stages * Layout::stage_bytes);
    const int part = kSlice * p, columns = a.Dv - part < kSlice ? a.Dv - part : kSlice;
    load_tile(grad_o, kChunk, kSlice, a.grad_o.data + b * a.grad_o.batch + t0 * a.grad_o.token + h * a.Dv + part, a.grad_o.token, valid,
              columns, a.grad_o.vectors);
    load_tile(grad_o + Layout::tile, kChunk, kSlice, a.v.data + b * a.v.batch + t0 * a.v.token + h * a.Dv + part, a.v.token, valid, columns,
              a.v.vectors);
    const int64_t state = (unit * a.Dv + part) * a.D + kSlice * slice;
    load_tile(grad_o + 2 * Layout::tile, kSlice, kSlice, a.states + state, a.D, columns, kSlice, true);
    load_tile(grad_o + 3 * Layout::tile, kSlice, kSlice, a.state_grads + state, a.D, columns, kSlice, true);
  };
  load_tile(q_tile, kChunk, kSlice, at_slice(a.q), a.q.token, valid, width, a.q.vectors);
  load_tile(k_tile, kChunk, kSlice, at_slice(a.k), a.k.token, valid, width, a.k.vectors);

  // grad_o S', v R' (rows: tokens; columns: this slice of Dk) and grad_o v' (columns: tokens j)
  float through_S[4][4], through_R[4][4], product[4][4];
  clear(through_S);
  clear(through_R);
  clear(product);
  float state_dot = 0;
  const int tiles_below = row_tile + 1 - 2 * half;  // 16-column tiles of grad_o v' up to the diagonal, of this half
  const int turns = (a.Dv + kSlice - 1) / kSlice;
  if (a.stages == 2) fetch(0);
  for (int p = 0; p < turns; ++p) {
    if (a.stages == 2) {
      copies_arrived();
      __syncthreads();  // part p is here, and nobody reads the other stage any more
      if (p + 1 < turns) fetch(p + 1);
    } else {
      __syncthreads();
      fetch(p);
      copies_arrived();
      __syncthreads();
    }
    const T* grad_o = reinterpret_cast<const T*>(stages + p % a.stages * Layout::stage_bytes);
    const T *v = grad_o + Layout::tile, *S = v + Layout::tile, *R = S + Layout::tile;
#pragma unroll
    for (int k16 = 0; k16 < kSlice; k16 += 16) {
      const Left<T> left_o = Left<T>::template load<Stored::as_is>(grad_o + tile_row * stride + k16, stride);
      multiply<Stored::as_is, 2>(through_S, left_o, S + k16 * stride + first_column, stride);
      multiply<Stored::transposed, 2>(product, left_o, v + first_column * stride + k16, stride, 0, tiles_below);
      const Left<T> left_v = Left<T>::template load<Stored::as_is>(v + tile_row * stride + k16, stride);
      multiply<Stored::as_is, 2>(through_R, left_v, R + k16 * stride + first_column, stride);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) state_dot += widen(S[(rows + i) * stride + column]) * widen(R[(rows + i) * stride + column]);
  }
  copies_arrived();  // q and k, where there was no part at all
  __syncthreads();   // the stages have been read

#pragma unroll
  for (int j8 = 0; j8 < 4; ++j8)
#pragma unroll
    for (int e = 0; e < 4; e += 2)
      if (j8 / 2 < tiles_below)
        store_two(grad_scores + (tile_row + g + e / 2 * 8) * stride + first_column + 8 * j8 + 2 * quad, a.scale * product[j8][e],
                  a.scale * product[j8][e + 1], true, true);
  state_dots[rows / 16 * kSlice + column] = state_dot;
  const auto given_gate = [&](int row) { return widen(at_slice(a.gate)[row * a.gate.token + column]); };
  float log2_gates[2][kLeafTokens];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      const int row = rows + k * kLeafTokens + i;
      log2_gates[k][i] = row < valid && column < width ? log2_gate(given_gate(row), a.gates) : 0.0f;
    }
    leaf_decays(decays, rows / kLeafTokens + k, column, log2_gates[k]);
  }
  __syncthreads();

  // Pairs j < i of a leaf, one column per thread.
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int first = rows + k * kLeafTokens;
    float query[kLeafTokens], key[kLeafTokens], decay[kLeafTokens] /* from behind j through i */, to_q[kLeafTokens] = {},
                                                                                                  to_k[kLeafTokens] = {};
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      query[i] = widen(q_tile[(first + i) * stride + column]);
      key[i] = widen(k_tile[(first + i) * stride + column]);
    }
#pragma unroll
    for (int i = 1; i < kLeafTokens; ++i) {
      const float alpha = exp2_approx(log2_gates[k][i]);
      const Pack<T, kLeafTokens> grads = load_pack<kLeafTokens>(grad_scores + (first + i) * stride + first);
#pragma unroll
      for (int j = 0; j < i; ++j) {
        decay[j] = j == i - 1 ? alpha : decay[j] * alpha;
        const float grad = widen(grads.at[j]) * decay[j];
        to_q[i] += grad * key[j];
        to_k[j] += grad * query[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      pair_q[(first + i) * kDecayStride + column] = to_q[i];
      pair_k[(first + i) * kDecayStride + column] = to_k[i];
    }
  }
  __syncthreads();

  // Squares of 8, 16, 32 tokens: queries of odd blocks against keys of the block before, and the other way round.
  const auto add_scaled_product = [&](float* to, const float* scale, const float(&added)[4][4]) {
#pragma unroll
    for (int n8 = 0; n8 < 4; ++n8)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = (tile_row + g + e / 2 * 8) * kDecayStride + first_column + 8 * n8 + 2 * quad + e % 2;
        to[at] += added[n8][e] * scale[at];
      }
  };
#pragma unroll 1
  for (int square = kLeafTokens; square < kChunk; square *= 2) {
    const bool leaves = square == kLeafTokens;
    const int block = tile_row / square;
    if (leaves || block % 2 == 1) {
      float added[4][4];
      clear(added);
      const int begin = leaves ? tile_row : (block - 1) * square, end = leaves ? tile_row + 16 : block * square;
      for (int j = begin; j < end; j += 16) {
        Left<T> left = Left<T>::template load<Stored::as_is>(grad_scores + tile_row * stride + j, stride);
        if (leaves) left.keep_rows(1), left.keep_sum_index(0);
        multiply_weighted<Stored::as_is, 2>(added, left, k_tile + j * stride + first_column, stride,
                                            decays.to_end + j * kDecayStride + first_column, kDecayStride);
      }
      add_scaled_product(pair_q, decays.from_begin, added);
    }
    if (leaves || block % 2 == 0) {
      float added[4][4];
      clear(added);
      const int begin = leaves ? tile_row : (block + 1) * square, end = leaves ? tile_row + 16 : (block + 2) * square;
      for (int i = begin; i < end; i += 16) {
        Left<T> left = Left<T>::template load<Stored::transposed>(grad_scores + i * stride + tile_row, stride);
        if (leaves) left.keep_rows(0), left.keep_sum_index(1);
        multiply_weighted<Stored::as_is, 2>(added, left, q_tile + i * stride + first_column, stride,
                                            decays.from_begin + i * kDecayStride + first_column, kDecayStride);
      }
      add_scaled_product(pair_k, decays.to_end, added);
    }
    __syncthreads();
    widen_decays(decays, square);
    __syncthreads();
  }

  // With the states, and the pairs i = j: grad q and grad k, into the tiles of q and k; what the gate's gradient sums, into pair_q, pair_k.
#pragma unroll
  for (int n8 = 0; n8 < 4; ++n8)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = tile_row + g + e / 2 * 8, m = first_column + 8 * n8 + 2 * quad + e % 2, at = i * kDecayStride + m;
      const float query = widen(q_tile[i * stride + m]), key = widen(k_tile[i * stride + m]), same = widen(grad_scores[i * stride + i]);
      const float before = a.scale * decays.from_begin[at] * through_S[n8][e], behind = decays.to_end[at] * through_R[n8][e];
      const float inside_q = pair_q[at], inside_k = pair_k[at];
      q_tile[i * stride + m] = narrow<T>(inside_q + before + same * key);
      k_tile[i * stride + m] = narrow<T>(inside_k + behind + same * query);
      pair_q[at] = query * (inside_q + before) - key * inside_k;
      pair_k[at] = key * behind;
    }
  __syncthreads();
  const auto store = [&](const TokenRows<T>& to, const T* tile) {
    if (to.data != nullptr) store_tile(at_slice(to), to.token, tile, kSlice, valid, width, to.vectors);
  };
  store(a.grad_q, q_tile);
  store(a.grad_k, k_tile);
  if (a.grad_gate.data == nullptr) return;

  // dg_t = sum_{u >= t} pair_q_u + sum_{u < t} pair_k_u + decay of the chunk * <R, S>
  float behind = 0, before = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    behind += pair_q[(rows + i) * kDecayStride + column];
    before += pair_k[(rows + i) * kDecayStride + column];
  }
  behind_sums[rows / 16 * kSlice + column] = behind;
  before_sums[rows / 16 * kSlice + column] = before;
  __syncthreads();
  behind = before = 0;
  float whole = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k > rows / 16) behind += behind_sums[k * kSlice + column];
    if (k < rows / 16) before += before_sums[k * kSlice + column];
    whole += state_dots[k * kSlice + column];
  }
  whole *= chunk_decay(decays, column);
  float grad[16];
#pragma unroll
  for (int i = 15; i >= 0; --i) {
    behind += pair_q[(rows + i) * kDecayStride + column];
    grad[i] = behind + whole;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    grad[i] += before;
    before += pair_k[(rows + i) * kDecayStride + column];
    float result = 0.0f;
    if (rows + i < valid && column < width) {
      const float given = given_gate(rows + i);  // a decay of 0 passes nothing on: there dg is exp(g) times something
      if (exp2_approx(log2_gate(given, a.gates)) != 0.0f) result = grad[i] * gate_slope(given, a.gates);
    }
    grad_scores[(rows + i) * stride + column] = narrow<T>(result);
  }
  __syncthreads();
  store(a.grad_gate, grad_scores);
}

// --- launchers ------------------------------------------------------------------------------------------------

Tensor rows_of_batch(const Tensor& t, int64_t begin, int64_t end) {
  return t.defined() ? t.slice(0, begin, end) : t;
}

/// Backward of some rows of the batch.
template <class T>
void backward_rows(const GlaInputs& in, const GlaRule& rule, const Tensor& grad_o, const Tensor& grad_h_T, const GlaGradients& out) {
  const CudaContext& context = in.q.device().cuda_context();
  const GlaSizes s = in.sizes();
  const GlaPrepared prepared = gla_prepare_cuda(in, rule);
  const Tensor state_grads = gla_chunk_state_gradients_cuda(in, prepared, grad_o, grad_h_T, out.v, out.h0);
  if (!out.q.defined() && !out.k.defined() && !out.gate.defined()) return;
  const Tensor states = gla_chunk_states_cuda(in, prepared);

  ChunkBwdArgs<T> args{};
  args.q = token_rows<const T>(in.q, s.Dk);
  args.k = token_rows<const T>(in.k, s.Dk);
  args.v = token_rows<const T>(in.v, s.Dv);
  args.gate = token_rows<const T>(in.gate, s.Dk);
  args.grad_o = token_rows<const T>(grad_o, s.Dv);
  args.grad_q = token_rows<T>(out.q, s.Dk);
  args.grad_k = token_rows<T>(out.k, s.Dk);
  args.grad_gate = token_rows<T>(out.gate, s.Dk);
  args.states = address_of<const T>(states);
  args.state_grads = address_of<const T>(state_grads);
  args.gates = gate_args(rule);
  args.scale = static_cast<float>(rule.scale);
  args.B = s.B;
  args.tokens = s.T;
  args.H = s.H;
  args.chunks = chunk_count(s.T);
  args.Dk = static_cast<int>(s.Dk);
  args.Dv = static_cast<int>(s.Dv);
  args.D = padded_key_dim(s.Dk);
  args.slices = (args.Dk + kSlice - 1) / kSlice;
  args.stages = ChunkBwdLayout<T>::total_bytes(2) <= context.shared_memory_per_block ? 2 : 1;
  const int64_t blocks = s.B * args.chunks * s.H * args.slices;
  if (blocks == 0) return;
  launch(&gla_chunk_bwd_kernel<T>, "gla_chunk_bwd_kernel", dim3(static_cast<unsigned>(blocks)), dim3(kSliceThreads),
         static_cast<size_t>(ChunkBwdLayout<T>::total_bytes(args.stages)), context, args);
}

// Two borders of every chunk and head are kept while backward runs; the batch is taken in equal pieces so that they stay below this.
constexpr int64_t kBorderBytes = int64_t{512} << 20;

template <class T>
void backward(const GlaInputs& in, const GlaRule& rule, const Tensor& grad_o_or_none, const Tensor& grad_h_T, const GlaGradients& out) {
  const GlaSizes s = in.sizes();
  const Tensor grad_o = grad_o_or_none.defined() ? grad_o_or_none : Tensor::zeros(in.q.device(), in.q.dtype(), in.v.shape());
  const int64_t border_bytes = 2 * s.B * chunk_count(s.T) * s.H * s.Dv * padded_key_dim(s.Dk) * static_cast<int64_t>(sizeof(T));
  const int64_t pieces = std::clamp<int64_t>((border_bytes + kBorderBytes - 1) / kBorderBytes, 1, std::max<int64_t>(1, s.B)),
                rows = (s.B + pieces - 1) / pieces;
  for (int64_t begin = 0; begin < s.B; begin += rows) {
    const int64_t end = std::min(begin + rows, s.B);
    const auto piece = [&](const Tensor& t) { return rows_of_batch(t, begin, end); };
    const GlaInputs some{piece(in.q), piece(in.k), piece(in.v), piece(in.gate), piece(in.h0)};
    const GlaGradients grads{piece(out.q), piece(out.k), piece(out.v), piece(out.gate), piece(out.h0)};
    backward_rows<T>(some, rule, piece(grad_o), piece(grad_h_T), grads);
  }
}

}  // namespace

void gla_bwd_cuda(const GlaInputs& in, const GlaRule& rule, const Tensor& grad_o, const Tensor& grad_h_T, const GlaGradients& out) {
  require_gla_cuda_sizes(in);
  in.q.dtype() == Dtype::bf16 ? backward<Bf16>(in, rule, grad_o, grad_h_T, out) : backward<float>(in, rule, grad_o, grad_h_T, out);
}

}  // namespace longhand
