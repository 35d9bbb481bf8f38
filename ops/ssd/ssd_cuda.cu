// SSD on CUDA: the steps, and the walks over the chunks with the P x N state in registers.
//
// ssd_steps_kernel
// moves   dt in once, dt and lambda per token and head out; negligible beside x
// split   one warp per (row, chunk, head), two tokens per lane
// order   a fixed shuffle scan
//
// ssd_walk_kernel: y and h_T, or states and gradients of states at chunk borders for backward
// moves   x in, y out, B_t and C_t once per block of heads (from L2 but for the first): near the ideal pass of 2e + 2GN + H elements a
// token flops   per chunk of Q = 64: C B' (Q Q N / 2) once per block; per head its product with X (Q Q P / 2), C S' and the state's update
//         (Q P N each), times 2: about 48 k a token and head
// floor   B 32, T 2048, H 24, P 64, N 128, bf16: 440 MB / 3.0 TB/s = 0.15 ms on an H100 SXM
// split   one block per (row, some heads of a group, segment). A team of one warp per 16 rows of P carries the state of its head in f32
//         registers and feeds C S' from there; the teams of a block share B_t, C_t and the work of C B'. Where that leaves much of the
//         GPU idle, the sequence is cut into segments: their end states from a zero state first (the same walk without outputs), a scan
//         over segments, then the outputs of all segments at once. On sm_90a, in bf16 and for P <= 64 and N <= 128,
//         ssd_walk_warpgroups_cuda.cu takes the walks
// needs   P <= 128, N <= 256 (f32: 128); P is padded to 64 or 128, N to 64, 128 or 256, with zeros. 16-byte copies where base,
//         strides and widths are multiples of 16 bytes, single elements otherwise
// agrees  with the CPU reference to kSsdToleranceF32, kSsdToleranceBf16 (ssd.h); bf16 rounds y, M, rho dt X and the state in C S'
// order   fixed, no atomics. How many segments there are depends on the GPU's size
#include "core/error.h"
#include "ops/common/tile_product.cuh"
#include "ops/ssd/ssd_walk_cuda.cuh"

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
  float* out_dt;
  LogDecay<T>* out_lambda;
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
  LogDecay<T> before = 0;
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
    LogDecay<T> sum = step < kLeastLog2Decay ? kLeastLog2Decay : step;
    for (int distance = 1; distance < 32; distance *= 2) {
      const LogDecay<T> other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    const int64_t at = ((b * a.H + h) * a.chunks + c) * kChunk + i;
    a.out_dt[at] = dt;
    a.out_lambda[at] = before + sum;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
}

// --- walk -----------------------------------------------------------------------------------------------------

/// Threads of a block at most: as many as the registers of an instance allow. A team has one warp for 16 rows of P.
template <class T, int kN>
constexpr int kWalkThreads = sizeof(T) == 2 && kN <= 128 ? 384 : 256;

template <class T, int kN, int kP, bool outputs>
struct WalkLayout {  // shared memory in bytes: vectors, and M or border rows, of every team, then the stages
  static constexpr int size = static_cast<int>(sizeof(T));
  static constexpr int side_bytes = kChunk * tile_stride<T>(kN) * size, rows_bytes = kChunk * tile_stride<T>(kP) * size;
  static constexpr int vector_bytes = kChunk * 4;
  static constexpr int steps_bytes = vector_bytes + kChunk * static_cast<int>(sizeof(LogDecay<T>));  // dt, lambda
  static constexpr int team_bytes = 2 * vector_bytes + (outputs ? kChunk * tile_stride<T>(kChunk) : kP * tile_stride<T>(kN)) * size;
  static constexpr int stage_bytes(int teams) { return teams * (steps_bytes + rows_bytes) + (outputs ? 2 : 1) * side_bytes; }
  static constexpr int total_bytes(int teams, int stages) { return teams * team_bytes + stages * stage_bytes(teams); }
};

