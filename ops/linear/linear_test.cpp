// linear: gradients, strided rows, parameters, the GPU against the CPU.
#include "ops/linear/linear.h"

#include <cmath>
#include <string>

#include "autograd/gradcheck.h"
#include "autograd/parameters.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/switches.h"
#include "ops/linear/linear_kernels.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

Tensor random_f64(Shape shape, uint64_t seed) {
  return random_tensor(Device::cpu(), Dtype::f64, shape, seed);
}
// 3 x, whose gradient is written where the tape says.
Variable multiplied(const Variable& x) {
  const Tensor y = x.value().clone();
  multiply(y, 3);
  return record("multiplied", y, {x}, [](BackwardCall& call) {
    const Tensor grad = call.buffer(0);
    copy(grad, call.grad(0));
    multiply(grad, 3);
    call.set(0, grad);
  });
}
// Rows of a matrix from `first` on; their gradient comes as one of the whole.
Variable split_rows(const Variable& matrix, int64_t first) {
  const Tensor rows = matrix.value().slice(0, first, matrix.value().dim(0));
  return record("split_rows", rows, {matrix}, [first, shape = matrix.shape()](BackwardCall& call) {
    const Tensor grad = Tensor::zeros(Device::cpu(), Dtype::f64, shape);
    copy(grad.slice(0, first, shape[0]), call.grad(0));
    call.set(0, grad);
  });
}
void set_poison(Switches& s) {
  s.poison = true;
}

}  // namespace

TEST("linear: a case worked by hand") {
  const Device cpu = Device::cpu();
  const Tensor x = Tensor::from<double>(cpu, {1, 2, 2}, {1, 2, 3, 4}), w = Tensor::from<double>(cpu, {3, 2}, {1, 0, 0, 1, 1, 1});
  const Tensor b = Tensor::from<double>(cpu, {3}, {10, 20, 30});
  CHECK(linear(x, w, b).value().to_vector<double>() == std::vector<double>{11, 22, 33, 13, 24, 37});
  CHECK(linear(x, w).shape() == Shape{1, 2, 3});
}

TEST("linear: gradients of x, weight and bias") {
  const SwitchScope poison(set_poison);
  const std::vector<Tensor> inputs{random_f64({2, 3, 5}, 1), random_f64({4, 5}, 2), random_f64({4}, 3)};
  const auto result = gradcheck([](const auto& v) { return std::vector{linear(v[0], v[1], v[2])}; }, inputs);
  CHECK_MESSAGE(result.worst < 1e-7, result.where);
}

TEST("linear: gradients through views of one projection, written into one buffer") {
  const SwitchScope poison(set_poison);
  const std::vector<Tensor> inputs{random_f64({2, 3, 7}, 1), random_f64({4, 5}, 2), random_f64({3, 2}, 3)};
  const auto f = [](const std::vector<Variable>& v) {
    const auto parts = split(v[0], {5, 2});
    return std::vector{linear(parts[0], v[1]), linear(parts[1], v[2])};
  };
  const auto result = gradcheck(f, inputs);
  CHECK_MESSAGE(result.worst < 1e-7, result.where);
}

TEST("linear: rows that need two strides are copied, and give the same") {
  const Tensor whole = random_f64({2, 5, 4}, 1), w = random_f64({3, 4}, 2);
  const Tensor times = whole.slice(1, 1, 4);
  CHECK(linear(times, w).value().to_vector<double>() == linear(times.clone(), w).value().to_vector<double>());
}

TEST("linear: rows of a wide output begin at whole lines of the cache, also those of its gradient, and the numbers are the same") {
  const SwitchScope poison(set_poison);
  constexpr int64_t kOut = 1003, kFirst = 600;  // 1,003 doubles: 5 more make whole lines of 16
  const Tensor x = random_f64({2, 3, 4}, 1), w = random_f64({kOut, 4}, 2), g = random_f64({2, 3, kOut - kFirst}, 3);
  struct Outcome {
    std::vector<double> y, grad_x, grad_w;
  };
  const auto outcome = [&](bool whole) {
    const Variable in = Variable::leaf(x), weight = Variable::leaf(w);
    const Variable part = whole ? split(linear(in, weight), {kFirst, kOut - kFirst})[1] : linear(in, split_rows(weight, kFirst));
    if (whole) CHECK(part.value().stride(1) == 1008);
    backward({multiplied(part)}, {g});
    return Outcome{part.value().to_vector<double>(), in.grad().to_vector<double>(), weight.grad().to_vector<double>()};
  };
  const Outcome part = outcome(true), expected = outcome(false);
  expect_close(part.y, expected.y, 1e-14);
  expect_close(part.grad_x, expected.grad_x, 1e-12);
  expect_close(part.grad_w, expected.grad_w, 1e-13);
  CHECK(linear(x, random_f64({1000, 4}, 4)).value().is_contiguous() == false);
  CHECK(linear(x, random_f64({1008, 4}, 4)).value().is_contiguous());
  CHECK(linear(x, random_f64({33, 4}, 4)).value().is_contiguous());  // a third more memory for three columns: not worth it
}

