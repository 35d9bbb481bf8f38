// Tile products for warps, one form for bf16 (tensor cores) and f32 (plain FMA, no TF32).
// A warp's accumulator of a 16 x 8n tile is acc[n][4]; with g = lane / 4 and q = lane % 4, acc[j][0..1] are (row g, columns 8j + 2q, 8j +
// 2q + 1) and acc[j][2..3] the same columns of row g + 8, for both dtypes, so that everything around the products is written once.
#pragma once
#include "ops/common/matrix_instructions.cuh"

namespace longhand {

using Bf16 = __nv_bfloat16;
constexpr int kChunk = 64;  // tokens per chunk on CUDA

enum class Stored { as_is, transposed };
// Left operand  [m, k]: as_is is a[m * stride + k], transposed is a[k * stride + m].
// Right operand [k, n]: as_is is b[k * stride + n], transposed is b[n * stride + k].

/// Row stride in shared memory of a tile of `width` columns: 16 bytes more, so that matrix loads of eight rows hit all banks once.
template <class T>
constexpr int tile_stride(int width) {
  return width + 16 / static_cast<int>(sizeof(T));
}

template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ Bf16 narrow<Bf16>(float v) {
  return __float2bfloat16(v);
}
__device__ __forceinline__ float widen(float v) {
  return v;
}
__device__ __forceinline__ float widen(Bf16 v) {
  return __bfloat162float(v);
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, float low, float high) {
  const float2 v = unpack(pair);
  return pack(v.x * low, v.y * high);
}

/// The left operand of a product: 16 rows, 16 of the summed index.
template <class T>
struct Left;

template <>
struct Left<Bf16> {
  uint32_t r[4];

  template <Stored stored>
  __device__ __forceinline__ static Left load(const Bf16* a, int stride) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8, second_m = (matrix & 1) * 8, second_k = (matrix & 2) * 4;
    Left left;
    if constexpr (stored == Stored::as_is) load_matrices(left.r, a + (row + second_m) * stride + second_k);
    else load_matrices_transposed(left.r, a + (row + second_k) * stride + second_m);
    return left;
  }
  /// From the accumulators of two neighbouring 8-column tiles.
  __device__ __forceinline__ static Left from(const float (&first)[4], const float (&second)[4]) {
    return {{pack(first[0], first[1]), pack(first[2], first[3]), pack(second[0], second[1]), pack(second[2], second[3])}};
  }
  /// a[m, k] *= weight[k]
  __device__ __forceinline__ void scale_sum_index(const float* weight) {
    const int k = 2 * (threadIdx.x % 4);
    const float w0 = weight[k], w1 = weight[k + 1], w8 = weight[k + 8], w9 = weight[k + 9];
    r[0] = scale_pair(r[0], w0, w1);
    r[1] = scale_pair(r[1], w0, w1);
    r[2] = scale_pair(r[2], w8, w9);
    r[3] = scale_pair(r[3], w8, w9);
  }
  /// Rows g and g + 8 of the warp's lanes times these.
  __device__ __forceinline__ void scale_rows(float low, float high) {
    r[0] = scale_pair(r[0], low, low);
    r[1] = scale_pair(r[1], high, high);
    r[2] = scale_pair(r[2], low, low);
    r[3] = scale_pair(r[3], high, high);
  }
  /// a[m, k] *= weight[m * stride + k]; stride even, weight aligned to 8 bytes
  __device__ __forceinline__ void scale_elements(const float* weight, int stride) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const float2 w = *reinterpret_cast<const float2*>(weight + (g + (x & 1) * 8) * stride + 2 * q + (x & 2) * 4);
      r[x] = scale_pair(r[x], w.x, w.y);
    }
  }
  /// Adds the operand, its rows g and g + 8 times these, to two neighbouring accumulator tiles whose columns are the summed index.
  __device__ __forceinline__ void add_to(float (&first)[4], float (&second)[4], float low, float high) const {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const float2 v = unpack(r[x]);
      float* to = (x & 2 ? second : first) + (x & 1) * 2;
      to[0] += (x & 1 ? high : low) * v.x;
      to[1] += (x & 1 ? high : low) * v.y;
    }
  }
  /// Only rows [8 * half, 8 * half + 8) stay; likewise for the summed index.
  __device__ __forceinline__ void keep_rows(int half) {
#pragma unroll
    for (int x = 0; x < 4; ++x)
      if ((x & 1) != half) r[x] = 0;
  }
  __device__ __forceinline__ void keep_sum_index(int half) {
#pragma unroll
    for (int x = 0; x < 4; ++x)
      if (x / 2 != half) r[x] = 0;
  }
};

template <>
struct Left<float> {
  float v[2][16];

