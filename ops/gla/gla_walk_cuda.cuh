// The walks over the chunks of gla: what their kernels are told.
#pragma once
#include "ops/gla/gla_cuda.cuh"

namespace longhand {

constexpr int kGlaPart = 64;  // columns of Dv in a block

template <class T>
struct GlaWalkArgs {
  TokenRows<const T> rows;  // v, or backwards grad_o [.., H, Dv]
  const T *side, *readout;  // [B, chunks, H, 64, D]: state' += rows' side;  y' = state' readout' + rows' scores
  const T* scores;          // [B, chunks, H, 64, 64]
  const float* decay;       // [B, chunks, H, D]
  TokenRows<T> y;           // o, or backwards grad_v
  const float* start;       // [B, H, segments, Dk, Dv] or null: zeros
  float* end;               // [B, H, Dk, Dv], or with end_per_segment [B, H, segments, Dk, Dv], or null
  float* segment_decay;     // [B, H, segments, Dk] with end_per_segment
  T* borders;               // [B, chunks, H, Dv, D] or null: the turned state before each chunk of the walk
  int64_t B, tokens, H, chunks, segments, chunks_per_segment;
  bool end_per_segment;
  int Dk, Dv, parts, stages;
};

/// What a block of a walk does: chunks [k_begin, k_end) in the walk's order, of one row and head, for a part of the columns of Dv.
struct GlaWalkBlock {
  int part, first_column, columns;
  int64_t segment, row_head, h, b, k_begin, k_end;

  template <class T>
  __device__ explicit GlaWalkBlock(const GlaWalkArgs<T>& a, unsigned block = blockIdx.x)
      : part(static_cast<int>(block % a.parts)),
        first_column(kGlaPart * part),
        columns(a.Dv - first_column < kGlaPart ? a.Dv - first_column : kGlaPart),
        segment(block / a.parts % a.segments),
        row_head(block / a.parts / a.segments),
        h(row_head % a.H),
        b(row_head / a.H),
        k_begin(segment * a.chunks_per_segment),
        k_end(k_begin + a.chunks_per_segment < a.chunks ? k_begin + a.chunks_per_segment : a.chunks) {}
};

/// Walks with the products of warpgroups (gla_walk_warpgroups_cuda.cu), where this GPU, this build and these shapes allow it.
constexpr int kGlaWalkBlocksAtOnce = 4;  // of an SM
bool gla_walk_has_warpgroups(const GlaWalkArgs<Bf16>& args, bool outputs, const CudaContext& context);
void launch_gla_walk_warpgroups(const GlaWalkArgs<Bf16>& args, bool outputs, bool backwards, const CudaContext& context);
/// The walk of the backward for grad v and the states' gradients, and the walk for states, side by side: of two kernels that leave much of
/// the GPU idle the second would wait for the end of the first. Both in one segment, with few enough blocks to fetch ahead.
bool gla_walks_go_together(const GlaWalkArgs<Bf16>& gradients, const GlaWalkArgs<Bf16>& states, const CudaContext& context);
void launch_gla_walks_together(const GlaWalkArgs<Bf16>& gradients, const GlaWalkArgs<Bf16>& states, const CudaContext& context);

}  // namespace longhand
