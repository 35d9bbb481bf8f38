// GLA on CUDA, what every chunk gives by itself, for mild chunks (gla_chunks_cuda.cuh), with products of warpgroups (sm_90a).
//
// gla_prepare_mild_kernel: decayed queries and keys, scores and decay of every chunk
// moves   as gla_prepare_kernel (gla_prepare_cuda.cu)
// flops   per chunk and head 3 exponentials per gate; the scores in one product (64 x 64 x Dk)
// floor   B 16, T 2048, H 4, Dk 128, bf16: 184 MB / 4.0 TB/s = 0.046 ms on an H200
// split   one block of 8 warps per (row, chunk, head), 64 columns of Dk at a time; a warp has a leaf of 8 tokens, a lane two columns
//         of it in registers. In the product a warpgroup has half of the scores' columns
// needs   bf16; T a multiple of 64; 16-byte copies; sm_90a. Columns between Dk and 64, 128 or 256 are zeros
// agrees  bf16 rounds each decayed operand once, and the scores; those of chunks that are not mild are written by gla_prepare_kernel
// order   fixed: the columns of a product, slices in order
#include "ops/gla/gla_chunks_cuda.cuh"

namespace longhand {
namespace {

template <int slices, bool logit>
__global__ void __launch_bounds__(kSliceThreads, 3) gla_prepare_mild_kernel(const __grid_constant__ GlaPrepareArgs<Bf16> a) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  const unsigned thread = threadIdx.x, warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32, g = lane / 4, quad = lane % 4;
  const unsigned group = warp / 4, leaf = warp, row = kLeafTokens * leaf;
  const unsigned unit = blockIdx.x, h = unit % static_cast<unsigned>(a.H), row_chunk = unit / static_cast<unsigned>(a.H),
                 chunk = row_chunk % static_cast<unsigned>(a.chunks);
  const int64_t b = row_chunk / static_cast<unsigned>(a.chunks), t0 = int64_t{chunk} * kChunk;
  const GateArgs gates{logit, a.gates.inverse_normalizer, a.gates.gate_min};

  // Panels of decayed queries, then those of keys over the decays from the chunk's beginning; logarithms of the leaves' decays, twice.
  unsigned char* const queries = shared_memory() + (kPanelAlignment - shared_address(shared_memory()) % kPanelAlignment) % kPanelAlignment;
  unsigned char* const keys = queries + slices * kPanelBytes;
  float* const leaf_sums = reinterpret_cast<float*>(keys + slices * kPanelBytes);

#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    const bool there = static_cast<int>(2 * lane) < a.Dk - kSlice * slice;
    const auto load = [&](Two<Bf16>(&to)[kLeafTokens], const TokenRows<const Bf16>& of, Two<Bf16> otherwise) {
      const Bf16* from = of.data + b * of.batch + (t0 + row) * of.token + h * a.Dk + kSlice * slice + 2 * lane;
#pragma unroll
      for (int i = 0; i < kLeafTokens; ++i, from += of.token) to[i] = there ? *reinterpret_cast<const Two<Bf16>*>(from) : otherwise;
    };
    Two<Bf16> q[kLeafTokens], k[kLeafTokens], gate[kLeafTokens];
    load(gate, a.gate, no_gates<logit>());
    load(q, a.q, {});
    load(k, a.k, {});
    ChunkDecays decays;
    decays.form(gate, gates, leaf, leaf_sums + slice % 2 * kLeaves * kSlice);
    const int64_t at = (int64_t{unit} * kChunk + row) * a.D + kSlice * slice + 2 * lane;
    Bf16 *q_to = a.decayed_q + at, *k_to = a.decayed_k + at;
    // row % 8 is i, so that a lane's place in a panel's row is lane / 4 exchanged with i
    const unsigned in_panel = static_cast<unsigned>(slice) * kPanelBytes + row * kPanelRow + g * 16 + quad * 4;
#pragma unroll
    for (unsigned i = 0; i < kLeafTokens; ++i, q_to += a.D, k_to += a.D) {
      const float2 query = a.scale * (q[i].wide() * decays.from_begin[i]), key = k[i].wide() * decays.to_end[i],
                   key_of_begin = key * decays.inverse;
      const unsigned place = (in_panel ^ i * 16) + i * kPanelRow;
      const uint32_t rounded = pack(query.x, query.y);
      *reinterpret_cast<uint32_t*>(q_to) = rounded;
      *reinterpret_cast<uint32_t*>(queries + place) = rounded;
      *reinterpret_cast<uint32_t*>(k_to) = pack(key.x, key.y);
      *reinterpret_cast<uint32_t*>(keys + place) = pack(key_of_begin.x, key_of_begin.y);
    }
    if (leaf == 0) *reinterpret_cast<float2*>(a.decay + int64_t{unit} * a.D + kSlice * slice + 2 * lane) = decays.whole;
  }

