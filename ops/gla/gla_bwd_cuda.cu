// GLA on CUDA, backward. The states at chunk beginnings, the gradients of the states at chunk ends and grad v come from two walks
// (gla_cuda.cu); with them every chunk stands alone.
//
// gla_chunk_bwd_kernel: grad q, grad k, grad gate; of the chunks that gla_chunk_bwd_mild_cuda.cu has left, where it runs
// moves   per token and head q, k, gate in, their gradients out, v and grad o in once per slice of Dk (from L2 when slices run together);
//         per chunk and head two turned states of Dk Dv
// flops   per chunk and head the products with the states (2 * 64 Dk Dv each), grad o v' once per slice (64 * 64 * Dv), squares of the
//         chunk (4 * 28 * 64 Dk) and its leaves of 8 tokens, pair by pair in f32
// floor   B 8, T 2048, H 4, Dk 128, Dv 256, bf16: 320 MB / 3.0 TB/s = 0.11 ms on an H100 SXM, two fifths of it states
// split   one block of 8 warps per (row, chunk, head, 64 columns of Dk). In products, warp w has token rows 16 * (w % 4) and half w / 4 of
//         the columns; otherwise a warp has a leaf of 8 tokens and a lane two columns of it, in registers
// needs   what gla_cuda.cu needs; 91 KB of shared memory a block in bf16, 165 KB in f32 (98 KB with one stage, where there is less)
// agrees  with the CPU reference to kGlaToleranceF32, kGlaToleranceBf16 (gla_kernels.h); bf16 rounds the states, grad o v' and each decayed
//         operand. The gate's gradient adds differences q grad_q - k grad_k of pairs inside the chunk, without the pairs i = j, which have
//         no decay in them: what cancels there is of the size of the gradients of the pairs themselves
// order   fixed, no atomics
// Exponentials are ex2.approx, reciprocals rcp.approx (cuda_math.cuh).
#include <algorithm>

#include "core/error.h"
#include "ops/gla/gla_chunks_cuda.cuh"