/// outputs: forward, y and h_T; else states alone, kept at borders or at the end
template <class T, int kN, int kP, bool outputs>
__global__ void __launch_bounds__((kWalkThreads<T, kN>)) ssd_walk_kernel(const __grid_constant__ SsdWalks<T> walks) {
  const SsdWalkArgs<T>& a = walks.of[outputs ? 0 : blockIdx.x / walks.blocks];
  const int64_t block = outputs ? blockIdx.x : blockIdx.x % walks.blocks;
  constexpr int side_stride = tile_stride<T>(kN), rows_stride = tile_stride<T>(kP), mixing_stride = tile_stride<T>(kChunk);
  constexpr int team_warps = kP / 16;
  using Layout = WalkLayout<T, kN, kP, outputs>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, g = lane / 4, q = lane % 4;
  const int team = warp / team_warps, team_warp = warp % team_warps, team_thread = threadIdx.x % (32 * team_warps);
  const int64_t heads = a.H / a.G, head_blocks = (heads + a.teams - 1) / a.teams;
  const int64_t segment = block % a.segments, head_block = block / a.segments % head_blocks, row_group = block / a.segments / head_blocks,
                group = row_group % a.G, b = row_group / a.G;
  const int64_t h_first = group * heads + head_block * a.teams, h_last = (group + 1) * heads - 1;
  // Where heads are no multiple of the teams, the last teams do the last head once more and keep silent about it.
  const bool speaks = h_first + team <= h_last;
  const int64_t h = speaks ? h_first + team : h_last, row_head = b * a.H + h;
  const int64_t k_begin = segment * a.chunks_per_segment, k_limit = k_begin + a.chunks_per_segment,
                k_end = k_limit < a.chunks ? k_limit : a.chunks;
  if (a.end_per_segment && segment == a.segments - 1) return;  // nobody starts from its end

  unsigned char* team_memory = shared_memory() + team * Layout::team_bytes;
  float* weight = reinterpret_cast<float*>(team_memory);  // of each token in the state's update
  float* from_begin = weight + kChunk;                    // e^{Lambda_i}
  T* mixing = reinterpret_cast<T*>(from_begin + kChunk);
  T* border = mixing + 16 * team_warp * side_stride;
  unsigned char* stages = shared_memory() + a.teams * Layout::team_bytes;
  const int stage_bytes = Layout::stage_bytes(a.teams);
  // A stage: dt and lambda of every team, the rows of every team, side, readout.
  auto stage_of = [&](int64_t k) { return stages + k % a.stages * stage_bytes; };
  auto dt_in = [&](unsigned char* stage, int of_team) { return reinterpret_cast<float*>(stage + of_team * Layout::steps_bytes); };
  auto rows_in = [&](unsigned char* stage) {
    return reinterpret_cast<T*>(stage + a.teams * Layout::steps_bytes + team * Layout::rows_bytes);
  };
  auto side_in = [&](unsigned char* stage) { return reinterpret_cast<T*>(stage + a.teams * (Layout::steps_bytes + Layout::rows_bytes)); };
  auto chunk_at = [&](int64_t k) { return a.backwards ? a.chunks - 1 - k : k; };
  auto tokens_in = [&](int64_t chunk) {
    const int64_t left = a.tokens - chunk * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  };
  auto fetch = [&](int64_t k) {  // the tiles of the walk's chunk k
    const int64_t chunk = chunk_at(k), t0 = chunk * kChunk, steps = (row_head * a.chunks + chunk) * kChunk;
    const int valid = tokens_in(chunk), thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    unsigned char* stage = stage_of(k);
    T* side = side_in(stage);
    load_tile<kN>(side, kChunk, a.side.data + b * a.side.batch + t0 * a.side.token + group * a.N, a.side.token, valid, a.N, a.side.vectors,
                  thread, threads);
    if constexpr (outputs)
      load_tile<kN>(side + kChunk * side_stride, kChunk, a.readout.data + b * a.readout.batch + t0 * a.readout.token + group * a.N,
                    a.readout.token, valid, a.N, a.readout.vectors, thread, threads);
    copy_steps_async(dt_in(stage, team), a.dt + steps, a.lambda + steps, team_thread, 32 * team_warps);
    load_tile<kP>(rows_in(stage), kChunk, a.rows.data + b * a.rows.batch + t0 * a.rows.token + h * a.P, a.rows.token, valid, a.P,
                  a.rows.vectors, team_thread, 32 * team_warps);
  };

  // The state: rows p = 16 * team_warp + g and + 8, columns 8j + 2q and the next.
  float state[kN / 8][4];
  clear(state);
  const int p_low = 16 * team_warp + g;
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
  if (a.start != nullptr) {
    const float* from = a.start + (row_head * a.segments + segment) * state_size;
    each_state_pair([&](int p, int n, float& first, float& second) {
      first = from[p * a.N + n];
      if (n + 1 < a.N) second = from[p * a.N + n + 1];
    });
  }
  float D[2] = {0, 0};
  if (outputs && a.D_skip != nullptr)
    for (int half = 0; half < 2; ++half)
      if (const int p = p_low + 8 * half; p < a.P) D[half] = a.D_skip[a.D_per_channel ? h * a.P + p : h];
  const int rows_left = a.P - 16 * team_warp;

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
    unsigned char* stage = stage_of(k);
    const float* dt = dt_in(stage, team);
    const LogDecay<T>* lambda = reinterpret_cast<const LogDecay<T>*>(dt + kChunk);
    T* rows = rows_in(stage);
    const T* side = side_in(stage);
    const T* readout = side + kChunk * side_stride;
    const LogDecay<T> last = lambda[kChunk - 1];

    if (team_thread < kChunk) {
      const int i = team_thread;
      const float here = decay_of(lambda[i]);
      from_begin[i] = here;
      weight[i] = a.backwards ? here : decay_of(last - lambda[i]) * dt[i];
    }
    if constexpr (outputs) {
      // C B' once for all teams, a 16 x 16 tile a warp, nothing above the diagonal tiles; then M = (C B') E dt of every team
      for (int tile = warp; tile < 10; tile += warps) {
        const int i16 = tile < 1 ? 0 : tile < 3 ? 1 : tile < 6 ? 2 : 3, j16 = tile - i16 * (i16 + 1) / 2;
        float scores[2][4];
        clear(scores);
#pragma unroll(sizeof(T) == 2 ? 8 : 1)
        for (int n = 0; n < kN; n += 16)
          multiply<Stored::transposed, 1>(scores, Left<T>::template load<Stored::as_is>(readout + 16 * i16 * side_stride + n, side_stride),
                                          side + 16 * j16 * side_stride + n, side_stride);
        const int i_low = 16 * i16 + g, j_low = 16 * j16 + 2 * q;
        for (int each = 0; each < a.teams; ++each) {
          const float* each_dt = dt_in(stage, each);
          const LogDecay<T>* each_lambda = reinterpret_cast<const LogDecay<T>*>(each_dt + kChunk);
          T* to =
              reinterpret_cast<T*>(shared_memory() + each * Layout::team_bytes + 2 * Layout::vector_bytes) + i_low * mixing_stride + j_low;
          const LogDecay<T> lambda_i[2] = {each_lambda[i_low], each_lambda[i_low + 8]};
#pragma unroll
          for (int j8 = 0; j8 < 2; ++j8) {
            const int j = j_low + 8 * j8;
            const LogDecay<T> lambda_j[2] = {each_lambda[j], each_lambda[j + 1]};
            const float2 dt_j = load_two(each_dt + j);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int i = i_low + 8 * half;
              const float first = scores[j8][2 * half] * decay_of(lambda_i[half] - lambda_j[0]) * dt_j.x;
              const float second = scores[j8][2 * half + 1] * decay_of(lambda_i[half] - lambda_j[1]) * dt_j.y;
              store_two(to + 8 * half * mixing_stride + 8 * j8, j <= i ? first : 0.0f, j + 1 <= i ? second : 0.0f, true, true);
            }
          }
        }
      }
    } else if (a.borders != nullptr) {  // this warp's 16 rows, through shared memory so that whole lines are written
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          store_two(border + (g + 8 * half) * side_stride + 8 * j + 2 * q, state[j][2 * half], state[j][2 * half + 1], true, true);
      __syncwarp();
      if (speaks)
        store_part<kN>(a.borders + ((b * a.chunks + chunk) * a.H + h) * state_size + 16 * team_warp * a.N, a.N, border, side_stride,
                       rows_left, 16, a.N, a.N * static_cast<int>(sizeof(T)) % 16 == 0);
      __syncwarp();
    }
    __syncthreads();

    float y[kChunk / 8][4];  // y' : rows p, columns i
    if constexpr (outputs) {
      clear(y);
#pragma unroll
      for (int n = 0; n < kN / 16; ++n)
        multiply<Stored::transposed, kChunk / 16>(y, Left<T>::from(state[2 * n], state[2 * n + 1]), readout + 16 * n, side_stride);
#pragma unroll
      for (int i8 = 0; i8 < kChunk / 8; ++i8) {
        const float2 scale = load_two(from_begin + 8 * i8 + 2 * q);
        y[i8][0] *= scale.x, y[i8][2] *= scale.x;
        y[i8][1] *= scale.y, y[i8][3] *= scale.y;
      }
    }
    const float decay = decay_of(last);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) state[j][e] *= decay;
