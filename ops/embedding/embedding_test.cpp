// embedding: the lookup, sums over repeated ids, bad ids, the GPU against the CPU.
#include "ops/embedding/embedding.h"

#include <cmath>

#include "autograd/gradcheck.h"
#include "autograd/parameters.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/philox.h"
#include "core/switches.h"
#include "tests/support/parity.h"

using namespace longhand;
using namespace longhand::test;

namespace {

void set_poison(Switches& s) {
  s.poison = true;
}

Tensor ids_of(Shape shape, const std::vector<int32_t>& values) {
  return Tensor::from(Device::cpu(), shape, values);
}

Tensor random_ids(int64_t count, int64_t vocab, uint64_t seed) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i)
    ids.push_back(static_cast<int32_t>(philox_u64(seed, static_cast<uint64_t>(i)) % static_cast<uint64_t>(vocab)));
  return ids_of({1, count}, ids);
}

}  // namespace

TEST("embedding: rows of the table, and a gradient that counts how often each was read") {
  const SwitchScope poison(set_poison);
  const Variable w = Variable::leaf(Tensor::from<float>(Device::cpu(), {3, 2}, {1, 2, 3, 4, 5, 6}));
  const Variable y = embedding(ids_of({2, 2}, {2, 0, 2, 2}), w, Dtype::f32);
  CHECK(y.shape() == Shape{2, 2, 2});
  CHECK(y.value().to_vector<double>() == std::vector<double>{5, 6, 1, 2, 5, 6, 5, 6});
  backward({y}, {Tensor::full(Device::cpu(), Dtype::f32, {2, 2, 2}, 1.0)});
  CHECK(w.grad().to_vector<double>() == std::vector<double>{1, 1, 0, 0, 3, 3});
}

TEST("embedding: gradient of the table") {
  const SwitchScope poison(set_poison);
  const Tensor tokens = random_ids(12, 5, 1);
  const auto result = gradcheck([&](const auto& v) { return std::vector{embedding(tokens, v[0], Dtype::f64)}; },
                                {random_tensor(Device::cpu(), Dtype::f64, {5, 70}, 2)});
  CHECK_MESSAGE(result.worst < 1e-7, result.where);
}

TEST("embedding: a parameter's place is overwritten by the first contribution and added to by the next") {
  ParameterSet set;
  Parameter* w = set.declare("w", {3, 1}, {init_constant(0)});
  set.allocate(Device::cpu(), Dtype::f32, Dtype::f32);
  fill(set.flat_grad(), std::nan(""));
  const Tensor one = Tensor::full(Device::cpu(), Dtype::f32, {1, 2, 1}, 1.0);
  for (int i = 0; i < 2; ++i) backward({embedding(ids_of({1, 2}, {0, 2}), w->variable, Dtype::f32)}, {one});
  CHECK(w->grad.to_vector<double>() == std::vector<double>{2, 0, 2});
}

TEST("embedding: an id outside the table is named with its position") {
  const Tensor w = Tensor::zeros(Device::cpu(), Dtype::f32, {3, 2});
  CHECK_THROWS_WITH_AS(embedding(ids_of({2, 2}, {0, 1, 2, 3}), w, Dtype::f32), doctest::Contains("[1, 1]"), ValueError);
  CHECK_THROWS_WITH_AS(embedding(ids_of({2, 2}, {0, -7, 2, 3}), w, Dtype::f32), doctest::Contains("-7"), ValueError);
  CHECK_THROWS_AS(embedding(ids_of({1, 1}, {0}), w, Dtype::bf16), DtypeError);
  CHECK(embedding(ids_of({0, 4}, {}), w, Dtype::f32).shape() == Shape{0, 4, 2});
}

TEST("embedding: CUDA agrees with the CPU at runs around the pieces, odd widths and both dtypes") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope poison(set_poison);
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  for (const Dtype w_dtype : {Dtype::f32, Dtype::bf16}) {
    for (const Dtype y_dtype : {Dtype::f32, Dtype::bf16}) {
      for (const int64_t width : {1, 33, 64, 1100}) {
        for (const int64_t vocab : {1, 3, 97}) {
          for (const int64_t count : {1, 31, 32, 33, 65, 1000}) {
            if (is_left_out()) continue;
            const Tensor tokens = random_ids(count, vocab, static_cast<uint64_t>(count));
            const Tensor table = random_tensor(cpu, w_dtype, {vocab, width}, 1), g = random_tensor(cpu, y_dtype, {1, count, width}, 2);
            const Tensor sink = Tensor::full(gpu, Dtype::f32, {vocab, width}, std::nan(""));
            const Variable w = Variable::leaf(table.to(Dtype::f32)), w_gpu = Variable::parameter(table.to(gpu), sink, "w");
            const Variable y = embedding(tokens, w, Dtype::f32), y_gpu = embedding(tokens.to(gpu), w_gpu, y_dtype);
            backward({y}, {g.to(Dtype::f32)});
            backward({y_gpu}, {g.to(gpu)});
            const std::string what = table.describe() + " rows " + std::to_string(count);
            expect_close(y_gpu.value().to_vector<double>(), y.value().to_vector<double>(),
                         y_dtype == w_dtype || y_dtype == Dtype::f32 ? 0 : 0x1p-8, 1e-30, what);
            expect_close(sink.to_vector<double>(), w.grad().to_vector<double>(), 1e-5, 1e-3, what + " grad");
            const auto once = sink.to_vector<double>();
            backward({embedding(tokens.to(gpu), w_gpu, y_dtype)}, {g.to(gpu)});  // adds the same again: exactly twice, if the bits repeat
            auto twice = once;
            for (double& v : twice) v *= 2;
            CHECK(sink.to_vector<double>() == twice);
          }
        }
      }
    }
  }
}

TEST("embedding: CUDA never reads or writes outside the table for a bad id, and the row is NaN") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const Tensor tokens = ids_of({1, 4}, {1, 3, -1, 0}).to(gpu);
  const Variable w = Variable::leaf(Tensor::full(gpu, Dtype::f32, {3, 2}, 1.0));
  const Variable y = embedding(tokens, w, Dtype::f32);
  const auto values = y.value().to_vector<double>();
  for (std::size_t i = 0; i < values.size(); ++i) CHECK(std::isnan(values[i]) == (i / 2 == 1 || i / 2 == 2));
  backward({y}, {Tensor::full(gpu, Dtype::f32, {1, 4, 2}, 1.0)});
  CHECK(w.grad().to_vector<double>() == std::vector<double>{1, 1, 1, 1, 0, 0});
  const SwitchScope check([](Switches& s) { s.check = true; });
  CHECK_THROWS_WITH_AS(embedding(tokens, w, Dtype::f32), doctest::Contains("[0, 1]"), ValueError);
}
