// GLA on CUDA, the chunks of the backward, for mild chunks (gla_chunks_cuda.cuh), with products of warpgroups (sm_90a).
//
// gla_chunk_bwd_mild_kernel: grad q, grad k, grad gate
// moves   as gla_chunk_bwd_kernel (gla_bwd_cuda.cu)
// flops   per chunk and head the products with the states (2 * 64 Dk Dv each), grad o v' once per slice (64 * 64 * Dv), and with the
//         gradients of the scores queries and keys (2 * 64 * 64 Dk)
// floor   B 16, T 2048, H 4, Dk 128, Dv 256, bf16: 600 MB / 4.0 TB/s = 0.15 ms on an H200, nearly half of it states
// split   one block of two warpgroups per (row, chunk, head, 64 columns of Dk). Warpgroup 0 multiplies for grad q: grad o with the
//         states, then the scores' gradients with the keys; warpgroup 1 for grad k: v with the states' gradients, then the same scores'
//         gradients, turned, with the queries. Beside products a warp has a leaf of 8 tokens and a lane two columns of it, in registers
// needs   bf16; T and Dv multiples of 64; 16-byte copies; all three gradients wanted; sm_90a
// agrees  as gla_chunk_bwd_kernel, which treats the chunks that are not mild. Pairs i = j are left out of the gate's gradient there as here
// order   fixed, no atomics
#include "ops/gla/gla_chunks_cuda.cuh"

namespace longhand {
namespace {

/// Shared memory in bytes: two stages, in whose place results of products lie later, panels, and what goes from leaf to leaf.
struct Layout {
  static constexpr int stage_bytes = 4 * kPanelBytes, sums_stride = kSlice + 8, sums = kChunk * sums_stride;
  static constexpr int grad_scores = 2 * stage_bytes, queries = grad_scores + kPanelBytes, keys = queries + kPanelBytes,
                       leaf_sums = keys + kPanelBytes, columns_bytes = kLeaves * kSlice * 4,
                       total_bytes = kPanelAlignment + leaf_sums + 4 * columns_bytes + kChunk * 4;
  static_assert(3 * sums * 4 <= grad_scores);
};

__device__ __forceinline__ float2 wide_pair(const unsigned char* at) {
  return reinterpret_cast<const Two<Bf16>*>(at)->wide();
}

template <bool logit>
__global__ void __launch_bounds__(kSliceThreads, 2) gla_chunk_bwd_mild_kernel(const __grid_constant__ GlaChunkBwdArgs<Bf16> a) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  using L = Layout;
  const unsigned thread = threadIdx.x, warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32, g = lane / 4, quad = lane % 4;
  const unsigned group = warp / 4, leaf = warp, row = kLeafTokens * leaf;
  const unsigned slice = blockIdx.x % static_cast<unsigned>(a.slices), unit = blockIdx.x / static_cast<unsigned>(a.slices),
                 h = unit % static_cast<unsigned>(a.H), row_chunk = unit / static_cast<unsigned>(a.H),
                 chunk = row_chunk % static_cast<unsigned>(a.chunks);
  const int64_t b = row_chunk / static_cast<unsigned>(a.chunks), t0 = int64_t{chunk} * kChunk;
  // Lanes behind the last columns of a head do what the last one does: columns never meet here.
  const unsigned column = min(2 * lane, static_cast<unsigned>(a.Dk) - kSlice * slice - 2);
  const GateArgs gates{logit, a.gates.inverse_normalizer, a.gates.gate_min};

  unsigned char* const base = shared_memory() + (kPanelAlignment - shared_address(shared_memory()) % kPanelAlignment) % kPanelAlignment;
  float* const query_sums = reinterpret_cast<float*>(base);  // after the stages: [64][sums_stride] each
  float* const key_sums = query_sums + L::sums;
  float* const state_sums = key_sums + L::sums;              // v R'
  unsigned char* const grad_scores = base + L::grad_scores;  // panels
  unsigned char* const queries = base + L::queries;
  unsigned char* const keys = base + L::keys;
  float* const leaf_sums = reinterpret_cast<float*>(base + L::leaf_sums);
  float* const state_dots = leaf_sums + kLeaves * kSlice;  // <R, S> of a column, by the warps that share it
  float* const behind_sums = state_dots + kLeaves * kSlice;
  float* const before_sums = behind_sums + kLeaves * kSlice;
  float* const diagonal = before_sums + kLeaves * kSlice;  // [64] of the scores' gradients