namespace longhand {
namespace {

constexpr int kSumStride = kSlice + 8;  // floats: accumulator fragments, written two columns at a time, meet all banks evenly

template <class T>
struct ChunkBwdLayout {  // shared memory in bytes; the stages and, later, what the products left share one place
  static constexpr int stride = tile_stride<T>(kSlice), tile = kChunk * stride, tile_bytes = tile * static_cast<int>(sizeof(T));
  static constexpr int sums = kChunk * kSumStride;  // floats of a tile in f32
  static constexpr int stage_bytes = 4 * tile_bytes, left_bytes = 3 * sums * 4 + tile_bytes;
  static constexpr int columns = kLeaves * kSlice;  // floats: a value of every column and leaf
  __host__ __device__ static constexpr int shared_place(int stages) {
    return stages * stage_bytes > left_bytes ? stages * stage_bytes : left_bytes;
  }
  __host__ __device__ static constexpr int total_bytes(int stages) { return shared_place(stages) + tile_bytes + 4 * columns * 4; }
};

template <class T>
__device__ __forceinline__ void chunk_bwd(const GlaChunkBwdArgs<T>& a, int64_t piece) {
  using Layout = ChunkBwdLayout<T>;
  constexpr int stride = Layout::stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
  const int tile_row = 16 * (warp % 4), first_column = 32 * (warp / 4);  // in products
  const int leaf = warp, row = kLeafTokens * leaf, column = 2 * lane;    // by columns
  const int slice = static_cast<int>(piece % a.slices);
  const int64_t unit = piece / a.slices, h = unit % a.H, chunk = unit / a.H % a.chunks, b = unit / a.H / a.chunks, t0 = chunk * kChunk;
  const int valid = static_cast<int>(a.tokens - t0 < kChunk ? a.tokens - t0 : kChunk);
  const int width = a.Dk - kSlice * slice < kSlice ? a.Dk - kSlice * slice : kSlice;

  unsigned char* stages = shared_memory();
  float* through_S = reinterpret_cast<float*>(stages);  // after the stages: [64][kSumStride] grad_o S', v R' and products of a square
  float* through_R = through_S + Layout::sums;
  float* square_sums = through_R + Layout::sums;
  T* decayed = reinterpret_cast<T*>(square_sums + Layout::sums);                   // queries of odd blocks, keys of even ones
  T* grad_scores = reinterpret_cast<T*>(stages + Layout::shared_place(a.stages));  // scale * grad_o_i v_j, up to the tiles on the diagonal
  float* leaf_sums = reinterpret_cast<float*>(grad_scores + Layout::tile);
  float* state_dots = leaf_sums + Layout::columns;  // <R, S> of a column, by the warps that share it
  float* behind_sums = state_dots + Layout::columns;
  float* before_sums = behind_sums + Layout::columns;

  const auto at_leaf = [&](const auto& of) { return of.data + b * of.batch + (t0 + row) * of.token + h * a.Dk + kSlice * slice + column; };
  const auto stage_of = [&](int p) { return reinterpret_cast<T*>(stages + (p & (a.stages - 1)) * Layout::stage_bytes); };
  const auto fetch = [&](int p) {  // 64 columns of Dv
    T* grad_o = stage_of(p);
    const int part = kSlice * p, columns = a.Dv - part < kSlice ? a.Dv - part : kSlice, thread = static_cast<int>(threadIdx.x);
    const auto load = [&](int tile, const T* from, int64_t row_stride, int rows, int existing, bool vectors) {
      load_chunk_tile<kSlice, kSliceThreads>(grad_o + tile * Layout::tile, from, row_stride, rows, existing, vectors, thread);
    };
    const int64_t state = (unit * a.Dv + part) * a.D + kSlice * slice;
    load(0, a.grad_o.data + b * a.grad_o.batch + t0 * a.grad_o.token + h * a.Dv + part, a.grad_o.token, valid, columns, a.grad_o.vectors);
    load(1, a.v.data + b * a.v.batch + t0 * a.v.token + h * a.Dv + part, a.v.token, valid, columns, a.v.vectors);
    load(2, a.states + state, a.D, columns, kSlice, true);
    load(3, a.state_grads + state, a.D, columns, kSlice, true);
  };
  const int turns = (a.Dv + kSlice - 1) / kSlice;
  if (a.stages == 2) fetch(0);
  Two<T> q[kLeafTokens], k[kLeafTokens], gate[kLeafTokens];
  load_leaf(gate, at_leaf(a.gate), a.gate.token, valid - row, width - column, a.gate.vectors);
  load_leaf(q, at_leaf(a.q), a.q.token, valid - row, width - column, a.q.vectors);
  load_leaf(k, at_leaf(a.k), a.k.token, valid - row, width - column, a.k.vectors);

  // grad_o S', v R' (rows: tokens; columns: this slice of Dk) and grad_o v' (columns: tokens j)
  {
    float product_S[4][4], product_R[4][4], product[4][4];
    clear(product_S);
    clear(product_R);
    clear(product);
    float2 state_dot = make_float2(0, 0);
    const int tiles_below = (tile_row - first_column) / 16 + 1;  // 16-column tiles of grad_o v' up to the diagonal, of this half
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
      const T* grad_o = stage_of(p);
      const T *v = grad_o + Layout::tile, *S = v + Layout::tile, *R = S + Layout::tile;
#pragma unroll
      for (int k16 = 0; k16 < kSlice; k16 += 16) {
        const Left<T> left_o = Left<T>::template load<Stored::as_is>(grad_o + tile_row * stride + k16, stride);
        multiply<Stored::as_is, 2>(product_S, left_o, S + k16 * stride + first_column, stride);
        multiply<Stored::transposed, 2>(product, left_o, v + first_column * stride + k16, stride, 0, tiles_below);
        const Left<T> left_v = Left<T>::template load<Stored::as_is>(v + tile_row * stride + k16, stride);
        multiply<Stored::as_is, 2>(product_R, left_v, R + k16 * stride + first_column, stride);
      }
#pragma unroll
      for (int i = 0; i < kLeafTokens; ++i)
        state_dot = state_dot + load_two(S + (row + i) * stride + column) * load_two(R + (row + i) * stride + column);
    }
    __syncthreads();  // the stages have been read
#pragma unroll
    for (int j8 = 0; j8 < 4; ++j8)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = tile_row + g + 8 * half, j = first_column + 8 * j8 + 2 * quad;
        if (j8 / 2 < tiles_below)
          store_two(grad_scores + i * stride + j, a.scale * product[j8][2 * half], a.scale * product[j8][2 * half + 1], true, true);
        store_two(through_S + i * kSumStride + j, product_S[j8][2 * half], product_S[j8][2 * half + 1], true, true);
        store_two(through_R + i * kSumStride + j, product_R[j8][2 * half], product_R[j8][2 * half + 1], true, true);
      }
    store_two(state_dots + leaf * kSlice + column, state_dot.x, state_dot.y, true, true);
  }