#pragma unroll(sizeof(T) == 2 ? 4 : 1)
    for (int k16 = 0; k16 < kChunk / 16; ++k16) {
      Left<T> left = Left<T>::template load<Stored::transposed>(rows + 16 * k16 * rows_stride + 16 * team_warp, rows_stride);
      if constexpr (outputs) {
        multiply<Stored::transposed, kChunk / 16>(y, left, mixing + 16 * k16, mixing_stride, k16);
#pragma unroll
        for (int of = 0; of < kChunk / 16; ++of)  // + D x; k16 is known only where the loop is unrolled
          if (of == k16) left.add_to(y[2 * of], y[2 * of + 1], D[0], D[1]);
      }
      left.scale_sum_index(weight + 16 * k16);
      multiply<Stored::as_is, kN / 16>(state, left, side + 16 * k16 * side_stride, side_stride);
    }
    if constexpr (outputs) {  // y takes x's place in the tile: columns 16 * team_warp .. of it are this warp's alone
      T* own = rows + 16 * team_warp;
      __syncwarp();
#pragma unroll
      for (int i8 = 0; i8 < kChunk / 8; ++i8) store_transposed(own + 8 * i8 * rows_stride, rows_stride, y[i8]);
      __syncwarp();
      if (speaks)
        store_part<16>(a.y.data + b * a.y.batch + chunk * kChunk * a.y.token + h * a.P + 16 * team_warp, a.y.token, own, rows_stride,
                       tokens_in(chunk), kChunk, rows_left, a.y.vectors);
    }
  }
  if (speaks && a.end != nullptr && (a.end_per_segment || segment == a.segments - 1)) {
    const bool even = a.N % 2 == 0;
    float* to = a.end + (a.end_per_segment ? row_head * a.segments + segment : row_head) * state_size;
    each_state_pair([&](int p, int n, float first, float second) { store_two(to + p * a.N + n, first, second, n + 1 < a.N, even); });
  }
}

