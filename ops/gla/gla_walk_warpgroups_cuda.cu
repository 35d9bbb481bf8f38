// GLA on CUDA, the walks over the chunks with the products of warpgroups (sm_90a). What gla_walk_kernel (gla_cuda.cu) computes, with the
// same roundings.
//
// gla_walk_warpgroup_kernel<outputs>: o and h_T (forward), grad v and grad h0 (backward, from the last chunk), states at chunk borders
// moves   prepared q and k, scores, v in, o out: 2 Dk + 64 + 2 Dv elements per token and head; the parts of Dv read q, k and scores
//         again, from L2 when they run together
// flops   per chunk and head the scores' product with v (64 * 64 * Dv), state and update (2 * 64 Dk Dv each)
// floor   B 32, T 2048, H 4, Dk 128, Dv 256, bf16: 440 MB / 4.0 TB/s = 0.11 ms on an H200
// split   one block of one warpgroup per (row, head, 64 columns of Dv, segment); the turned state, 64 rows by Dk columns, stays in f32
//         registers and feeds its product from there, 16 columns at a time. Four blocks of an SM hide one another's waiting: 128 registers
//         a thread, of which state, y and two operands take 104. Where there are no more than two an SM, each fetches a chunk ahead, and
//         the two walks of the backward go side by side in one launch (gla_walks_together_kernel)
// needs   bf16, Dk <= 128, 16-byte copies of v and o; sm_90a
// agrees  with the CPU reference to kGlaToleranceBf16 (gla_kernels.h); bf16 rounds o, and the state in its product
// order   fixed, no atomics. How many segments there are depends on the GPU's size
#include "core/error.h"
#include "ops/common/warpgroup_instructions.cuh"
#include "ops/gla/gla_walk_cuda.cuh"

