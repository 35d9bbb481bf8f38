// gemm against a triple loop, and the GPU against the CPU.
#include "ops/common/gemm.h"

#include <omp.h>

#include <string>

#include "autograd/gradcheck.h"
#include "core/error.h"
#include "core/switches.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

struct Sizes {
  int64_t m, n, k;
};

/// A matrix inside a wider one, beginning at column `skip`: rows are `extra` elements further apart than they are wide.
Tensor matrix(Device device, Dtype dtype, int64_t rows, int64_t columns, uint64_t seed, int64_t extra = 0, int64_t skip = 0) {
  return random_tensor(device, dtype, {rows, columns + extra}, seed).slice(1, skip, skip + columns);
}

std::vector<double> product_by_hand(bool ta, const Tensor& a, bool tb, const Tensor& b, const Tensor& c, double alpha, double beta) {
  const auto av = a.to_vector<double>(), bv = b.to_vector<double>();
  auto cv = c.to_vector<double>();
  const auto m = static_cast<std::size_t>(c.dim(0)), n = static_cast<std::size_t>(c.dim(1)),
             k = static_cast<std::size_t>(a.dim(ta ? 0 : 1));
  for (std::size_t i = 0; i < m; ++i)
    for (std::size_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::size_t l = 0; l < k; ++l) sum += av[ta ? l * m + i : i * k + l] * bv[tb ? j * k + l : l * n + j];
      cv[i * n + j] = alpha * sum + (beta == 0 ? 0 : beta * cv[i * n + j]);
    }
  return cv;
}

void check_products(const Device& device, Dtype dtype, Dtype c_dtype, const Sizes& s, double tolerance) {
  for (const int64_t extra : {0, 3}) {
    for (const bool ta : {false, true}) {
      for (const bool tb : {false, true}) {
        for (const double beta : {0.0, 1.0, 0.5}) {
          const int64_t skip = extra / 2;
          const Tensor a = matrix(device, dtype, ta ? s.k : s.m, ta ? s.m : s.k, 1, extra, skip);
          const Tensor b = matrix(device, dtype, tb ? s.n : s.k, tb ? s.k : s.n, 2, extra, skip);
          const Tensor c = matrix(device, c_dtype, s.m, s.n, 3, extra, skip);
          const auto expected = product_by_hand(ta, a, tb, b, c, 0.75, beta);
          gemm(ta, a, tb, b, c, 0.75, beta);
          const double roundings = c_dtype == Dtype::bf16 && beta != 0 ? 2 : 1;  // the product, then the sum with the old C
          expect_close(
              c.to_vector<double>(), expected, roundings * tolerance, 1e-3,
              c.describe() + " k " + std::to_string(s.k) + (ta ? " A^T" : "") + (tb ? " B^T" : "") + " beta " + std::to_string(beta));
        }
      }
    }
  }
}

}  // namespace

TEST("gemm: a product worked by hand") {
  const Device cpu = Device::cpu();
  const Tensor a = Tensor::from<double>(cpu, {2, 3}, {1, 2, 3, 4, 5, 6}), b = Tensor::from<double>(cpu, {3, 2}, {1, 0, 0, 1, 2, 2});
  const Tensor c = Tensor::full(cpu, Dtype::f64, {2, 2}, 10.0);
  gemm(false, a, false, b, c, 1.0, 2.0);
  CHECK(c.to_vector<double>() == std::vector<double>{27, 28, 36, 37});
}

TEST("gemm: every transposition, row stride and beta agrees with a triple loop, at sizes around the tiles") {
  for (const Sizes& s : {Sizes{1, 1, 1}, {1, 600, 33}, {5, 97, 33}, {257, 3, 7}, {256, 513, 5}, {3, 1025, 40}}) {
    check_products(Device::cpu(), Dtype::f64, Dtype::f64, s, 1e-13);
    check_products(Device::cpu(), Dtype::f32, Dtype::f32, s, 1e-5);
  }
}

TEST("gemm: with beta 0 the old values are not read") {
  const SwitchScope poison([](Switches& s) { s.poison = true; });
  for (const int64_t m : {1, 4, 300}) {
    const Tensor a = random_tensor(Device::cpu(), Dtype::f32, {m, 8}, 1), b = random_tensor(Device::cpu(), Dtype::f32, {700, 8}, 2);
    const Tensor c = Tensor::empty(Device::cpu(), Dtype::f32, {m, 700});
    gemm(false, a, true, b, c);
    CHECK(first_non_finite(c) == -1);
  }
}

TEST("gemm: the number of threads does not change a bit") {
  const Tensor a = random_tensor(Device::cpu(), Dtype::f32, {300, 70}, 1), b = random_tensor(Device::cpu(), Dtype::f32, {900, 70}, 2);
  auto product = [&](int threads) {
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    const Tensor c = Tensor::empty(Device::cpu(), Dtype::f32, {300, 900});
    gemm(false, a, true, b, c);
    omp_set_num_threads(before);
    return c.to_vector<float>();
  };
  const auto one = product(1);
  CHECK(one == product(2));
  CHECK(one == product(5));
}

