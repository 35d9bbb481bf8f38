// cross_entropy on a GPU with products of warpgroups (sm_90a): the product that makes the logits of a chunk writes exponentials, and no
// pass over the logits is left. Everything is relative to the target's logit t, which one dot product a row gives beforehand:
//   e[v] = exp(logit[v] - t), without the target        others = sum_v e[v]        loss = log(1 + others)
//   grad_logits[v] = s * (e[v] - [v = target] others)                              s = factor * mask / (1 + others)
// so that the row's factor s, known only when the row is whole, need not reach its elements:
//   grad_x = s * (e W)                  grad_weight = e' (s x)                     with e[target] = -others
// A row whose target is less likely than e^-62 leaves the range in which e is safe, and is formed anew relative to its largest logit.
//
// cross_entropy_exponentials_kernel
// moves   x and weight in (weight once a chunk from memory, both many times from L2), e out once: R*V * 2 bytes; without a gradient nothing
//         is written but a sum per row and 256 columns
// flops   2 * R*d*V; one ex2 a logit: a sixth of the time of 768 features' products, partly beside those of the other warpgroup
// floor   32768 x 768 -> 50280: 2.5 TFLOP / 0.99 PFLOP/s = 2.6 ms on an H100 SXM
// split   blocks stay, one an SM, and take tiles of 128 rows and 256 columns; tiles of the same columns follow one another. One thread
//         orders boxes of 64 features four ahead, two warpgroups multiply 64 rows each; results leave 16 rows and 64 columns at a time
// needs   bf16, d a multiple of 8, rows that begin at multiples of 16 bytes; sm_90a; forms_exponentials_cuda() tells
//
// cross_entropy_finish_rows_kernel
// moves   the sums in, x in, s x out, 2 * R*d * 2 bytes: 0.1 ms for the shape above
// split   a block for 32 rows; where some have to be formed anew, their logits are, twice, by the whole block: the weight passes through
//         one SM
//
// agrees  with float64: kCrossEntropyToleranceExponentials, losses to kCrossEntropyToleranceF32; ex2.approx is good to 2^-22 relative
// order   fixed: a lane's columns, its quad, tiles sixteen apart, those sixteen; no atomics
#include <algorithm>

#include "core/error.h"
#include "core/show_as_written_cuda.h"
#include "ops/common/box_copies.cuh"
#include "ops/common/cuda_math.cuh"
#include "ops/common/launch.cuh"
#include "ops/cross_entropy/bad_target.cuh"
#include "ops/cross_entropy/cross_entropy_kernels.h"

