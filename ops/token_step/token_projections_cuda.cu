// The projections of a token; token_step.h has the formulas.
//
// norm_projection_kernel, gated_projection_kernel, convolved_projection_kernel
// form_norm_kernel, form_gated_kernel, form_convolved_kernel, and behind them formed_projection_kernel
// moves   the weight once: 2*R*D bytes in bf16 (9.0 MB for 4384 x 1024); the rows of activations stay in L2
// flops   1 multiply-add per element of weight and row: memory bound
// floor   9.0 MB / 4.3 TB/s = 2.1 us on an H200
// split   a block owns some rows of weight: token_product.h says how many. They are on their way to shared memory long before the kernel in
//         front has ended; then the rows of activations come beside them and its warps multiply. Of few rows every block forms those
//         itself, which saves a kernel; of more a kernel in front does it once, and a block takes them in passes. A boundary between
//         kernels waits for the end of each block and a product for its slowest warp: few blocks, and in each many warps with few columns
// needs   weights of whole packs of 16 bytes a row; the shared memory that cut_product() counts
// order   sums over parts of the columns, then over the parts: the same bits whatever the grid, the number of rows and who forms them
// agrees  with the ops that they join: kTokenStepToleranceF32, kTokenStepToleranceBf16
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/error.h"
#include "ops/common/cuda_math.cuh"
#include "ops/common/matrix_instructions.cuh"
#include "ops/token_step/token_launch_cuda.cuh"
#include "ops/token_step/token_product.h"
#include "ops/token_step/token_step.h"

namespace longhand {
namespace {

constexpr int kGroup = static_cast<int>(kRowsOfGroup), kPass = static_cast<int>(kRowsOfPass);  // rows of x
constexpr int kSumThreads = kProductWarps * kWarp;  // among which sums are cut, whatever the threads of a block

// --- a product of few rows ------------------------------------------------------------------------------------

constexpr int kWindow = 32;  // columns of two tensor-core products

/// out = x weight^T
struct Product {
  const void* weight;
  void* out;
  int64_t out_rows;  // R
  int width;         // D, a multiple of the pack
  int stride;        // elements between two rows in shared memory
  int batch;
  int rows_log2;  // of weight in a block
  float one_over_width;
  __device__ int block_rows() const { return 1 << rows_log2; }
};

/// The dynamic shared memory of a block: its rows of weight, the rows of x, what a kernel loads ahead, what the product adds up.
template <class T>
struct BlockMemory {
  T *weight, *x;
  float *ahead, *partial;
  __device__ BlockMemory(const Product& p, int floats_ahead) {
    weight = reinterpret_cast<T*>(shared_memory());
    x = weight + p.block_rows() * p.stride;
    ahead = reinterpret_cast<float*>(x + p.batch * p.stride);
    partial = ahead + floats_ahead;
  }
};

/// Sends `width` floats, in fours, on their way.
template <int warps>
__device__ void load_ahead(const float* from, int width, float* to) {
  for (int i = static_cast<int>(threadIdx.x) * 4; i < width; i += warps * kWarp * 4) copy_16_async(to + i, from + i);
  close_copies();
}

/// The same with a block's rows of weight; rows past the end repeat the last one.
template <int warps, class T>
__device__ void load_weight(const Product& p, T* to, int64_t block) {
  constexpr int vec = 16 / static_cast<int>(sizeof(T));
  const int lane = static_cast<int>(threadIdx.x) % kWarp, packs = p.width / vec;
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < p.block_rows(); r += warps) {
    const int64_t row = min((block << p.rows_log2) + r, p.out_rows - 1);
    const T* from = static_cast<const T*>(p.weight) + row * p.width;
    for (int pack = lane; pack < packs; pack += kWarp) copy_16_async(to + r * p.stride + pack * vec, from + pack * vec);
  }
  close_copies();
}

/// bf16 on the tensor cores: a tile of weight by a group of rows of x an instruction; the warps of a tile share out the columns. An
/// instruction takes 16 columns in whatever order, so that a lane's 16 bytes of a row go into two of them. Even and odd windows are summed
/// apart: no instruction waits for the one before, and of twice as many warps two share a part, of which one has the even ones.
/// partial [warp, row of x, row of the tile]
template <int warps, int rows>
__device__ void multiply_part(const Product& p, const BlockMemory<__nv_bfloat16>& memory) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, row = lane / 4;
  constexpr bool paired = warps > kProductWarps;
  const int parts = parts_log2(p.rows_log2), share = paired ? parts + 1 : parts, tile = warp >> share, below = row + kTile / 2;
  const int of_tile = warp - (tile << share), part = paired ? of_tile / 2 : of_tile;
  const int windows = (p.width + kWindow - 1) / kWindow, begin = windows * part >> parts, end = windows * (part + 1) >> parts;
  const int stride = p.stride;
  const __nv_bfloat16 *const weight = memory.weight + (tile * kTile + row) * stride, *const x = memory.x + row * stride;
  const bool whole = p.rows_log2 >= kTileLog2;  // or what the block has of a tile
  const bool upper = whole || row < p.block_rows(), lower = whole || below < p.block_rows();
  constexpr int kGroups = rows / kGroup;
  float even[kGroups][2][4] = {}, odd[kGroups][2][4] = {};  // columns that one, and that the other instruction takes
#pragma unroll 2
  for (int window = paired ? begin + of_tile % 2 : begin; window < end; window += 2) {
    const auto multiply = [&](int at, float(&sums)[kGroups][2][4]) {
      const int column = at * kWindow + lane % 4 * 8;
      const auto pack = [&](const __nv_bfloat16* from, bool there) {
        return there && at < end && column < p.width ? *reinterpret_cast<const uint4*>(from + column) : uint4{0, 0, 0, 0};
      };
      const uint4 w = pack(weight, upper), more = pack(weight + kTile / 2 * stride, lower);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint4 in = pack(x + g * kGroup * stride, row + g * kGroup < p.batch);
        multiply_bf16(sums[g][0], {w.x, more.x, w.y, more.y}, in.x, in.y);
        multiply_bf16(sums[g][1], {w.z, more.z, w.w, more.w}, in.z, in.w);
      }
    };
    multiply(window, even);
    if (!paired) multiply(window + 1, odd);
  }
  float* const to = memory.partial + warp * rows * kPartsOfRow;
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (const int of_x = g * kGroup + lane % 4 * 2 + j % 2; of_x < p.batch)
        to[of_x * kPartsOfRow + (j < 2 ? row : below)] = (even[g][0][j] + even[g][1][j]) + (odd[g][0][j] + odd[g][1][j]);
}

