// linear on CUDA where x is narrow: the product by itself, and all gradients in one pass over grad y.
//
// linear_narrow_product_kernel
// moves   x in, y out; weight and bias stay in registers
// flops   2 R in out, on tensor cores
// floor   32768 x 16 -> 512, bf16: 34.6 MB / 4.0 TB/s = 9 us on an H200
// split   a warp has 64 columns of y and walks over tiles of 16 rows, the next rows of x on their way. Which columns of y a product of 16 x
// 8
//         stands for is chosen such that a lane has 8 neighbours of them: 16 bytes
// needs   bf16, in = 16, out a multiple of 8 of at most 8192
// agrees  with a product of matrices but for the bias, which that rounds to bf16: one f32 sum, which begins with it, and one rounding
// order   every element is one product's: the same bits on every GPU
//
// linear_narrow_bwd_kernel
// moves   grad y and x in, grad x out; weight and its gradient stay on the SM, each block leaves one partial sum of them
// flops   4 R in out, on tensor cores, and out R more for the bias: a column of ones beside x
// floor   32768 x 16 -> 512, bf16: 35.7 MB / 4.0 TB/s = 9 us on an H200
// split   a block of 8 warps an SM walks over tiles of 64 rows, the next one on its way. For grad x warp w has rows 16 * (w % 4) and half
//         w / 4 of the sum, for the weight an eighth of its rows
// needs   bf16, in = 16, out a multiple of 8 from 136 to 1024, 16-byte copies. A tile has 256, 512 or 1024 columns; those behind out are
//         zeros, which cost no bytes of memory
// agrees  with products: f32 sums, one rounding of grad x
// order   rows are dealt to blocks by the GPU's size, partial sums are added in a fixed order: fixed for a build and a GPU
#include <algorithm>

#include "core/error.h"
#include "ops/common/cuda_math.cuh"
#include "ops/common/launch.cuh"
#include "ops/common/strided_rows.h"
#include "ops/common/sum_partials.h"
#include "ops/common/tile_product.cuh"
#include "ops/linear/linear_kernels.h"

namespace longhand {
namespace {

constexpr int kIn = 16, kThreads = 256, kInStride = tile_stride<Bf16>(kIn);

constexpr int kWarpColumns = 64, kRowTile = 16, kMostOut = 8192;
constexpr int64_t kBlocksOfMultiprocessor = 4;  // each group of columns has a warp from 4 multiprocessors on
static_assert(4 * kBlocksOfMultiprocessor * (kThreads / 32) >= kMostOut / kWarpColumns);

struct ProductArgs {
  const Bf16 *x, *weight;
  const void* bias;  // may be null
  Bf16* y;
  int64_t rows, x_stride, weight_stride, y_stride;
  int out;
  bool wide_bias;  // f32
};

__global__ void __launch_bounds__(kThreads) linear_narrow_product_kernel(const __grid_constant__ ProductArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, quad = lane % 4;
  const int64_t groups = (a.out + kWarpColumns - 1) / kWarpColumns, warps = int64_t{gridDim.x} * (kThreads / 32) / groups,
                unit = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (unit >= warps * groups) return;
  const int first_column = static_cast<int>(unit % groups) * kWarpColumns;

  // Products (half, j) give columns 32 half + 8 quad + 2 j and the next to a lane's quad, and have these as right operand's columns.
  uint32_t right[2][4][2];
  float bias[2][8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = first_column + 32 * half + 8 * quad;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      bias[half][i] = a.bias == nullptr || own >= a.out ? 0.0f
                      : a.wide_bias                     ? static_cast<const float*>(a.bias)[own + i]
                                                        : to_f32(static_cast<const Bf16*>(a.bias)[own + i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = first_column + 32 * half + 8 * (g / 2) + 2 * j + g % 2;
#pragma unroll
      for (int k8 = 0; k8 < 2; ++k8)
        right[half][j][k8] =
            column < a.out ? *reinterpret_cast<const uint32_t*>(a.weight + column * a.weight_stride + 8 * k8 + 2 * quad) : 0u;
    }
  }

  const auto load = [&](int64_t tile) {
    Left<Bf16> left;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows g and g + 8 of the first eight columns, then of the others
      const int64_t row = tile * kRowTile + g + i % 2 * 8;
      left.r[i] = row < a.rows ? *reinterpret_cast<const uint32_t*>(a.x + row * a.x_stride + i / 2 * 8 + 2 * quad) : 0u;
    }
    return left;
  };
  const int64_t tiles = (a.rows + kRowTile - 1) / kRowTile;
  Left<Bf16> next = load(unit / groups);
  for (int64_t tile = unit / groups; tile < tiles; tile += warps) {
    const Left<Bf16> left = next;
    next = load(tile + warps);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float y[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) y[j][e] = bias[half][2 * j + e % 2];
        multiply_bf16(y[j], left.r, right[half][j][0], right[half][j][1]);
      }
      const int column = first_column + 32 * half + 8 * quad;
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int64_t row = tile * kRowTile + g + 8 * lower;
        if (row < a.rows && column < a.out)
          *reinterpret_cast<uint4*>(a.y + row * a.y_stride + column) =
              make_uint4(pack(y[0][2 * lower], y[0][2 * lower + 1]), pack(y[1][2 * lower], y[1][2 * lower + 1]),
                         pack(y[2][2 * lower], y[2][2 * lower + 1]), pack(y[3][2 * lower], y[3][2 * lower + 1]));
      }
    }
  }
}