namespace longhand {
namespace {

constexpr int kTileRows = 128, kTileColumns = 256, kTileFeatures = kPanelColumns;
constexpr int kStages = 4, kThreads = 3 * kWarpgroup, kWorkerWarps = 8;
constexpr int kFetcherRegisters = 40, kWorkerRegisters = 232;
constexpr int kRowsBytes = kTileRows * kPanelRow, kColumnsBytes = kTileColumns * kPanelRow, kStageBytes = kRowsBytes + kColumnsBytes;
constexpr int kPieceBytes = 16 * kPanelRow;  // 16 rows of 64 results on their way out, of one warp
constexpr int kPiecesPlace = kStages * kStageBytes, kBarriersPlace = kPiecesPlace + kWorkerWarps * 2 * kPieceBytes;
constexpr int kSharedBytes = kPanelAlignment + kBarriersPlace + 2 * kStages * 8;

constexpr int kFinishThreads = 512, kFinishWarps = kFinishThreads / kWarp, kFinishRows = 32;
constexpr float kMostOthers = 0x1p90f;  // s x keeps its digits in bf16 where factor * mask * x is above 2^-36; e is far from infinite

struct ExponentialArgs {
  CUtensorMap x, weight, exponentials;
  const float* tops;  // log2(e) times the target's logit
  const int32_t* targets;
  float* sums;  // [column tiles, rows]
  int rows, vocab, features, row_tiles, column_tiles;
};

/// log2(e) times a logit, by a warp: the product of a row of x and one of the weight.
__device__ __forceinline__ float logit2(const Bf16* x, const Bf16* weight, int width) {
  float sum = 0;
  for (int i = 8 * (static_cast<int>(threadIdx.x) % kWarp); i < width; i += 8 * kWarp) {
    const Pack<Bf16, 8> left = load_pack<8>(x + i), right = load_pack<8>(weight + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(to_f32(left.at[j]), to_f32(right.at[j]), sum);
  }
  return kLog2e * warp_sum(sum);
}

/// log2(e) times the target's logit, a warp a row; class 0 stands for a target that does not exist.
__global__ void __launch_bounds__(kFinishThreads)
    cross_entropy_target_logits_warp_per_row_kernel(const Bf16* x, int64_t x_stride, const Bf16* weight, int64_t weight_stride,
                                                    const int32_t* targets, float* tops, int64_t rows, int vocab, int width) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int target = targets[row];
  const float logit = logit2(x + row * x_stride, weight + (target >= 0 && target < vocab ? target : 0) * weight_stride, width);
  if (threadIdx.x % kWarp == 0) tops[row] = logit;
}

/// Logits of a tile that count for nothing: those of the targets (columns of the tile) and behind the vocabulary.
__device__ __forceinline__ void leave_out(float (&acc)[kTileColumns / 8][4], int columns, const int (&target)[2]) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
  if (columns < kTileColumns) {
#pragma unroll
    for (int j = 0; j < kTileColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (8 * j + 2 * quad + e % 2 >= columns) acc[j][e] = -INFINITY;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (target[half] >= 0 && target[half] < kTileColumns) {
#pragma unroll
      for (int j = 0; j < kTileColumns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * j + 2 * quad + e == target[half]) acc[j][2 * half + e] = -INFINITY;
    }
}

template <bool writes>
__global__ void __launch_bounds__(kThreads, 1) cross_entropy_exponentials_kernel(const __grid_constant__ ExponentialArgs a) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  unsigned char* const memory = shared_memory() + (0u - shared_address(shared_memory())) % kPanelAlignment;
  uint64_t *const full = reinterpret_cast<uint64_t*>(memory + kBarriersPlace), *const empty = full + kStages;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  create_ring<kStages>(full, empty, kWorkerWarps);

  const int tiles = a.row_tiles * a.column_tiles, slices = (a.features + kTileFeatures - 1) / kTileFeatures;
  unsigned n = 0;  // slices so far
  if (thread < kWarpgroup) {
    give_up_registers<kFetcherRegisters>();
    if (thread == 0) {
      for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
        const int row = tile % a.row_tiles * kTileRows, column = tile / a.row_tiles * kTileColumns;
        for (int slice = 0; slice < slices; ++slice, ++n) {
          const unsigned stage = n % kStages;
          unsigned char* const rows = memory + stage * kStageBytes;
          if (n >= kStages) barrier_wait(&empty[stage], static_cast<int>(n / kStages - 1) % 2);
          barrier_expect(&full[stage], kStageBytes);
          copy_box_async(rows, &a.x, row, slice * kTileFeatures, &full[stage]);
          copy_box_async(rows + kRowsBytes, &a.weight, column, slice * kTileFeatures, &full[stage]);
        }
      }
    }
  } else {
    take_registers<kWorkerRegisters>();
    const int warp = thread / kWarp - 4, g = lane / 4, quad = lane % 4;
    unsigned char* const pieces = memory + kPiecesPlace + warp * 2 * kPieceBytes;
    const auto release = [&](unsigned slice) {
      if (lane == 0) barrier_arrive(&empty[slice % kStages]);
    };
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
      const int first_row = tile % a.row_tiles * kTileRows + 16 * warp, column_tile = tile / a.row_tiles,
                first_column = column_tile * kTileColumns;
      float top[2];
      int target[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + g + 8 * half;
        top[half] = row < a.rows ? a.tops[row] : 0.0f;
        const int known = row < a.rows ? a.targets[row] : -1;
        target[half] = known >= first_column ? known - first_column : -1;
      }

      float acc[kTileColumns / 8][4];
      for (int slice = 0; slice < slices; ++slice, ++n) {
        const unsigned char* const rows = memory + n % kStages * kStageBytes;
        barrier_wait(&full[n % kStages], static_cast<int>(n / kStages) % 2);
        products_begin();
#pragma unroll
        for (int k16 = 0; k16 < kTileFeatures / 16; ++k16)
          multiply_panels<Summed::along_rows, Summed::along_rows>(acc, operand<Summed::along_rows>(rows + warp / 4 * kPanelBytes, k16),
                                                                  operand<Summed::along_rows>(rows + kRowsBytes, k16),
                                                                  slice > 0 || k16 > 0);
        products_close();
        products_done_but<1>();
        if (slice > 0) release(n - 1);
      }
      products_done_but<0>();
      release(n - 1);
      touch(acc);

      leave_out(acc, a.vocab - first_column, target);
      float sum[2] = {0, 0};
#pragma unroll
      for (int part = 0; part < kTileColumns / kPanelColumns; ++part) {
#pragma unroll
        for (int j = 8 * part; j < 8 * part + 8; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) acc[j][e] = exp2_approx(fmaf(kLog2e, acc[j][e], -top[half]));
            sum[half] += acc[j][2 * half] + acc[j][2 * half + 1];
          }
        if constexpr (writes) {  // 64 columns at a time leave through shared memory
          unsigned char* const piece = pieces + part % 2 * kPieceBytes;
          if (lane == 0) boxes_read_but<1>();  // the one that was here before
          __syncwarp();
          const int matrix = lane / 8;
#pragma unroll
          for (int j = 8 * part; j < 8 * part + 8; j += 2) {
            const uint32_t four[4] = {pack(acc[j][0], acc[j][1]), pack(acc[j][2], acc[j][3]), pack(acc[j + 1][0], acc[j + 1][1]),
                                      pack(acc[j + 1][2], acc[j + 1][3])};
            store_matrices(panel_element(piece, lane % 8 + matrix % 2 * 8, (j % 8 + matrix / 2) * 8), four);
          }
          publish_to_tensor_cores();
          __syncwarp();
          if (lane == 0) {
            store_box_async(&a.exponentials, first_row, first_column + part * kPanelColumns, piece);
            close_boxes();
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
        sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
        const int row = first_row + g + 8 * half;
        if (quad == 0 && row < a.rows) a.sums[static_cast<int64_t>(column_tile) * a.rows + row] = sum[half];
      }
    }
    if (writes && lane == 0) boxes_stored();
  }
#endif
}

struct FinishArgs {
  Bf16* exponentials;  // null without a gradient
  const Bf16 *x, *weight;
  Bf16* scaled_x;  // null: not wanted
  const int32_t* targets;
  const float* mask;  // null: 1 everywhere
  const float *factor, *tops, *sums;
  float *token_loss, *row_factors;
  int64_t stride, x_stride, weight_stride, first_row;
  int rows, vocab, width, column_tiles;
};

struct RowOfExponentials {
  float top, others;  // what they are relative to, in powers of two; their sum without the target
};

constexpr int kAnewTiles = 4, kAnewClasses = 8 * kAnewTiles;  // that a warp takes at a time

/// Logits of a block's rows and of a warp's classes from `begin` on, on the tensor cores; rows and classes behind the last repeat it. An
/// instruction takes 16 features in whatever order, so that a lane's 16 bytes of a row go into two of them.
/// logits[m][n][j]  of row 16 m + lane / 4 + 8 (j / 2) and class begin + 8 n + 2 (lane % 4) + j % 2
__device__ __forceinline__ void form_logits(const FinishArgs& a, int first_row, int rows, int begin, float (&logits)[2][kAnewTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, quad = lane % 4;
  const Bf16 *of_row[4], *of_class[kAnewTiles];
#pragma unroll
  for (int k = 0; k < 4; ++k) of_row[k] = a.x + (first_row + min(g + 8 * k, rows - 1)) * a.x_stride;
#pragma unroll
  for (int n = 0; n < kAnewTiles; ++n) of_class[n] = a.weight + min(begin + 8 * n + g, a.vocab - 1) * a.weight_stride;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < kAnewTiles; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) logits[m][n][j] = 0;
#pragma unroll 1
  for (int window = 0; window < a.width; window += 8 * 4) {
    const int i = window + 8 * quad;
    const auto pack_of = [&](const Bf16* from) { return i < a.width ? *reinterpret_cast<const uint4*>(from + i) : uint4{0, 0, 0, 0}; };
    uint4 x[4], weight[kAnewTiles];
#pragma unroll
    for (int n = 0; n < kAnewTiles; ++n) weight[n] = pack_of(of_class[n]);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = pack_of(of_row[k]);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kAnewTiles; ++n) {
        multiply_bf16(logits[m][n], {x[2 * m].x, x[2 * m + 1].x, x[2 * m].y, x[2 * m + 1].y}, weight[n].x, weight[n].y);
        multiply_bf16(logits[m][n], {x[2 * m].z, x[2 * m + 1].z, x[2 * m].w, x[2 * m + 1].w}, weight[n].z, weight[n].w);
      }
  }
}