// --- scan over segments ---------------------------------------------------------------------------------------

template <class L>
struct SegmentScanArgs {
  const L* lambda;     // [B, H, chunks, 64]
  const float* start;  // [B, H, P, N] or null
  float* states;       // [B, H, segments, P, N]: ends from a zero state in, starts out
  int64_t chunks, segments, chunks_per_segment, state_size;
  bool backwards;
};

// One block for 1024 elements of a state, four neighbours a thread; the decays of all segments first, one segment a warp at a time.
constexpr int kScanThreads = 256, kScanElements = 4 * kScanThreads, kSegmentsAhead = 8;
template <class L>
__global__ void ssd_segment_scan_kernel(const SegmentScanArgs<L> a) {
  float* decays = reinterpret_cast<float*>(shared_memory());  // [segments]
  const int64_t row_head = blockIdx.x, last = a.segments - 1;
  const int lane = threadIdx.x % 32;
  for (int64_t segment = threadIdx.x / 32; segment < last; segment += kScanThreads / 32) {
    L log2_decay = 0;
    for (int64_t k = segment * a.chunks_per_segment + lane; k < (segment + 1) * a.chunks_per_segment; k += 32)
      log2_decay += a.lambda[(row_head * a.chunks + (a.backwards ? a.chunks - 1 - k : k)) * kChunk + kChunk - 1];
    for (int distance = 16; distance > 0; distance /= 2) log2_decay += __shfl_xor_sync(0xffffffffu, log2_decay, distance);
    if (lane == 0) decays[segment] = decay_of(log2_decay);
  }
  __syncthreads();
  const int64_t element = static_cast<int64_t>(blockIdx.y) * kScanElements + 4 * threadIdx.x;
  const int count = static_cast<int>(element + 4 <= a.state_size ? 4 : element < a.state_size ? a.state_size - element : 0);
  const bool whole = count == 4 && a.state_size % 4 == 0;
  auto load = [&](const float* from) {
    if (whole) return *reinterpret_cast<const float4*>(from);
    return make_float4(count > 0 ? from[0] : 0, count > 1 ? from[1] : 0, count > 2 ? from[2] : 0, count > 3 ? from[3] : 0);
  };
  auto store = [&](float* to, const float4& v) {
    if (whole) *reinterpret_cast<float4*>(to) = v;
    else
      for (int e = 0; e < count; ++e) to[e] = e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w;
  };
  float* places = a.states + row_head * a.segments * a.state_size + element;
  float4 current = make_float4(0, 0, 0, 0);
  if (a.start != nullptr) current = load(a.start + row_head * a.state_size + element);
  for (int64_t begin = 0; begin < last; begin += kSegmentsAhead) {
    float4 own[kSegmentsAhead];  // all on their way before the first is needed
#pragma unroll
    for (int s = 0; s < kSegmentsAhead; ++s)
      if (begin + s < last) own[s] = load(places + (begin + s) * a.state_size);
#pragma unroll
    for (int s = 0; s < kSegmentsAhead; ++s) {
      if (begin + s >= last) break;
      store(places + (begin + s) * a.state_size, current);
      const float decay = decays[begin + s];
      current.x = decay * current.x + own[s].x;
      current.y = decay * current.y + own[s].y;
      current.z = decay * current.z + own[s].z;
      current.w = decay * current.w + own[s].w;
    }
  }
  store(places + last * a.state_size, current);
}