  const auto at_leaf = [&](const auto& of) { return of.data + b * of.batch + (t0 + row) * of.token + h * a.Dk + kSlice * slice + column; };
  const auto load = [&](Two<Bf16>(&to)[kLeafTokens], const TokenRows<const Bf16>& of) {
    const Bf16* from = at_leaf(of);
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i, from += of.token) to[i] = *reinterpret_cast<const Two<Bf16>*>(from);
  };
  const auto store = [&](const TokenRows<Bf16>& of, const float2(&values)[kLeafTokens]) {
    Bf16* to = at_leaf(of);
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i, to += of.token) store_two(to, values[i].x, values[i].y, true, true);
  };

  // This thread's copies: 16 bytes of row `copied_row` of every panel and of the row 32 further.
  const unsigned copied_row = thread / 8, copied_column = thread % 8 * 8;
  unsigned char* const copied_to = base + panel_place(copied_row, copied_column);
  const Bf16* o_from = a.grad_o.data + b * a.grad_o.batch + (t0 + copied_row) * a.grad_o.token + h * a.Dv + copied_column;
  const Bf16* v_from = a.v.data + b * a.v.batch + (t0 + copied_row) * a.v.token + h * a.Dv + copied_column;
  const int64_t in_states = (int64_t{unit} * a.Dv + copied_row) * a.D + kSlice * slice + copied_column;
  const Bf16 *S_from = a.states + in_states, *R_from = a.state_grads + in_states;
  const auto fetch = [&](unsigned stage) {  // the next 64 columns of Dv: grad o, v, states, their gradients
    unsigned char* const to = copied_to + stage;
    const auto copy = [&](int panel, const Bf16* from, int64_t row_stride) {
      copy_16_async(to + panel * kPanelBytes, from);
      copy_16_async(to + panel * kPanelBytes + 32 * kPanelRow, from + 32 * row_stride);
    };
    copy(0, o_from, a.grad_o.token);
    copy(1, v_from, a.v.token);
    copy(2, S_from, a.D);
    copy(3, R_from, a.D);
    o_from += kSlice;
    v_from += kSlice;
    S_from += kSlice * a.D;
    R_from += kSlice * a.D;
  };
  fetch(0);
  Two<Bf16> q[kLeafTokens], k[kLeafTokens], gate[kLeafTokens];
  load(gate, a.gate);
  load(q, a.q);
  load(k, a.k);

  // Rows: tokens; columns: this slice of Dk. Warpgroup 0: grad_o S', warpgroup 1: v R'. And grad_o v', half of its columns each.
  const unsigned in_leaf = row * kPanelRow + 2 * column;  // its columns of the leaf's first row in a panel; on row i column / 8 is
                                                          // exchanged with i
  const unsigned tile = 2 * (warp % 4);                   // of 8 rows of a product
  float through[8][4];
  clear(through);
  {
    float product[4][4];
    clear(product);
    float2 state_dot = make_float2(0, 0);
    unsigned stage = 0;
    const int turns = a.Dv / kSlice;
#pragma unroll 1
    for (int p = 0; p < turns; ++p) {
      copies_arrived();
      publish_to_tensor_cores();
      __syncthreads();  // part p is here, and nobody reads the other stage any more
      if (p + 1 < turns) fetch(stage ^ L::stage_bytes);
      const unsigned panels = shared_address(base) + stage, own = panels + group * kPanelBytes;
      const uint64_t left = operand<Summed::along_rows>(own, 0), right = operand<Summed::across_rows>(own + 2 * kPanelBytes, 0),
                     grad_o = operand<Summed::along_rows>(panels, 0),
                     v = operand<Summed::along_rows>(panels + kPanelBytes + group * (kPanelBytes / 2), 0);
      products_begin();
#pragma unroll
      for (int k16 = 0; k16 < kSlice / 16; ++k16) {  // operands count in 16 bytes
        multiply_panels<Summed::along_rows, Summed::across_rows>(through, left + 2 * k16, right + kPanelRow * k16, true);
        multiply_half_panel(product, grad_o + 2 * k16, v + 2 * k16);
      }
      products_close();
      const unsigned char* const S = base + stage + 2 * kPanelBytes;
#pragma unroll
      for (unsigned i = 0; i < kLeafTokens; ++i) {
        const unsigned char* const at = S + (in_leaf ^ i * 16) + i * kPanelRow;
        state_dot = state_dot + wide_pair(at) * wide_pair(at + kPanelBytes);
      }
      products_done_but<0>();
      stage ^= L::stage_bytes;
    }
    touch(through);
    touch(product);
    store_two(state_dots + leaf * kSlice + column, state_dot.x, state_dot.y, true, true);

    // The scores' gradients below the diagonal, and the diagonal.
#pragma unroll
    for (unsigned half = 0; half < 2; ++half)
#pragma unroll
      for (unsigned j8 = 0; j8 < 4; ++j8) {
        const unsigned i_tile = tile + half, j_tile = 4 * group + j8;
        const bool below = j_tile < i_tile, on = j_tile == i_tile;
        const float first = a.scale * product[j8][2 * half], second = a.scale * product[j8][2 * half + 1];
        *reinterpret_cast<uint32_t*>(grad_scores + i_tile * 8 * kPanelRow + g * kPanelRow + (j_tile ^ g) * 16 + quad * 4) =
            pack(below || (on && 2 * quad < g) ? first : 0.0f, below || (on && 2 * quad + 1 < g) ? second : 0.0f);
        if (on && g / 2 == quad) diagonal[8 * i_tile + g] = g % 2 == 0 ? first : second;
      }
  }

  ChunkDecays decays;
  decays.form(gate, gates, leaf, leaf_sums);  // its barrier: the stages have been read
  const unsigned in_sums = (8 * tile + g) * L::sums_stride + 2 * quad;
  const auto put = [&](float* sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j8 = 0; j8 < 8; ++j8)
        store_two(sums + in_sums + 8 * half * L::sums_stride + 8 * j8, through[j8][2 * half], through[j8][2 * half + 1], true, true);
  };
  if (group == 1) {
    put(state_sums);
    clear(through);
  } else {
#pragma unroll
    for (int j8 = 0; j8 < 8; ++j8)
#pragma unroll
      for (int e = 0; e < 4; ++e) through[j8][e] *= a.scale;
  }