/// f32: a warp takes a row of weight after the other, its lanes share the columns.
/// partial [row of weight, row of x]
template <int warps, int rows>
__device__ void multiply_part(const Product& p, const BlockMemory<float>& memory) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, stride = p.stride;
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < p.block_rows(); r += warps) {
    float sums[rows] = {};
    for (int i = lane * 4; i < p.width; i += kWarp * 4) {
      const Pack<float, 4> w = load_pack<4>(memory.weight + r * stride + i);
#pragma unroll
      for (int b = 0; b < rows; ++b) {
        if (b >= p.batch) break;
        const Pack<float, 4> in = load_pack<4>(memory.x + b * stride + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[b] = fmaf(w.at[j], in.at[j], sums[b]);
      }
    }
#pragma unroll
    for (int b = 0; b < rows; ++b) {
      const float sum = warp_sum(sums[b]);
      if (lane == 0) memory.partial[r * rows + b] = sum;
    }
  }
}

template <int warps, int rows, class T>
__device__ float sum_of_parts(const Product& p, const float* partial, int b, int r) {
  if constexpr (sizeof(T) == 4) {
    return partial[r * rows + b];
  } else {
    constexpr int kOfPart = warps / kProductWarps, kOfWarp = rows * kPartsOfRow;
    const int parts = parts_log2(p.rows_log2);
    const float* const first = partial + ((r / kTile << parts) * kOfPart * rows + b) * kPartsOfRow + r % kTile;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kProductWarps; ++k)
      if (k < 1 << parts) {
        const float* const part = first + k * kOfPart * kOfWarp;
        sum += kOfPart > 1 ? part[0] + part[kOfWarp] : part[0];
      }
    return sum;
  }
}

/// The product of a block's rows of weight times scale(row of x), once all of it is on its way to shared memory; `next` is what may be sent
/// there as soon as the product does not read it any more.
template <int warps, int rows, class T, class Out, class Scale, class Next>
__device__ void multiply_block(const Product& p, const BlockMemory<T>& memory, int64_t block, Out* out, const Scale& scale,
                               const Next& next) {
  copies_arrived();
  __syncthreads();
  multiply_part<warps, rows>(p, memory);
  __syncthreads();
  next();
  for (int i = static_cast<int>(threadIdx.x); i < p.batch << p.rows_log2; i += warps * kWarp) {
    const int b = i >> p.rows_log2, r = i - (b << p.rows_log2);
    const int64_t row = (block << p.rows_log2) + r;
    if (row < p.out_rows) out[b * p.out_rows + row] = static_cast<Out>(scale(b) * sum_of_parts<warps, rows, T>(p, memory.partial, b, r));
  }
}

/// The same once x is in shared memory and the first rows of weight are on their way there; further blocks of rows follow.
template <int warps, class T, class Out, class Scale>
__device__ void multiply_all(const Product& p, const BlockMemory<T>& memory, int64_t block, int64_t blocks_apart, int64_t blocks,
                             const Scale& scale) {
  for (; block < blocks; block += blocks_apart)
    multiply_block<warps, kGroup>(p, memory, block, static_cast<Out*>(p.out), scale, [&] {
      if (block + blocks_apart < blocks) load_weight<warps>(p, memory.weight, block + blocks_apart);
    });
}

/// The same with rows of x that a kernel in front has formed, kPass at a time.
struct FormedArgs {
  Product product;     // batch: of a pass, for the shared memory
  const void* x;       // [batch, width]
  const float* scale;  // [batch], or null
  int batch;
};

