// GLA on CUDA: the walks over the chunks (prepared by gla_prepare_cuda.cu) with the state in registers.
//
// gla_walk_kernel<outputs>: o and h_T (forward), grad v and grad h0 (backward, from the last chunk)
// moves   prepared q and k, scores, v in, o out: 2 Dk + 64 + 2 Dv elements per token and head; the parts of Dv read q, k and scores
//         again, from L2 when they run together
// flops   per chunk and head the scores' product with v (64 * 64 * Dv, half of it needed), state and update (2 * 64 Dk Dv each)
// floor   B 32, T 2048, H 4, Dk 128, Dv 256, bf16: 440 MB / 3.0 TB/s = 0.15 ms; with the preparation 0.27 ms
// split   one block per (row, head, 64 columns of Dv, segment), one warp per 16 of the columns; the turned state [Dv, Dk] stays in f32
//         registers and feeds its product from there. With too few rows and heads for the GPU the sequence is cut into segments: their end
//         states from a zero state first, a scan over segments, then the outputs of all segments at once. On sm_90a, in bf16 and for
//         Dk <= 128, gla_walk_warpgroups_cuda.cu takes the walks
// needs   16-byte copies of v where base, strides and widths are multiples of 16 bytes, single elements otherwise
// agrees  with the CPU reference to kGlaToleranceF32, kGlaToleranceBf16 (gla_kernels.h); bf16 rounds o, and the state in its product
// order   fixed, no atomics. How many segments there are depends on the GPU's size
// Exponentials are ex2.approx, reciprocals rcp.approx (cuda_math.cuh).
#include <algorithm>

#include "core/error.h"
#include "ops/gla/gla_walk_cuda.cuh"

