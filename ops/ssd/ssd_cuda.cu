// SSD on CUDA: the steps, and the walks over the chunks with the P x N state in registers.
//
// ssd_steps_kernel
// moves   dt in once, two f32 per token and head out; negligible beside x
// split   one warp per (row, chunk, head), two tokens per lane
// order   a fixed shuffle scan
//
// ssd_walk_kernel<outputs>: y and h_T
// moves   x in, y out, and per head B_t and C_t (from L2 when heads of a group run together): the ideal single pass of 2e + 2GN + H
// elements a token flops   per chunk of Q = 64 and head: C B' (Q Q N), its product with X (Q Q P), C S' and the state update (2 Q P N
// each): about 56 k per token floor   B 32, T 2048, H 24, P 64, N 128, bf16: 440 MB / 3.0 TB/s = 0.15 ms on an H100 SXM split   one block
// per (row, head, segment), one warp per 16 rows of P; the state stays in f32 registers and feeds C S' from there.
//         With too few rows and heads for the GPU the sequence is cut into segments: their end states from a zero state first
//         (ssd_walk_kernel<states>), a scan over segments, then the outputs of all segments at once
// needs   P <= 128, N <= 256 (f32: 128); P is padded to a multiple of 16 and N to 64, 128 or 256 with zeros. 16-byte copies where base,
// strides and
//         widths are multiples of 16 bytes, single elements otherwise
// agrees  with the CPU reference to kSsdToleranceF32, kSsdToleranceBf16 (ssd.h); bf16 rounds y, M, rho dt X and the state in C S'
// order   fixed, no atomics. How many segments there are depends on the GPU's size
#include "core/error.h"
#include "ops/common/tile_product.cuh"
#include "ops/ssd/ssd_cuda.cuh"