// --- launchers ------------------------------------------------------------------------------------------------

/// How a walk is spread over the GPU: heads that a block takes side by side, chunks whose tiles it holds, segments of the sequence.
struct WalkShape {
  int teams = 1, stages = 1, shared_bytes = 0;
  int64_t blocks = 0;       // of one segment
  bool warpgroups = false;  // the kernel of ssd_walk_warpgroups_cuda.cu
};

template <class T, int kN, int kP, bool outputs>
WalkShape walk_shape(const SsdWalkArgs<T>& args, const CudaContext& context) {
  const int64_t heads = args.H / args.G, shared_limit = context.shared_memory_per_block;
  WalkShape shape;
  if constexpr (sizeof(T) == 2 && kN <= 128 && kP == 64)
    if (const int teams = ssd_walk_warpgroup_teams(args, outputs, context); teams > 0) {
      shape.teams = teams;
      shape.blocks = args.B * args.G * ((heads + teams - 1) / teams);
      shape.warpgroups = true;
      return shape;
    }
  auto fits = [&](int teams, int stages) {
    shape.teams = teams;
    shape.stages = stages;
    shape.shared_bytes = WalkLayout<T, kN, kP, outputs>::total_bytes(teams, stages);
    shape.blocks = args.B * args.G * ((heads + teams - 1) / teams);
    return teams <= heads && shape.shared_bytes <= shared_limit;
  };
  const int most = kWalkThreads<T, kN> / (2 * kP);
  for (int stages = 2; stages >= 1; --stages)
    for (int teams = most; teams >= 1; --teams)
      if (fits(teams, stages)) return shape;
  return shape;  // too large: the launch says so
}

/// Segments that make the walk shortest: waves of blocks times chunks of each; the ends of segments, where there are any, cost a pass
/// of about `ends_cost` of the walk itself. A segment of fewer than 8 chunks costs more than it brings.
int64_t best_segments(int64_t blocks, int64_t chunks, int sm_count, double ends_cost) {
  int64_t best = 1;
  double least = 0;
  for (int64_t segments = 1; segments == 1 || segments <= chunks / 8; ++segments) {
    const int64_t waves = (blocks * segments + sm_count - 1) / sm_count;
    const double cost = static_cast<double>(waves * ((chunks + segments - 1) / segments)) * (segments > 1 ? 1 + ends_cost : 1);
    if (segments == 1 || cost < 0.97 * least) {
      best = segments;
      least = cost;
    }
    if (blocks * segments > 8 * sm_count) break;
  }
  return best;
}