namespace longhand {
namespace {

// --- walk -----------------------------------------------------------------------------------------------------

template <class T, int D>
struct WalkLayout {  // shared memory in bytes: the decay of a segment, border rows of every warp, then the stages with the tiles of one
                     // chunk
  static constexpr int size = static_cast<int>(sizeof(T));
  static constexpr int side_bytes = kChunk * tile_stride<T>(D) * size, scores_bytes = kChunk * tile_stride<T>(kChunk) * size;
  static constexpr bool stages_borders = D * size <= 512;  // wider rows leave no room for it, and are whole lines anyway
  static constexpr int rows_bytes = kChunk * tile_stride<T>(kGlaPart) * size,
                       border_bytes = stages_borders ? kGlaPart * tile_stride<T>(D) * size : 0;
  static constexpr int stage_bytes(bool outputs) { return D * 4 + rows_bytes + side_bytes + (outputs ? side_bytes + scores_bytes : 0); }
  static constexpr int total_bytes(bool outputs, bool borders, int stages) {
    return D * 4 + (borders ? border_bytes : 0) + stages * stage_bytes(outputs);
  }
};

template <class T, int D, bool outputs, bool backwards>
__global__ void __launch_bounds__(2 * kGlaPart, sizeof(T) == 2 && D == 128 ? (backwards ? 3 : 4) : 0)
    gla_walk_kernel(const GlaWalkArgs<T> a) {
  using Layout = WalkLayout<T, D>;
  constexpr int side_stride = tile_stride<T>(D), scores_stride = tile_stride<T>(kChunk);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
  const auto [part, first_column, columns, segment, row_head, h, b, k_begin, k_end] = GlaWalkBlock(a);
  if (a.end_per_segment && segment == a.segments - 1) return;  // nobody starts from its end

  float* product = reinterpret_cast<float*>(shared_memory());  // [D] decay over the segment so far
  T* border = reinterpret_cast<T*>(product + D) + 16 * warp * side_stride;
  unsigned char* stages = shared_memory() + D * 4 + (a.borders != nullptr ? Layout::border_bytes : 0);
  constexpr int rows_stride = tile_stride<T>(kGlaPart), stage_bytes = Layout::stage_bytes(outputs), threads = 2 * kGlaPart;
  const int thread = static_cast<int>(threadIdx.x);
  const auto chunk_at = [&](int64_t k) { return backwards ? a.chunks - 1 - k : k; };
  const auto tokens_in = [&](int64_t chunk) {
    const int64_t left = a.tokens - chunk * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  };
  const auto fetch = [&](int64_t k) {  // the tiles of the walk's chunk k
    const int64_t chunk = chunk_at(k), unit = (b * a.chunks + chunk) * a.H + h;
    float* decay = reinterpret_cast<float*>(stages + k % a.stages * stage_bytes);
    for (int i = thread; i < D / 4; i += threads) copy_16_async(decay + 4 * i, a.decay + unit * D + 4 * i);
    T* rows = reinterpret_cast<T*>(decay + D);
    load_tile<kGlaPart>(rows, kChunk, a.rows.data + b * a.rows.batch + chunk * kChunk * a.rows.token + h * a.Dv + first_column,
                        a.rows.token, tokens_in(chunk), columns, a.rows.vectors, thread, threads);
    T* side = rows + kChunk * rows_stride;
    load_tile<D>(side, kChunk, a.side + unit * kChunk * D, D, kChunk, D, true, thread, threads);
    if constexpr (outputs) {
      load_tile<D>(side + kChunk * side_stride, kChunk, a.readout + unit * kChunk * D, D, kChunk, D, true, thread, threads);
      load_tile<kChunk>(side + 2 * kChunk * side_stride, kChunk, a.scores + unit * kChunk * kChunk, kChunk, kChunk, kChunk, true, thread,
                        threads);
    }
  };

  // The turned state: rows p = 16 * warp + g and + 8 of this part, columns 8j + 2 * quad and the next.
  float state[D / 8][4];
  clear(state);
  const auto each_state_entry = [&](auto&& visit) {  // visit(offset in [Dk, Dv], value)
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int p = 16 * warp + g + e / 2 * 8, m = 8 * j + 2 * quad + e % 2;
        if (p < columns && m < a.Dk) visit(static_cast<int64_t>(m) * a.Dv + first_column + p, state[j][e]);
      }
  };
  const int64_t state_size = static_cast<int64_t>(a.Dk) * a.Dv;
  if (a.start != nullptr) {
    const float* from = a.start + (row_head * a.segments + segment) * state_size;
    each_state_entry([&](int64_t at, float& value) { value = from[at]; });
  }
  if (a.end_per_segment)
    for (int m = static_cast<int>(threadIdx.x); m < D; m += static_cast<int>(blockDim.x)) product[m] = 1.0f;  // read by this thread only