template <class T, class Out>
__global__ void __launch_bounds__(2 * kProductWarps * kWarp, blocks_of_registers(2 * kProductWarps))
    formed_projection_kernel(FormedArgs p, int64_t blocks) {
  constexpr int kWarps = 2 * kProductWarps, kVec = 16 / static_cast<int>(sizeof(T));
  const BlockMemory<T> memory(p.product, 0);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, packs = p.product.width / kVec;
  const auto load_rows = [&](int first) {
    const int row = static_cast<int>(threadIdx.x) / kWarp;
    static_assert(kWarps == kPass);
    if (first + row < p.batch) {
      const T* from = static_cast<const T*>(p.x) + static_cast<int64_t>(first + row) * p.product.width;
      for (int pack = lane; pack < packs; pack += kWarp) copy_16_async(memory.x + row * p.product.stride + pack * kVec, from + pack * kVec);
    }
    close_copies();
  };
  load_weight<kWarps>(p.product, memory.weight, blockIdx.x);
  let_next_kernel_start();
  wait_for_kernel_in_front();
  load_rows(0);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x)
    for (int first = 0; first < p.batch; first += kPass) {
      Product pass = p.product;
      pass.batch = min(kPass, p.batch - first);
      const bool last = first + kPass >= p.batch;
      const int64_t next = block + gridDim.x;
      multiply_block<kWarps, kPass>(
          pass, memory, block, static_cast<Out*>(p.product.out) + first * p.product.out_rows,
          [&](int b) { return p.scale == nullptr ? 1.0f : p.scale[first + b]; },
          [&] {
            if (last && next < blocks) load_weight<kWarps>(p.product, memory.weight, next);
            if (!last || (next < blocks && p.batch > kPass)) load_rows(last ? 0 : first + kPass);
          });
    }
}

// --- what stands in front of it -------------------------------------------------------------------------------

/// How the rows of a batch are dealt to the threads of a block while they are normalised: n rows at the same time. A row's numbers are
/// summed in one order whatever n and the block: as kSumThreads threads would, of which a thread stands for `turns`.
template <int n, int block_warps>
struct RowsOfBlock {
  static constexpr int threads = block_warps * kWarp / n, warps = block_warps / n, turns = kSumThreads / threads;  // of a row
  static_assert(warps >= 1 && turns >= 1);
  static __device__ int row() { return static_cast<int>(threadIdx.x) / threads; }
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % threads; }
  /// What total() adds up, behind a barrier. scratch holds n * kProductWarps floats.
  static __device__ void put(const float (&partial)[turns], float* scratch) {
#pragma unroll
    for (int v = 0; v < turns; ++v) {
      const float part = warp_sum(partial[v]);
      if (threadIdx.x % kWarp == 0) scratch[row() * kProductWarps + v * warps + lane() / kWarp] = part;
    }
  }
  /// The sum over the threads of a row.
  static __device__ float total(const float* scratch, int of_row) {
    float sum = 0;
    for (int w = 0; w < kProductWarps; ++w) sum += scratch[of_row * kProductWarps + w];
    return sum;
  }
};

/// A convolution's window that moves on beside a product, in blocks of its own.
struct WindowMove {
  void* window;  // null: nothing to move
  const void* now;
  int64_t now_stride;
  int batch, taps, channels;  // taps W - 1
};

template <class T>
__device__ void move_window(const WindowMove& m, int64_t block) {
  constexpr int kAhead = 7;  // what models have at most; the kernel in front still reads the window, and nobody writes it
  const int64_t i = block * blockDim.x + threadIdx.x, b = i / m.channels, c = i % m.channels, C = m.channels;
  const bool mine = b < m.batch;
  T* const window = static_cast<T*>(m.window) + b * m.taps * C + c;
  T later[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k)
    if (mine && k + 1 < m.taps) later[k] = window[(k + 1) * C];
  wait_for_kernel_in_front();
  if (!mine) return;
  const T now = static_cast<const T*>(m.now)[b * m.now_stride + c];
#pragma unroll
  for (int k = 0; k < kAhead; ++k)
    if (k + 1 < m.taps) window[k * C] = later[k];
  for (int k = kAhead; k + 1 < m.taps; ++k) window[k * C] = window[(k + 1) * C];
  window[(m.taps - 1) * C] = now;
}

struct NormArgs {
  Product product;
  const float *residual, *norm;
  const void* branch;  // may be null
  float* sum;          // null without a branch
  float eps;
  WindowMove move;
};

template <class T>
__device__ Pack<float, 4> residual_sum(const NormArgs& p, int64_t at) {
  Pack<float, 4> v = load_pack<4>(p.residual + at);
  if (p.branch != nullptr) {
    const Pack<T, 4> more = load_pack<4>(static_cast<const T*>(p.branch) + at);
#pragma unroll
    for (int j = 0; j < 4; ++j) v.at[j] += to_f32(more.at[j]);
  }
  return v;
}