namespace longhand {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
// A token's decay below 2^-160 is 0 in f32; held there so that sums over a chunk keep their precision.
constexpr float kLeastLog2Decay = -160.0f;

// --- steps ----------------------------------------------------------------------------------------------------

template <class T>
struct StepArgs {
  TokenRows<const T> dt;
  const float *A_log, *dt_bias;
  float *out_dt, *out_lambda;
  int64_t B, tokens, H, chunks;
  float dt_min, dt_max;
};

template <class T>
__global__ void ssd_steps_kernel(const StepArgs<T> a) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (warp >= a.B * a.chunks * a.H) return;
  const int64_t h = warp % a.H, c = warp / a.H % a.chunks, b = warp / a.H / a.chunks;
  const float A = -expf(a.A_log[h]), bias = a.dt_bias[h];
  float before = 0;
  for (int half = 0; half < 2; ++half) {
    const int i = half * 32 + lane;
    const int64_t t = c * kChunk + i;
    float dt = 0;
    if (t < a.tokens) {
      const float raw = widen(a.dt.data[b * a.dt.batch + t * a.dt.token + h]) + bias;
      dt = raw > 20.0f ? raw : log1pf(expf(raw));
      dt = dt < a.dt_min ? a.dt_min : dt > a.dt_max ? a.dt_max : dt;
    }
    const float step = dt * A * kLog2e;
    float sum = step < kLeastLog2Decay ? kLeastLog2Decay : step;
    for (int distance = 1; distance < 32; distance *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    const int64_t at = ((b * a.H + h) * a.chunks + c) * kChunk + i;
    a.out_dt[at] = dt;
    a.out_lambda[at] = before + sum;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
}

// --- walk -----------------------------------------------------------------------------------------------------

enum class Walk {
  outputs,   // forward, and y
  states,    // forward, states only
  gradients  // backward from the last chunk, gradients of states: rows is dY, side is C_t
};

template <class T>
struct WalkArgs {
  TokenRows<const T> rows, side, readout;  // x or dY [.., H, P];  B_t or C_t [.., G, N];  C_t for outputs
  TokenRows<T> y;
  const float* D_skip;  // [H] or [H, P] or null
  bool D_per_channel;
  const float *dt, *lambda;  // [B, H, chunks, 64]
  const float* start;        // [B, H, segments, P, N] or null: zeros
  float* end;                // [B, H, P, N], or with end_per_segment [B, H, segments, P, N], or null
  bool end_per_segment;
  T* borders;  // [B, chunks, H, P, N] or null: the state before each chunk of the walk
  int64_t B, tokens, H, G, chunks, segments, chunks_per_segment;
  int P, N, P_padded, stages;
};

template <class T, int kN>
struct WalkLayout {  // shared memory, in bytes; each stage holds the tiles of one chunk
  static constexpr int side_bytes = kChunk * tile_stride<T>(kN) * static_cast<int>(sizeof(T));
  static constexpr int mixing_bytes = kChunk * tile_stride<T>(kChunk) * static_cast<int>(sizeof(T));
  static constexpr int vector_bytes = kChunk * 4;
  __host__ __device__ static constexpr int rows_bytes(int P_padded) {
    return kChunk * tile_stride<T>(P_padded) * static_cast<int>(sizeof(T));
  }
  __host__ __device__ static constexpr int stage_bytes(int P_padded, bool outputs) {
    return rows_bytes(P_padded) + (outputs ? 2 : 1) * side_bytes + 2 * vector_bytes;
  }
  __host__ __device__ static constexpr int total_bytes(int P_padded, bool outputs, int stages) {
    return stages * stage_bytes(P_padded, outputs) + 2 * vector_bytes + (outputs ? mixing_bytes : 0);
  }
};

template <class T, int kN, Walk walk>
__global__ void __launch_bounds__(256) ssd_walk_kernel(const WalkArgs<T> a) {
  constexpr bool outputs = walk == Walk::outputs;
  constexpr int side_stride = tile_stride<T>(kN), mixing_stride = tile_stride<T>(kChunk);
  using Layout = WalkLayout<T, kN>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, g = lane / 4, q = lane % 4;
  const int64_t segment = blockIdx.x % a.segments, row_head = blockIdx.x / a.segments, h = row_head % a.H, b = row_head / a.H,
                group = h / (a.H / a.G);
  const int64_t k_begin = segment * a.chunks_per_segment, k_limit = k_begin + a.chunks_per_segment,
                k_end = k_limit < a.chunks ? k_limit : a.chunks;
  if (a.end_per_segment && segment == a.segments - 1) return;  // nobody starts from its end

  unsigned char* shared = shared_memory();
  float* weight = reinterpret_cast<float*>(shared);  // of each token in the state's update
  float* from_begin = weight + kChunk;               // e^{Lambda_i}
  T* mixing = reinterpret_cast<T*>(from_begin + kChunk);
  unsigned char* stages = shared + 2 * Layout::vector_bytes + (outputs ? Layout::mixing_bytes : 0);
  const int rows_stride = tile_stride<T>(a.P_padded), stage_bytes = Layout::stage_bytes(a.P_padded, outputs);
  auto chunk_at = [&](int64_t k) { return walk == Walk::gradients ? a.chunks - 1 - k : k; };
  auto tokens_in = [&](int64_t chunk) {
    const int64_t left = a.tokens - chunk * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  };
  auto fetch = [&](int64_t k) {  // the tiles of the walk's chunk k
    const int64_t chunk = chunk_at(k), t0 = chunk * kChunk;
    const int valid = tokens_in(chunk);
    unsigned char* stage = stages + k % a.stages * stage_bytes;
    float* dt = reinterpret_cast<float*>(stage);
    const int64_t steps = (row_head * a.chunks + chunk) * kChunk;
    for (int i = static_cast<int>(threadIdx.x); i < kChunk / 2; i += static_cast<int>(blockDim.x))  // 16 units of dt, 16 of lambda
      copy_16_async(dt + 4 * i, (i < kChunk / 4 ? a.dt : a.lambda - kChunk) + steps + 4 * i);
    T* rows = reinterpret_cast<T*>(dt + 2 * kChunk);
    load_tile(rows, kChunk, a.P_padded, a.rows.data + b * a.rows.batch + t0 * a.rows.token + h * a.P, a.rows.token, valid, a.P,
              a.rows.vectors);
    T* side = rows + kChunk * rows_stride;
    load_tile(side, kChunk, kN, a.side.data + b * a.side.batch + t0 * a.side.token + group * a.N, a.side.token, valid, a.N, a.side.vectors);
    if constexpr (outputs)
      load_tile(side + kChunk * side_stride, kChunk, kN, a.readout.data + b * a.readout.batch + t0 * a.readout.token + group * a.N,
                a.readout.token, valid, a.N, a.readout.vectors);
  };

  // The state: rows p = 16 * warp + g and + 8, columns 8j + 2q and the next.
  float state[kN / 8][4];
  clear(state);
  const int p_low = 16 * warp + g;
  auto each_state_pair = [&](auto&& visit) {  // visit(row p, column n, values)
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int p = p_low + 8 * half, n = 8 * j + 2 * q;
        if (p < a.P && n < a.N) visit(p, n, state[j][2 * half], state[j][2 * half + 1]);
      }
  };
  const int64_t state_size = static_cast<int64_t>(a.P) * a.N;
  const bool even = a.N % 2 == 0;
  if (a.start != nullptr) {
    const float* from = a.start + (row_head * a.segments + segment) * state_size;
    each_state_pair([&](int p, int n, float& first, float& second) {
      first = from[p * a.N + n];
      if (n + 1 < a.N) second = from[p * a.N + n + 1];
    });
  }

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
    const float* dt = reinterpret_cast<const float*>(stages + k % a.stages * stage_bytes);
    const float* lambda = dt + kChunk;
    T* rows = reinterpret_cast<T*>(stages + k % a.stages * stage_bytes + 2 * Layout::vector_bytes);
    const T* side = rows + kChunk * rows_stride;
    const T* readout = side + kChunk * side_stride;
    const float last = lambda[kChunk - 1];

    if (a.borders != nullptr) {
      T* to = a.borders + ((b * a.chunks + chunk) * a.H + h) * state_size;
      each_state_pair([&](int p, int n, float first, float second) { store_two(to + p * a.N + n, first, second, n + 1 < a.N, even); });
    }
    for (int i = static_cast<int>(threadIdx.x); i < kChunk; i += static_cast<int>(blockDim.x)) {
      const float here = exp2f(lambda[i]);
      from_begin[i] = here;
      weight[i] = walk == Walk::gradients ? here : exp2f(fminf(last - lambda[i], 0.0f)) * dt[i];
    }
    if constexpr (outputs) {  // M = (C B') E dt, 16 rows at a time, nothing above the diagonal tiles
      for (int tile = warp; tile < kChunk / 16; tile += warps) {
        float scores[kChunk / 8][4];
        clear(scores);
#pragma unroll 2
        for (int n = 0; n < kN; n += 16)
          multiply<Stored::transposed, kChunk / 16>(
              scores, Left<T>::template load<Stored::as_is>(readout + 16 * tile * side_stride + n, side_stride), side + n, side_stride, 0,
              tile + 1);
#pragma unroll
        for (int j8 = 0; j8 < kChunk / 8; ++j8) {
          if (j8 / 2 > tile) continue;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = 16 * tile + g + 8 * half, j = 8 * j8 + 2 * q;
            const float first = j <= i ? scores[j8][2 * half] * exp2f(fminf(lambda[i] - lambda[j], 0.0f)) * dt[j] : 0.0f;
            const float second = j + 1 <= i ? scores[j8][2 * half + 1] * exp2f(fminf(lambda[i] - lambda[j + 1], 0.0f)) * dt[j + 1] : 0.0f;
            store_two(mixing + i * mixing_stride + j, first, second, true, true);
          }
        }
      }
    }
    __syncthreads();

