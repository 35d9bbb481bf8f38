// gemm on the CPU: tiles of C, each one call of single-threaded OpenBLAS, shared out over the OpenMP threads. One pool of threads serves
// the whole program that way (OpenBLAS's own pool would fight OpenMP's for the cores), and since the tiles depend on the shape alone, the
// number of threads does not change a bit of the result.
#include <cblas.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "ops/common/gemm.h"

namespace longhand {
namespace {

// Larger tiles pack their operands less often (6% of the time instead of 10%), smaller ones can be shared by more threads.
struct Tile {
  int64_t rows, columns;
};
constexpr Tile kLargeTile{512, 1024}, kSmallTile{256, 512};
constexpr int64_t kLargeTilesAtLeast = 8;
constexpr int64_t kSerialProducts = 1 << 16;  // below this many multiplications, waking the other threads costs more than it brings

blasint blas_int(int64_t value) {
  return static_cast<blasint>(value);
}

void blas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, GemmShape s, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
               float beta, float* c, int64_t ldc) {
  cblas_sgemm(CblasRowMajor, ta, tb, blas_int(s.m), blas_int(s.n), blas_int(s.k), alpha, a, blas_int(lda), b, blas_int(ldb), beta, c,
              blas_int(ldc));
}
void blas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, GemmShape s, double alpha, const double* a, int64_t lda, const double* b,
               int64_t ldb, double beta, double* c, int64_t ldc) {
  cblas_dgemm(CblasRowMajor, ta, tb, blas_int(s.m), blas_int(s.n), blas_int(s.k), alpha, a, blas_int(lda), b, blas_int(ldb), beta, c,
              blas_int(ldc));
}
void blas_gemv(int64_t rows, int64_t columns, float alpha, const float* a, int64_t lda, const float* x, float beta, float* y) {
  cblas_sgemv(CblasRowMajor, CblasNoTrans, blas_int(rows), blas_int(columns), alpha, a, blas_int(lda), x, 1, beta, y, 1);
}
void blas_gemv(int64_t rows, int64_t columns, double alpha, const double* a, int64_t lda, const double* x, double beta, double* y) {
  cblas_dgemv(CblasRowMajor, CblasNoTrans, blas_int(rows), blas_int(columns), alpha, a, blas_int(lda), x, 1, beta, y, 1);
}

// Elements between the beginnings of two rows; a single row may have any stride.
int64_t leading(const Tensor& t) {
  return t.dim(0) == 1 ? t.dim(1) : t.stride(0);
}

void require_blas_size(const Tensor& t) {
  constexpr int64_t kLimit = std::numeric_limits<blasint>::max();
  if (leading(t) > kLimit || t.dim(0) > kLimit)
    throw ShapeError("gemm: a matrix is larger than the BLAS can index", {{"matrix", t.describe()}, {"limit", std::to_string(kLimit)}});
}

template <class T>
void tiled_gemm(const GemmShape& shape, bool transpose_a, const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& c, T alpha,
                T beta) {
  const T* a_data = a.data<T>();
  const T* b_data = b.data<T>();
  T* c_data = c.data<T>();
  const int64_t lda = leading(a), ldb = leading(b), ldc = leading(c);
  const bool one_token = shape.m == 1 && transpose_b && (!transpose_a || lda == 1);  // decoding: read the weight once, row by row
  const bool large = shape.m * shape.n >= kLargeTilesAtLeast * kLargeTile.rows * kLargeTile.columns;
  const Tile tile_size = large ? kLargeTile : kSmallTile;
  const int64_t tile_m = std::min(shape.m, tile_size.rows), tile_n = std::min(shape.n, tile_size.columns);
  const int64_t tiles_m = (shape.m + tile_m - 1) / tile_m, tiles_n = (shape.n + tile_n - 1) / tile_n;
  const bool parallel = tiles_m * tiles_n > 1 && shape.m * shape.n * shape.k > kSerialProducts;
#pragma omp parallel for schedule(dynamic) if (parallel)
  for (int64_t tile = 0; tile < tiles_m * tiles_n; ++tile) {
    const int64_t i = tile / tiles_n * tile_m, j = tile % tiles_n * tile_n;
    const GemmShape part{std::min(tile_m, shape.m - i), std::min(tile_n, shape.n - j), shape.k};
    const T* a_tile = a_data + (transpose_a ? i : i * lda);
    const T* b_tile = b_data + (transpose_b ? j * ldb : j);
    T* c_tile = c_data + i * ldc + j;
    if (one_token) {
      if (beta == T(0)) std::fill(c_tile, c_tile + part.n, T(0));  // BLAS versions differ on 0 * NaN here
      blas_gemv(part.n, part.k, alpha, b_tile, ldb, a_tile, beta, c_tile);
    } else {
      blas_gemm(transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans, part, alpha, a_tile, lda, b_tile, ldb,
                beta, c_tile, ldc);
    }
  }
}

}  // namespace

void gemm_cpu(const GemmShape& shape, bool transpose_a, const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& c, double alpha,
              double beta, const Tensor& row) {
  static const bool single_threaded = (openblas_set_num_threads(1), true);
  (void)single_threaded;
  for (const Tensor* matrix : {&a, &b, &c}) require_blas_size(*matrix);
  if (row) {
    const auto size = static_cast<std::size_t>(size_of(c.dtype()));
    for (int64_t r = 0; r < shape.m; ++r)
      std::memcpy(static_cast<char*>(c.raw()) + static_cast<std::size_t>(r * c.stride(0)) * size, row.raw(),
                  static_cast<std::size_t>(shape.n) * size);
    beta = 1;
  }
  if (a.dtype() == Dtype::f64) tiled_gemm<double>(shape, transpose_a, a, transpose_b, b, c, alpha, beta);
  else tiled_gemm<float>(shape, transpose_a, a, transpose_b, b, c, static_cast<float>(alpha), static_cast<float>(beta));
}

}  // namespace longhand
