// SSD on CUDA, the walks over the chunks with the products of warpgroups (sm_90a). What ssd_walk_kernel (ssd_cuda.cu) computes, with the
// same roundings.
//
// ssd_walk_warpgroups_kernel<outputs>: y and h_T, or states and gradients of states at chunk borders for backward
// moves   x in, y out, B_t and C_t once per block of heads; without outputs x in and P N a chunk and head out
// flops   per chunk of Q = 64 and head: C B' (Q Q N), its product with X (Q Q P), C S' and the state's update (Q P N each), times 2
// floor   B 32, T 2048, H 24, P 64, N 128, bf16, outputs: 440 MB / 4.0 TB/s = 0.11 ms on an H200; 1.4 M clocks of matrix products / 132
// split   one block per (row, up to three heads of a group, segment). A warpgroup carries the turned state of its head, P rows by N
// columns,
//         in f32 registers and feeds C S' from there. The warpgroups share the tiles of B_t and C_t, otherwise each goes at its own pace;
//         one more fetches the chunks to come
// needs   bf16, P <= 64, N <= 128, all widths, strides and addresses multiples of 16 bytes; sm_90a
// agrees  with the CPU reference to kSsdToleranceBf16 (ssd.h); bf16 rounds y, M, rho dt X and the state in C S'
// order   fixed, no atomics. How many segments there are depends on the GPU's size
#include "core/error.h"
#include "ops/common/warpgroup_instructions.cuh"
#include "ops/ssd/ssd_walk_cuda.cuh"

namespace longhand {
namespace {

constexpr int kMostTeams = 3, kStages = 3;
constexpr int kWorkerRegisters = 152, kFetcherRegisters = 56;

/// Shared memory in bytes: M of every team twice, or its border rows, the stages, then vectors (twice) and steps of every team. What is
/// there twice changes from chunk to chunk: with one barrier a chunk a warp may be a chunk ahead of another.
template <int kN, bool outputs>
struct Layout {
  static constexpr int side_bytes = kN / kPanelColumns * kPanelBytes, own_bytes = outputs ? 2 * kPanelBytes : side_bytes;
  static constexpr int vector_bytes = 2 * kChunk * 4 /* weight, from_begin */, steps_bytes = 2 * kChunk * 4;
  // A stage: side, readout, then the rows of every team; the steps of every team lie behind all stages.
  __host__ __device__ static constexpr int rows_place() { return (outputs ? 2 : 1) * side_bytes; }
  __host__ __device__ static constexpr int stage_bytes(int teams) { return rows_place() + teams * kPanelBytes; }
  __host__ __device__ static constexpr int stages_place(int teams) { return teams * own_bytes; }
  __host__ __device__ static constexpr int vectors_place(int teams) { return stages_place(teams) + kStages * stage_bytes(teams); }
  __host__ __device__ static constexpr int steps_place(int teams) { return vectors_place(teams) + 2 * teams * vector_bytes; }
  __host__ __device__ static constexpr int total_bytes(int teams) {
    return kPanelAlignment + steps_place(teams) + kStages * teams * steps_bytes;
  }
};

template <int kN, bool outputs>
__global__ void __launch_bounds__((kMostTeams + 1) * kWarpgroup, 1)
    ssd_walk_warpgroups_kernel(const __grid_constant__ SsdWalks<Bf16> walks) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  using L = Layout<kN, outputs>;
  __shared__ uint64_t full[kStages], empty[kStages];
  const SsdWalkArgs<Bf16>& a = walks.of[outputs ? 0 : blockIdx.x / walks.blocks];
  const int64_t block = outputs ? blockIdx.x : blockIdx.x % walks.blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int team = warp / 4, row_tile = warp % 4, thread = threadIdx.x % kWarpgroup, low = 16 * row_tile + g;  // rows low and low + 8
  const int teams = a.teams;
  const int64_t heads = a.H / a.G, head_blocks = (heads + teams - 1) / teams;
  const int64_t segment = block % a.segments, head_block = block / a.segments % head_blocks, row_group = block / a.segments / head_blocks,
                group = row_group % a.G, b = row_group / a.G;
  const int64_t h_first = group * heads + head_block * teams, h_last = (group + 1) * heads - 1;
  // Where heads are no multiple of the teams, the last teams do the last head once more and keep silent about it.
  const auto head_of = [&](int of_team) { return h_first + of_team <= h_last ? h_first + of_team : h_last; };
  const int64_t k_begin = segment * a.chunks_per_segment, k_limit = k_begin + a.chunks_per_segment,
                k_end = k_limit < a.chunks ? k_limit : a.chunks;
  const int count = static_cast<int>(k_end - k_begin);
  if (a.end_per_segment && segment == a.segments - 1) return;  // nobody starts from its end