  if (a.stages == 2 && k_begin < k_end) fetch(k_begin);
  for (int64_t k = k_begin; k < k_end; ++k) {
    if (a.stages == 2) {
      copies_arrived();
      __syncthreads();  // chunk k is here, and nobody reads the other stage any more
      if (k + 1 < k_end) fetch(k + 1);
    } else {
      __syncthreads();
      fetch(k);
      copies_arrived();
      __syncthreads();
    }
    const int64_t chunk = chunk_at(k);
    const float* decay = reinterpret_cast<const float*>(stages + k % a.stages * stage_bytes);
    T* rows = const_cast<T*>(reinterpret_cast<const T*>(decay + D));
    const T* side = rows + kChunk * rows_stride;
    const T* readout = side + kChunk * side_stride;
    const T* scores = readout + kChunk * side_stride;
    if (a.end_per_segment)
      for (int m = static_cast<int>(threadIdx.x); m < D; m += static_cast<int>(blockDim.x)) product[m] *= decay[m];
    if (a.borders != nullptr) {
      // this warp's 16 rows, through shared memory so that whole lines are written
      T* const to = a.borders + (((b * a.chunks + chunk) * a.H + h) * a.Dv + first_column + 16 * warp) * D;
      T* const own = Layout::stages_borders ? border : to;
      constexpr int64_t own_stride = Layout::stages_borders ? side_stride : D;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (Layout::stages_borders || 16 * warp + g + 8 * half < columns)
            store_two(own + (g + 8 * half) * own_stride + 8 * j + 2 * quad, state[j][2 * half], state[j][2 * half + 1], true, true);
      if constexpr (Layout::stages_borders) {
        __syncwarp();
        store_part<D>(to, D, border, side_stride, columns - 16 * warp, 16, D, true);
        __syncwarp();
      }
    }

    float y[kChunk / 8][4];  // y' : rows p, columns tokens
    if constexpr (outputs) {
      clear(y);
#pragma unroll(sizeof(T) == 4 && D == 256 ? 1 : D / 16)  // in f32 at 256 the state spills anyway
      for (int n = 0; n < D / 16; ++n)
        multiply<Stored::transposed, kChunk / 16>(y, Left<T>::from(state[2 * n], state[2 * n + 1]), readout + 16 * n, side_stride);
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const float2 factor = *reinterpret_cast<const float2*>(decay + 8 * j + 2 * quad);
      state[j][0] *= factor.x;
      state[j][1] *= factor.y;
      state[j][2] *= factor.x;
      state[j][3] *= factor.y;
    }
#pragma unroll(sizeof(T) == 2 ? 4 : 1)
    for (int k16 = 0; k16 < kChunk / 16; ++k16) {
      const Left<T> left = Left<T>::template load<Stored::transposed>(rows + 16 * k16 * rows_stride + 16 * warp, rows_stride);
      if constexpr (outputs && !backwards)  // o_i takes v_j of j <= i
        multiply<Stored::transposed, kChunk / 16>(y, left, scores + 16 * k16, scores_stride, k16);
      if constexpr (outputs && backwards)  // grad v_j takes grad o_i of i >= j
        multiply<Stored::as_is, kChunk / 16>(y, left, scores + 16 * k16 * scores_stride, scores_stride, 0, k16 + 1);
      multiply<Stored::as_is, D / 16>(state, left, side + 16 * k16 * side_stride, side_stride);
    }
    if constexpr (outputs) {  // y takes the place of the rows in their tile: columns 16 * warp .. of it are this warp's alone
      T* own = rows + 16 * warp;
      __syncwarp();
#pragma unroll
      for (int i8 = 0; i8 < kChunk / 8; ++i8) store_transposed(own + 8 * i8 * rows_stride, rows_stride, y[i8]);
      __syncwarp();
      store_part<16>(a.y.data + b * a.y.batch + chunk * kChunk * a.y.token + h * a.Dv + first_column + 16 * warp, a.y.token, own,
                     rows_stride, tokens_in(chunk), kChunk, columns - 16 * warp, a.y.vectors);
    }
  }
  if (a.end != nullptr && (a.end_per_segment || segment == a.segments - 1)) {
    float* to = a.end + (a.end_per_segment ? row_head * a.segments + segment : row_head) * state_size;
    each_state_entry([&](int64_t at, float& value) { to[at] = value; });
  }
  if (a.end_per_segment && part == 0)
    for (int m = static_cast<int>(threadIdx.x); m < a.Dk; m += static_cast<int>(blockDim.x))
      a.segment_decay[(row_head * a.segments + segment) * a.Dk + m] = product[m];
}

// --- scan over segments ---------------------------------------------------------------------------------------

struct SegmentScanArgs {
  const float* decay;  // [B, H, segments, Dk]
  const float* start;  // [B, H, Dk, Dv] or null
  float* states;       // [B, H, segments, Dk, Dv]: ends from a zero state in, starts out
  int64_t segments, Dk, Dv;
};

// One thread per `vec` entries of a row of the state, one block row per (row, head).
constexpr int kSegmentsAhead = 8;
template <int vec>
__global__ void gla_segment_scan_kernel(const SegmentScanArgs a) {
  const int64_t entry = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * vec, row_head = blockIdx.x, size = a.Dk * a.Dv;
  if (entry >= size) return;
  Pack<float, vec> current{};
  if (a.start != nullptr) current = load_pack<vec>(a.start + row_head * size + entry);
  const float* decay = a.decay + row_head * a.segments * a.Dk + entry / a.Dv;
  float* place = a.states + row_head * a.segments * size + entry;
  const int64_t last = a.segments - 1;
  for (int64_t begin = 0; begin < last; begin += kSegmentsAhead) {
    Pack<float, vec> own[kSegmentsAhead];  // all on their way before the first is needed
    float factor[kSegmentsAhead];
#pragma unroll
    for (int s = 0; s < kSegmentsAhead; ++s)
      if (begin + s < last) {
        own[s] = load_pack<vec>(place + (begin + s) * size);
        factor[s] = decay[(begin + s) * a.Dk];
      }
#pragma unroll
    for (int s = 0; s < kSegmentsAhead; ++s) {
      if (begin + s >= last) break;
      store_pack(place + (begin + s) * size, current);
#pragma unroll
      for (int e = 0; e < vec; ++e) current.at[e] = factor[s] * current.at[e] + own[s].at[e];
    }
  }
  store_pack(place + last * size, current);  // the last segment's end is nobody's beginning
}

// --- launchers ------------------------------------------------------------------------------------------------

template <class T, int D, bool outputs, bool backwards>
void launch_walk(GlaWalkArgs<T> args, const CudaContext& context) {
  using Layout = WalkLayout<T, D>;
  if constexpr (sizeof(T) == 2 && D <= 128)
    if (gla_walk_has_warpgroups(args, outputs, context)) return launch_gla_walk_warpgroups(args, outputs, backwards, context);
  const int64_t blocks = args.B * args.H * args.segments * args.parts;
  // Two stages hide the loads of a block that is alone on its SM; where there are blocks enough, more of them per SM hide them better.
  const bool two =
      blocks <= 2 * context.sm_count && Layout::total_bytes(outputs, args.borders != nullptr, 2) <= context.shared_memory_per_block;
  args.stages = two ? 2 : 1;
  launch(&gla_walk_kernel<T, D, outputs, backwards>, "gla_walk_kernel", dim3(static_cast<unsigned>(blocks)), dim3(2 * kGlaPart),
         static_cast<size_t>(Layout::total_bytes(outputs, args.borders != nullptr, args.stages)), context, args);
}

template <class T, bool outputs, bool backwards>
void launch_walk(const GlaWalkArgs<T>& args, const CudaContext& context) {
  switch (padded_key_dim(args.Dk)) {
    case 64:
      return launch_walk<T, 64, outputs, backwards>(args, context);
    case 128:
      return launch_walk<T, 128, outputs, backwards>(args, context);
    default:
      return launch_walk<T, 256, outputs, backwards>(args, context);
  }
}

/// Cuts a walk into segments when rows, heads and parts alone leave much of the GPU idle.
template <class T>
void cut_into_segments(GlaWalkArgs<T>& args, bool outputs, const Tensor& start, const CudaContext& context) {
  const int64_t blocks = std::max<int64_t>(1, args.B * args.H * args.parts);
  // As many segments as make a full wave of blocks, where there is room for some: two passes over them take less time than one pass of
  // blocks that have an SM to themselves. Shorter segments than 4 chunks cost more than they bring.
  int64_t at_once = 2, worth = 3;  // blocks of an SM; from how many segments on
  if constexpr (sizeof(T) == 2)
    if (gla_walk_has_warpgroups(args, outputs, context)) at_once = kGlaWalkBlocksAtOnce, worth = kGlaWalkBlocksAtOnce + 1;
  const int64_t wanted = at_once * context.sm_count / blocks, possible = args.chunks / 4;
  args.segments = wanted < worth ? 1 : wanted < possible ? wanted : possible;
  if (args.segments < 1) args.segments = 1;
  args.chunks_per_segment = (args.chunks + args.segments - 1) / args.segments;
  if (args.chunks_per_segment > 0) args.segments = (args.chunks + args.chunks_per_segment - 1) / args.chunks_per_segment;
  if (args.segments < 1) args.segments = 1;
  args.start = address_of<const float>(start);
  args.end_per_segment = false;
}

template <class T, bool outputs, bool backwards>
void run_walk(GlaWalkArgs<T> args, const Tensor& start, const Device& device) {
  const CudaContext& context = device.cuda_context();
  const int64_t heads = args.B * args.H;
  if (heads * args.parts == 0) return;
  cut_into_segments(args, outputs, start, context);
  Tensor starts, decays;
  if (args.segments > 1) {
    const int64_t Dk = args.Dk, Dv = args.Dv;
    const Shape states_shape{args.B, args.H, args.segments, Dk, Dv}, decays_shape{args.B, args.H, args.segments, Dk};
    starts = Tensor::empty(device, Dtype::f32, states_shape);
    decays = Tensor::empty(device, Dtype::f32, decays_shape);
    GlaWalkArgs<T> ends = args;
    ends.start = nullptr;
    ends.borders = nullptr;
    ends.end = starts.data<float>();
    ends.segment_decay = decays.data<float>();
    ends.end_per_segment = true;
    launch_walk<T, false, backwards>(ends, context);
    const SegmentScanArgs scan{decays.data<float>(), args.start, starts.data<float>(), args.segments, Dk, Dv};
    const int64_t vec = Dv % 4 == 0 ? 4 : 1;
    const dim3 grid(static_cast<unsigned>(heads), static_cast<unsigned>((Dk * Dv / vec + 255) / 256));
    launch(vec == 4 ? &gla_segment_scan_kernel<4> : &gla_segment_scan_kernel<1>, "gla_segment_scan_kernel", grid, dim3(256), 0, context,
           scan);
    args.start = starts.data<float>();
  }
  launch_walk<T, outputs, backwards>(args, context);
}

template <class T>
GlaWalkArgs<T> walk_args(const GlaInputs& in, const GlaPrepared& prepared) {
  const GlaSizes s = in.sizes();
  GlaWalkArgs<T> args{};
  args.scores = address_of<const T>(prepared.scores);
  args.decay = address_of<const float>(prepared.decay);
  args.B = s.B;
  args.tokens = s.T;
  args.H = s.H;
  args.chunks = chunk_count(s.T);
  args.Dk = static_cast<int>(s.Dk);
  args.Dv = static_cast<int>(s.Dv);
  args.parts = static_cast<int>((s.Dv + kGlaPart - 1) / kGlaPart);
  return args;
}

template <class T>
GlaResult forward(const GlaInputs& in, const GlaRule& rule) {
  const GlaSizes s = in.sizes();
  const Shape o_shape{s.B, s.T, s.H, s.Dv}, state_shape{s.B, s.H, s.Dk, s.Dv};
  const GlaPrepared prepared = gla_prepare_cuda(in, rule);
  const GlaResult out{Tensor::empty(in.q.device(), in.q.dtype(), o_shape), Tensor::empty(in.q.device(), Dtype::f32, state_shape), prepared};
  GlaWalkArgs<T> args = walk_args<T>(in, prepared);
  args.rows = token_rows<const T>(in.v, s.Dv);
  args.side = address_of<const T>(prepared.k);
  args.readout = address_of<const T>(prepared.q);
  args.y = token_rows<T>(out.o, s.Dv);
  args.end = out.h_T.data<float>();
  run_walk<T, true, false>(args, in.h0, in.q.device());
  return out;
}

Tensor empty_borders(const GlaInputs& in) {
  const GlaSizes s = in.sizes();
  const Shape shape{s.B, chunk_count(s.T), s.H, s.Dv, int64_t{padded_key_dim(s.Dk)}};
  return Tensor::empty(in.q.device(), in.q.dtype(), shape);
}

template <class T>
GlaWalkArgs<T> states_walk(const GlaInputs& in, const GlaPrepared& prepared, const Tensor& borders) {
  GlaWalkArgs<T> args = walk_args<T>(in, prepared);
  args.rows = token_rows<const T>(in.v, in.sizes().Dv);
  args.side = address_of<const T>(prepared.k);
  args.borders = address_of<T>(borders);
  return args;
}

template <class T>
GlaWalkArgs<T> gradients_walk(const GlaInputs& in, const GlaPrepared& prepared, const Tensor& grad_o, const Tensor& grad_v,
                              const Tensor& grad_h0, const Tensor& borders) {
  GlaWalkArgs<T> args = walk_args<T>(in, prepared);
  args.rows = token_rows<const T>(grad_o, in.sizes().Dv);
  args.side = address_of<const T>(prepared.q);
  args.readout = address_of<const T>(prepared.k);
  args.y = token_rows<T>(grad_v, in.sizes().Dv);
  args.borders = address_of<T>(borders);
  args.end = address_of<float>(grad_h0);
  return args;
}

template <class T>
GlaBorders chunk_borders(const GlaInputs& in, const GlaPrepared& prepared, const Tensor& grad_o, const Tensor& grad_h_T,
                         const Tensor& grad_v, const Tensor& grad_h0, bool with_states) {
  const Device& device = in.q.device();
  const GlaBorders out{with_states ? empty_borders(in) : Tensor(), empty_borders(in)};
  GlaWalkArgs<T> gradients = gradients_walk<T>(in, prepared, grad_o, grad_v, grad_h0, out.gradients);
  if constexpr (sizeof(T) == 2)
    if (with_states && grad_v.defined() && in.q.numel() > 0) {
      const CudaContext& context = device.cuda_context();
      GlaWalkArgs<T> states = states_walk<T>(in, prepared, out.states);
      cut_into_segments(gradients, true, grad_h_T, context);
      cut_into_segments(states, false, in.h0, context);
      if (gla_walks_go_together(gradients, states, context)) {
        launch_gla_walks_together(gradients, states, context);
        return out;
      }
    }
  grad_v.defined() ? run_walk<T, true, true>(gradients, grad_h_T, device) : run_walk<T, false, true>(gradients, grad_h_T, device);
  if (with_states) run_walk<T, false, false>(states_walk<T>(in, prepared, out.states), in.h0, device);
  return out;
}

}  // namespace