  float2 alpha[kLeafTokens];
  const auto log2_gates = [&](int i) {
    const float2 given = gate[i].wide();
    const bool exists = row + i < valid;
    return make_float2(exists && column < width ? log2_gate<T>(given.x, a.gates) : 0.0f,
                       exists && column + 1 < width ? log2_gate<T>(given.y, a.gates) : 0.0f);
  };
  {
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      const float2 log2 = log2_gates(i);
      sum = sum + log2;
      alpha[i] = exp2_of(log2);
    }
    store_two(leaf_sums + leaf * kSlice + column, sum.x, sum.y, true, true);
  }
  __syncthreads();

  // Pairs j < i of a leaf.
  float2 grad_q[kLeafTokens], grad_k[kLeafTokens];
#pragma unroll
  for (int i = 0; i < kLeafTokens; ++i) grad_q[i] = grad_k[i] = make_float2(0, 0);
  {
    float2 decay[kLeafTokens];  // from behind j through i
#pragma unroll
    for (int i = 1; i < kLeafTokens; ++i) {
      const Pack<T, kLeafTokens> grads = load_pack<kLeafTokens>(grad_scores + (row + i) * stride + row);
      const float2 query = q[i].wide();
#pragma unroll
      for (int j = 0; j < i; ++j) {
        decay[j] = j == i - 1 ? alpha[i] : decay[j] * alpha[i];
        const float2 grad = widen(grads.at[j]) * decay[j];
        grad_q[i] = grad_q[i] + grad * k[j].wide();
        grad_k[j] = grad_k[j] + grad * query;
      }
    }
  }

  // Squares of 8, 16, 32 tokens: queries of odd blocks against keys of the block before, and the other way round.
  LeafDecays decays;
  decays.start(alpha);
#pragma unroll 1
  for (int square = kLeafTokens; square < kChunk; square *= 2) {
    const bool odd_leaf = leaf / (square / kLeafTokens) % 2 == 1;
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      const float2 two = odd_leaf ? q[i].wide() * decays.from_begin[i] : k[i].wide() * decays.to_end[i];
      store_two(decayed + (row + i) * stride + column, two.x, two.y, true, true);
    }
    __syncthreads();
    float added[4][4];
    clear(added);
    const auto add_queries = [&](int j, bool halves) {  // rows i of this tile take keys j ..
      Left<T> left = Left<T>::template load<Stored::as_is>(grad_scores + tile_row * stride + j, stride);
      if (halves) left.keep_rows(1), left.keep_sum_index(0);
      multiply<Stored::as_is, 2>(added, left, decayed + j * stride + first_column, stride);
    };
    const auto add_keys = [&](int i, bool halves) {  // rows j of this tile take queries i ..
      Left<T> left = Left<T>::template load<Stored::transposed>(grad_scores + i * stride + tile_row, stride);
      if (halves) left.keep_rows(0), left.keep_sum_index(1);
      multiply<Stored::as_is, 2>(added, left, decayed + i * stride + first_column, stride);
    };
    if (square == kLeafTokens) {
      add_queries(tile_row, true);
      add_keys(tile_row, true);
    } else {
      const int block = tile_row / square;
      for (int other = 0; other < square; other += 16)
        if (block % 2 == 1) add_queries((block - 1) * square + other, false);
        else add_keys((block + 1) * square + other, false);
    }