  unsigned char* const memory = shared_memory() + (0u - shared_address(shared_memory())) % kPanelAlignment;
  const auto stage_of = [&](int n) { return memory + L::stages_place(teams) + n % kStages * L::stage_bytes(teams); };
  const auto dt_of = [&](int n, int of_team) {
    return reinterpret_cast<float*>(memory + L::steps_place(teams) + (n % kStages * teams + of_team) * L::steps_bytes);
  };
  const auto chunk_at = [&](int n) { return a.backwards ? a.chunks - 1 - (k_begin + n) : k_begin + n; };
  const auto tokens_in = [&](int64_t chunk) {
    const int64_t left = a.tokens - chunk * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  };

  if (threadIdx.x == 0)
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_create(&full[stage], kWarpgroup);  // threads that fetch
      barrier_create(&empty[stage], 4 * teams);  // warps that work
    }
  __syncthreads();

  if (team == teams) {
    give_up_registers<kFetcherRegisters>();
    for (int n = 0; n < count; ++n) {
      if (n >= kStages) barrier_wait(&empty[n % kStages], (n / kStages - 1) % 2);
      const int64_t chunk = chunk_at(n), t0 = chunk * kChunk;
      const int valid = tokens_in(chunk);
      unsigned char* const stage = stage_of(n);
      const auto load_side = [&](int place, const TokenRows<const Bf16>& from) {
        load_panels<kN, 32>(stage + place, from.data + b * from.batch + t0 * from.token + group * a.N, from.token, valid, a.N, lane);
      };
      if (row_tile == 0) load_side(0, a.side);
      if (outputs && row_tile == 1) load_side(L::side_bytes, a.readout);
      if (row_tile >= (outputs ? 2 : 1))
        for (int of_team = row_tile - (outputs ? 2 : 1); of_team < teams; of_team += outputs ? 2 : 3) {
          const int64_t h = head_of(of_team), steps = ((b * a.H + h) * a.chunks + chunk) * kChunk;
          load_panels<kChunk, 32>(stage + L::rows_place() + of_team * kPanelBytes,
                                  a.rows.data + b * a.rows.batch + t0 * a.rows.token + h * a.P, a.rows.token, valid, a.P, lane);
          copy_steps_async(dt_of(n, of_team), a.dt + steps, a.lambda + steps, lane, 32);
        }
      barrier_arrive_with_copies(&full[n % kStages]);
    }
    copies_arrived();
    return;
  }
  take_registers<kWorkerRegisters>();

  const bool speaks = h_first + team <= h_last;
  const int64_t h = head_of(team), row_head = b * a.H + h, state_size = static_cast<int64_t>(a.P) * a.N;
  unsigned char* const own = memory + team * L::own_bytes;  // M as [i][j], twice, or this warp's rows of a border
  float* const vectors = reinterpret_cast<float*>(memory + L::vectors_place(teams) + 2 * team * L::vector_bytes);
  const auto team_sync = [&] { named_barrier(1 + team, kWarpgroup); };