  publish_to_tensor_cores();
  __syncthreads();
  float scores[4][4];
  clear(scores);
  const unsigned left = shared_address(queries), right = shared_address(keys) + group * (kPanelBytes / 2);
  products_begin();
#pragma unroll
  for (int k16 = 0; k16 < slices * kSlice / 16; ++k16)
    multiply_half_panel(scores, operand<Summed::along_rows>(left, k16), operand<Summed::along_rows>(right, k16));
  products_close();
  products_done_but<0>();
  touch(scores);
  __syncthreads();  // the panels have been read: the scores take the place of the first
  const unsigned tile = 2 * (warp % 4), own = tile * 8 * kPanelRow + g * kPanelRow + quad * 4;
#pragma unroll
  for (unsigned half = 0; half < 2; ++half)
#pragma unroll
    for (unsigned j8 = 0; j8 < 4; ++j8) {
      const unsigned i_tile = tile + half, j_tile = 4 * group + j8;  // of 8 tokens
      const bool below = j_tile < i_tile, diagonal = j_tile == i_tile;
      const float first = below || (diagonal && 2 * quad <= g) ? scores[j8][2 * half] : 0.0f,
                  second = below || (diagonal && 2 * quad + 1 <= g) ? scores[j8][2 * half + 1] : 0.0f;
      *reinterpret_cast<uint32_t*>(queries + own + half * 8 * kPanelRow + (j_tile ^ g) * 16) = pack(first, second);
    }
  __syncthreads();
  Bf16* const to = a.scores + int64_t{unit} * kChunk * kChunk;
#pragma unroll
  for (unsigned u = thread; u < kChunk * kChunk / 8; u += kSliceThreads)
    *reinterpret_cast<uint4*>(to + u * 8) = *reinterpret_cast<const uint4*>(queries + panel_place(u / 8, u % 8 * 8));
#endif
}

template <int slices>
void launch_mild(const GlaPrepareArgs<Bf16>& args, int64_t units, const CudaContext& context) {
  constexpr size_t shared = kPanelAlignment + 2 * slices * kPanelBytes + 2 * kLeaves * kSlice * 4;
  launch(args.gates.logit ? &gla_prepare_mild_kernel<slices, true> : &gla_prepare_mild_kernel<slices, false>, "gla_prepare_mild_kernel",
         dim3(static_cast<unsigned>(units)), dim3(kSliceThreads), shared, context, args);
}

}  // namespace

bool gla_prepare_has_mild(const GlaPrepareArgs<Bf16>& a, const CudaContext& context) {
  return a.tokens % kChunk == 0 && a.q.vectors && a.k.vectors && a.gate.vectors &&
         has_warpgroup_instructions(&gla_prepare_mild_kernel<2, true>, context);
}

void launch_gla_prepare_mild(const GlaPrepareArgs<Bf16>& args, int64_t units, const CudaContext& context) {
  switch (args.D / kSlice) {
    case 1:
      return launch_mild<1>(args, units, context);
    case 2:
      return launch_mild<2>(args, units, context);
    default:
      return launch_mild<4>(args, units, context);
  }
}

}  // namespace longhand