/// Exponentials relative to the largest logit of each row, of those rows of a block that `anew` has bits for, by the whole block.
/// of_warps  scratch
__device__ void form_rows_anew(const FinishArgs& a, int first_row, int rows, unsigned anew, float (&of_warps)[kFinishWarps][kFinishRows],
                               RowOfExponentials (&all)[kFinishRows]) {
  static_assert(kFinishRows == 32);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, quad = lane % 4;
  // What a lane has for rows g + 8 k, joined over its quad and the warps in order; lane r of every warp gets that of row r.
  const auto of_rows = [&](float(&own)[4], auto&& join) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      own[k] = join(own[k], __shfl_xor_sync(0xffffffffu, own[k], 1));
      own[k] = join(own[k], __shfl_xor_sync(0xffffffffu, own[k], 2));
      if (quad == 0) of_warps[warp][g + 8 * k] = own[k];
    }
    __syncthreads();
    float joined = of_warps[0][lane];
    for (int w = 1; w < kFinishWarps; ++w) joined = join(joined, of_warps[w][lane]);
    return joined;
  };
  float logits[2][kAnewTiles][4], largest[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  for (int begin = warp * kAnewClasses; begin < a.vocab; begin += kFinishWarps * kAnewClasses) {
    form_logits(a, first_row, rows, begin, logits);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int n = 0; n < kAnewTiles; ++n)
        largest[k] = fmaxf(largest[k], fmaxf(logits[k / 2][n][k % 2 * 2], logits[k / 2][n][k % 2 * 2 + 1]));
  }
  const float top_of_lane = kLog2e * of_rows(largest, [](float p, float q) { return fmaxf(p, q); });
  float top[4], sums[4] = {};
  int target[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    top[k] = __shfl_sync(0xffffffffu, top_of_lane, g + 8 * k);
    target[k] = a.targets[first_row + min(g + 8 * k, rows - 1)];
  }
  for (int begin = warp * kAnewClasses; begin < a.vocab; begin += kFinishWarps * kAnewClasses) {
    form_logits(a, first_row, rows, begin, logits);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int n = 0; n < kAnewTiles; ++n) {
        const int v = begin + 8 * n + 2 * quad;
        float e[2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
          e[j] = v + j < a.vocab && v + j != target[k] ? exp2_approx(fmaf(kLog2e, logits[k / 2][n][k % 2 * 2 + j], -top[k])) : 0.0f;
        sums[k] += e[0] + e[1];
        if (a.exponentials != nullptr && v < a.vocab && (anew >> (g + 8 * k) & 1) != 0)
          *reinterpret_cast<uint32_t*>(a.exponentials + (first_row + g + 8 * k) * a.stride + v) = pack(e[0], e[1]);
      }
  }
  const float others_of_lane = of_rows(sums, [](float p, float q) { return p + q; });
  if (warp == 0 && (anew >> lane & 1) != 0) all[lane] = {top_of_lane, others_of_lane};
}