template <class T, int kN, int kP, bool outputs>
void launch_walks(SsdWalks<T> walks, const CudaContext& context) {
  const WalkShape shape = walk_shape<T, kN, kP, outputs>(walks.of[0], context);
  for (SsdWalkArgs<T>& args : walks.of) {
    args.teams = shape.teams;
    args.stages = shape.stages;
  }
  walks.blocks = shape.blocks * walks.of[0].segments;
  if constexpr (sizeof(T) == 2)
    if (shape.warpgroups) return launch_ssd_walks_warpgroups(walks, outputs, context);
  launch(&ssd_walk_kernel<T, kN, kP, outputs>, "ssd_walk_kernel", dim3(static_cast<unsigned>(walks.blocks * walks.count)),
         dim3(static_cast<unsigned>(2 * kP * shape.teams)), static_cast<size_t>(shape.shared_bytes), context, walks);
}

/// Runs walks from their starts [B, H, P, N] (null: zeros), in segments when rows and heads alone leave much of the GPU idle.
template <class T, int kN, int kP, bool outputs>
void run_walks(SsdWalks<T> walks, const Device& device) {
  const CudaContext& context = device.cuda_context();
  SsdWalkArgs<T>& first = walks.of[0];
  const int64_t heads = first.B * first.H, state_size = static_cast<int64_t>(first.P) * first.N;
  if (heads == 0) return;
  const WalkShape shape = walk_shape<T, kN, kP, outputs>(first, context);
  int64_t segments = best_segments(shape.blocks * walks.count, first.chunks, context.sm_count, outputs ? 0.4 : 0.8);
  const int64_t chunks_per_segment = (first.chunks + segments - 1) / segments;
  if (chunks_per_segment > 0) segments = (first.chunks + chunks_per_segment - 1) / chunks_per_segment;
  for (SsdWalkArgs<T>& args : walks.of) {
    args.segments = segments;
    args.chunks_per_segment = chunks_per_segment;
    args.end_per_segment = false;
  }

  Tensor starts;
  if (segments > 1) {
    const Shape shape_of_starts{walks.count, first.B, first.H, segments, int64_t{first.P}, int64_t{first.N}};
    starts = Tensor::empty(device, Dtype::f32, shape_of_starts);
    SsdWalks<T> ends = walks;
    for (int64_t w = 0; w < walks.count; ++w) {
      ends.of[w].start = nullptr;
      ends.of[w].borders = nullptr;
      ends.of[w].end = starts.data<float>() + w * heads * segments * state_size;
      ends.of[w].end_per_segment = true;
    }
    launch_walks<T, kN, kP, false>(ends, context);
    for (int64_t w = 0; w < walks.count; ++w) {
      const SegmentScanArgs<LogDecay<T>> scan{first.lambda, walks.of[w].start,  ends.of[w].end, first.chunks,
                                              segments,     chunks_per_segment, state_size,     walks.of[w].backwards};
      const dim3 grid(static_cast<unsigned>(heads), static_cast<unsigned>((state_size + kScanElements - 1) / kScanElements));
      launch(&ssd_segment_scan_kernel<LogDecay<T>>, "ssd_segment_scan_kernel", grid, dim3(kScanThreads),
             static_cast<size_t>(segments) * sizeof(float), context, scan);
      walks.of[w].start = ends.of[w].end;
    }
  }
  launch_walks<T, kN, kP, outputs>(walks, context);
}

template <bool outputs, class T>
void run_walks(const SsdWalks<T>& walks, const Device& device) {
  const int kN = padded_state_dim(walks.of[0].N);
  if constexpr (sizeof(T) == 2) {
    if (kN == 256) return run_walks<T, 256, 128, outputs>(walks, device);
    if (walks.of[0].P <= 64) return kN == 64 ? run_walks<T, 64, 64, outputs>(walks, device) : run_walks<T, 128, 64, outputs>(walks, device);
  }
  kN == 64 ? run_walks<T, 64, 128, outputs>(walks, device) : run_walks<T, 128, 128, outputs>(walks, device);
}

const float* floats_or_null(const Tensor& t) {
  return t.defined() ? t.data<float>() : nullptr;
}

