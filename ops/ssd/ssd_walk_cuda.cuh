// The walks over the chunks of ssd: what their kernels are told.
#pragma once
#include "ops/ssd/ssd_cuda.cuh"

namespace longhand {

template <class T>
struct SsdWalkArgs {
  bool backwards;                          // from the last chunk, gradients of states: rows is dY, side is C_t
  TokenRows<const T> rows, side, readout;  // x or dY [.., H, P];  B_t or C_t [.., G, N];  C_t for outputs
  TokenRows<T> y;
  const float* D_skip;  // [H] or [H, P] or null
  bool D_per_channel;
  const float* dt;            // [B, H, chunks, 64]
  const LogDecay<T>* lambda;  // [B, H, chunks, 64]
  const float* start;         // [B, H, segments, P, N] or null: zeros
  float* end;                 // [B, H, P, N], or with end_per_segment [B, H, segments, P, N], or null
  bool end_per_segment;
  T* borders;  // [B, chunks, H, P, N] or null: the state before each chunk of the walk
  int64_t B, tokens, H, G, chunks, segments, chunks_per_segment;
  int P, N, teams, stages;
};

/// One walk, or two of the same shape in one launch: more blocks fill the GPU better than one launch after the other.
template <class T>
struct SsdWalks {
  SsdWalkArgs<T> of[2];
  int64_t count, blocks;  // blocks of each
};

/// A walk of warpgroups, heads of a block side by side: 0 where this GPU, this build or these shapes do not allow it.
int ssd_walk_warpgroup_teams(const SsdWalkArgs<Bf16>& args, bool outputs, const CudaContext& context);
/// Launches it; of[0] alone with outputs.
void launch_ssd_walks_warpgroups(const SsdWalks<Bf16>& walks, bool outputs, const CudaContext& context);

}  // namespace longhand