#pragma unroll
  for (unsigned i = 0; i < kLeafTokens; ++i) {
    const unsigned place = (in_leaf ^ i * 16) + i * kPanelRow;
    const float2 query = q[i].wide() * decays.from_begin[i], key = k[i].wide() * (decays.to_end[i] * decays.inverse);
    *reinterpret_cast<uint32_t*>(queries + place) = pack(query.x, query.y);
    *reinterpret_cast<uint32_t*>(keys + place) = pack(key.x, key.y);
  }
  publish_to_tensor_cores();
  __syncthreads();
  {
    const unsigned scores = shared_address(grad_scores);
    products_begin();
    if (group == 0) {
#pragma unroll
      for (int k16 = 0; k16 < kChunk / 16; ++k16)
        multiply_panels<Summed::along_rows, Summed::across_rows>(through, operand<Summed::along_rows>(scores, k16),
                                                                 operand<Summed::across_rows>(shared_address(keys), k16), true);
    } else {
#pragma unroll
      for (int k16 = 0; k16 < kChunk / 16; ++k16)
        multiply_panels<Summed::across_rows, Summed::across_rows>(through, operand<Summed::across_rows>(scores, k16),
                                                                  operand<Summed::across_rows>(shared_address(queries), k16), true);
    }
    products_close();
    products_done_but<0>();
    touch(through);
  }
  put(group == 0 ? query_sums : key_sums);
  __syncthreads();

  // What the gate's gradient sums: what lies behind t in from_begin's place, before t in to_end's.
  float2 behind = make_float2(0, 0), before = make_float2(0, 0);
  {
    const unsigned at = row * L::sums_stride + column;
    float2 grad_q[kLeafTokens], grad_k[kLeafTokens];
#pragma unroll
    for (int i = 0; i < kLeafTokens; ++i) {
      const float2 query = q[i].wide(), key = k[i].wide();
      const float same = diagonal[row + i];
      const float2 others = decays.from_begin[i] * load_two(query_sums + at + i * L::sums_stride),
                   inside = (decays.to_end[i] * decays.inverse) * load_two(key_sums + at + i * L::sums_stride),
                   from_R = decays.to_end[i] * load_two(state_sums + at + i * L::sums_stride);
      grad_q[i] = others + same * key;
      grad_k[i] = inside + from_R + same * query;
      decays.from_begin[i] = query * others + -1.0f * (key * inside);
      decays.to_end[i] = key * from_R;
      behind = behind + decays.from_begin[i];
      before = before + decays.to_end[i];
    }
    store(a.grad_q, grad_q);
    store(a.grad_k, grad_k);
  }

  // dg_t = sum over u >= t of the first + sum over u < t of the second + decay of the chunk * <R, S>
  store_two(behind_sums + leaf * kSlice + column, behind.x, behind.y, true, true);
  store_two(before_sums + leaf * kSlice + column, before.x, before.y, true, true);
  __syncthreads();
  float2 dot = make_float2(0, 0);
  before = behind = dot;