__global__ void __launch_bounds__(kFinishThreads) cross_entropy_finish_rows_kernel(const FinishArgs a) {
  __shared__ float sums[kFinishWarps][kFinishRows], factors[kFinishRows];
  __shared__ RowOfExponentials all[kFinishRows];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first = static_cast<int>(blockIdx.x) * kFinishRows, row = first + lane, count = min(kFinishRows, a.rows - first);
  float sum = 0;
  if (lane < count)
    for (int tile = warp; tile < a.column_tiles; tile += kFinishWarps) sum += a.sums[static_cast<int64_t>(tile) * a.rows + row];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0) {
    float others = sums[0][lane];
    for (int w = 1; w < kFinishWarps; ++w) others += sums[w][lane];
    all[lane] = {lane < count ? a.tops[row] : 0.0f, others};
  }
  __syncthreads();
  const auto is_known = [&](int r) { return a.targets[r] >= 0 && a.targets[r] < a.vocab; };
  const auto weight_of = [&](int r) { return a.mask != nullptr ? a.mask[r] : 1.0f; };
  // Rows of the block, as bits: every warp finds the same.
  const bool out_of_range = lane < count && !(all[lane].others <= kMostOthers);
  const unsigned anew =
      __ballot_sync(0xffffffffu, out_of_range && all[lane].others > kMostOthers && is_known(row));  // not NaN: it would stay
  const unsigned emptied = __ballot_sync(0xffffffffu, out_of_range && a.exponentials != nullptr && weight_of(row) == 0);
  if (anew != 0) form_rows_anew(a, first, count, anew, sums, all);
  __syncthreads();
  for (unsigned left = emptied; left != 0; left &= left - 1) {
    const int64_t r = first + __ffs(static_cast<int>(left)) - 1;
    for (int v = static_cast<int>(threadIdx.x); v < (a.vocab + 7) / 8 * 8; v += kFinishThreads)
      a.exponentials[r * a.stride + v] = Bf16(0.0f);
  }

  if (warp == 0 && lane < count) {
    const float weight = weight_of(row);
    const auto [top, others] = all[lane];
    const float own_top = a.tops[row], target_term = exp2_approx(own_top - top), whole = target_term + others;
    float loss = 0, factor = 0;  // of a position that has no target and is not counted
    if (is_known(row)) {
      loss = own_top == top ? log1pf(others / target_term) : logf(whole) - (own_top - top) / kLog2e;
      if (weight != 0) factor = *a.factor * weight / whole;
    } else if (weight != 0) {
      loss = factor = bad_target(a.first_row + row, a.targets[row], a.vocab);
    }
    a.token_loss[row] = loss;
    if (a.exponentials != nullptr) {
      factors[lane] = a.row_factors[row] = factor;
      if (is_known(row) && weight != 0) a.exponentials[row * a.stride + a.targets[row]] = __float2bfloat16(-others);
    }
  }
  if (a.scaled_x == nullptr) return;
  __syncthreads();
  for (int i = warp; i < count; i += kFinishWarps) {
    const float factor = factors[i];
    const int64_t r = first + i;
    for (int c = 8 * lane; c < a.width; c += 8 * kWarp) {
      const Pack<Bf16, 8> from = load_pack<8>(a.x + r * a.x_stride + c);
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = factor != 0 ? factor * to_f32(from.at[j]) : 0.0f;
      store_pack(a.scaled_x + r * a.width + c, round_to<Bf16>(values));
    }
  }
}