TEST("linear: a parameter used twice sums both gradients in its place") {
  const SwitchScope poison(set_poison);
  ParameterSet set;
  Parameter* w = set.declare("w", {4, 5}, {init_normal(1.0)});
  Parameter* b = set.declare("b", {4}, {init_normal(1.0)});
  set.allocate(Device::cpu(), Dtype::f64, Dtype::f64);
  set.initialize(1);
  const Tensor x1 = random_f64({3, 5}, 1), x2 = random_f64({6, 5}, 2), g1 = random_f64({3, 4}, 3), g2 = random_f64({6, 4}, 4);
  const Variable leaf_w = Variable::leaf(w->master.clone()), leaf_b = Variable::leaf(b->master.clone());
  backward({linear(x1, leaf_w, leaf_b), linear(x2, leaf_w, leaf_b)}, {g1, g2});
  fill(set.flat_grad(), std::nan(""));  // what was there before does not matter
  backward({linear(x1, w->variable, b->variable), linear(x2, w->variable, b->variable)}, {g1, g2});
  expect_close(w->grad.to_vector<double>(), leaf_w.grad().to_vector<double>(), 1e-13, 1e-30, "weight");
  expect_close(b->grad.to_vector<double>(), leaf_b.grad().to_vector<double>(), 1e-13, 1e-30, "bias");
}

TEST("linear: no rows give no rows, and zero gradients") {
  const SwitchScope poison(set_poison);
  const Variable x = Variable::leaf(Tensor::zeros(Device::cpu(), Dtype::f32, {2, 0, 5})),
                 w = Variable::leaf(Tensor::zeros(Device::cpu(), Dtype::f32, {4, 5}));
  const Variable y = linear(x, w);
  CHECK(y.shape() == Shape{2, 0, 4});
  backward({y}, {Tensor::zeros(Device::cpu(), Dtype::f32, {2, 0, 4})});
  CHECK(w.grad().to_vector<double>() == std::vector<double>(20, 0.0));
}

TEST("linear: what does not fit is named") {
  const Tensor x = Tensor::zeros(Device::cpu(), Dtype::f32, {2, 3, 5}), w = Tensor::zeros(Device::cpu(), Dtype::f32, {4, 6});
  CHECK_THROWS_WITH_AS(linear(x, Variable::leaf(w, "layers.3.in_proj.weight")), doctest::Contains("layers.3.in_proj.weight"), ShapeError);
  CHECK_THROWS_AS(linear(x, Tensor::zeros(Device::cpu(), Dtype::f64, {4, 5})), DtypeError);
  CHECK_THROWS_WITH_AS(linear(x, Tensor::zeros(Device::cpu(), Dtype::f32, {4, 5}), Tensor::zeros(Device::cpu(), Dtype::f32, {5})),
                       doctest::Contains("bias"), ShapeError);
}

TEST("linear: CUDA agrees with the CPU, forward and backward, odd widths and strided rows") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope poison(set_poison);
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  struct Sizes {
    int64_t rows, in, out;
  };
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    const double tolerance = dtype == Dtype::f32 ? 1e-5 : 0x1p-7;  // bf16: the result's rounding, and the bias's
    for (const Sizes& s : {Sizes{1, 8, 16}, {5, 33, 97}, {3, 1, 1}, {64, 64, 48}, {0, 8, 8}}) {
      const Tensor wide = random_tensor(cpu, dtype, {1, s.rows, s.in + 3}, 1), w = random_tensor(cpu, dtype, {s.out, s.in}, 2);
      const Tensor bias = random_tensor(cpu, dtype, {s.out}, 3).to(Dtype::f32), g = random_tensor(cpu, dtype, {1, s.rows, s.out}, 4);
      auto run = [&](const Device& device, Dtype type) {
        const Variable x_wide = Variable::leaf(wide.to(device).to(type)), weight = Variable::leaf(w.to(device).to(type));
        const Variable b = Variable::leaf(bias.to(device));
        const Variable y = linear(split(x_wide, {s.in, 3})[0], weight, b);
        backward({y}, {g.to(device).to(type)});
        return std::vector{y.value().to_vector<double>(), x_wide.grad().to_vector<double>(), weight.grad().to_vector<double>(),
                           b.grad().to_vector<double>()};
      };
      const auto expected = run(cpu, Dtype::f32), actual = run(gpu, dtype);
      const char* names[] = {"y", "grad_x", "grad_weight", "grad_bias"};
      for (std::size_t i = 0; i < 4; ++i)
        expect_close(actual[i], expected[i], tolerance, 1e-3, std::string(names[i]) + " " + wide.describe());
    }
  }
}