  template <Stored stored>
  __device__ __forceinline__ static Left load(const float* a, int stride) {
    const int g = threadIdx.x % 32 / 4;
    Left left;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      left.v[0][k] = stored == Stored::as_is ? a[g * stride + k] : a[k * stride + g];
      left.v[1][k] = stored == Stored::as_is ? a[(g + 8) * stride + k] : a[k * stride + g + 8];
    }
    return left;
  }
  __device__ __forceinline__ static Left from(const float (&first)[4], const float (&second)[4]) {
    const int quad = threadIdx.x % 32 / 4 * 4;
    Left left;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      left.v[0][k] = __shfl_sync(0xffffffffu, first[k % 2], quad + k / 2);
      left.v[1][k] = __shfl_sync(0xffffffffu, first[2 + k % 2], quad + k / 2);
      left.v[0][8 + k] = __shfl_sync(0xffffffffu, second[k % 2], quad + k / 2);
      left.v[1][8 + k] = __shfl_sync(0xffffffffu, second[2 + k % 2], quad + k / 2);
    }
    return left;
  }
  __device__ __forceinline__ void scale_sum_index(const float* weight) {
#pragma unroll
    for (int k = 0; k < 16; ++k) v[0][k] *= weight[k], v[1][k] *= weight[k];
  }
  __device__ __forceinline__ void scale_rows(float low, float high) {
#pragma unroll
    for (int k = 0; k < 16; ++k) v[0][k] *= low, v[1][k] *= high;
  }
  __device__ __forceinline__ void scale_elements(const float* weight, int stride) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int k = 0; k < 16; ++k) v[0][k] *= weight[g * stride + k], v[1][k] *= weight[(g + 8) * stride + k];
  }
  __device__ __forceinline__ void add_to(float (&first)[4], float (&second)[4], float low, float high) const {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (k / 2 == q) {
        first[k % 2] += low * v[0][k];
        first[2 + k % 2] += high * v[1][k];
        second[k % 2] += low * v[0][8 + k];
        second[2 + k % 2] += high * v[1][8 + k];
      }
  }
  __device__ __forceinline__ void keep_rows(int half) {
#pragma unroll
    for (int k = 0; k < 16; ++k) v[1 - half][k] = 0;
  }
  __device__ __forceinline__ void keep_sum_index(int half) {
#pragma unroll
    for (int k = 0; k < 8; ++k) v[0][8 * (1 - half) + k] = 0, v[1][8 * (1 - half) + k] = 0;
  }
};

/// acc [16, 16 * pairs] += left [16, 16] * b [16, ..]; only the pairs of 8-column tiles [begin, end).
template <Stored stored, int pairs>
__device__ __forceinline__ void multiply(float (&acc)[2 * pairs][4], const Left<Bf16>& left, const Bf16* b, int stride, int begin = 0,
                                         int end = pairs) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8, second_k = (matrix & 1) * 8, second_n = (matrix & 2) * 4;
#pragma unroll
  for (int pair = 0; pair < pairs; ++pair) {
    if (pair < begin || pair >= end) continue;
    uint32_t r[4];
    if constexpr (stored == Stored::as_is) load_matrices_transposed(r, b + (row + second_k) * stride + 16 * pair + second_n);
    else load_matrices(r, b + (16 * pair + row + second_n) * stride + second_k);
    multiply_bf16(acc[2 * pair], left.r, r[0], r[1]);
    multiply_bf16(acc[2 * pair + 1], left.r, r[2], r[3]);
  }
}

template <Stored stored, int pairs>
__device__ __forceinline__ void multiply(float (&acc)[2 * pairs][4], const Left<float>& left, const float* b, int stride, int begin = 0,
                                         int end = pairs) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < 2 * pairs; ++tile) {
    if (tile / 2 < begin || tile / 2 >= end) continue;
    const int n = 8 * tile + 2 * q;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float b0 = stored == Stored::as_is ? b[k * stride + n] : b[n * stride + k];
      const float b1 = stored == Stored::as_is ? b[k * stride + n + 1] : b[(n + 1) * stride + k];
      acc[tile][0] += left.v[0][k] * b0;
      acc[tile][1] += left.v[0][k] * b1;
      acc[tile][2] += left.v[1][k] * b0;
      acc[tile][3] += left.v[1][k] * b1;
    }
  }
}