TEST("gemm: a row is added to every row of a product, at once or, where its columns are odd or it begins anywhere, before it") {
  std::vector<std::pair<Device, Dtype>> places{{Device::cpu(), Dtype::f64}, {Device::cpu(), Dtype::f32}};
  if (cuda_device_count() > 0) places.insert(places.end(), {{Device::cuda(), Dtype::f32}, {Device::cuda(), Dtype::bf16}});
  for (const auto& [device, dtype] : places)
    for (const Sizes& s : {Sizes{1, 1, 1}, {5, 97, 33}, {1, 64, 128}, {300, 512, 16}, {7, 24, 1}, {130, 72, 48}, {6, 40, 0}})
      for (const int64_t extra : {0, 3, 8}) {
        const Tensor a = matrix(device, dtype, s.m, s.k, 1, extra), b = matrix(device, dtype, s.n, s.k, 2, extra),
                     row = random_tensor(device, dtype, {extra % 8 + s.n}, 3).slice(0, extra % 8, extra % 8 + s.n),
                     c = matrix(device, dtype, s.m, s.n, 4, extra);
        const Tensor rows = Tensor::empty(device, dtype, {s.m, s.n});
        for (int64_t r = 0; r < s.m; ++r) copy(rows.slice(0, r, r + 1), row.reshape({1, s.n}));
        const auto expected = product_by_hand(false, a, true, b, rows, 1.0, 1.0);
        gemm_add_row(a, true, b, row, c);
        const double tolerance = dtype == Dtype::bf16 ? 0x1p-7 : dtype == Dtype::f32 ? 1e-5 : 1e-13;
        expect_close(c.to_vector<double>(), expected, tolerance, 1e-3, c.describe() + " k " + std::to_string(s.k));
      }
  const Tensor a = Tensor::zeros(Device::cpu(), Dtype::f32, {2, 3}), c = Tensor::zeros(Device::cpu(), Dtype::f32, {2, 2});
  CHECK_THROWS_WITH_AS(gemm_add_row(a, false, Tensor::zeros(Device::cpu(), Dtype::f32, {3, 2}), a.slice(0, 0, 1), c),
                       doctest::Contains("the row does not fit"), ShapeError);
}

TEST("gemm: without an inner axis C is only scaled") {
  const Tensor a = Tensor::zeros(Device::cpu(), Dtype::f64, {2, 0}), b = Tensor::zeros(Device::cpu(), Dtype::f64, {0, 3});
  const Tensor c = Tensor::full(Device::cpu(), Dtype::f64, {2, 3}, 4.0);
  gemm(false, a, false, b, c, 1.0, 0.5);
  CHECK(c.to_vector<double>() == std::vector<double>(6, 2.0));
  gemm(false, a, false, b, c);
  CHECK(c.to_vector<double>() == std::vector<double>(6, 0.0));
}

TEST("gemm: sizes and types that do not fit are named") {
  const Tensor a = Tensor::zeros(Device::cpu(), Dtype::f32, {2, 3}), b = Tensor::zeros(Device::cpu(), Dtype::f32, {4, 5});
  const Tensor c = Tensor::zeros(Device::cpu(), Dtype::f32, {2, 5}), wide = Tensor::zeros(Device::cpu(), Dtype::f64, {3, 5});
  CHECK_THROWS_AS(gemm(false, a, false, b, c), ShapeError);
  CHECK_THROWS_WITH_AS(gemm(false, a, false, wide, c), doctest::Contains("[3, 5] f64"), DtypeError);
}

TEST("as_matrix: a view where rows have one stride, a copy else") {
  const Tensor whole = random_tensor(Device::cpu(), Dtype::f32, {2, 5, 8}, 1);
  const Tensor columns = whole.slice(2, 2, 6), times = whole.slice(1, 1, 3);
  CHECK(as_matrix(columns).same_storage(whole));
  CHECK(as_matrix(columns).stride(0) == 8);
  CHECK_FALSE(as_matrix(times).same_storage(whole));
  CHECK(as_matrix(times).to_vector<float>() == times.to_vector<float>());
  CHECK(as_matrix(whole.slice(1, 4, 5)).same_storage(whole));  // the last token of each row
  CHECK(as_matrix(whole.slice(1, 4, 5)).stride(0) == 40);
}

TEST("gemm: CUDA agrees with a triple loop, whatever the widths and the alignment") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  for (const Sizes& s : {Sizes{1, 1, 1}, {5, 97, 33}, {1, 64, 128}, {64, 1, 16}, {7, 24, 1}, {130, 72, 48}, {128, 256, 64}}) {
    check_products(gpu, Dtype::f32, Dtype::f32, s, 1e-5);
    check_products(gpu, Dtype::bf16, Dtype::f32, s, 1e-5);     // products of bf16 are exact in f32
    check_products(gpu, Dtype::bf16, Dtype::bf16, s, 0x1p-8);  // one rounding of the result
  }
}