    float y[kChunk / 8][4];  // y' : rows p, columns i
    if constexpr (outputs) {
      clear(y);
#pragma unroll
      for (int n = 0; n < kN / 16; ++n)
        multiply<Stored::transposed, kChunk / 16>(y, Left<T>::from(state[2 * n], state[2 * n + 1]), readout + 16 * n, side_stride);
#pragma unroll
      for (int i8 = 0; i8 < kChunk / 8; ++i8)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[i8][e] *= from_begin[8 * i8 + 2 * q + e % 2];
    }
    const float decay = exp2f(last);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) state[j][e] *= decay;
#pragma unroll(sizeof(T) == 2 ? 4 : 1)
    for (int k16 = 0; k16 < kChunk / 16; ++k16) {
      Left<T> left = Left<T>::template load<Stored::transposed>(rows + 16 * k16 * rows_stride + 16 * warp, rows_stride);
      if constexpr (outputs) multiply<Stored::transposed, kChunk / 16>(y, left, mixing + 16 * k16, mixing_stride, k16);
      left.scale_sum_index(weight + 16 * k16);
      multiply<Stored::as_is, kN / 16>(state, left, side + 16 * k16 * side_stride, side_stride);
    }
    if constexpr (outputs) {  // + D x; y takes x's place in the tile: columns 16 * warp .. of it are this warp's alone
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int p = p_low + 8 * half;
        const float D = a.D_skip == nullptr || p >= a.P ? 0.0f : a.D_skip[a.D_per_channel ? h * a.P + p : h];
#pragma unroll
        for (int i8 = 0; i8 < kChunk / 8; ++i8)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            T* place = rows + (8 * i8 + 2 * q + e) * rows_stride + p;
            *place = narrow<T>(y[i8][2 * half + e] + D * widen(*place));
          }
      }
      __syncthreads();
      store_tile(a.y.data + b * a.y.batch + chunk * kChunk * a.y.token + h * a.P, a.y.token, rows, a.P_padded, tokens_in(chunk), a.P,
                 a.y.vectors);
    }
  }
  if (a.end != nullptr && (a.end_per_segment || segment == a.segments - 1)) {
    float* to = a.end + (a.end_per_segment ? row_head * a.segments + segment : row_head) * state_size;
    each_state_pair([&](int p, int n, float first, float second) { store_two(to + p * a.N + n, first, second, n + 1 < a.N, even); });
  }
}