template <class T>
SsdWalkArgs<T> walk_args(const SsdInputs& in, const SsdSteps& steps) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  SsdWalkArgs<T> args{};
  args.dt = steps.dt.data<float>();
  args.lambda = steps.lambda.data<LogDecay<T>>();
  args.B = s.B;
  args.tokens = s.T;
  args.H = s.H;
  args.G = s.G;
  args.chunks = chunk_count(s.T);
  args.P = static_cast<int>(s.P);
  args.N = static_cast<int>(s.N);
  return args;
}

template <class T>
SsdResult forward(const SsdInputs& in, const SsdOptions& options) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  const SsdSteps steps = ssd_steps_cuda(in, options);
  const SsdResult out{Tensor::empty(in.x.device(), in.x.dtype(), {s.B, s.T, s.H, s.P}),
                      Tensor::empty(in.x.device(), Dtype::f32, {s.B, s.H, s.P, s.N})};
  SsdWalkArgs<T> args = walk_args<T>(in, steps);
  args.rows = token_rows<const T>(in.x, s.P);
  args.side = token_rows<const T>(in.B_t, s.N);
  args.readout = token_rows<const T>(in.C_t, s.N);
  args.y = token_rows<T>(out.y, s.P);
  args.D_skip = in.D_skip.defined() ? in.D_skip.data<float>() : nullptr;
  args.D_per_channel = in.D_skip.defined() && in.D_skip.rank() == 2;
  args.end = out.h_T.data<float>();
  args.start = floats_or_null(in.h0);
  run_walks<true>(SsdWalks<T>{{args, args}, 1, 0}, in.x.device());
  return out;
}

template <class T>
SsdBorders borders(const SsdInputs& in, const SsdSteps& steps, const Tensor& grad_y, const Tensor& grad_h_T, const Tensor& grad_h0) {
  const SsdSizes s = ssd_sizes(in.x, in.B_t);
  SsdWalkArgs<T> states = walk_args<T>(in, steps), gradients = states;
  const Shape shape{s.B, states.chunks, s.H, s.P, s.N};
  const SsdBorders out{Tensor::empty(in.x.device(), in.x.dtype(), shape), Tensor::empty(in.x.device(), in.x.dtype(), shape)};
  states.rows = token_rows<const T>(in.x, s.P);
  states.side = token_rows<const T>(in.B_t, s.N);
  states.borders = static_cast<T*>(out.states.raw());
  states.start = floats_or_null(in.h0);
  gradients.backwards = true;
  gradients.rows = token_rows<const T>(grad_y, s.P);
  gradients.side = token_rows<const T>(in.C_t, s.N);
  gradients.borders = static_cast<T*>(out.state_grads.raw());
  gradients.start = floats_or_null(grad_h_T);
  gradients.end = grad_h0.defined() ? grad_h0.data<float>() : nullptr;
  run_walks<false>(SsdWalks<T>{{states, gradients}, 2, 0}, in.x.device());
  return out;
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
                         out.lambda.data<LogDecay<T>>(),
                         s.B,
                         s.T,
                         s.H,
                         chunks,
                         static_cast<float>(options.dt_min),
                         static_cast<float>(options.dt_max)};
  launch(&ssd_steps_kernel<T>, "ssd_steps_kernel", dim3(static_cast<unsigned>((warps + 7) / 8)), dim3(256), 0, in.x.device().cuda_context(),
         args);
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
  const Dtype log_decay = in.x.dtype() == Dtype::bf16 ? Dtype::f32 : Dtype::f64;
  const SsdSteps out{Tensor::empty(in.x.device(), Dtype::f32, shape), Tensor::empty(in.x.device(), log_decay, shape)};
  in.x.dtype() == Dtype::bf16 ? steps<Bf16>(in, options, out) : steps<float>(in, options, out);
  return out;
}

SsdBorders ssd_borders_cuda(const SsdInputs& in, const SsdSteps& steps, const Tensor& grad_y, const Tensor& grad_h_T,
                            const Tensor& grad_h0) {
  return in.x.dtype() == Dtype::bf16 ? borders<Bf16>(in, steps, grad_y, grad_h_T, grad_h0)
                                     : borders<float>(in, steps, grad_y, grad_h_T, grad_h0);
}

SsdResult ssd_fwd_cuda(const SsdInputs& in, const SsdOptions& options) {
  require_ssd_cuda_sizes(in);
  return in.x.dtype() == Dtype::bf16 ? forward<Bf16>(in, options) : forward<float>(in, options);
}

}  // namespace longhand