/// A row's part of x, as far as this thread has to form it: norm times sum. Its factor rstd is not known yet: the product's sums get it.
template <class T, class Rows>
__device__ void form_norm(const NormArgs& p, int b, const float* norm, T* x, bool writes_sum, float (&squares)[Rows::turns]) {
  constexpr bool whole_block = Rows::warps == kProductWarps;
  // Loads of a thread that are under way together: of further columns, or of the further parts of a row that it stands for.
  constexpr int kTurns = whole_block ? 2 : Rows::turns;
  const int D = p.product.width;
  const int64_t row = static_cast<int64_t>(b) * D;
#pragma unroll
  for (int part = 0; part < Rows::turns; part += whole_block ? 1 : kTurns)
    for (int begin = 0; begin < D; begin += kSumThreads * 4 * (whole_block ? kTurns : 1)) {
      const auto column = [&](int u) {
        return begin + (whole_block ? u * kSumThreads : (part + u) * Rows::threads) * 4 + Rows::lane() * 4;
      };
      Pack<float, 4> in[kTurns];
#pragma unroll
      for (int u = 0; u < kTurns; ++u)
        if (column(u) < D) in[u] = residual_sum<T>(p, row + column(u));
#pragma unroll
      for (int u = 0; u < kTurns; ++u) {
        const int i = column(u), v = whole_block ? 0 : part + u;
        if (i >= D) continue;
        const Pack<float, 4> w = load_pack<4>(norm + i);
        float scaled[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          squares[v] = fmaf(in[u].at[j], in[u].at[j], squares[v]);
          scaled[j] = w.at[j] * in[u].at[j];
        }
        store_pack(x + i, round_to<T>(scaled));
        if (writes_sum) store_pack(p.sum + row + i, in[u]);
      }
    }
}

template <class Rows>
__device__ float rstd_of(const NormArgs& p, const float* scratch, int row) {
  return rsqrtf(fmaf(Rows::total(scratch, row), p.product.one_over_width, p.eps));
}

/// Blocks from `product_blocks` on move the window; the others multiply.
template <class T, class Out, int n, int warps>
__global__ void __launch_bounds__(warps* kWarp, blocks_of_registers(warps))
    norm_projection_kernel(NormArgs p, int64_t blocks, unsigned product_blocks) {
  if (blockIdx.x >= product_blocks) {
    let_next_kernel_start();
    return move_window<T>(p.move, blockIdx.x - product_blocks);
  }
  using Rows = RowsOfBlock<n, warps>;
  __shared__ float scratch[n * kProductWarps];
  const int b = Rows::row();
  const BlockMemory<T> memory(p.product, p.product.width);
  load_ahead<warps>(p.norm, p.product.width, memory.ahead);
  load_weight<warps>(p.product, memory.weight, blockIdx.x);
  let_next_kernel_start();
  copies_arrived_but<1>();
  __syncthreads();  // the norm's weights are there
  wait_for_kernel_in_front();
  float squares[Rows::turns] = {};
  if (b < p.product.batch)
    form_norm<T, Rows>(p, b, memory.ahead, memory.x + b * p.product.stride, blockIdx.x == 0 && p.sum != nullptr, squares);
  Rows::put(squares, scratch);
  multiply_all<warps, T, Out>(p.product, memory, blockIdx.x, product_blocks, blocks,
                              [&](int row) { return rstd_of<Rows>(p, scratch, row); });
}

/// A row a block, x and rstd to global memory; blocks behind them move the window.
template <class T>
__global__ void __launch_bounds__(kSumThreads) form_norm_kernel(NormArgs p, T* x, float* rstd) {
  using Rows = RowsOfBlock<1, kProductWarps>;
  __shared__ float scratch[kProductWarps];
  const int b = static_cast<int>(blockIdx.x);
  let_next_kernel_start();
  if (b >= p.product.batch) return move_window<T>(p.move, b - p.product.batch);
  wait_for_kernel_in_front();
  float squares[Rows::turns] = {};
  form_norm<T, Rows>(p, b, p.norm, x + static_cast<int64_t>(b) * p.product.width, p.sum != nullptr, squares);
  Rows::put(squares, scratch);
  __syncthreads();
  if (threadIdx.x == 0) rstd[b] = rstd_of<Rows>(p, scratch, 0);
}

struct GateArgs {
  Product product;
  const void *y, *z;
  int64_t y_stride, z_stride;
  const float* norm;  // null: the gate alone
  int norm_width;     // of what repeats
  float eps;
  int groups;
  bool norm_before_gate;
  WindowMove move;
};

/// Four neighbours, of whose alignment nothing is known.
template <class T>
__device__ Pack<T, 4> load_four(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pack<T, 4>) == 0) return load_pack<4>(from);
  return {{from[0], from[1], from[2], from[3]}};
}