bool gla_takes_keys_whole(const GlaInputs& in) {
  const int64_t limit = in.q.device().cuda_context().shared_memory_per_block;
  const bool fits = in.q.dtype() == Dtype::bf16 || in.q.dim(3) <= 128 || WalkLayout<float, 256>::total_bytes(true, true, 1) <= limit;
  return in.q.dim(3) <= kMaxKeyDim && fits;
}

GlaBorders gla_borders_cuda(const GlaInputs& in, const GlaPrepared& prepared, const Tensor& grad_o, const Tensor& grad_h_T,
                            const Tensor& grad_v, const Tensor& grad_h0, bool with_states) {
  return in.q.dtype() == Dtype::bf16 ? chunk_borders<Bf16>(in, prepared, grad_o, grad_h_T, grad_v, grad_h0, with_states)
                                     : chunk_borders<float>(in, prepared, grad_o, grad_h_T, grad_v, grad_h0, with_states);
}

GlaResult gla_fwd_cuda(const GlaInputs& in, const GlaRule& rule) {
  if (!gla_takes_keys_whole(in)) return gla_fwd_key_slices_cuda(in, rule);
  return in.q.dtype() == Dtype::bf16 ? forward<Bf16>(in, rule) : forward<float>(in, rule);
}

}  // namespace longhand