TEST("linear: CUDA agrees with the CPU where a narrow input's gradients are formed in one pass, also into sums and odd rows") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope poison(set_poison);
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  constexpr int64_t in = 16;
  for (const int64_t rows : {0, 1, 63, 64, 200, 20000})
    for (const int64_t out : {128, 136, 256, 384, 512, 768, 1000, 1024, 1280})  // the first and the last by products
      for (const int64_t beside : {48, 3}) {  // columns of the projection in front of x: rows that move by 16 bytes, and others
        if (rows == 20000 && ((out != 512 && out != 384 && out != 768) || beside != 48)) continue;
        const Tensor wide = random_tensor(cpu, Dtype::bf16, {1, rows, beside + in}, 1);
        const Tensor w = random_tensor(cpu, Dtype::bf16, {out, in}, 2), g = random_tensor(cpu, Dtype::bf16, {1, rows, out}, 4);
        const Tensor bias = random_tensor(cpu, Dtype::bf16, {out}, 3).to(Dtype::f32);
        const auto run = [&](const Device& device, Dtype type, bool twice) {
          const Variable x_wide = Variable::leaf(wide.to(device).to(type)), weight = Variable::leaf(w.to(device).to(type));
          const Variable b = Variable::leaf(bias.to(device));
          const Variable x = split(multiplied(x_wide), {beside, in})[1];
          std::vector<Variable> roots{linear(x, weight, b)};
          std::vector<Tensor> grads{g.to(device).to(type)};
          if (twice) roots.push_back(linear(x, weight, b)), grads.push_back(grads[0]);
          backward(roots, grads);
          return std::vector{x_wide.grad().to_vector<double>(), weight.grad().to_vector<double>(), b.grad().to_vector<double>()};
        };
        for (const bool twice : {false, true}) {
          const auto expected = run(cpu, Dtype::f32, twice), actual = run(gpu, Dtype::bf16, twice);
          const char* names[] = {"grad_x", "grad_weight", "grad_bias"};
          for (std::size_t i = 0; i < 3; ++i)
            expect_close(actual[i], expected[i], 0x1p-6, 1e-3,
                         std::string(names[i]) + (twice ? ", twice, " : ", ") + wide.describe() + " out " + std::to_string(out));
        }
      }
}

TEST("linear: on CUDA one pass forms a narrow input's gradients for 16 inputs and 136 to 1024 outputs, products do for others") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const auto one_pass = [&](int64_t in, int64_t out, Dtype dtype = Dtype::bf16, int64_t padding = 0) {
    const Tensor grad_y = Tensor::zeros(gpu, dtype, {3, out + padding}).slice(1, 0, out), weight = Tensor::zeros(gpu, dtype, {out, in});
    return on_device<decltype(linear_narrow_fits_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(linear_narrow_fits_cuda))(grad_y, weight);
  };
  if (!one_pass(16, 512)) SKIP("this GPU has too little shared memory a block");
  for (const int64_t out : {136, 256, 384, 768, 1024}) CHECK(one_pass(16, out));  // keys of all heads of GLA's recipes of 45m to 1.3b
  for (const int64_t out : {16, 128, 260, 1032, 1280}) CHECK_FALSE(one_pass(16, out));
  for (const int64_t in : {8, 15, 24, 32}) CHECK_FALSE(one_pass(in, 512));
  CHECK_FALSE(one_pass(16, 512, Dtype::f32));
  CHECK(one_pass(16, 512, Dtype::bf16, 8));
  CHECK_FALSE(one_pass(16, 512, Dtype::bf16, 4));
}
