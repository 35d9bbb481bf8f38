// GLA on CUDA: what every chunk gives by itself.
//
// gla_prepare_kernel: decayed queries and keys, scores and decay of every chunk, or of those that gla_prepare_mild_cuda.cu has left
// moves   q, k, gate in; decayed q, k and 64 scores a token out: 5 Dk + 64 elements per token and head
// flops   per chunk and head 3 exponentials per gate; the scores by squares of 8, 16 and 32 tokens (28 x 64 x Dk products on tensor cores)
//         and the triangles of 8 tokens left on the diagonal (8 x 36 x Dk products, running decays in f32)
// floor   B 32, T 2048, H 4, Dk 128, bf16: 370 MB / 3.0 TB/s = 0.12 ms on an H100 SXM
// split   one block of 8 warps per (row, chunk, head), 64 columns of Dk at a time; a warp has a leaf of 8 tokens, a lane two columns of it
//         in registers. Products of a scale, 16 x 16 each, are spread over the warps
// needs   Dk <= 256, padded to 64, 128 or 256
// agrees  bf16 rounds each decayed operand once, and the scores
// order   fixed: columns of a lane, lanes by a tree, slices in order
// Exponentials are ex2.approx, reciprocals rcp.approx (cuda_math.cuh).
#include "ops/gla/gla_chunks_cuda.cuh"