Bf16* elements(const Tensor& t) {
  return static_cast<Bf16*>(t.raw());
}

}  // namespace

bool forms_exponentials_cuda(const Tensor& x, const Tensor& weight) {
  return x.dtype() == Dtype::bf16 && x.dim(0) < INT32_MAX - kTileRows && fits_boxes(x) && fits_boxes(weight) &&
         weight.dim(0) < INT32_MAX / 2 && has_warpgroup_instructions(&cross_entropy_exponentials_kernel<true>, x.device().cuda_context());
}

void target_logits_cuda(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t vocab, const Tensor& target_logits) {
  const int64_t rows = x.dim(0);
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>((rows + kFinishWarps - 1) / kFinishWarps));
  cross_entropy_target_logits_warp_per_row_kernel<<<grid, kFinishThreads, 0, x.device().cuda_context().stream>>>(
      elements(x), x.stride(0), elements(weight), weight.stride(0), targets.data<int32_t>(), target_logits.data<float>(), rows,
      static_cast<int>(vocab), static_cast<int>(x.dim(1)));
  launch_check("cross_entropy_target_logits_warp_per_row_kernel", grid, kFinishThreads);
}

void exponentials_chunk_cuda(const ExponentialsChunk& chunk) {
  const CudaContext& cuda = chunk.x.device().cuda_context();
  const bool writes = chunk.exponentials.defined();
  const auto tiles = [](int64_t size, int of) { return static_cast<int>((size + of - 1) / of); };
  const int rows = static_cast<int>(chunk.x.dim(0)), row_tiles = tiles(rows, kTileRows), column_tiles = tiles(chunk.vocab, kTileColumns);
  const int vocab = static_cast<int>(chunk.vocab), width = static_cast<int>(chunk.x.dim(1));
  const int64_t stride = writes ? chunk.exponentials.stride(0) : 0;
  if (writes &&
      (stride % 8 != 0 || stride < (chunk.vocab + 7) / 8 * 8 || reinterpret_cast<std::uintptr_t>(chunk.exponentials.raw()) % 16 != 0))
    throw ShapeError("cross_entropy: rows of exponentials must begin at multiples of 16 bytes and be padded to one",
                     {{"exponentials", chunk.exponentials.describe()}, {"row stride", std::to_string(stride)}});
  if (writes) show_as_written(chunk.exponentials);
  const Tensor sums = Tensor::empty(chunk.x.device(), Dtype::f32, {column_tiles, rows});
  const ExponentialArgs args{panel_boxes(chunk.x, kTileRows),
                             panel_boxes(chunk.weight.slice(0, 0, chunk.vocab), kTileColumns),
                             writes ? panel_boxes(chunk.exponentials, 16) : CUtensorMap{},
                             chunk.target_logits.data<float>(),
                             chunk.targets.data<int32_t>(),
                             sums.data<float>(),
                             rows,
                             vocab,
                             width,
                             row_tiles,
                             column_tiles};
  launch(writes ? &cross_entropy_exponentials_kernel<true> : &cross_entropy_exponentials_kernel<false>, "cross_entropy_exponentials_kernel",
         static_cast<unsigned>(std::min(row_tiles * column_tiles, cuda.sm_count)), kThreads, kSharedBytes, cuda, args);

  const FinishArgs finish{writes ? elements(chunk.exponentials) : nullptr,
                          elements(chunk.x),
                          elements(chunk.weight),
                          chunk.scaled_x.defined() ? elements(chunk.scaled_x) : nullptr,
                          args.targets,
                          chunk.mask.defined() ? chunk.mask.data<float>() : nullptr,
                          chunk.factor.data<float>(),
                          args.tops,
                          args.sums,
                          chunk.token_loss.data<float>(),
                          writes ? chunk.row_factors.data<float>() : nullptr,
                          stride,
                          chunk.x.stride(0),
                          chunk.weight.stride(0),
                          chunk.first_row,
                          rows,
                          vocab,
                          width,
                          column_tiles};
  const dim3 grid(static_cast<unsigned>(tiles(rows, kFinishRows)));
  cross_entropy_finish_rows_kernel<<<grid, kFinishThreads, 0, cuda.stream>>>(finish);
  launch_check("cross_entropy_finish_rows_kernel", grid, kFinishThreads);
}

}  // namespace longhand