  float state[kN / 8][4];  // rows p = low and low + 8, columns 8j + 2q and the next
  clear(state);
  const auto each_state_pair = [&](auto&& visit) {  // visit(offset, values)
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int p = low + 8 * half, n = 8 * j + 2 * q;
        if (p < a.P && n < a.N) visit(p * a.N + n, state[j][2 * half], state[j][2 * half + 1]);
      }
  };
  if (a.start != nullptr) {
    const float* const from = a.start + (row_head * a.segments + segment) * state_size;
    each_state_pair([&](int at, float& first, float& second) {
      const float2 two = load_two(from + at);
      first = two.x;
      second = two.y;
    });
  }
  float D[2] = {0, 0};
  if (outputs) {
    if (a.D_skip != nullptr)
      for (int half = 0; half < 2; ++half)
        if (const int p = low + 8 * half; p < a.P) D[half] = a.D_skip[a.D_per_channel ? h * a.P + p : h];
    for (int unit = thread; unit < 2 * kPanelBytes / 16; unit += kWarpgroup)  // M stays zero above the diagonal tiles
      reinterpret_cast<uint4*>(own)[unit] = make_uint4(0, 0, 0, 0);
    team_sync();
  }

  for (int n = 0; n < count; ++n) {
    const int64_t chunk = chunk_at(n);
    unsigned char* const stage = stage_of(n);
    unsigned char* const rows = stage + L::rows_place() + team * kPanelBytes;
    const unsigned char* const readout = stage + L::side_bytes;
    const float *const dt = dt_of(n, team), *const lambda = dt + kChunk;
    if (!outputs && a.borders != nullptr) {  // this warp's 16 rows, through shared memory so that whole lines are written
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          store_two(panel_element(own, low + 8 * half, 8 * j + 2 * q), state[j][2 * half], state[j][2 * half + 1], true, true);
      __syncwarp();
      if (speaks) {
        Bf16* const to = a.borders + ((b * a.chunks + chunk) * a.H + h) * state_size;
        constexpr int units = kN / 8, rows_at_once = 32 / units;
        const int column = lane % units * 8;
#pragma unroll
        for (int pass = 0; pass < 16 / rows_at_once; ++pass)
          if (const int row = 16 * row_tile + lane / units + pass * rows_at_once; row < a.P && column < a.N)
            *reinterpret_cast<uint4*>(to + row * a.N + column) = *reinterpret_cast<const uint4*>(panel_element(own, row, column));
      }
      __syncwarp();
    }
    barrier_wait(&full[n % kStages], n / kStages % 2);
    publish_to_tensor_cores();
    unsigned char* const M = own + n % 2 * kPanelBytes;
    float* const weight = vectors + n % 2 * 2 * kChunk;  // of each token in the state's update
    float* const from_begin = weight + kChunk;           // e^{Lambda_i}
    const float last = lambda[kChunk - 1];
    if (thread < kChunk) {
      const float here = decay_of(lambda[thread]);
      from_begin[thread] = here;
      weight[thread] = a.backwards ? here : decay_of(last - lambda[thread]) * dt[thread];
    }

    float y[8][4];  // y' : rows p, columns i
    if constexpr (outputs) {
      {  // M = (C B') E dt
        float scores[8][4];
        products_begin();
#pragma unroll
        for (int k16 = 0; k16 < kN / 16; ++k16)
          multiply_panels<Summed::along_rows, Summed::along_rows>(scores, operand<Summed::along_rows>(readout, k16),
                                                                  operand<Summed::along_rows>(stage, k16), k16 > 0);
        products_close();
        const float lambda_i[2] = {lambda[low], lambda[low + 8]};
        products_done_but<0>();
        touch(scores);
#pragma unroll
        for (int j8 = 0; j8 < 8; ++j8) {
          if (j8 / 2 > row_tile) continue;
          const int j = 8 * j8 + 2 * q;
          const float2 lambda_j = load_two(lambda + j), dt_j = load_two(dt + j);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = low + 8 * half;
            const float first = scores[j8][2 * half] * decay_of(lambda_i[half] - lambda_j.x) * dt_j.x;
            const float second = scores[j8][2 * half + 1] * decay_of(lambda_i[half] - lambda_j.y) * dt_j.y;
            store_two(panel_element(M, i, j), j <= i ? first : 0.0f, j + 1 <= i ? second : 0.0f, true, true);
          }
        }
        publish_to_tensor_cores();
      }
      clear(y);
#pragma unroll
      for (int first = 0; first < kN / 16; first += 4) {  // 64 columns of the state, rounded, in registers at a time
        Left<Bf16> rounded[4];
#pragma unroll
        for (int n16 = 0; n16 < 4; ++n16) rounded[n16] = Left<Bf16>::from(state[2 * (first + n16)], state[2 * (first + n16) + 1]);
        products_begin();
#pragma unroll
        for (int n16 = 0; n16 < 4; ++n16)
          multiply_panels<Summed::along_rows>(y, rounded[n16], operand<Summed::along_rows>(readout, first + n16));
        products_close();
        products_done_but<0>();
        touch(y);
      }
    }
    team_sync();  // weight, from_begin and M are there
    Left<Bf16> x[4];