#pragma unroll
  for (unsigned other = 0; other < kLeaves; ++other) dot = dot + load_two(state_dots + other * kSlice + column);
#pragma unroll
  for (unsigned on = 1; on < kLeaves; ++on) {
    const unsigned other = (leaf + on) % kLeaves;
    before = before + load_two((other > leaf ? behind_sums : before_sums) + other * kSlice + column);
  }
  before = before + dot * decays.whole;
#pragma unroll
  for (int i = kLeafTokens - 1; i >= 0; --i) {
    behind = behind + decays.from_begin[i];
    decays.from_begin[i] = behind;
  }
  float2 grad_gate[kLeafTokens];
#pragma unroll
  for (int i = 0; i < kLeafTokens; ++i) {
    const float2 grad = decays.from_begin[i] + before, given = gate[i].wide();
    before = before + decays.to_end[i];
    const GateAndSlope x = gate_and_slope<Bf16>(given.x, gates), y = gate_and_slope<Bf16>(given.y, gates);
    grad_gate[i] = make_float2(grad.x * x.slope, grad.y * y.slope);  // of a mild chunk no decay is 0
  }
  store(a.grad_gate, grad_gate);
#endif
}

}  // namespace

bool gla_chunk_bwd_has_mild(const GlaChunkBwdArgs<Bf16>& a, const CudaContext& context) {
  for (const auto* rows : {&a.q, &a.k, &a.v, &a.gate, &a.grad_o})
    if (!rows->vectors) return false;
  for (const auto* rows : {&a.grad_q, &a.grad_k, &a.grad_gate})
    if (rows->data == nullptr || !rows->vectors) return false;
  return a.tokens % kChunk == 0 && a.Dv % kSlice == 0 && has_warpgroup_instructions(&gla_chunk_bwd_mild_kernel<true>, context);
}

void launch_gla_chunk_bwd_mild(const GlaChunkBwdArgs<Bf16>& args, const CudaContext& context) {
  const dim3 grid(static_cast<unsigned>(args.B * args.chunks * args.H * args.slices));
  launch(args.gates.logit ? &gla_chunk_bwd_mild_kernel<true> : &gla_chunk_bwd_mild_kernel<false>, "gla_chunk_bwd_mild_kernel", grid,
         dim3(kSliceThreads), static_cast<size_t>(Layout::total_bytes), context, args);
}

}  // namespace longhand