namespace longhand {
namespace {

/// Shared memory in bytes. A stage: side, readout (or, without outputs, border rows), rows, scores. Behind the stages their chunks' decays.
template <int D, bool outputs, int stages>
struct Layout {
  static constexpr int side_bytes = D / kPanelColumns * kPanelBytes;
  static constexpr int readout_place = side_bytes, rows_place = 2 * side_bytes, scores_place = rows_place + kPanelBytes;
  static constexpr int stage_bytes = scores_place + (outputs ? kPanelBytes : 0), decay_bytes = D * 4;
  static constexpr int total_bytes = kPanelAlignment + stages * (stage_bytes + decay_bytes);
};

// Shared memory by its own addresses: a thread's places in a tile are then one register and constants. From pointers the compiler forms
// each place for itself, 300 instructions a chunk more, and keeps so many of them that it stores others in local memory.

__device__ __forceinline__ void copy_16_async(unsigned to, const Bf16* from, bool read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_16_async(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ float load_one(unsigned from) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ float2 load_two(unsigned from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_16(unsigned from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

/// The place 16 * n columns behind one in the first 16 columns.
__device__ __forceinline__ unsigned columns_behind(unsigned place, int n) {
  return (place ^ static_cast<unsigned>(n % 4 * 32)) + static_cast<unsigned>(n / 4 * kPanelBytes);
}

/// 64 rows of `columns` elements, one behind the other in global memory, into panels; the copies of thread `thread`.
template <int columns>
__device__ __forceinline__ void load_whole_panels(unsigned panels, const Bf16* from, unsigned thread) {
  constexpr unsigned units = columns / 8, rows_at_once = kWarpgroup / units;
  const unsigned to = panels + panel_place(thread / units, thread % units * 8);
  from += thread * 8;
#pragma unroll
  for (unsigned pass = 0; pass < kChunk / rows_at_once; ++pass)
    copy_16_async(to + pass * rows_at_once * kPanelRow, from + pass * kWarpgroup * 8);
}

/// What Left::from gives, by other instructions: the same ones would be carried out once, and their results kept in registers that a
/// thread does not have.
__device__ __forceinline__ Left<Bf16> rounded_again(const float (&first)[4], const float (&second)[4]) {
  const auto two = [](float a, float b) { return __byte_perm(pack(b, a), 0, 0x1032); };
  return {{two(first[0], first[1]), two(first[2], first[3]), two(second[0], second[1]), two(second[2], second[3])}};
}

template <int D, bool outputs, bool backwards, int stages>
__device__ __forceinline__ void walk(const GlaWalkArgs<Bf16>& a, unsigned block) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  using L = Layout<D, outputs, stages>;
  const unsigned thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const auto [part, first_column, columns, segment, row_head, h, b, k_begin, k_end] = GlaWalkBlock(a, block);
  // With outputs, ends are those of the whole walk and borders are kept on the way back only.
  const bool keeps_borders = outputs ? backwards : a.borders != nullptr, ends_segments = !outputs && a.end_per_segment;
  if (ends_segments && segment == a.segments - 1) return;  // nobody starts from its end

  const unsigned first_stage = (shared_address(shared_memory()) + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;

  // The turned state: rows p = 16 * warp + lane / 4 and + 8 of this part, columns 8j + 2 * (lane % 4) and the next.
  float state[D / 8][4];
  clear(state);
  const auto each_state_entry = [&](auto* entries, auto&& visit) {  // visit(entry of [Dk, Dv], value)
    const int first_p = static_cast<int>(16 * warp + lane / 4), first_m = static_cast<int>(2 * (lane % 4));
    const bool one = first_p < columns, other = first_p + 8 < columns;
    auto* at = entries + first_m * a.Dv + first_column + first_p;
#pragma unroll
    for (int j = 0; j < D / 8; ++j, at += 8 * a.Dv)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
        if (8 * j + first_m + odd < a.Dk) {
          if (one) visit(at[odd * a.Dv], state[j][odd]);
          if (other) visit(at[odd * a.Dv + 8], state[j][2 + odd]);
        }
  };
  const int64_t state_size = static_cast<int64_t>(a.Dk) * a.Dv;
  if (a.start != nullptr)
    each_state_entry(a.start + (row_head * a.segments + segment) * state_size, [](const float& entry, float& value) { value = entry; });

  // This thread's 16 bytes of a panel's rows 0 to 15, and of the tokens that rows and y have there; 16 rows on come the next ones.
  const int row = static_cast<int>(thread / 8), column = static_cast<int>(thread % 8 * 8);
  const unsigned place = panel_place(row, column);
  const int64_t first_token = (backwards ? a.chunks - 1 - k_begin : k_begin) * kChunk + row, next_chunk = backwards ? -kChunk : kChunk;
  const Bf16* rows_from = a.rows.data + b * a.rows.batch + first_token * a.rows.token + h * a.Dv + first_column + column;
  Bf16* y_to = outputs ? a.y.data + b * a.y.batch + first_token * a.y.token + h * a.Dv + first_column + column : nullptr;
  float product = 1.0f;  // the decay of column `thread` over the segment so far

  const auto chunk_at = [&](int64_t k) { return backwards ? a.chunks - 1 - k : k; };
  const auto rows_in = [&](int64_t chunk) {  // how many rows from `row` on exist
    const int64_t left_tokens = a.tokens - chunk * kChunk;
    return (column < columns ? static_cast<int>(left_tokens < kChunk ? left_tokens : kChunk) : 0) - row;
  };
  const auto fetch = [&](int64_t k, unsigned stage) {  // the tiles of the walk's next chunk
    const int64_t chunk = chunk_at(k), unit = (b * a.chunks + chunk) * a.H + h;
    const int rows_here = rows_in(chunk);
    const unsigned side = first_stage + stage * L::stage_bytes;
    if (thread < D / 4)
      copy_16_async(first_stage + stages * L::stage_bytes + stage * L::decay_bytes + 16 * thread, a.decay + unit * D + 4 * thread);
    if constexpr (outputs) load_whole_panels<D>(side + L::readout_place, a.readout + unit * kChunk * D, thread);
    const Bf16* from = rows_from;
#pragma unroll
    for (int pass = 0; pass < 4; ++pass, from += 16 * a.rows.token)
      copy_16_async(side + L::rows_place + place + pass * 16 * kPanelRow, from, 16 * pass < rows_here);
    rows_from += next_chunk * a.rows.token;
    if constexpr (outputs) load_whole_panels<kChunk>(side + L::scores_place, a.scores + unit * kChunk * kChunk, thread);
    load_whole_panels<D>(side, a.side + unit * kChunk * D, thread);
  };
  const auto arrived = [] {
    copies_arrived();
    publish_to_tensor_cores();
    __syncthreads();
  };

  if (stages > 1 && k_begin < k_end) fetch(k_begin, 0);
  unsigned stage = 0;
  for (int64_t k = k_begin; k < k_end; ++k) {
    const int64_t chunk = chunk_at(k), unit = (b * a.chunks + chunk) * a.H + h;
    const int rows_here = rows_in(chunk);
    const unsigned side = first_stage + stage * L::stage_bytes, readout = side + L::readout_place, rows = side + L::rows_place,
                   scores = side + L::scores_place, decay = first_stage + stages * L::stage_bytes + stage * L::decay_bytes;
    if constexpr (stages > 1) {
      arrived();  // and the other stage has been read
      stage ^= 1;
      if (k + 1 < k_end) fetch(k + 1, stage);
    } else {
      __syncthreads();  // the tiles of the chunk before have been read
      fetch(k, 0);
      arrived();
    }
    if (ends_segments && thread < D) product *= load_one(decay + 4 * thread);

    const auto keep_border = [&](int n, const Left<Bf16>& left) {  // columns 16 * n .. of this warp's 16 rows
      store_matrices(columns_behind(readout + panel_place(16 * warp + lane % 16, lane / 16 * 8), n), left.r);
    };
    float y[8][4];  // y' : rows p, columns tokens
    if constexpr (outputs) {
      clear(y);
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        const Left<Bf16> left = Left<Bf16>::from(state[2 * n], state[2 * n + 1]);
        products_begin();
        multiply_panels<Summed::along_rows>(y, left, operand<Summed::along_rows>(readout, n));
        products_close();
        products_done_but<1>();  // two operands in registers at a time
      }
      if constexpr (backwards) {
        products_done_but<0>();
        touch(y);
        __syncthreads();  // readout has been read: the border takes its place
#pragma unroll
        for (int n = 0; n < D / 16; ++n) keep_border(n, rounded_again(state[2 * n], state[2 * n + 1]));
      }
      constexpr Summed of_scores = backwards ? Summed::across_rows : Summed::along_rows;  // o_i takes v_j, grad v_j takes grad o_i
      products_begin();
#pragma unroll
      for (int k16 = 0; k16 < kChunk / 16; ++k16)
        multiply_panels<Summed::across_rows, of_scores>(y, operand<Summed::across_rows>(rows, k16), operand<of_scores>(scores, k16), true);
      products_close();
    } else if (keeps_borders) {
#pragma unroll
      for (int n = 0; n < D / 16; ++n) keep_border(n, Left<Bf16>::from(state[2 * n], state[2 * n + 1]));
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const float2 factor = load_two(decay + 8 * (lane % 4) + 32 * j);
      state[j][0] *= factor.x;
      state[j][1] *= factor.y;
      state[j][2] *= factor.x;
      state[j][3] *= factor.y;
    }
    products_begin();
#pragma unroll
    for (int k16 = 0; k16 < kChunk / 16; ++k16)
      multiply_panels<Summed::across_rows, Summed::across_rows>(state, operand<Summed::across_rows>(rows, k16),
                                                                operand<Summed::across_rows>(side, k16), true);
    products_close();
    if (keeps_borders) {  // out of shared memory, so that whole lines are written
      __syncwarp();
      constexpr int units = D / 8, rows_at_once = 32 / units;
      const int p = static_cast<int>(16 * warp + lane / units), m = static_cast<int>(lane % units * 8);
      Bf16* const to = a.borders + (unit * a.Dv + first_column + p) * D + m;
#pragma unroll 2
      for (int pass = 0; pass < 16; pass += rows_at_once)
        if (p + pass < columns) *reinterpret_cast<uint4*>(to + pass * D) = load_16(readout + panel_place(p + pass, m));
    }
    if constexpr (outputs) {
      products_done_but<1>();
      touch(y);
      __syncthreads();  // scores have been read: y takes their place
      const unsigned own = scores + panel_place(lane / 16 * 8 + lane % 8, 16 * warp + lane / 8 % 2 * 8);
#pragma unroll
      for (int i8 = 0; i8 < kChunk / 8; i8 += 2)
        store_matrices_transposed(own + i8 * 8 * kPanelRow, {pack(y[i8][0], y[i8][1]), pack(y[i8][2], y[i8][3]),
                                                             pack(y[i8 + 1][0], y[i8 + 1][1]), pack(y[i8 + 1][2], y[i8 + 1][3])});
      __syncthreads();
      Bf16* to = y_to;
#pragma unroll
      for (int pass = 0; pass < 4; ++pass, to += 16 * a.y.token)
        if (16 * pass < rows_here) *reinterpret_cast<uint4*>(to) = load_16(scores + place + pass * 16 * kPanelRow);
      y_to += next_chunk * a.y.token;
    }
    products_done_but<0>();
    touch(state);
  }
  if (a.end != nullptr && (ends_segments || segment == a.segments - 1))
    each_state_entry(a.end + (ends_segments ? row_head * a.segments + segment : row_head) * state_size,
                     [](float& entry, float value) { entry = value; });
  if (ends_segments && part == 0 && thread < static_cast<unsigned>(a.Dk))
    a.segment_decay[(row_head * a.segments + segment) * a.Dk + thread] = product;
#endif
}

template <int D, bool outputs, bool backwards, int stages>
__global__ void __launch_bounds__(kWarpgroup, kGlaWalkBlocksAtOnce / stages)
    gla_walk_warpgroup_kernel(const __grid_constant__ GlaWalkArgs<Bf16> a) {
  walk<D, outputs, backwards, stages>(a, blockIdx.x);
}

// Blocks below `first_blocks` are of the first walk.
template <int D>
__global__ void __launch_bounds__(kWarpgroup, kGlaWalkBlocksAtOnce / 2)
    gla_walks_together_kernel(const __grid_constant__ GlaWalkArgs<Bf16> gradients, const __grid_constant__ GlaWalkArgs<Bf16> states,
                              unsigned first_blocks) {
  if (blockIdx.x < first_blocks) walk<D, true, true, 2>(gradients, blockIdx.x);
  else walk<D, false, false, 2>(states, blockIdx.x - first_blocks);
}

int64_t blocks_of(const GlaWalkArgs<Bf16>& a) {
  return a.B * a.H * a.segments * a.parts;
}
// Where half as many blocks of an SM are all there are, each of them has room to fetch a chunk ahead.
bool fetches_ahead(const GlaWalkArgs<Bf16>& a, const CudaContext& context) {
  return blocks_of(a) <= kGlaWalkBlocksAtOnce / 2 * context.sm_count;
}

template <int D, bool outputs, bool backwards, int stages>
void launch_walk(const GlaWalkArgs<Bf16>& args, unsigned blocks, const CudaContext& context) {
  launch(&gla_walk_warpgroup_kernel<D, outputs, backwards, stages>, "gla_walk_warpgroup_kernel", dim3(blocks), dim3(kWarpgroup),
         static_cast<size_t>(Layout<D, outputs, stages>::total_bytes), context, args);
}

template <int D, bool outputs, bool backwards>
void launch_walk(const GlaWalkArgs<Bf16>& args, const CudaContext& context) {
  const auto blocks = static_cast<unsigned>(blocks_of(args));
  fetches_ahead(args, context) ? launch_walk<D, outputs, backwards, 2>(args, blocks, context)
                               : launch_walk<D, outputs, backwards, 1>(args, blocks, context);
}

template <int D>
void launch_walk(const GlaWalkArgs<Bf16>& args, bool outputs, bool backwards, const CudaContext& context) {
  if (outputs) backwards ? launch_walk<D, true, true>(args, context) : launch_walk<D, true, false>(args, context);
  else backwards ? launch_walk<D, false, true>(args, context) : launch_walk<D, false, false>(args, context);
}

}  // namespace

bool gla_walk_has_warpgroups(const GlaWalkArgs<Bf16>& a, bool outputs, const CudaContext& context) {
  return a.Dk <= 128 && a.rows.vectors && (!outputs || a.y.vectors) &&
         has_warpgroup_instructions(&gla_walk_warpgroup_kernel<128, true, false, 1>, context);
}

void launch_gla_walk_warpgroups(const GlaWalkArgs<Bf16>& args, bool outputs, bool backwards, const CudaContext& context) {
  args.Dk <= 64 ? launch_walk<64>(args, outputs, backwards, context) : launch_walk<128>(args, outputs, backwards, context);
}

bool gla_walks_go_together(const GlaWalkArgs<Bf16>& gradients, const GlaWalkArgs<Bf16>& states, const CudaContext& context) {
  return gla_walk_has_warpgroups(gradients, true, context) && gla_walk_has_warpgroups(states, false, context) && gradients.segments == 1 &&
         states.segments == 1 && fetches_ahead(gradients, context) && fetches_ahead(states, context);
}

void launch_gla_walks_together(const GlaWalkArgs<Bf16>& gradients, const GlaWalkArgs<Bf16>& states, const CudaContext& context) {
  const auto first = static_cast<unsigned>(blocks_of(gradients)), all = first + static_cast<unsigned>(blocks_of(states));
  const bool narrow = gradients.Dk <= 64;
  launch(narrow ? &gla_walks_together_kernel<64> : &gla_walks_together_kernel<128>, "gla_walks_together_kernel", dim3(all),
         dim3(kWarpgroup), static_cast<size_t>(narrow ? Layout<64, true, 2>::total_bytes : Layout<128, true, 2>::total_bytes), context,
         gradients, states, first);
}

}  // namespace longhand