#pragma unroll
    for (int k16 = 0; k16 < 4; ++k16) x[k16] = left_from_panels_transposed(rows, 16 * k16, 16 * row_tile);
    if constexpr (outputs) {
#pragma unroll
      for (int i8 = 0; i8 < 8; ++i8) {
        const float2 scale = load_two(from_begin + 8 * i8 + 2 * q);
        y[i8][0] *= scale.x, y[i8][2] *= scale.x;
        y[i8][1] *= scale.y, y[i8][3] *= scale.y;
      }
      products_begin();
#pragma unroll
      for (int k16 = 0; k16 < 4; ++k16) multiply_panels<Summed::along_rows>(y, x[k16], operand<Summed::along_rows>(M, k16));
      products_close();
    }
    const float decay = decay_of(last);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) state[j][e] *= decay;
    if constexpr (outputs) {
      products_done_but<0>();
      touch(y);
#pragma unroll
      for (int k16 = 0; k16 < 4; ++k16) x[k16].add_to(y[2 * k16], y[2 * k16 + 1], D[0], D[1]);
    }
#pragma unroll
    for (int k16 = 0; k16 < 4; ++k16) x[k16].scale_sum_index(weight + 16 * k16);
    products_begin();
#pragma unroll
    for (int k16 = 0; k16 < 4; ++k16) multiply_panels<Summed::across_rows>(state, x[k16], operand<Summed::across_rows>(stage, k16));
    products_close();
    if constexpr (outputs) {  // y takes x's place in the tile: columns 16 * row_tile .. of it are this warp's alone
      __syncwarp();
#pragma unroll
      for (int i8 = 0; i8 < 8; ++i8)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(panel_element(rows, 8 * i8 + g, 16 * row_tile + 8 * half + 2 * q)) =
              transpose_matrix(pack(y[i8][2 * half], y[i8][2 * half + 1]));
      __syncwarp();
      if (speaks) {
        Bf16* const to = a.y.data + b * a.y.batch + chunk * kChunk * a.y.token + h * a.P;
        const int valid = tokens_in(chunk), p = 16 * row_tile + lane % 2 * 8;
#pragma unroll
        for (int pass = 0; pass < 4; ++pass) {
          const int i = 16 * pass + lane / 2;
          if (i < valid && p < a.P)
            *reinterpret_cast<uint4*>(to + i * a.y.token + p) = *reinterpret_cast<const uint4*>(panel_element(rows, i, p));
        }
      }
    }
    products_done_but<0>();
    touch(state);
    __syncwarp();
    if (lane == 0) barrier_arrive(&empty[n % kStages]);
  }
  if (speaks && a.end != nullptr && (a.end_per_segment || segment == a.segments - 1)) {
    float* const to = a.end + (a.end_per_segment ? row_head * a.segments + segment : row_head) * state_size;
    each_state_pair([&](int at, float first, float second) { store_two(to + at, first, second, true, true); });
  }
#endif
}

template <int kN, bool outputs>
void launch_walks(const SsdWalks<Bf16>& walks, const CudaContext& context) {
  const int teams = walks.of[0].teams;
  launch(&ssd_walk_warpgroups_kernel<kN, outputs>, "ssd_walk_warpgroups_kernel", dim3(static_cast<unsigned>(walks.blocks * walks.count)),
         dim3(static_cast<unsigned>((teams + 1) * kWarpgroup)), static_cast<size_t>(Layout<kN, outputs>::total_bytes(teams)), context,
         walks);
}

}  // namespace

int ssd_walk_warpgroup_teams(const SsdWalkArgs<Bf16>& a, bool outputs, const CudaContext& context) {
  const bool vectors = a.rows.vectors && a.side.vectors && (!outputs || (a.readout.vectors && a.y.vectors));
  if (!vectors || a.P > kChunk || a.N > 128) return 0;
  if (Layout<128, true>::total_bytes(kMostTeams) > context.shared_memory_per_block) return 0;
  if (!has_warpgroup_instructions(&ssd_walk_warpgroups_kernel<128, true>, context)) return 0;
  const auto work = [&](int64_t teams) { return (a.H / a.G + teams - 1) / teams * teams; };  // heads, those done twice included
  int best = 1;
  for (int teams = 2; teams <= kMostTeams; ++teams)
    if (work(teams) <= work(best) + teams - 2) best = teams;
  return best;
}

void launch_ssd_walks_warpgroups(const SsdWalks<Bf16>& walks, bool outputs, const CudaContext& context) {
  if (walks.of[0].N <= 64) outputs ? launch_walks<64, true>(walks, context) : launch_walks<64, false>(walks, context);
  else outputs ? launch_walks<128, true>(walks, context) : launch_walks<128, false>(walks, context);
}

}  // namespace longhand
