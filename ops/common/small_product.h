// Small matrix products for the CPU's chunked ops: both operands in the first-level cache, accumulators in registers.
#pragma once
#include <cstdint>

namespace longhand {

/// A matrix whose element (i, k) is data[i * rows + k * columns]: any strides, because its elements are broadcast one by one.
template <class T>
struct Broadcast {
  const T* data;
  int64_t rows, columns;
};

namespace small_product_detail {

#ifdef __AVX512F__
constexpr int kVectorBytes = 64, kTileRows = 8;
#else
constexpr int kVectorBytes = 32, kTileRows = 4;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

/// c[0..R) x [0..C vectors) += a * b over k.
template <class T, int R, int C>
inline void tile(int64_t depth, Broadcast<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride) {
  using V = typename VectorOf<T>::type;
  constexpr int64_t width = kVectorBytes / static_cast<int64_t>(sizeof(T));
  V sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) sum[r][v] = *reinterpret_cast<const V*>(c + r * c_stride + v * width);
  for (int64_t k = 0; k < depth; ++k) {
    V row[C];
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) row[v] = *reinterpret_cast<const V*>(b + k * b_stride + v * width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T factor = a.data[r * a.rows + k * a.columns];
#pragma GCC unroll 2
      for (int v = 0; v < C; ++v) sum[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) *reinterpret_cast<V*>(c + r * c_stride + v * width) = sum[r][v];
}

template <class T, int R>
inline void row_block(int64_t n, int64_t depth, Broadcast<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride) {
  constexpr int64_t width = kVectorBytes / static_cast<int64_t>(sizeof(T));
  int64_t j = 0;
  for (; j + 2 * width <= n; j += 2 * width) tile<T, R, 2>(depth, a, b + j, b_stride, c + j, c_stride);
  for (; j + width <= n; j += width) tile<T, R, 1>(depth, a, b + j, b_stride, c + j, c_stride);
  for (int r = 0; r < R && j < n; ++r)
    for (int64_t k = 0; k < depth; ++k) {
      const T factor = a.data[r * a.rows + k * a.columns];
      for (int64_t jj = j; jj < n; ++jj) c[r * c_stride + jj] += factor * b[k * b_stride + jj];
    }
}

}  // namespace small_product_detail

/// c[i, j] += sum_k a(i, k) * b[k, j] for i < m, j < n, k < depth; rows of b and c contiguous.
template <class T>
void add_product(int64_t m, int64_t n, int64_t depth, Broadcast<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride) {
  using namespace small_product_detail;
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows)
    row_block<T, kTileRows>(n, depth, {a.data + i * a.rows, a.rows, a.columns}, b, b_stride, c + i * c_stride, c_stride);
  for (; i < m; ++i) row_block<T, 1>(n, depth, {a.data + i * a.rows, a.rows, a.columns}, b, b_stride, c + i * c_stride, c_stride);
}

/// The same for a lower triangular a: row i uses k <= i only. Whole row blocks take the entries above the diagonal along, which must be 0.
template <class T>
void add_lower_product(int64_t m, int64_t n, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c, int64_t c_stride) {
  constexpr int64_t block = 16;
  for (int64_t i = 0; i < m; i += block) {
    const int64_t rows = m - i < block ? m - i : block;
    add_product<T>(rows, n, i + rows, {a + i * a_stride, a_stride, 1}, b, b_stride, c + i * c_stride, c_stride);
  }
}

/// c[j, :] += sum_{i >= j} a[i, j] * b[i, :]: the transpose of a lower triangular a.
template <class T>
void add_lower_transposed_product(int64_t m, int64_t n, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                                  int64_t c_stride) {
  constexpr int64_t block = 16;
  for (int64_t j = 0; j < m; j += block) {
    const int64_t rows = m - j < block ? m - j : block;
    add_product<T>(rows, n, m - j, {a + j * a_stride + j, 1, a_stride}, b + j * b_stride, b_stride, c + j * c_stride, c_stride);
  }
}

/// to[j, i] = from[i, j] for i < m, j < n.
template <class T>
void transpose(int64_t m, int64_t n, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < m; i0 += block)
    for (int64_t j0 = 0; j0 < n; j0 += block)
      for (int64_t j = j0; j < n && j < j0 + block; ++j)
        for (int64_t i = i0; i < m && i < i0 + block; ++i) to[j * to_stride + i] = from[i * from_stride + j];
}

}  // namespace longhand