/// The same with every element of the right operand times its weight, f32, stored like it; bf16 rounds the product once.
template <Stored stored, int pairs>
__device__ __forceinline__ void multiply_weighted(float (&acc)[2 * pairs][4], const Left<Bf16>& left, const Bf16* b, int stride,
                                                  const float* weight, int weight_stride, int begin = 0, int end = pairs) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8, second_k = (matrix & 1) * 8, second_n = (matrix & 2) * 4;
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int pair = 0; pair < pairs; ++pair) {
    if (pair < begin || pair >= end) continue;
    uint32_t r[4];
    if constexpr (stored == Stored::as_is) load_matrices_transposed(r, b + (row + second_k) * stride + 16 * pair + second_n);
    else load_matrices(r, b + (16 * pair + row + second_n) * stride + second_k);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int n = 16 * pair + g + (x & 2) * 4, k = 2 * q + (x & 1) * 8;
      if constexpr (stored == Stored::as_is) {
        r[x] = scale_pair(r[x], weight[k * weight_stride + n], weight[(k + 1) * weight_stride + n]);
      } else {
        const float2 w = *reinterpret_cast<const float2*>(weight + n * weight_stride + k);
        r[x] = scale_pair(r[x], w.x, w.y);
      }
    }
    multiply_bf16(acc[2 * pair], left.r, r[0], r[1]);
    multiply_bf16(acc[2 * pair + 1], left.r, r[2], r[3]);
  }
}

template <Stored stored, int pairs>
__device__ __forceinline__ void multiply_weighted(float (&acc)[2 * pairs][4], const Left<float>& left, const float* b, int stride,
                                                  const float* weight, int weight_stride, int begin = 0, int end = pairs) {
  const int q = threadIdx.x % 4;
  const auto at = [](int k, int n, int row_stride) { return stored == Stored::as_is ? k * row_stride + n : n * row_stride + k; };
#pragma unroll
  for (int tile = 0; tile < 2 * pairs; ++tile) {
    if (tile / 2 < begin || tile / 2 >= end) continue;
    const int n = 8 * tile + 2 * q;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float b0 = b[at(k, n, stride)] * weight[at(k, n, weight_stride)],
                  b1 = b[at(k, n + 1, stride)] * weight[at(k, n + 1, weight_stride)];
      acc[tile][0] += left.v[0][k] * b0;
      acc[tile][1] += left.v[0][k] * b1;
      acc[tile][2] += left.v[1][k] * b0;
      acc[tile][3] += left.v[1][k] * b1;
    }
  }
}

template <int tiles>
__device__ __forceinline__ void clear(float (&acc)[tiles][4]) {
#pragma unroll
  for (int j = 0; j < tiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[j][e] = 0;
}

/// Two neighbouring elements of a row; `both` says that the second exists, `aligned` that they may be written at once.
__device__ __forceinline__ void store_two(float* to, float a, float b, bool both, bool aligned) {
  if (both && aligned) *reinterpret_cast<float2*>(to) = make_float2(a, b);
  else {
    to[0] = a;
    if (both) to[1] = b;
  }
}
__device__ __forceinline__ void store_two(Bf16* to, float a, float b, bool both, bool aligned) {
  if (both && aligned) *reinterpret_cast<uint32_t*>(to) = pack(a, b);
  else {
    to[0] = __float2bfloat16(a);
    if (both) to[1] = __float2bfloat16(b);
  }
}

/// Two neighbouring elements of a row, the first at an even place.
__device__ __forceinline__ float2 load_two(const float* from) {
  return *reinterpret_cast<const float2*>(from);
}
__device__ __forceinline__ float2 load_two(const Bf16* from) {
  return unpack(*reinterpret_cast<const uint32_t*>(from));
}

/// An accumulator tile [16, 8] with rows and columns exchanged: element (m, n) to tile[n * stride + m].
__device__ __forceinline__ void store_transposed(float* tile, int stride, const float (&acc)[4]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int e = 0; e < 4; ++e) tile[(2 * q + e % 2) * stride + g + e / 2 * 8] = acc[e];
}
__device__ __forceinline__ void store_transposed(Bf16* tile, int stride, const float (&acc)[4]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    *reinterpret_cast<uint32_t*>(tile + g * stride + 8 * half + 2 * q) = transpose_matrix(pack(acc[2 * half], acc[2 * half + 1]));
}

/// rows x width elements from global memory (rows `row_stride` apart) into a tile of tile_rows x tile_width, zeros around them.
/// vectors: 16-byte copies, where addresses, strides and width allow them (the launcher knows). Complete after copies_arrived() and a
/// barrier.
template <class T>
__device__ __forceinline__ void load_tile(T* tile, int tile_rows, int tile_width, const T* from, int64_t row_stride, int rows, int width,
                                          bool vectors) {
  const int stride = tile_stride<T>(tile_width);
  constexpr int unit = 16 / static_cast<int>(sizeof(T));
  if (vectors) {
    const int units = tile_width / unit;
    for (int i = static_cast<int>(threadIdx.x); i < tile_rows * units; i += static_cast<int>(blockDim.x)) {
      const int row = i / units, column = i % units * unit;
      copy_16_or_zero_async(tile + row * stride + column, from + row * row_stride + column, row < rows && column < width);
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < tile_rows * tile_width; i += static_cast<int>(blockDim.x)) {
      const int row = i / tile_width, column = i % tile_width;
      tile[row * stride + column] = row < rows && column < width ? from[row * row_stride + column] : narrow<T>(0.0f);
    }
  }
}