struct NarrowArgs {
  const Bf16 *grad_y, *x, *weight;
  void* grad_x;
  float* partials;  // [blocks, out * in + out]: of the weight, of the bias
  int64_t rows, grad_y_stride, x_stride, weight_stride, grad_x_stride;
  int out;
  float beta;  // of grad x
  bool wide;   // grad x is f32
};

template <int columns>
struct Layout {
  static constexpr int stride = tile_stride<Bf16>(columns), stages = columns <= 512 ? 2 : 1;
  static constexpr int tile = kChunk * stride, x_tile = kChunk * kInStride, stage = tile + x_tile;  // elements
  static constexpr int weight = stages * stage, total_bytes = (weight + columns * kInStride) * 2 + kChunk * kIn * 4;
};

template <int columns>
__global__ void __launch_bounds__(kThreads, 1) linear_narrow_bwd_kernel(const __grid_constant__ NarrowArgs a) {
  using L = Layout<columns>;
  constexpr int own_tiles = columns / 128;  // 16 rows of the weight each
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, quad = lane % 4;
  const int row_tile = 16 * (warp % 4), half = warp / 4;
  Bf16* const tiles = reinterpret_cast<Bf16*>(shared_memory());
  Bf16* const weight = tiles + L::weight;
  float* const other_half = reinterpret_cast<float*>(weight + columns * kInStride);  // [64][in]

  for (int u = thread; u < columns * kIn / 8; u += kThreads)
    copy_16_or_zero_async(weight + u / 2 * kInStride + u % 2 * 8, a.weight + u / 2 * a.weight_stride + u % 2 * 8, u / 2 < a.out);
  const int64_t count = (a.rows + kChunk - 1) / kChunk;
  const auto fetch = [&](int64_t at, int stage) {
    const int rows = static_cast<int>(std::min<int64_t>(a.rows - at * kChunk, kChunk));
    Bf16* const to = tiles + stage * L::stage;
    load_chunk_tile<columns, kThreads>(to, a.grad_y + at * kChunk * a.grad_y_stride, a.grad_y_stride, rows, a.out, true, thread);
    if (thread < 2 * kChunk)
      copy_16_or_zero_async(to + L::tile + thread / 2 * kInStride + thread % 2 * 8,
                            a.x + (at * kChunk + thread / 2) * a.x_stride + thread % 2 * 8, thread / 2 < rows);
  };

  float grad_weight[own_tiles][2][4], grad_bias[own_tiles][4];
#pragma unroll
  for (int m = 0; m < own_tiles; ++m) clear(grad_weight[m]);
  clear(grad_bias);
  const uint32_t ones = g == 0 ? 0x3f803f80u : 0;  // of a right operand whose first column is ones
  int stage = 0;
  if (L::stages > 1) fetch(blockIdx.x, 0);
  for (int64_t at = blockIdx.x; at < count; at += gridDim.x) {
    if constexpr (L::stages > 1) {
      copies_arrived();
      __syncthreads();  // this tile is here, and the one before has been read
      if (at + gridDim.x < count) fetch(at + gridDim.x, stage ^ 1);
    } else {
      __syncthreads();
      fetch(at, 0);
      copies_arrived();
      __syncthreads();
    }
    const Bf16* const grad_y = tiles + stage * L::stage;
    const Bf16* const x = grad_y + L::tile;
    if (L::stages > 1) stage ^= 1;

    float grad_x[2][4];
    clear(grad_x);
#pragma unroll 4
    for (int k16 = 0; k16 < columns / 32; ++k16) {
      const int column = half * (columns / 2) + 16 * k16;
      multiply<Stored::as_is, 1>(grad_x, Left<Bf16>::load<Stored::as_is>(grad_y + row_tile * L::stride + column, L::stride),
                                 weight + column * kInStride, kInStride);
    }
#pragma unroll
    for (int k16 = 0; k16 < kChunk / 16; ++k16)
#pragma unroll
      for (int m = 0; m < own_tiles; ++m) {
        const Left<Bf16> left =
            Left<Bf16>::load<Stored::transposed>(grad_y + 16 * k16 * L::stride + warp * (columns / 8) + 16 * m, L::stride);
        multiply<Stored::as_is, 1>(grad_weight[m], left, x + 16 * k16 * kInStride, kInStride);
        multiply_bf16(grad_bias[m], left.r, ones, ones);
      }

    const auto place = [&](int n8, int lower) { return other_half + (row_tile + g + 8 * lower) * kIn + 8 * n8 + 2 * quad; };
    if (half == 1)
#pragma unroll
      for (int n8 = 0; n8 < 2; ++n8)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) store_two(place(n8, lower), grad_x[n8][2 * lower], grad_x[n8][2 * lower + 1], true, true);
    __syncthreads();
    if (half == 1) continue;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int64_t row = at * kChunk + row_tile + g + 8 * lower;
      if (row >= a.rows) continue;
#pragma unroll
      for (int n8 = 0; n8 < 2; ++n8) {
        const float2 other = load_two(place(n8, lower));
        float first = grad_x[n8][2 * lower] + other.x, second = grad_x[n8][2 * lower + 1] + other.y;
        const int64_t to = row * a.grad_x_stride + 8 * n8 + 2 * quad;
        const auto put = [&](auto* grad) {
          if (a.beta != 0) {
            const float2 before = load_two(grad);
            first += a.beta * before.x;
            second += a.beta * before.y;
          }
          store_two(grad, first, second, true, true);
        };
        if (a.wide) put(static_cast<float*>(a.grad_x) + to);
        else put(static_cast<Bf16*>(a.grad_x) + to);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < own_tiles; ++m)
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int of_weight = warp * (columns / 8) + 16 * m + g + 8 * lower;
      if (of_weight >= a.out) continue;
      float* const partial = a.partials + int64_t{blockIdx.x} * a.out * (kIn + 1);
#pragma unroll
      for (int n8 = 0; n8 < 2; ++n8)
        store_two(partial + of_weight * kIn + 8 * n8 + 2 * quad, grad_weight[m][n8][2 * lower], grad_weight[m][n8][2 * lower + 1], true,
                  true);
      if (quad == 0) partial[a.out * kIn + of_weight] = grad_bias[m][2 * lower];
    }
}