/// Rows of x, as far as they are in groups [first, end) of all rows: n groups, of whichever rows, are normalised at the same time.
template <class T, int n, int warps>
__device__ void form_gated(const GateArgs& p, int first, int end, const float* norm, T* x, int64_t stride,
                           float (&scratch)[2][n * kProductWarps]) {
  using Rows = RowsOfBlock<n, warps>;
  const int group = p.product.width / p.groups;
  int turn = 0;
  for (; first < end; first += n, turn ^= 1) {
    const int b = (first + Rows::row()) / p.groups, begin = (first + Rows::row()) % p.groups * group;
    const bool mine = first + Rows::row() < end;
    const T *y = static_cast<const T*>(p.y) + b * p.y_stride + begin, *z = static_cast<const T*>(p.z) + b * p.z_stride + begin;
    float rstd = 1.0f;
    if (p.norm != nullptr) {
      float squares[Rows::turns] = {};
      if (mine)
#pragma unroll
        for (int v = 0; v < Rows::turns; ++v)
          for (int i = (v * Rows::threads + Rows::lane()) * 4; i < group; i += kSumThreads * 4) {
            const Pack<T, 4> y_in = load_four(y + i), z_in = load_four(z + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float value = to_f32(y_in.at[j]), normed = p.norm_before_gate ? value : value * silu(to_f32(z_in.at[j]));
              squares[v] = fmaf(normed, normed, squares[v]);
            }
          }
      Rows::put(squares, scratch[turn]);
      __syncthreads();
      rstd = rsqrtf(Rows::total(scratch[turn], Rows::row()) / static_cast<float>(group) + p.eps);
    }
    if (!mine) continue;
    T* const to = x + b * stride + begin;
    const float* weight = norm + (p.norm_width > group ? begin : 0);
    constexpr int kTurns = 4;  // whose loads are under way together
    for (int begin_of_turns = Rows::lane() * 4; begin_of_turns < group; begin_of_turns += kTurns * Rows::threads * 4) {
      Pack<T, 4> y_in[kTurns], z_in[kTurns];
#pragma unroll
      for (int u = 0; u < kTurns; ++u) {
        const int i = begin_of_turns + u * Rows::threads * 4, at = i < group ? i : begin_of_turns;
        y_in[u] = load_four(y + at);
        z_in[u] = load_four(z + at);
      }
#pragma unroll
      for (int u = 0; u < kTurns; ++u) {
        const int i = begin_of_turns + u * Rows::threads * 4;
        if (i >= group) continue;
        float out[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          out[j] = (p.norm != nullptr ? weight[i + j] : 1.0f) * rstd * (to_f32(y_in[u].at[j]) * silu(to_f32(z_in[u].at[j])));
        store_pack(to + i, round_to<T>(out));
      }
    }
  }
}

template <class T, int n, int warps>
__global__ void __launch_bounds__(warps* kWarp, blocks_of_registers(warps))
    gated_projection_kernel(GateArgs p, int64_t blocks, unsigned product_blocks) {
  if (blockIdx.x >= product_blocks) {
    let_next_kernel_start();
    return move_window<T>(p.move, blockIdx.x - product_blocks);
  }
  __shared__ float scratch[2][n * kProductWarps];
  const BlockMemory<T> memory(p.product, p.norm_width);
  load_ahead<warps>(p.norm, p.norm_width, memory.ahead);
  load_weight<warps>(p.product, memory.weight, blockIdx.x);
  let_next_kernel_start();
  copies_arrived_but<1>();
  wait_for_kernel_in_front();
  form_gated<T, n, warps>(p, 0, p.product.batch * p.groups, memory.ahead, memory.x, p.product.stride, scratch);
  multiply_all<warps, T, T>(p.product, memory, blockIdx.x, product_blocks, blocks, [](int) { return 1.0f; });
}

/// A group of a row a block, x to global memory; blocks behind them move the window.
template <class T>
__global__ void __launch_bounds__(kSumThreads) form_gated_kernel(GateArgs p, T* x) {
  __shared__ float scratch[2][kProductWarps];
  const int group = static_cast<int>(blockIdx.x), groups = p.product.batch * p.groups;
  let_next_kernel_start();
  if (group >= groups) return move_window<T>(p.move, group - groups);
  wait_for_kernel_in_front();
  form_gated<T, 1, kProductWarps>(p, group, group + 1, p.norm, x, p.product.width, scratch);
}

struct ConvolvedArgs {
  Product product;
  const void *now, *window;
  int64_t now_stride;
  const float *conv_weight, *conv_bias;
  void* y;
  int taps;    // W
  bool ahead;  // there is shared memory for the sums over the taps before the last
};

/// The sum over the taps before the last: what the window holds.
template <class T>
__device__ float earlier_taps(const ConvolvedArgs& p, int b, int c) {
  const int C = p.product.width;
  const T* window = static_cast<const T*>(p.window) + static_cast<int64_t>(b) * (p.taps - 1) * C + c;
  float sum = p.conv_bias != nullptr ? p.conv_bias[c] : 0.0f;
  for (int j = 0; j + 1 < p.taps; ++j) sum = fmaf(p.conv_weight[c * p.taps + j], to_f32(window[static_cast<int64_t>(j) * C]), sum);
  return sum;
}

template <class T, int warps>
__global__ void __launch_bounds__(warps* kWarp, blocks_of_registers(warps)) convolved_projection_kernel(ConvolvedArgs p, int64_t blocks) {
  constexpr int kThreads = warps * kWarp;
  const int C = p.product.width, thread = static_cast<int>(threadIdx.x);
  const int batch = p.product.batch;
  const BlockMemory<T> memory(p.product, p.ahead ? (batch + 1) * C : 0);
  float* const last_taps = memory.ahead + batch * C;
  load_weight<warps>(p.product, memory.weight, blockIdx.x);
  let_next_kernel_start();
  if (p.ahead && p.taps == 4) {  // what models have: two channels of four rows a turn, whose loads do not wait for one another
    for (int c = thread * 2; c < C; c += kThreads * 2) {
      Pack<float, 4> taps[2];
      float bias[2] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        taps[k] = load_pack<4>(p.conv_weight + (c + k) * 4);
        if (p.conv_bias != nullptr) bias[k] = p.conv_bias[c + k];
      }
      constexpr int kAtOnce = 4;
      for (int first = 0; first < batch; first += kAtOnce) {
        const T* const window = static_cast<const T*>(p.window) + static_cast<int64_t>(first) * 3 * C + c;
        Pack<T, 2> past[kAtOnce][3];
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b)
#pragma unroll
          for (int j = 0; j < 3; ++j)
            if (first + b < batch) past[b][j] = load_pack<2>(window + (b * 3 + j) * C);
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
          if (first + b >= batch) break;
          Pack<float, 2> sums;
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            sums.at[k] = bias[k];
#pragma unroll
            for (int j = 0; j < 3; ++j) sums.at[k] = fmaf(taps[k].at[j], to_f32(past[b][j].at[k]), sums.at[k]);
          }
          store_pack(memory.ahead + (first + b) * C + c, sums);
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) last_taps[c + k] = taps[k].at[3];
    }
  } else if (p.ahead) {
    for (int c = thread; c < C; c += kThreads) {
      last_taps[c] = p.conv_weight[c * p.taps + p.taps - 1];
      for (int b = 0; b < batch; ++b) memory.ahead[b * C + c] = earlier_taps<T>(p, b, c);
    }
  }
  __syncthreads();
  wait_for_kernel_in_front();
  // A thread changes the packs that it has asked for, where they lie.
  constexpr int vec = 16 / static_cast<int>(sizeof(T));
  const T* const now = static_cast<const T*>(p.now);
  const bool whole = reinterpret_cast<uintptr_t>(now) % 16 == 0 && p.now_stride % vec == 0;
  if (whole)
    for (int b = 0; b < batch; ++b)
      for (int c = thread * vec; c < C; c += kThreads * vec) copy_16_async(memory.x + b * p.product.stride + c, now + b * p.now_stride + c);
  copies_arrived();
  unsigned turn = 0;  // which block writes y
  for (int b = 0; b < batch; ++b)
    for (int c = thread * vec; c < C; c += kThreads * vec, turn = turn + 1 < gridDim.x ? turn + 1 : 0) {
      T* const x = memory.x + b * p.product.stride + c;
      Pack<T, vec> y;
      if (whole) {
        y = load_pack<vec>(x);
      } else {
#pragma unroll
        for (int j = 0; j < vec; ++j) y.at[j] = now[b * p.now_stride + c + j];
      }
      Pack<float, vec> sums, last;
      if (p.ahead) {
        sums = load_pack<vec>(memory.ahead + b * C + c);
        last = load_pack<vec>(last_taps + c);
      } else {
#pragma unroll
        for (int j = 0; j < vec; ++j) {
          sums.at[j] = earlier_taps<T>(p, b, c + j);
          last.at[j] = p.conv_weight[(c + j) * p.taps + p.taps - 1];
        }
      }
#pragma unroll
      for (int j = 0; j < vec; ++j) y.at[j] = static_cast<T>(silu(fmaf(last.at[j], to_f32(y.at[j]), sums.at[j])));
      store_pack(x, y);
      if (turn == blockIdx.x) store_pack(static_cast<T*>(p.y) + static_cast<int64_t>(b) * C + c, y);
    }
  multiply_all<warps, T, T>(p.product, memory, blockIdx.x, gridDim.x, blocks, [](int) { return 1.0f; });
}

