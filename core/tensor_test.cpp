// Views, copies and conversions of tensors.
#include <bit>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/tensor.h"
#include "core/upload.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {
const Device kCpu = Device::cpu();

Tensor counting(Shape shape) {
  std::vector<float> values(static_cast<std::size_t>(shape.numel()));
  std::iota(values.begin(), values.end(), 0.0f);
  return Tensor::from(kCpu, shape, values);
}
}  // namespace

TEST("slices and selections are views of the same storage") {
  const Tensor t = counting({2, 3, 4});
  const Tensor middle = t.slice(1, 1, 2);
  CHECK(middle.same_storage(t));
  CHECK(middle.to_vector<float>() == std::vector<float>{4, 5, 6, 7, 16, 17, 18, 19});
  CHECK(t.select(0, 1).to_vector<float>()[0] == 12);
  CHECK(t.slice(-1, 2, 4).to_vector<float>() == std::vector<float>{2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23});
  CHECK_THROWS_AS(t.slice(1, 2, 4), ShapeError);
  CHECK_THROWS_AS(t.select(-1, 0), ShapeError);
  CHECK_THROWS_AS(t.select(-4, 0), ShapeError);
}

TEST("reshape splits and joins axes of a strided view without a copy") {
  const Tensor whole = counting({2, 3, 10});
  const Tensor part = whole.slice(-1, 2, 8);  // [2, 3, 6], row stride 10
  const Tensor heads = part.reshape({2, 3, 2, 3});
  CHECK(heads.same_storage(whole));
  CHECK(heads.to_vector<float>() == part.to_vector<float>());
  CHECK(part.reshape({6, 6}).to_vector<float>() == part.to_vector<float>());
  CHECK(heads.reshape({6, 2, 3}).stride(0) == 10);
  CHECK(part.slice(0, 1, 2).reshape({1, 3, 2, 3}).stride(0) == 30);  // of the only row: kernels ask it whether rows are aligned
  CHECK(part.reshape({1, 2, 3, 1, 6}).to_vector<float>() == part.to_vector<float>());
  CHECK_THROWS_AS(part.reshape({36}), ShapeError);  // no single stride
  CHECK_THROWS_AS(part.reshape({2, 18}), ShapeError);
  CHECK_THROWS_AS(part.reshape({5, 7}), ShapeError);  // another number of elements
  CHECK(whole.slice(0, 0, 1).reshape({30}).numel() == 30);
  const Tensor column = whole.slice(-1, 4, 5);  // [2, 3, 1], row stride 10
  CHECK(column.reshape({6, 1}).to_vector<float>() == column.to_vector<float>());
  CHECK_THROWS_AS(column.reshape({2, 3}), ShapeError);  // the last axis would have stride 10
}

TEST("a shape with more elements than can be counted is refused") {
  CHECK_THROWS_AS(Tensor::empty(kCpu, Dtype::f64, {int64_t{1} << 31, int64_t{1} << 30}), ShapeError);
  CHECK_THROWS_AS(Tensor::empty(kCpu, Dtype::u8, {int64_t{1} << 40, int64_t{1} << 40}), ShapeError);
  for (const Shape& empty : {Shape{0, int64_t{1} << 40, int64_t{1} << 40}, Shape{int64_t{1} << 40, int64_t{1} << 40, 0}}) {
    CHECK_THROWS_AS(Tensor::empty(kCpu, Dtype::u8, empty), ShapeError);  // no element, but strides that overflow
    CHECK_THROWS_AS(Tensor::borrow(Dtype::u8, empty, &empty, nullptr), ShapeError);
  }
}

TEST("rows are seen through strided views, and refused where there is no one stride") {
  const Tensor whole = counting({2, 3, 10});
  const Rows rows = rows_of(whole.slice(-1, 0, 4), "test");
  CHECK(rows.count == 6);
  CHECK(rows.width == 4);
  CHECK(rows.stride == 10);
  CHECK_THROWS_AS(rows_of(whole.slice(1, 0, 2), "test"), ShapeError);
  CHECK(rows_of(whole.slice(0, 0, 1), "test").count == 3);
  CHECK(rows_of(Tensor::empty(kCpu, Dtype::f32, {0, 5, 8}), "test").count == 0);
}

TEST("copies convert element types and follow strides") {
  const Tensor t = counting({4, 6});
  const Tensor half = t.to(Dtype::bf16).to(Dtype::f64);
  CHECK(half.to_vector<double>() == t.to_vector<double>());
  const Tensor target = Tensor::zeros(kCpu, Dtype::f32, {4, 8});
  copy(target.slice(-1, 1, 7), t);
  CHECK(target.to_vector<float>()[9] == 6);
  CHECK(target.to_vector<float>()[0] == 0);
  CHECK_THROWS_AS(copy(target, t), ShapeError);
  CHECK(t.slice(-1, 0, 2).clone().is_contiguous());
  CHECK_THROWS_AS(t.data<double>(), DtypeError);
  CHECK_THROWS_AS(Tensor().device(), ValueError);
}