#pragma unroll
    for (int n8 = 0; n8 < 4; ++n8)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_two(square_sums + (tile_row + g + 8 * half) * kSumStride + first_column + 8 * n8 + 2 * quad, added[n8][2 * half],
                  added[n8][2 * half + 1], true, true);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      const float2 sum = load_two(square_sums + (row + i) * kSumStride + column);
      if (odd_leaf) grad_q[i] = grad_q[i] + decays.from_begin[i] * sum;
      else grad_k[i] = grad_k[i] + decays.to_end[i] * sum;
    }
    decays.widen(square, leaf, leaf_sums);
  }

  // With the states, and the pairs i = j. What the gate's gradient sums: what lies behind t in grad_q's place, before t in grad_k's.
  float2 behind = make_float2(0, 0), before = make_float2(0, 0);
#pragma unroll
  for (int i = 0; i < kLeafTokens; ++i) {
    const int at = (row + i) * kSumStride + column;
    const float2 query = q[i].wide(), key = k[i].wide();
    const float2 from_S = a.scale * (decays.from_begin[i] * load_two(through_S + at)), from_R = decays.to_end[i] * load_two(through_R + at);
    const float same = widen(grad_scores[(row + i) * stride + row + i]);
    // The decays have done: the gradients of q and k take their place.
    decays.from_begin[i] = grad_q[i] + from_S + same * key;
    decays.to_end[i] = grad_k[i] + from_R + same * query;
    grad_q[i] = query * (grad_q[i] + from_S) + -1.0f * (key * grad_k[i]);
    grad_k[i] = key * from_R;
    behind = behind + grad_q[i];
    before = before + grad_k[i];
  }
  const auto store = [&](const TokenRows<T>& to, const float2(&values)[kLeafTokens]) {
    if (to.data != nullptr) store_leaf(at_leaf(to), to.token, values, valid - row, width - column, to.vectors);
  };
  store(a.grad_q, decays.from_begin);
  store(a.grad_k, decays.to_end);
  if (a.grad_gate.data == nullptr) return;

  // dg_t = sum over u >= t of the first + sum over u < t of the second + decay of the chunk * <R, S>
  store_two(behind_sums + leaf * kSlice + column, behind.x, behind.y, true, true);
  store_two(before_sums + leaf * kSlice + column, before.x, before.y, true, true);
  __syncthreads();
  behind = before = make_float2(0, 0);
  float2 whole = make_float2(0, 0);
#pragma unroll
  for (int other = 0; other < kLeaves; ++other) {
    if (other > leaf) behind = behind + load_two(behind_sums + other * kSlice + column);
    if (other < leaf) before = before + load_two(before_sums + other * kSlice + column);
    whole = whole + load_two(state_dots + other * kSlice + column);
  }
  before = before + whole * chunk_decay(leaf_sums);
#pragma unroll
  for (int i = kLeafTokens - 1; i >= 0; --i) {
    behind = behind + grad_q[i];
    grad_q[i] = behind;
  }
#pragma unroll
  for (int i = 0; i < kLeafTokens; ++i) {
    const float2 grad = grad_q[i] + before, given = gate[i].wide();
    before = before + grad_k[i];
    const GateAndSlope x = gate_and_slope<T>(given.x, a.gates), y = gate_and_slope<T>(given.y, a.gates);
    // a decay of 0 passes nothing on: there dg is exp(g) times something
    const float2 result = make_float2(x.log2 < kLog2OfNothing ? 0.0f : grad.x * x.slope, y.log2 < kLog2OfNothing ? 0.0f : grad.y * y.slope);
    grad_q[i] = result;
  }
  store(a.grad_gate, grad_q);
}

template <class T>
__global__ void __launch_bounds__(kSliceThreads, sizeof(T) == 2 ? 2 : 1)
    gla_chunk_bwd_kernel(const __grid_constant__ GlaChunkBwdArgs<T> a) {
  a.search.each([&](int64_t piece) { chunk_bwd(a, piece); });
}

// --- launchers ------------------------------------------------------------------------------------------------

Tensor rows_of_batch(const Tensor& t, int64_t begin, int64_t end) {
  return t.defined() ? t.slice(0, begin, end) : t;
}