namespace longhand {
namespace {

template <class T>
constexpr int kSliceTile = kChunk* tile_stride<T>(kSlice);  // elements of a tile of 64 tokens and 64 columns

// Decayed queries and keys of one scale, twice; logarithms of the leaves' decays, twice. The scores take the place of the tiles at the end.
constexpr int kScoreStride = kChunk + 4;
template <class T>
constexpr int kPrepareBytes = 4 * kSliceTile<T>* static_cast<int>(sizeof(T)) + 2 * kLeaves* kSlice * 4;
static_assert(kPrepareBytes<Bf16> >= kChunk * kScoreStride * 4);

/// The sums over a warp of 32 values: lane l gets that of values[l].
__device__ __forceinline__ float transposed_sums(float (&values)[32]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int kept = 16; kept >= 1; kept /= 2) {
    const bool upper = lane & kept;
#pragma unroll
    for (int k = 0; k < 16; ++k)
      if (k < kept) {
        const float given = upper ? values[k] : values[k + kept], own = upper ? values[k + kept] : values[k];
        values[k] = own + __shfl_xor_sync(0xffffffffu, given, kept);
      }
  }
  return values[0];
}

template <class T>
__device__ __forceinline__ void prepare_chunk(const GlaPrepareArgs<T>& a, int64_t unit) {
  constexpr int stride = tile_stride<T>(kSlice), pairs = kLeafTokens * (kLeafTokens + 1) / 2;
  const int leaf = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4, row = kLeafTokens * leaf;
  const int64_t h = unit % a.H, chunk = unit / a.H % a.chunks, b = unit / a.H / a.chunks, t0 = chunk * kChunk;
  const int valid = static_cast<int>(a.tokens - t0 < kChunk ? a.tokens - t0 : kChunk);

  T* const tiles = reinterpret_cast<T*>(shared_memory());  // [2] of q, then k
  float* const all_leaf_sums = reinterpret_cast<float*>(tiles + 4 * kSliceTile<T>);
  float* const sums = reinterpret_cast<float*>(shared_memory());  // at the end: the scores [64][kScoreStride]

  // Squares on the diagonal of scale 8 (warps 0 to 3), of scale 16 (warps 4 and 5) and of scale 32 (warps 4 to 7), 16 x 16 each.
  float inner[2][4], outer[2][4];
  clear(inner);
  clear(outer);
  float leaf_scores[pairs] = {};  // tokens j <= i of the leaf, at i (i + 1) / 2 + j; of this lane's columns
  int turn = 0;

  for (int slice = 0; slice < a.D / kSlice; ++slice) {
    const int width = a.Dk - kSlice * slice < kSlice ? a.Dk - kSlice * slice : kSlice;
    float* const leaf_sums = all_leaf_sums + slice % 2 * kLeaves * kSlice;
    Two<T> q[kLeafTokens], k[kLeafTokens];
    LeafDecays decays;
    {
      const auto load = [&](Two<T>(&to)[kLeafTokens], const TokenRows<const T>& from) {
        load_leaf(to, from.data + b * from.batch + (t0 + row) * from.token + h * a.Dk + kSlice * slice + 2 * lane, from.token, valid - row,
                  width - 2 * lane, from.vectors);
      };
      Two<T> gate[kLeafTokens];
      load(gate, a.gate);
      load(q, a.q);
      load(k, a.k);
      float2 alpha[kLeafTokens], sum = make_float2(0, 0);
#pragma unroll
      for (int i = 0; i < kLeafTokens; ++i) {
        const float2 given = gate[i].wide();
        const bool exists = row + i < valid;
        const float2 log2 = make_float2(exists && 2 * lane < width ? log2_gate<T>(given.x, a.gates) : 0.0f,
                                        exists && 2 * lane + 1 < width ? log2_gate<T>(given.y, a.gates) : 0.0f);
        sum = sum + log2;
        alpha[i] = exp2_of(log2);
      }
      *reinterpret_cast<float2*>(leaf_sums + leaf * kSlice + 2 * lane) = sum;
      float2 key[kLeafTokens];  // keys decay as the queries go by
#pragma unroll
      for (int i = 0; i < kLeafTokens; ++i) {
        const float2 query = q[i].wide();
        key[i] = k[i].wide();
#pragma unroll
        for (int j = 0; j <= i; ++j) {
          if (j < i) key[j] = key[j] * alpha[i];
          leaf_scores[i * (i + 1) / 2 + j] += query.x * key[j].x + query.y * key[j].y;
        }
      }
      decays.start(alpha);
    }
#pragma unroll
    for (int square = kLeafTokens; square < kChunk; square *= 2, ++turn) {  // queries of odd blocks against keys of the block before
      T *const q_tile = tiles + turn % 2 * 2 * kSliceTile<T>, *const k_tile = q_tile + kSliceTile<T>;
      const bool odd = leaf / (square / kLeafTokens) % 2 == 1;
#pragma unroll
      for (int i = 0; i < kLeafTokens; ++i) {
        if (odd) {
          const float2 decayed = q[i].wide() * decays.from_begin[i];
          store_two(q_tile + (row + i) * stride + 2 * lane, decayed.x, decayed.y, true, true);
        } else {
          const float2 decayed = k[i].wide() * decays.to_end[i];
          store_two(k_tile + (row + i) * stride + 2 * lane, decayed.x, decayed.y, true, true);
        }
      }
      __syncthreads();  // and the tiles of the turn before may be written again
      const auto add = [&](float(&scores)[2][4], int i16, int j16) {
#pragma unroll
        for (int first = 0; first < kSlice; first += 16)
          multiply<Stored::transposed, 1>(scores, Left<T>::template load<Stored::as_is>(q_tile + 16 * i16 * stride + first, stride),
                                          k_tile + 16 * j16 * stride + first, stride);
      };
      if (square == 8 && leaf < 4) add(inner, leaf, leaf);
      if (square == 16 && (leaf == 4 || leaf == 5)) add(inner, 2 * leaf - 7, 2 * leaf - 8);
      if (square == 32 && leaf >= 4) add(outer, leaf / 2, leaf % 2);
      decays.widen(square, leaf, leaf_sums);
    }
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      decays.from_begin[i] = a.scale * (q[i].wide() * decays.from_begin[i]);
      decays.to_end[i] = k[i].wide() * decays.to_end[i];
    }
    const int64_t at = (unit * kChunk + row) * a.D + kSlice * slice + 2 * lane;
    store_leaf(a.decayed_q + at, a.D, decays.from_begin, kLeafTokens, 2, true);
    store_leaf(a.decayed_k + at, a.D, decays.to_end, kLeafTokens, 2, true);
    if (leaf == 0) *reinterpret_cast<float2*>(a.decay + unit * a.D + kSlice * slice + 2 * lane) = chunk_decay(leaf_sums);
  }