// --- scan over segments ---------------------------------------------------------------------------------------

struct SegmentScanArgs {
  const float* lambda;  // [B, H, chunks, 64]
  const float* start;   // [B, H, P, N] or null
  float* states;        // [B, H, segments, P, N]: ends from a zero state in, starts out
  int64_t chunks, segments, chunks_per_segment, state_size;
  bool backwards;
};

// One thread per element of the state, one block row per (row, head).
__global__ void ssd_segment_scan_kernel(const SegmentScanArgs a) {
  const int64_t element = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x, row_head = blockIdx.x;
  if (element >= a.state_size) return;
  float current = a.start == nullptr ? 0.0f : a.start[row_head * a.state_size + element];
  for (int64_t segment = 0; segment < a.segments; ++segment) {
    float* place = a.states + (row_head * a.segments + segment) * a.state_size + element;
    if (segment == a.segments - 1) {
      *place = current;
      return;
    }
    float log2_decay = 0;
    for (int64_t k = segment * a.chunks_per_segment; k < (segment + 1) * a.chunks_per_segment; ++k)
      log2_decay += a.lambda[(row_head * a.chunks + (a.backwards ? a.chunks - 1 - k : k)) * kChunk + kChunk - 1];
    const float own = *place;
    *place = current;
    current = exp2f(log2_decay) * current + own;
  }
}

// --- launchers ------------------------------------------------------------------------------------------------

template <class T, int kN, Walk walk>
void launch_walk(WalkArgs<T> args, const CudaContext& context) {
  constexpr bool outputs = walk == Walk::outputs;
  args.stages = WalkLayout<T, kN>::total_bytes(args.P_padded, outputs, 2) <= context.shared_memory_per_block ? 2 : 1;
  const auto shared = static_cast<size_t>(WalkLayout<T, kN>::total_bytes(args.P_padded, outputs, args.stages));
  const dim3 grid(static_cast<unsigned>(args.B * args.H * args.segments)), block(static_cast<unsigned>(args.P_padded * 2));
  launch(&ssd_walk_kernel<T, kN, walk>, "ssd_walk_kernel", grid, block, shared, context.stream, args);
}

template <class T, Walk walk>
void launch_walk(const WalkArgs<T>& args, const CudaContext& context) {
  switch (padded_state_dim(args.N)) {
    case 64:
      return launch_walk<T, 64, walk>(args, context);
    case 128:
      return launch_walk<T, 128, walk>(args, context);
    default:
      if constexpr (sizeof(T) == 2) launch_walk<T, 256, walk>(args, context);  // f32 ends at 128: require_ssd_cuda_sizes
  }
}