TEST("add_scaled, multiply and fill work on views and on bf16") {
  const Tensor a = Tensor::full(kCpu, Dtype::bf16, {2, 4}, 1.0);
  add_scaled(a.slice(-1, 1, 3), Tensor::full(kCpu, Dtype::f32, {2, 2}, 2.0), 0.5);
  CHECK(a.to_vector<float>() == std::vector<float>{1, 2, 2, 1, 1, 2, 2, 1});
  multiply(a, 3);
  CHECK(a.to_vector<float>()[1] == 6);
}

TEST("scalars have rank 0") {
  const Tensor s = Tensor::full(kCpu, Dtype::f32, {}, 2.5);
  CHECK(s.numel() == 1);
  CHECK(s.item() == 2.5);
  CHECK_THROWS_AS(counting({2}).item(), ShapeError);
}

TEST("the first NaN is found") {
  const Tensor t = Tensor::from(kCpu, {3}, std::vector<float>{1, NAN, INFINITY});
  CHECK(first_non_finite(t) == 1);
  CHECK(first_non_finite(counting({3})) == -1);
  for (const Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16}) {
    const Tensor large = Tensor::full(kCpu, dtype, {400'003}, -60'000);
    CHECK(first_non_finite(large) == -1);
    for (const int64_t at : {400'002, 300'000, 16'384, 16'383}) {
      fill(large.slice(0, at, at + 1), -INFINITY);
      CHECK(first_non_finite(large) == at);
    }
  }
}

TEST("tensors of f16 are widened as single numbers are, every value") {
  std::vector<f16> all(65536);
  for (uint32_t bits = 0; bits < all.size(); ++bits) all[bits].bits = static_cast<uint16_t>(bits);
  const auto widened = Tensor::from(kCpu, {65536}, all).to_vector<float>();
  for (uint32_t bits = 0; bits < all.size(); ++bits)
    if (std::bit_cast<uint32_t>(widened[bits]) != std::bit_cast<uint32_t>(static_cast<float>(all[bits]))) FAIL_CHECK(bits);
}

TEST("large tensors are converted like small ones") {
  const Tensor large = counting({300, 1001});
  for (const Dtype dtype : {Dtype::f64, Dtype::f16, Dtype::bf16}) {
    const Tensor converted = large.to(dtype);
    for (const int64_t row : {0, 123, 299})
      CHECK(converted.slice(0, row, row + 1).to_vector<float>() == large.slice(0, row, row + 1).clone().to(dtype).to_vector<float>());
  }
}

TEST("CUDA tensors copy, convert and fill like CPU tensors") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const Tensor t = counting({3, 5, 7});
  const Tensor g = t.to(gpu);
  CHECK(g.to_vector<float>() == t.to_vector<float>());
  CHECK(g.slice(-1, 1, 4).to_vector<float>() == t.slice(-1, 1, 4).to_vector<float>());
  CHECK(g.to(Dtype::bf16).to_vector<float>() == t.to(Dtype::bf16).to_vector<float>());
  CHECK(g.to(Dtype::f16).to(Dtype::f32).to_vector<float>() == t.to_vector<float>());
  const Tensor view = g.slice(1, 1, 3);
  fill(view, 2.0);
  multiply(view, 2.0);
  add_scaled(view, Tensor::full(gpu, Dtype::bf16, {3, 2, 7}, 1.0), 0.5);
  CHECK(view.to_vector<float>() == std::vector<float>(42, 4.5f));
  CHECK(g.to_vector<float>()[0] == 0);
  CHECK(g.to_vector<float>()[8 * 7] == 56);  // outside the view nothing changed
  const Tensor ids = Tensor::full(gpu, Dtype::i32, {5}, 7);
  CHECK(ids.to_vector<int32_t>() == std::vector<int32_t>(5, 7));
}

TEST("upload: values arrive that the host forgets at once; a CPU has none") {
  CHECK_THROWS_AS(upload_to(counting({3})), DeviceError);
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const Tensor to = Tensor::empty(gpu, Dtype::i32, {1000}), work = Tensor::empty(gpu, Dtype::f32, {int64_t{1} << 26});
  const auto upload = upload_to(to);
  std::vector<Tensor> seen;
  for (int32_t turn = 0; turn < 50; ++turn) {
    std::vector<int32_t> values(1000, turn);
    fill(work, turn);  // the copy waits behind it, while the host is at the next values already
    upload->send(std::as_bytes(std::span(values)));
    values.assign(1000, -1);
    seen.push_back(to.clone());
  }
  for (int32_t turn = 0; turn < 50; ++turn)
    CHECK(seen[static_cast<std::size_t>(turn)].to_vector<int32_t>() == std::vector<int32_t>(1000, turn));
  const std::vector<int32_t> few(3);
  CHECK_THROWS_AS(upload->send(std::as_bytes(std::span(few))), ValueError);
}