constexpr int kPack = 8, kPair = 2;  // bf16 that are moved at a time

bool moves_by(int elements, const Tensor& t) {
  return t.dtype() == Dtype::bf16 && t.stride(1) == 1 && t.stride(0) % elements == 0 &&
         reinterpret_cast<uintptr_t>(t.raw()) % (2 * static_cast<uintptr_t>(elements)) == 0;
}

// Where partial sums are added up: the gradient of a weight that was computed itself is not f32.
class SumPlace {
 public:
  explicit SumPlace(const Accumulation& wanted) : wanted_(wanted) {
    const Tensor& to = wanted.destination;
    if (to.dtype() != Dtype::f32 || !to.is_contiguous()) own_ = Tensor::empty(to.device(), Dtype::f32, to.shape());
  }
  Accumulation target() const { return own_.defined() ? Accumulation{own_, 0} : wanted_; }
  void finish() const {
    const Tensor& to = wanted_.destination;
    if (own_.defined()) wanted_.beta == 0 ? copy(to, own_) : add_scaled(to, own_.to(to.dtype()));
  }

 private:
  Accumulation wanted_;
  Tensor own_;
};

template <int columns>
void backward(const NarrowGradients& n) {
  const CudaContext& context = n.grad_y.device().cuda_context();
  const int64_t rows = n.grad_y.dim(0), out = n.weight.dim(0), blocks = std::min<int64_t>((rows + kChunk - 1) / kChunk, context.sm_count);
  const Tensor partials = Tensor::empty(n.grad_y.device(), Dtype::f32, {blocks, out * (kIn + 1)});
  const Tensor x = moves_by(kPack, n.x) ? n.x : n.x.clone();
  const Tensor to = n.grad_x.destination.reshape({rows, kIn});
  const bool in_place =
      to.stride(1) == 1 && to.stride(0) % 2 == 0 && reinterpret_cast<uintptr_t>(to.raw()) % (2 * size_of(to.dtype())) == 0;
  const Tensor grad_x = in_place ? to : Tensor::empty(to.device(), to.dtype(), to.shape());
  const NarrowArgs args{address_of<const Bf16>(n.grad_y),
                        address_of<const Bf16>(x),
                        address_of<const Bf16>(n.weight),
                        grad_x.raw(),
                        partials.data<float>(),
                        rows,
                        n.grad_y.stride(0),
                        x.stride(0),
                        n.weight.stride(0),
                        grad_x.stride(0),
                        static_cast<int>(out),
                        in_place ? static_cast<float>(n.grad_x.beta) : 0.0f,
                        grad_x.dtype() == Dtype::f32};
  if (blocks > 0)
    launch(&linear_narrow_bwd_kernel<columns>, "linear_narrow_bwd_kernel", dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
           static_cast<size_t>(Layout<columns>::total_bytes), context, args);
  if (!in_place) n.grad_x.beta == 0 ? copy(to, grad_x) : add_scaled(to, grad_x);
  const SumPlace grad_weight(n.grad_weight), grad_bias(n.grad_bias);
  sum_partials_cuda(partials, grad_weight.target(), grad_bias.target());
  grad_weight.finish();
  grad_bias.finish();
}

}  // namespace