  // The scores, below the diagonal: squares, then leaves.
  __syncthreads();
  const auto place = [&](int i, int j) { return sums + i * kScoreStride + j; };
  const auto put_square = [&](const float(&scores)[2][4], int i16, int j16) {
#pragma unroll
    for (int n8 = 0; n8 < 2; ++n8)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_two(place(16 * i16 + g + 8 * half, 16 * j16 + 8 * n8 + 2 * quad), scores[n8][2 * half], scores[n8][2 * half + 1], true, true);
  };
  if (leaf < 4) store_two(place(16 * leaf + 8 + g, 16 * leaf + 2 * quad), inner[0][2], inner[0][3], true, true);
  if (leaf == 4 || leaf == 5) put_square(inner, 2 * leaf - 7, 2 * leaf - 8);
  if (leaf >= 4) put_square(outer, leaf / 2, leaf % 2);
  float most[32];
#pragma unroll
  for (int k = 0; k < 32; ++k) most[k] = leaf_scores[k];
  const float score = transposed_sums(most);
  int i = 0;
  while ((i + 1) * (i + 2) / 2 <= lane) ++i;
  *place(row + i, row + lane - i * (i + 1) / 2) = score;
#pragma unroll
  for (int k = 32; k < pairs; ++k) {
    const float sum = warp_sum(leaf_scores[k]);
    if (lane == 0) *place(row + kLeafTokens - 1, row + k - kLeafTokens * (kLeafTokens - 1) / 2) = sum;
  }
  __syncthreads();
  constexpr int pack = 16 / static_cast<int>(sizeof(T)), packs = kChunk / pack;
  for (int u = static_cast<int>(threadIdx.x); u < kChunk * packs; u += kSliceThreads) {
    const int i_out = u / packs, first = u % packs * pack;
    float scaled[pack];
#pragma unroll
    for (int e = 0; e < pack; ++e) scaled[e] = first + e <= i_out ? a.scale * *place(i_out, first + e) : 0.0f;
    store_pack(a.scores + (unit * kChunk + i_out) * kChunk + first, round_to<T>(scaled));
  }
}

template <class T>
__global__ void __launch_bounds__(kSliceThreads, 2) gla_prepare_kernel(const __grid_constant__ GlaPrepareArgs<T> a) {
  a.search.each([&](int64_t unit) { prepare_chunk(a, unit); });
}

template <class T>
GlaPrepareArgs<T> prepare_args(const GlaInputs& in, const GlaRule& rule, const GlaPrepared& out) {
  const GlaSizes s = in.sizes();
  const int64_t chunks = chunk_count(s.T);
  return {token_rows<const T>(in.q, s.Dk),
          token_rows<const T>(in.k, s.Dk),
          token_rows<const T>(in.gate, s.Dk),
          address_of<T>(out.q),
          address_of<T>(out.k),
          address_of<T>(out.scores),
          address_of<float>(out.decay),
          gate_args(rule),
          static_cast<float>(rule.scale),
          s.T,
          s.H,
          chunks,
          static_cast<int>(s.Dk),
          padded_key_dim(s.Dk),
          SteepSearch::of_all(s.B * chunks * s.H)};
}

template <class T>
void prepare(const GlaInputs& in, const GlaRule& rule, const GlaPrepared& out) {
  GlaPrepareArgs<T> args = prepare_args<T>(in, rule, out);
  const int64_t units = args.search.pieces;
  if (units == 0) return;
  const CudaContext& context = in.q.device().cuda_context();
  if constexpr (sizeof(T) == 2)
    if (gla_prepare_has_mild(args, context)) {
      launch_gla_prepare_mild(args, units, context);
      args.search = SteepSearch::among(args.decay, units, args.D, 1, args.D, 2 * context.sm_count);
    }
  launch(&gla_prepare_kernel<T>, "gla_prepare_kernel", args.search.grid(), dim3(kSliceThreads), kPrepareBytes<T>, context, args);
}

}  // namespace

GlaPrepared gla_prepare_cuda(const GlaInputs& in, const GlaRule& rule) {
  const GlaSizes s = in.sizes();
  const int64_t chunks = chunk_count(s.T), D = padded_key_dim(s.Dk), tokens = kChunk;
  const Shape keys{s.B, chunks, s.H, tokens, D}, scores{s.B, chunks, s.H, tokens, tokens}, decay{s.B, chunks, s.H, D};
  const auto make = [&](Dtype dtype, const Shape& shape) { return Tensor::empty(in.q.device(), dtype, shape); };
  const GlaPrepared out{make(in.q.dtype(), keys), make(in.q.dtype(), keys), make(in.q.dtype(), scores), make(Dtype::f32, decay)};
  in.q.dtype() == Dtype::bf16 ? prepare<Bf16>(in, rule, out) : prepare<float>(in, rule, out);
  return out;
}

bool gla_tells_mild_chunks_cuda(const GlaInputs& in, const GlaRule& rule) {
  return in.q.dtype() == Dtype::bf16 && gla_takes_keys_whole(in) &&
         gla_prepare_has_mild(prepare_args<Bf16>(in, rule, {}), in.q.device().cuda_context());
}

}  // namespace longhand