/// The same for widths known to the compiler, by `threads` threads (a multiple of the 16-byte units of a row) of which this is number
/// `thread`: a handful of instructions a copy.
template <int tile_width, class T>
__device__ __forceinline__ void load_tile(T* tile, int tile_rows, const T* from, int64_t row_stride, int rows, int width, bool vectors,
                                          int thread, int threads) {
  constexpr int stride = tile_stride<T>(tile_width), unit = 16 / static_cast<int>(sizeof(T)), units = tile_width / unit;
  if (vectors) {
    const int first = thread / units, column = thread % units * unit, step = threads / units;
    const int rows_here = column < width ? rows : 0;
    T* to = tile + first * stride + column;
    from += first * row_stride + column;
    for (int row = first; row < tile_rows; row += step, to += step * stride, from += step * row_stride)
      copy_16_or_zero_async(to, from, row < rows_here);
  } else {
    for (int i = thread; i < tile_rows * tile_width; i += threads) {
      const int row = i / tile_width, column = i % tile_width;
      tile[row * stride + column] = row < rows && column < width ? from[row * row_stride + column] : narrow<T>(0.0f);
    }
  }
}

/// A tile of 64 rows by `threads` threads, their number known to the compiler too.
template <int tile_width, int threads, class T>
__device__ __forceinline__ void load_chunk_tile(T* tile, const T* from, int64_t row_stride, int rows, int width, bool vectors,
                                                unsigned thread) {
  constexpr int stride = tile_stride<T>(tile_width), unit = 16 / static_cast<int>(sizeof(T)), units = tile_width / unit;
  constexpr int step = threads / units;
  static_assert(threads % units == 0 && kChunk % step == 0);
  if (vectors) {
    const int first = static_cast<int>(thread / units), column = static_cast<int>(thread % units * unit);
    const int rows_here = (column < width ? rows : 0) - first;
    T* const to = tile + first * stride + column;
    from += first * row_stride + column;
    const int64_t next = step * row_stride;
#pragma unroll
    for (int row = 0; row < kChunk; row += step, from += next) copy_16_or_zero_async(to + row * stride, from, row < rows_here);
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(thread); i < kChunk * tile_width; i += threads) {
      const int row = i / tile_width, column = i % tile_width;
      tile[row * stride + column] = row < rows && column < width ? from[row * row_stride + column] : narrow<T>(0.0f);
    }
  }
}

/// The first rows x width elements of a tile to global memory.
template <class T>
__device__ __forceinline__ void store_tile(T* to, int64_t row_stride, const T* tile, int tile_width, int rows, int width, bool vectors) {
  const int stride = tile_stride<T>(tile_width);
  constexpr int unit = 16 / static_cast<int>(sizeof(T));
  if (vectors) {
    const int units = width / unit;
    for (int i = static_cast<int>(threadIdx.x); i < rows * units; i += static_cast<int>(blockDim.x)) {
      const int row = i / units, column = i % units * unit;
      *reinterpret_cast<uint4*>(to + row * row_stride + column) = *reinterpret_cast<const uint4*>(tile + row * stride + column);
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < rows * width; i += static_cast<int>(blockDim.x))
      to[i / width * row_stride + i % width] = tile[i / width * stride + i % width];
  }
}

/// A part of a tile of any stride, part_width columns and part_rows rows of which rows and width exist, to global memory, by one warp.
template <int part_width, class T>
__device__ __forceinline__ void store_part(T* to, int64_t row_stride, const T* part, int stride, int rows, int part_rows, int width,
                                           bool vectors) {
  constexpr int unit = 16 / static_cast<int>(sizeof(T)), units = part_width / unit;
  constexpr int lanes = units < 32 ? units : 32;  // of a row at a time
  static_assert(32 % lanes == 0 && units % lanes == 0);
  const int lane = threadIdx.x % 32, last = rows < part_rows ? rows : part_rows;
  if (vectors) {
    const int first = lane / lanes;
    to += first * row_stride;
    part += first * stride;
    for (int row = first; row < last; row += 32 / lanes, to += 32 / lanes * row_stride, part += 32 / lanes * stride)
#pragma unroll
      for (int column = lane % lanes * unit; column < part_width; column += lanes * unit)
        if (column < width) *reinterpret_cast<uint4*>(to + column) = *reinterpret_cast<const uint4*>(part + column);
  } else {
    for (int i = lane; i < last * part_width; i += 32)
      if (i % part_width < width) to[i / part_width * row_stride + i % part_width] = part[i / part_width * stride + i % part_width];
  }
}

}  // namespace longhand