/// A channel of a row a thread, y to global memory.
template <class T>
__global__ void __launch_bounds__(kSumThreads) form_convolved_kernel(ConvolvedArgs p, int batch) {
  const int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  const int C = p.product.width, b = static_cast<int>(i / C), c = static_cast<int>(i % C);
  let_next_kernel_start();
  const float sum = b < batch ? earlier_taps<T>(p, b, c) : 0.0f, last = p.conv_weight[c * p.taps + p.taps - 1];
  wait_for_kernel_in_front();
  if (b < batch)
    static_cast<T*>(p.y)[i] = static_cast<T>(silu(fmaf(last, to_f32(static_cast<const T*>(p.now)[b * p.now_stride + c]), sum)));
}

template <class T>
__global__ void shift_window_kernel(WindowMove move) {
  let_next_kernel_start();
  move_window<T>(move, blockIdx.x);
}

// --- launches -------------------------------------------------------------------------------------------------

GpuSizes sizes_of(const CudaContext& cuda) {
  return {cuda.shared_memory_per_block, cuda.sm_count};
}
/// Up to how many rows every block forms those of x itself. More are formed once, by a kernel in front, where the product behind it fits:
/// faster on an H200 by what each kind has to form (docs/bench/2026-12-01-decode.md), and to the same bits.
constexpr int64_t kJoinedNorms = kRowsOfGroup, kJoinedGates = 1, kJoinedConvolutions = 2;