/// Backward of some rows of the batch.
template <class T>
void backward_rows(const GlaInputs& in, const GlaRule& rule, const GlaPrepared& kept, const Tensor& grad_o, const Tensor& grad_h_T,
                   const GlaGradients& out) {
  const CudaContext& context = in.q.device().cuda_context();
  const GlaSizes s = in.sizes();
  const GlaPrepared prepared = kept.q.defined() ? kept : gla_prepare_cuda(in, rule);
  const bool chunks_wanted = out.q.defined() || out.k.defined() || out.gate.defined();
  const GlaBorders borders = gla_borders_cuda(in, prepared, grad_o, grad_h_T, out.v, out.h0, chunks_wanted);
  if (!chunks_wanted) return;

  GlaChunkBwdArgs<T> args{};
  args.q = token_rows<const T>(in.q, s.Dk);
  args.k = token_rows<const T>(in.k, s.Dk);
  args.v = token_rows<const T>(in.v, s.Dv);
  args.gate = token_rows<const T>(in.gate, s.Dk);
  args.grad_o = token_rows<const T>(grad_o, s.Dv);
  args.grad_q = token_rows<T>(out.q, s.Dk);
  args.grad_k = token_rows<T>(out.k, s.Dk);
  args.grad_gate = token_rows<T>(out.gate, s.Dk);
  args.states = address_of<const T>(borders.states);
  args.state_grads = address_of<const T>(borders.gradients);
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
  args.search = SteepSearch::of_all(blocks);
  if constexpr (sizeof(T) == 2)
    if (gla_chunk_bwd_has_mild(args, context)) {
      launch_gla_chunk_bwd_mild(args, context);
      args.search = SteepSearch::among(address_of<const float>(prepared.decay), s.B * args.chunks * s.H, args.D, args.slices, kSlice,
                                       2 * context.sm_count);
    }
  launch(&gla_chunk_bwd_kernel<T>, "gla_chunk_bwd_kernel", args.search.grid(), dim3(kSliceThreads),
         static_cast<size_t>(ChunkBwdLayout<T>::total_bytes(args.stages)), context, args);
}

// Two borders of every chunk and head are kept while backward runs; the batch is taken in equal pieces so that they stay below this.
constexpr int64_t kBorderBytes = int64_t{512} << 20;

template <class T>
void backward(const GlaInputs& in, const GlaRule& rule, const GlaPrepared& prepared, const Tensor& grad_o_or_none, const Tensor& grad_h_T,
              const GlaGradients& out) {
  const GlaSizes s = in.sizes();
  const Tensor grad_o = grad_o_or_none.defined() ? grad_o_or_none : Tensor::zeros(in.q.device(), in.q.dtype(), in.v.shape());
  const int64_t border_bytes = 2 * s.B * chunk_count(s.T) * s.H * s.Dv * padded_key_dim(s.Dk) * static_cast<int64_t>(sizeof(T));
  const int64_t pieces = std::clamp<int64_t>((border_bytes + kBorderBytes - 1) / kBorderBytes, 1, std::max<int64_t>(1, s.B)),
                rows = (s.B + pieces - 1) / pieces;
  for (int64_t begin = 0; begin < s.B; begin += rows) {
    const int64_t end = std::min(begin + rows, s.B);
    const auto piece = [&](const Tensor& t) { return rows_of_batch(t, begin, end); };
    const GlaInputs some{piece(in.q), piece(in.k), piece(in.v), piece(in.gate), piece(in.h0)};
    const GlaPrepared chunks{piece(prepared.q), piece(prepared.k), piece(prepared.scores), piece(prepared.decay)};
    const GlaGradients grads{piece(out.q), piece(out.k), piece(out.v), piece(out.gate), piece(out.h0)};
    backward_rows<T>(some, rule, chunks, piece(grad_o), piece(grad_h_T), grads);
  }
}

}  // namespace

void gla_bwd_cuda(const GlaInputs& in, const GlaRule& rule, const GlaPrepared& prepared, const Tensor& grad_o, const Tensor& grad_h_T,
                  const GlaGradients& out) {
  if (!gla_takes_keys_whole(in)) return gla_bwd_key_slices_cuda(in, rule, grad_o, grad_h_T, out);
  in.q.dtype() == Dtype::bf16 ? backward<Bf16>(in, rule, prepared, grad_o, grad_h_T, out)
                              : backward<float>(in, rule, prepared, grad_o, grad_h_T, out);
}

}  // namespace longhand