/// Runs a walk, in segments when rows and heads alone leave most of the GPU idle.
template <class T, Walk walk>
void run_walk(WalkArgs<T> args, const Tensor& start, const Device& device) {
  const CudaContext& context = device.cuda_context();
  const int64_t heads = args.B * args.H, state_size = static_cast<int64_t>(args.P) * args.N;
  if (heads == 0) return;
  const int64_t wanted = heads >= context.sm_count ? 1 : (2 * context.sm_count + heads - 1) / heads;
  const int64_t possible = args.chunks / 8;  // shorter segments cost more than they bring
  args.segments = wanted < possible ? wanted : possible;
  if (args.segments < 1) args.segments = 1;
  args.chunks_per_segment = (args.chunks + args.segments - 1) / args.segments;
  if (args.chunks_per_segment > 0) args.segments = (args.chunks + args.chunks_per_segment - 1) / args.chunks_per_segment;
  if (args.segments < 1) args.segments = 1;
  args.start = start.defined() ? static_cast<const float*>(start.raw()) : nullptr;
  args.end_per_segment = false;

  Tensor starts;
  if (args.segments > 1) {
    const Shape shape{args.B, args.H, args.segments, int64_t{args.P}, int64_t{args.N}};
    starts = Tensor::empty(device, Dtype::f32, shape);
    WalkArgs<T> ends = args;
    ends.start = nullptr;
    ends.borders = nullptr;
    ends.end = starts.data<float>();
    ends.end_per_segment = true;
    launch_walk<T, walk == Walk::gradients ? Walk::gradients : Walk::states>(ends, context);
    const SegmentScanArgs scan{args.lambda,          args.start,
                               starts.data<float>(), args.chunks,
                               args.segments,        args.chunks_per_segment,
                               state_size,           walk == Walk::gradients};
    const dim3 grid(static_cast<unsigned>(heads), static_cast<unsigned>((state_size + 255) / 256));
    launch(&ssd_segment_scan_kernel, "ssd_segment_scan_kernel", grid, dim3(256), 0, context.stream, scan);
    args.start = starts.data<float>();
  }
  launch_walk<T, walk>(args, context);
}

template <class T>
WalkArgs<T> walk_args(const SsdInputs& in, const SsdSteps& steps) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  WalkArgs<T> args{};
  args.dt = steps.dt.data<float>();
  args.lambda = steps.lambda.data<float>();
  args.B = s.B;
  args.tokens = s.T;
  args.H = s.H;
  args.G = s.G;
  args.chunks = chunk_count(s.T);
  args.P = static_cast<int>(s.P);
  args.N = static_cast<int>(s.N);
  args.P_padded = rounded_up(s.P, 16);
  return args;
}

template <class T>
SsdResult forward(const SsdInputs& in, const SsdOptions& options) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  const SsdSteps steps = ssd_steps_cuda(in, options);
  const SsdResult out{Tensor::empty(in.x.device(), in.x.dtype(), {s.B, s.T, s.H, s.P}),
                      Tensor::empty(in.x.device(), Dtype::f32, {s.B, s.H, s.P, s.N})};
  WalkArgs<T> args = walk_args<T>(in, steps);
  args.rows = token_rows<const T>(in.x, s.P);
  args.side = token_rows<const T>(in.B_t, s.N);
  args.readout = token_rows<const T>(in.C_t, s.N);
  args.y = token_rows<T>(out.y, s.P);
  args.D_skip = in.D_skip.defined() ? in.D_skip.data<float>() : nullptr;
  args.D_per_channel = in.D_skip.defined() && in.D_skip.rank() == 2;
  args.end = out.h_T.data<float>();
  run_walk<T, Walk::outputs>(args, in.h0, in.x.device());
  return out;
}

