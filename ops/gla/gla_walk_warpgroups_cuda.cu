// GLA on CUDA, the walks over the chunks with the products of warpgroups (sm_90a). What gla_walk_kernel (gla_cuda.cu) computes, with the
// same roundings.
//
// gla_walk_warpgroup_kernel<outputs>: o and h_T (forward), grad v and grad h0 (backward, from the last chunk), states at chunk borders
// moves   prepared q and k, scores, v in, o out: 2 Dk + 64 + 2 Dv elements per token and head; the parts of Dv read q, k and scores
//         again, from L2 when they run together
// flops   per chunk and head the scores' product with v (64 * 64 * Dv), state and update (2 * 64 Dk Dv each)
// floor   B 32, T 2048, H 4, Dk 128, Dv 256, bf16: 440 MB / 4.0 TB/s = 0.11 ms on an H200
// split   one block of one warpgroup per (row, head, 64 columns of Dv, segment); the turned state, 64 rows by Dk columns, stays in f32
//         registers and feeds its product from there, a quarter at a time. Four blocks of an SM hide one another's waiting
// needs   bf16, Dk <= 128, 16-byte copies of v and o; sm_90a
// agrees  with the CPU reference to kGlaToleranceBf16 (gla_kernels.h); bf16 rounds o, and the state in its product
// order   fixed, no atomics. How many segments there are depends on the GPU's size
#include "core/error.h"
#include "ops/common/warpgroup_instructions.cuh"
#include "ops/gla/gla_walk_cuda.cuh"

namespace longhand {
namespace {

/// Shared memory in bytes: side, readout (or, without outputs, border rows), rows, scores, the chunk's decay, the segment's.
template <int D, bool outputs>
struct Layout {
  static constexpr int side_bytes = D / kPanelColumns * kPanelBytes;
  static constexpr int readout_place = side_bytes, rows_place = 2 * side_bytes, scores_place = rows_place + kPanelBytes;
  static constexpr int decay_place = scores_place + (outputs ? kPanelBytes : 0), total_bytes = kPanelAlignment + decay_place + 2 * D * 4;
};

template <int D, bool outputs, bool backwards>
__global__ void __launch_bounds__(kWarpgroup, kGlaWalkBlocksAtOnce) gla_walk_warpgroup_kernel(const __grid_constant__ GlaWalkArgs<Bf16> a) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  using L = Layout<D, outputs>;
  const int thread = static_cast<int>(threadIdx.x), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
  const int low = 16 * warp + g;  // rows low and low + 8
  const int part = static_cast<int>(blockIdx.x % a.parts), first_column = kGlaPart * part,
            columns = a.Dv - first_column < kGlaPart ? a.Dv - first_column : kGlaPart;
  const int64_t segment = blockIdx.x / a.parts % a.segments, row_head = blockIdx.x / a.parts / a.segments, h = row_head % a.H,
                b = row_head / a.H;
  const int64_t k_begin = segment * a.chunks_per_segment, k_limit = k_begin + a.chunks_per_segment,
                k_end = k_limit < a.chunks ? k_limit : a.chunks;
  // With outputs, ends are those of the whole walk and borders are kept on the way back only.
  const bool keeps_borders = outputs ? backwards : a.borders != nullptr, ends_segments = !outputs && a.end_per_segment;
  if (ends_segments && segment == a.segments - 1) return;  // nobody starts from its end

  unsigned char* const memory = shared_memory() + (0u - shared_address(shared_memory())) % kPanelAlignment;
  float* const decay = reinterpret_cast<float*>(memory + L::decay_place);
  float* const product = decay + D;  // decay over the segment so far

  // The turned state: rows p = low and low + 8 of this part, columns 8j + 2 * quad and the next.
  float state[D / 8][4];
  clear(state);
  const auto each_state_entry = [&](auto&& visit) {  // visit(offset in [Dk, Dv], value)
    const int first_m = not_hoisted(2 * quad);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int p = low + e / 2 * 8, m = 8 * j + first_m + e % 2;
        if (p < columns && m < a.Dk) visit(static_cast<int64_t>(m) * a.Dv + first_column + p, state[j][e]);
      }
  };
  const int64_t state_size = static_cast<int64_t>(a.Dk) * a.Dv;
  if (a.start != nullptr) {
    const float* const from = a.start + (row_head * a.segments + segment) * state_size;
    each_state_entry([&](int64_t at, float& value) { value = from[at]; });
  }
  if (ends_segments && thread < D) product[thread] = 1.0f;  // read by this thread only