struct Way {
  ProductCut cut;
  bool joined;
};
Way way_of(const Tensor& weight, int64_t batch, int64_t most_joined, int64_t floats_ahead, int64_t rows_of_few_warps = 1) {
  const ProductSizes sizes{weight.dim(0), weight.dim(1), batch, size_of(weight.dtype()), floats_ahead, rows_of_few_warps};
  const GpuSizes gpu = sizes_of(weight.device().cuda_context());
  if (batch > most_joined) {
    const ProductCut formed = cut_formed_product(sizes, gpu);
    if (formed.fits || batch > kRowsOfGroup) return {formed, false};
  }
  return {cut_product(sizes, gpu), true};
}

Product product_of(const Tensor& weight, const Tensor& out, const ProductCut& cut) {
  const int64_t width = weight.dim(1);
  return {weight.raw(),
          out.raw(),
          weight.dim(0),
          static_cast<int>(width),
          static_cast<int>(shared_stride(width, size_of(weight.dtype()))),
          static_cast<int>(out.dim(0)),
          cut.rows_log2,
          1.0f / static_cast<float>(width)};
}

WindowMove move_of(const Tensor& window, const Tensor& now) {
  if (!window || window.numel() == 0) return {};
  return {window.raw(),
          now.raw(),
          now.stride(0),
          static_cast<int>(window.dim(0)),
          static_cast<int>(window.dim(1)),
          static_cast<int>(window.dim(2))};
}
unsigned blocks_of(const WindowMove& move, int threads) {
  const int64_t count = int64_t{move.batch} * move.channels;
  return move.window == nullptr ? 0 : static_cast<unsigned>((count + threads - 1) / threads);
}

template <int i>
constexpr std::integral_constant<int, i> kConstant;

/// Calls f with an element of the dtype's type.
template <class F>
void with_type(Dtype dtype, const F& f) {
  dtype == Dtype::f32 ? f(0.0f) : f(__nv_bfloat16());
}

/// x, formed in front of it, times weight
template <class T, class Out>
void formed_projection(const Product& product, const ProductCut& cut, const Tensor& x, const float* scale, const CudaContext& cuda) {
  FormedArgs args{product, x.raw(), scale, product.batch};
  args.product.batch = kPass;
  launch_overlapping(&formed_projection_kernel<T, Out>, "formed_projection_kernel", cut.resident, cut.warps * kWarp,
                     static_cast<size_t>(cut.shared_bytes), cuda, args, cut.blocks);
}

}  // namespace

bool few_rows_fit_cuda(const Tensor& weight, int64_t rows, int64_t floats_ahead) {
  return way_of(weight, rows, kRowsOfGroup, floats_ahead).cut.fits;
}

void norm_projection_cuda(const NormProjection& p, const Tensor& sum) {
  if (p.out.numel() == 0) return;
  const CudaContext& cuda = p.weight.device().cuda_context();
  const int64_t B = p.out.dim(0);
  const auto [cut, joined] = way_of(p.weight, B, kJoinedNorms, p.weight.dim(1));
  const NormArgs args{
      product_of(p.weight, p.out, cut),       p.residual.data<float>(),  p.norm.data<float>(),    p.branch ? p.branch.raw() : nullptr,
      p.branch ? sum.data<float>() : nullptr, static_cast<float>(p.eps), move_of(p.window, p.now)};
  const auto start = [&](auto element, auto out) {
    using T = decltype(element);
    using Out = decltype(out);
    if (!joined) {
      const Tensor x = Tensor::empty(p.weight.device(), p.weight.dtype(), {B, p.weight.dim(1)});
      const Tensor rstd = Tensor::empty(x.device(), Dtype::f32, {B});
      launch_overlapping(&form_norm_kernel<T>, "form_norm_kernel", static_cast<unsigned>(B) + blocks_of(args.move, kSumThreads),
                         kSumThreads, 0, cuda, args, static_cast<T*>(x.raw()), rstd.data<float>());
      return formed_projection<T, Out>(args.product, cut, x, rstd.data<float>(), cuda);
    }
    const auto launch = [&](auto n, auto warps) {
      constexpr int kThreads = warps() * kWarp;
      launch_overlapping(&norm_projection_kernel<T, Out, n(), warps()>, "norm_projection_kernel",
                         cut.resident + blocks_of(args.move, kThreads), kThreads, static_cast<size_t>(cut.shared_bytes), cuda, args,
                         cut.blocks, cut.resident);
    };
    if (cut.warps == kProductWarps) launch(kConstant<1>, kConstant<kProductWarps>);
    else if (B <= 4) launch(kConstant<4>, kConstant<2 * kProductWarps>);
    else launch(kConstant<kGroup>, kConstant<2 * kProductWarps>);
  };
  with_type(p.weight.dtype(), [&](auto element) { p.out.dtype() == Dtype::f32 ? start(element, 0.0f) : start(element, element); });
}