TEST("gemm: CUDA sums over many rows are whole, whatever their number") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{256, 64}, {64, 256}, {512, 64}, {96, 152}})
    for (const int64_t k : {16384, 16895, 16897, 16904, 17024, 32769}) {
      const Tensor a = random_tensor(Device::cpu(), Dtype::bf16, {k, m}, 1), b = random_tensor(Device::cpu(), Dtype::bf16, {k, n}, 2);
      const Tensor expected = Tensor::empty(Device::cpu(), Dtype::f64, {m, n}), c = Tensor::empty(Device::cuda(), Dtype::f32, {m, n});
      gemm(true, a.to(Dtype::f64), false, b.to(Dtype::f64), expected);
      gemm(true, a.to(Device::cuda()), false, b.to(Device::cuda()), c);
      // Tensor cores add 16 products at a time, and cut the sum off at 24 bits. A row that is lost would be 1e-2.
      const double tolerance = static_cast<double>(k) / 16 * 0x1p-24;
      expect_close(c.to_vector<double>(), expected.to_vector<double>(), tolerance, 1e-3,
                   std::to_string(m) + " x " + std::to_string(n) + " k " + std::to_string(k));
    }
}

TEST("gemm: CUDA agrees with the CPU where products are large, of few terms in many tiles and of others") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  struct Case {
    Sizes sizes;
    bool ta, tb, adds_row;
    Dtype c_dtype;
    double beta;
  };
  // 13 million results are tiles enough for 132 multiprocessors four times over; 2,048 terms are too many, and 4,096 rows of 512 too few.
  for (const Case& t : {Case{{4224, 3088, 768}, false, true, false, Dtype::bf16, 0},
                        {{4224, 3088, 256}, false, false, false, Dtype::bf16, 1},
                        {{3088, 4229, 520}, false, true, false, Dtype::f32, 0},
                        {{4224, 3088, 264}, true, false, false, Dtype::f32, 1},
                        {{4224, 3088, 272}, false, true, true, Dtype::bf16, 0},
                        {{4224, 3088, 2048}, false, true, false, Dtype::bf16, 0},
                        {{5632, 1024, 2048}, true, false, false, Dtype::f32, 0},  // a weight's gradient: tall tiles
                        {{5632, 1024, 4096}, true, false, false, Dtype::f32, 1},
                        {{5632, 1024, 2177}, true, false, false, Dtype::f32, 1},
                        {{4096, 512, 1024}, false, true, false, Dtype::bf16, 0}}) {
    const Sizes& s = t.sizes;
    const Device cpu = Device::cpu(), gpu = Device::cuda();
    const Tensor a = matrix(cpu, Dtype::bf16, t.ta ? s.k : s.m, t.ta ? s.m : s.k, 1),
                 b = matrix(cpu, Dtype::bf16, t.tb ? s.n : s.k, t.tb ? s.k : s.n, 2), c = matrix(cpu, t.c_dtype, s.m, s.n, 3),
                 row = random_tensor(cpu, Dtype::bf16, {s.n}, 4), a32 = a.to(Dtype::f32), b32 = b.to(Dtype::f32);
    const Tensor expected = c.to(Dtype::f32).clone(), actual = c.to(gpu);
    if (t.adds_row) {
      gemm_add_row(a32, t.tb, b32, row.to(Dtype::f32), expected);
      gemm_add_row(a.to(gpu), t.tb, b.to(gpu), row.to(gpu), actual);
    } else {
      gemm(t.ta, a32, t.tb, b32, expected, 1.0, t.beta);
      gemm(t.ta, a.to(gpu), t.tb, b.to(gpu), actual, 1.0, t.beta);
    }
    const double roundings = t.c_dtype == Dtype::bf16 && t.beta != 0 ? 2 : 1;
    expect_close(actual.to(cpu).to_vector<double>(), expected.to_vector<double>(), t.c_dtype == Dtype::bf16 ? roundings * 0x1p-8 : 1e-5,
                 1e-3, c.describe() + " k " + std::to_string(s.k) + (t.ta ? " A^T" : "") + (t.tb ? " B^T" : ""));
  }
}

TEST("gemm: CUDA keeps f32 products in f32") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  // 1 + 2^-12 has no TF32 and no bf16 form: its square would lose the 2^-11.
  const Tensor a = Tensor::full(gpu, Dtype::f32, {256, 256}, 1 + 0x1p-12), c = Tensor::empty(gpu, Dtype::f32, {256, 256});
  gemm(false, a, true, a, c);
  expect_close(c.to_vector<double>(), std::vector<double>(256 * 256, 256 * (1 + 0x1p-12) * (1 + 0x1p-12)), 2e-5);  // TF32: 5e-4
}