template <class T>
Tensor chunk_states(const SsdInputs& in, const SsdSteps& steps) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  WalkArgs<T> args = walk_args<T>(in, steps);
  const Tensor borders = Tensor::empty(in.x.device(), in.x.dtype(), {s.B, args.chunks, s.H, s.P, s.N});
  args.rows = token_rows<const T>(in.x, s.P);
  args.side = token_rows<const T>(in.B_t, s.N);
  args.borders = static_cast<T*>(borders.raw());
  run_walk<T, Walk::states>(args, in.h0, in.x.device());
  return borders;
}

template <class T>
Tensor chunk_state_gradients(const SsdInputs& in, const SsdSteps& steps, const Tensor& grad_y, const Tensor& grad_h_T,
                             const Tensor& grad_h0) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  WalkArgs<T> args = walk_args<T>(in, steps);
  const Tensor borders = Tensor::empty(in.x.device(), in.x.dtype(), {s.B, args.chunks, s.H, s.P, s.N});
  args.rows = token_rows<const T>(grad_y, s.P);
  args.side = token_rows<const T>(in.C_t, s.N);
  args.borders = static_cast<T*>(borders.raw());
  args.end = grad_h0.defined() ? grad_h0.data<float>() : nullptr;
  run_walk<T, Walk::gradients>(args, grad_h_T, in.x.device());
  return borders;
}

template <class T>
void steps(const SsdInputs& in, const SsdOptions& options, const SsdSteps& out) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  const int64_t chunks = chunk_count(s.T), warps = s.B * s.H * chunks;
  if (warps == 0) return;
  const StepArgs<T> args{token_rows<const T>(in.dt, s.H),
                         in.A_log.data<float>(),
                         in.dt_bias.data<float>(),
                         out.dt.data<float>(),
                         out.lambda.data<float>(),
                         s.B,
                         s.T,
                         s.H,
                         chunks,
                         static_cast<float>(options.dt_min),
                         static_cast<float>(options.dt_max)};
  launch(&ssd_steps_kernel<T>, "ssd_steps_kernel", dim3(static_cast<unsigned>((warps + 7) / 8)), dim3(256), 0,
         in.x.device().cuda_context().stream, args);
}

}  // namespace

void require_ssd_cuda_sizes(const SsdInputs& in) {
  const int64_t most = in.x.dtype() == Dtype::f32 ? kMaxStateDimF32 : kMaxStateDim;
  if (in.x.dim(3) <= kMaxHeadDim && in.B_t.dim(3) <= most) return;
  throw ValueError("ssd: a head's state is too large for the CUDA kernels",
                   {{"x", in.x.describe()},
                    {"B_t", in.B_t.describe()},
                    {"expected", "P <= 128, and N <= 256 in bf16, N <= 128 in f32"},
                    {"try", "more heads of a smaller P, or bf16"}});
}

SsdSteps ssd_steps_cuda(const SsdInputs& in, const SsdOptions& options) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  const Shape shape{s.B, s.H, chunk_count(s.T), int64_t{kChunk}};
  const SsdSteps out{Tensor::empty(in.x.device(), Dtype::f32, shape), Tensor::empty(in.x.device(), Dtype::f32, shape)};
  in.x.dtype() == Dtype::bf16 ? steps<Bf16>(in, options, out) : steps<float>(in, options, out);
  return out;
}

Tensor ssd_chunk_states_cuda(const SsdInputs& in, const SsdSteps& steps) {
  return in.x.dtype() == Dtype::bf16 ? chunk_states<Bf16>(in, steps) : chunk_states<float>(in, steps);
}

Tensor ssd_chunk_state_gradients_cuda(const SsdInputs& in, const SsdSteps& steps, const Tensor& grad_y, const Tensor& grad_h_T,
                                      const Tensor& grad_h0) {
  return in.x.dtype() == Dtype::bf16 ? chunk_state_gradients<Bf16>(in, steps, grad_y, grad_h_T, grad_h0)
                                     : chunk_state_gradients<float>(in, steps, grad_y, grad_h_T, grad_h0);
}

SsdResult ssd_fwd_cuda(const SsdInputs& in, const SsdOptions& options) {
  require_ssd_cuda_sizes(in);
  return in.x.dtype() == Dtype::bf16 ? forward<Bf16>(in, options) : forward<float>(in, options);
}

}  // namespace longhand