void gated_projection_cuda(const GatedProjection& p) {
  if (p.out.numel() == 0) return;
  const CudaContext& cuda = p.weight.device().cuda_context();
  const int64_t B = p.out.dim(0);
  const auto [cut, joined] = way_of(p.weight, B, kJoinedGates, p.norm ? p.norm.dim(0) : 0, 0);  // 0: many warps for one row, too
  const GateArgs args{product_of(p.weight, p.out, cut),
                      p.y.raw(),
                      p.z.raw(),
                      p.y.stride(0),
                      p.z.stride(0),
                      p.norm ? p.norm.data<float>() : nullptr,
                      p.norm ? static_cast<int>(p.norm.dim(0)) : 0,
                      static_cast<float>(p.eps),
                      static_cast<int>(p.norm ? p.groups : 1),
                      p.norm_before_gate,
                      move_of(p.window, p.now)};
  with_type(p.weight.dtype(), [&](auto element) {
    using T = decltype(element);
    if (!joined) {
      const Tensor x = Tensor::empty(p.weight.device(), p.weight.dtype(), {B, p.weight.dim(1)});
      launch_overlapping(&form_gated_kernel<T>, "form_gated_kernel",
                         static_cast<unsigned>(B * args.groups) + blocks_of(args.move, kSumThreads), kSumThreads, 0, cuda, args,
                         static_cast<T*>(x.raw()));
      return formed_projection<T, T>(args.product, cut, x, nullptr, cuda);
    }
    const auto launch = [&](auto n) {
      constexpr int kWarps = 2 * kProductWarps, kThreads = kWarps * kWarp;
      launch_overlapping(&gated_projection_kernel<T, n(), kWarps>, "gated_projection_kernel", cut.resident + blocks_of(args.move, kThreads),
                         kThreads, static_cast<size_t>(cut.shared_bytes), cuda, args, cut.blocks, cut.resident);
    };
    const int groups = args.product.batch * args.groups;
    groups <= 4 ? launch(kConstant<4>) : launch(kConstant<kGroup>);
  });
}

void convolved_projection_cuda(const ConvolvedProjection& p) {
  if (p.out.numel() == 0) return;
  const CudaContext& cuda = p.weight.device().cuda_context();
  const int64_t B = p.now.dim(0), floats_ahead = p.now.numel() + p.now.dim(1);
  const bool ahead = way_of(p.weight, B, kJoinedConvolutions, 0).joined && few_rows_fit_cuda(p.weight, B, floats_ahead);
  const auto [cut, joined] = way_of(p.weight, B, kJoinedConvolutions, ahead ? floats_ahead : 0);
  const ConvolvedArgs args{product_of(p.weight, p.out, cut),
                           p.now.raw(),
                           p.window.raw(),
                           p.now.stride(0),
                           p.conv_weight.data<float>(),
                           p.conv_bias ? p.conv_bias.data<float>() : nullptr,
                           p.y.raw(),
                           static_cast<int>(p.conv_weight.dim(2)),
                           ahead};
  with_type(p.weight.dtype(), [&](auto element) {
    using T = decltype(element);
    if (!joined) {
      launch_overlapping(&form_convolved_kernel<T>, "form_convolved_kernel",
                         static_cast<unsigned>((p.now.numel() + kSumThreads - 1) / kSumThreads), kSumThreads, 0, cuda, args,
                         args.product.batch);
      return formed_projection<T, T>(args.product, cut, p.y, nullptr, cuda);
    }
    const auto launch = [&](auto warps) {
      launch_overlapping(&convolved_projection_kernel<T, warps()>, "convolved_projection_kernel", cut.resident, warps() * kWarp,
                         static_cast<size_t>(cut.shared_bytes), cuda, args, cut.blocks);
    };
    cut.warps == kProductWarps ? launch(kConstant<kProductWarps>) : launch(kConstant<2 * kProductWarps>);
  });
}

void shift_window_cuda(const Tensor& window, const Tensor& now) {
  const WindowMove move = move_of(window, now);
  if (move.window == nullptr) return;
  constexpr int kThreads = 256;
  const dim3 grid(blocks_of(move, kThreads));
  with_type(window.dtype(), [&](auto element) {
    launch_overlapping(&shift_window_kernel<decltype(element)>, "shift_window_kernel", grid, kThreads, 0, window.device().cuda_context(),
                       move);
  });
}

}  // namespace longhand