bool linear_narrow_product_fits_cuda(const NarrowProduct& p) {
  const int64_t out = p.weight.dim(0);
  return p.weight.dim(1) == kIn && out % 8 == 0 && out > 0 && out <= kMostOut && moves_by(kPair, p.x) && moves_by(kPair, p.weight) &&
         moves_by(kPack, p.y) && (!p.bias || p.bias.is_contiguous());
}

void linear_narrow_product_cuda(const NarrowProduct& p) {
  const CudaContext& context = p.x.device().cuda_context();
  const int64_t rows = p.x.dim(0), out = p.weight.dim(0);
  if (rows == 0) return;
  const ProductArgs args{address_of<const Bf16>(p.x),
                         address_of<const Bf16>(p.weight),
                         p.bias ? p.bias.raw() : nullptr,
                         address_of<Bf16>(p.y),
                         rows,
                         p.x.stride(0),
                         p.weight.stride(0),
                         p.y.stride(0),
                         static_cast<int>(out),
                         p.bias && p.bias.dtype() == Dtype::f32};
  constexpr int64_t warps_of_block = kThreads / 32;
  const int64_t units = (out + kWarpColumns - 1) / kWarpColumns * ((rows + kRowTile - 1) / kRowTile),
                blocks = std::min((units + warps_of_block - 1) / warps_of_block, kBlocksOfMultiprocessor * context.sm_count);
  launch(&linear_narrow_product_kernel, "linear_narrow_product_kernel", dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, context,
         args);
}

bool linear_narrow_fits_cuda(const Tensor& grad_y, const Tensor& weight) {
  const int64_t out = weight.dim(0);
  return weight.dim(1) == kIn && out % 8 == 0 && out > 128 && out <= 1024 && moves_by(kPack, grad_y) && moves_by(kPack, weight) &&
         Layout<1024>::total_bytes <= weight.device().cuda_context().shared_memory_per_block;
}

void linear_narrow_bwd_cuda(const NarrowGradients& n) {
  const int64_t out = n.weight.dim(0);
  out <= 256 ? backward<256>(n) : out <= 512 ? backward<512>(n) : backward<1024>(n);
}

}  // namespace longhand