  for (int64_t k = k_begin; k < k_end; ++k) {
    const int64_t chunk = backwards ? a.chunks - 1 - k : k, unit = (b * a.chunks + chunk) * a.H + h,
                  left_tokens = a.tokens - chunk * kChunk;
    const int valid = static_cast<int>(left_tokens < kChunk ? left_tokens : kChunk);
    unsigned char* const side = memory + not_hoisted(0);
    unsigned char *const readout = side + L::readout_place, *const rows = side + L::rows_place, *const scores = side + L::scores_place;
    __syncthreads();  // the tiles of the chunk before have been read
    if (thread < D / 4) copy_16_async(decay + 4 * thread, a.decay + unit * D + 4 * thread);
    if constexpr (outputs) load_panels<D, kWarpgroup>(readout, a.readout + unit * kChunk * D, D, kChunk, D, thread);
    load_panels<kGlaPart, kWarpgroup>(rows, a.rows.data + b * a.rows.batch + chunk * kChunk * a.rows.token + h * a.Dv + first_column,
                                      a.rows.token, valid, columns, thread);
    if constexpr (outputs) load_panels<kChunk, kWarpgroup>(scores, a.scores + unit * kChunk * kChunk, kChunk, kChunk, kChunk, thread);
    load_panels<D, kWarpgroup>(side, a.side + unit * kChunk * D, D, kChunk, D, thread);
    copies_arrived();
    publish_to_tensor_cores();
    __syncthreads();
    if (ends_segments && thread < D) product[thread] *= decay[thread];

    float y[8][4];  // y' : rows p, columns tokens
    if constexpr (outputs) {
      clear(y);
#pragma unroll
      for (int n = 0; n < D / 16; n += 2) {  // two operands in registers at a time
        const Left<Bf16> first = Left<Bf16>::from(state[2 * n], state[2 * n + 1]),
                         second = Left<Bf16>::from(state[2 * n + 2], state[2 * n + 3]);
        products_begin();
        multiply_panels<Summed::along_rows>(y, first, operand<Summed::along_rows>(readout, n));
        multiply_panels<Summed::along_rows>(y, second, operand<Summed::along_rows>(readout, n + 1));
        products_close();
        products_done_but<0>();
        touch(y);
      }
      constexpr Summed of_scores = backwards ? Summed::across_rows : Summed::along_rows;  // o_i takes v_j, grad v_j takes grad o_i
      products_begin();
#pragma unroll
      for (int k16 = 0; k16 < kChunk / 16; ++k16)
        multiply_panels<Summed::across_rows, of_scores>(y, operand<Summed::across_rows>(rows, k16), operand<of_scores>(scores, k16), true);
      products_close();
      products_done_but<0>();
      touch(y);
      __syncthreads();  // readout and scores have been read: a border takes the place of one, y of the other
    }
    if (keeps_borders) {  // this warp's 16 rows, through shared memory so that whole lines are written
      const int own_row = not_hoisted(low);
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          store_two(panel_element(readout, own_row + 8 * half, 8 * j + 2 * quad), state[j][2 * half], state[j][2 * half + 1], true, true);
      __syncwarp();
      constexpr int units = D / 8, rows_at_once = 32 / units;
      Bf16* const to = a.borders + (unit * a.Dv + first_column) * D + lane % units * 8;
#pragma unroll 2
      for (int pass = 0; pass < 16 / rows_at_once; ++pass)
        if (const int row = 16 * warp + lane / units + pass * rows_at_once; row < columns)
          *reinterpret_cast<uint4*>(to + row * D) = *reinterpret_cast<const uint4*>(panel_element(readout, row, lane % units * 8));
      __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const float2 factor = load_two(decay + 8 * j + 2 * quad);
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
    if constexpr (outputs) {  // columns 16 * warp .. are this warp's alone
#pragma unroll
      for (int i8 = 0; i8 < kChunk / 8; ++i8)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(panel_element(scores, 8 * i8 + g, 16 * warp + 8 * half + 2 * quad)) =
              transpose_matrix(pack(y[i8][2 * half], y[i8][2 * half + 1]));
      __syncwarp();
      Bf16* const to = a.y.data + b * a.y.batch + chunk * kChunk * a.y.token + h * a.Dv + first_column;
      const int p = 16 * warp + lane % 2 * 8;
#pragma unroll
      for (int pass = 0; pass < 4; ++pass) {
        const int i = 16 * pass + lane / 2;
        if (i < valid && p < columns)
          *reinterpret_cast<uint4*>(to + i * a.y.token + p) = *reinterpret_cast<const uint4*>(panel_element(scores, i, p));
      }
    }
    products_done_but<0>();
    touch(state);
  }
  if (a.end != nullptr && (ends_segments || segment == a.segments - 1)) {
    float* const to = a.end + (ends_segments ? row_head * a.segments + segment : row_head) * state_size;
    each_state_entry([&](int64_t at, float& value) { to[at] = value; });
  }
  if (ends_segments && part == 0 && thread < a.Dk) a.segment_decay[(row_head * a.segments + segment) * a.Dk + thread] = product[thread];
#endif
}

template <int D, bool outputs, bool backwards>
void launch_walk(const GlaWalkArgs<Bf16>& args, const CudaContext& context) {
  launch(&gla_walk_warpgroup_kernel<D, outputs, backwards>, "gla_walk_warpgroup_kernel",
         dim3(static_cast<unsigned>(args.B * args.H * args.segments * args.parts)), dim3(kWarpgroup),
         static_cast<size_t>(Layout<D, outputs>::total_bytes), context, args);
}

template <int D>
void launch_walk(const GlaWalkArgs<Bf16>& args, bool outputs, bool backwards, const CudaContext& context) {
  if (outputs) backwards ? launch_walk<D, true, true>(args, context) : launch_walk<D, true, false>(args, context);
  else backwards ? launch_walk<D, false, true>(args, context) : launch_walk<D, false, false>(args, context);
}

}  // namespace

bool gla_walk_has_warpgroups(const GlaWalkArgs<Bf16>& a, bool outputs, const CudaContext& context) {
  return a.Dk <= 128 && a.rows.vectors && (!outputs || a.y.vectors) &&
         has_warpgroup_instructions(&gla_walk_warpgroup_kernel<128, true, false>, context);
}

void launch_gla_walk_warpgroups(const GlaWalkArgs<Bf16>& args, bool outputs, bool backwards, const CudaContext& context) {
  args.Dk <= 64 ? launch_walk<64>(args, outputs, backwards, context) : launch_walk<128>(args, outputs, backwards, context);
}

}  // namespace longhand
