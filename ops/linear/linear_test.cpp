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

TEST("linear: on CUDA 16 inputs have a product of their own, with and without a bias, for all sizes, strides and tails") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope poison(set_poison);
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  constexpr int64_t in = 16;
  const auto fits = [&](const Tensor& x, const Tensor& weight, const Tensor& y) {
    return on_device<decltype(linear_narrow_product_fits_cuda)>(gpu, nullptr,
                                                                LONGHAND_CUDA_IMPL(linear_narrow_product_fits_cuda))({x, weight, {}, y});
  };
  const auto empty = [&](int64_t rows, int64_t columns, Dtype dtype = Dtype::bf16) { return Tensor::zeros(gpu, dtype, {rows, columns}); };
  CHECK(fits(empty(3, in), empty(512, in), empty(3, 512)));
  CHECK(fits(empty(3, 40).slice(1, 24, 40), empty(8, in), empty(3, 16).slice(1, 0, 8)));
  CHECK_FALSE(fits(empty(3, 40).slice(1, 3, 19), empty(8, in), empty(3, 8)));
  CHECK_FALSE(fits(empty(3, in), empty(12, in), empty(3, 12)));
  CHECK_FALSE(fits(empty(3, in), empty(8, in), empty(3, 12).slice(1, 0, 8)));
  CHECK_FALSE(fits(empty(3, in), empty(8200, in), empty(3, 8200)));
  CHECK_FALSE(fits(empty(3, in), empty(8, 17).slice(1, 0, in), empty(3, 8)));
  CHECK_FALSE(fits(empty(3, in), empty(8, 18).slice(1, 1, 17), empty(3, 8)));
  CHECK_FALSE(fits(empty(3, 32), empty(8, 32), empty(3, 8)));
  CHECK_FALSE(fits(empty(3, in, Dtype::f32), empty(8, in, Dtype::f32), empty(3, 8, Dtype::f32)));

  for (const int64_t rows : {0, 1, 15, 16, 17, 255, 3000, 70001})
    for (const int64_t out : {8, 56, 64, 72, 192, 512, 1000, 1280, 8192})
      for (const int64_t beside : {0, 24, 3}) {
        if (out == 8192 && rows > 300) continue;
        if (rows == 70001 && (beside != 24 || (out != 72 && out != 512))) continue;
        const Tensor wide = random_tensor(cpu, Dtype::bf16, {1, rows, beside + in}, 1), w = random_tensor(cpu, Dtype::bf16, {out, in}, 2);
        for (const Dtype bias_dtype : {Dtype::f32, Dtype::bf16, Dtype::f64}) {  // f64: none
          const Tensor bias = bias_dtype == Dtype::f64 ? Tensor() : random_tensor(cpu, bias_dtype, {out}, 3);
          const auto run = [&](const Device& device, bool exact) {
            const auto on = [&](const Tensor& t, Dtype own) { return t.to(exact ? Dtype::f64 : own).to(device); };
            const Variable b = bias ? Variable(on(bias, bias.dtype())) : Variable();
            return linear(on(wide, Dtype::bf16).slice(-1, beside, beside + in), on(w, Dtype::bf16), b).value().to_vector<double>();
          };
          const auto actual = run(gpu, false), expected = run(cpu, true);
          const std::string what = wide.describe() + " out " + std::to_string(out) + " bias " + (bias ? bias.describe() : "none");
          expect_close(actual, expected, beside == 3 ? 3.0 / 512 : 1.0 / 256, 1e-3, what);  // products of matrices round the bias too
        }
      }
}

TEST("linear: on CUDA a narrow input takes that product") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const Tensor x = random_tensor(gpu, Dtype::bf16, {40, 16}, 1), weight = random_tensor(gpu, Dtype::bf16, {512, 16}, 2),
               bias = random_tensor(gpu, Dtype::f32, {512}, 3), y = Tensor::empty(gpu, Dtype::bf16, {40, 512});
  on_device<decltype(linear_narrow_product_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(linear_narrow_product_cuda))({x, weight, bias, y});
  const auto found = linear(x, weight, bias).value().to_vector<float>(), own = y.to_vector<float>(),
             rounded = linear(x, weight, bias.to(Dtype::bf16)).value().to_vector<float>();
  CHECK(found == own);
  CHECK(found != rounded);  // as a product of matrices would be
}

TEST("linear: on CUDA the gradients of a narrow input's weight and bias are added to what is there, each to its own") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope poison(set_poison);
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  constexpr int64_t rows = 300, in = 16, out = 136;
  const Tensor x = random_tensor(cpu, Dtype::bf16, {rows, in}, 1), w = random_tensor(cpu, Dtype::bf16, {out, in}, 2),
               b = random_tensor(cpu, Dtype::f32, {out}, 3), g = random_tensor(cpu, Dtype::bf16, {rows, out}, 4);
  // Backward twice; `own_weight`, `own_bias`: into a place of its own the second time. computed: of a weight that an op made.
  const auto run = [&](const Device& device, Dtype dtype, bool own_weight, bool own_bias, bool computed) {
    const auto place = [&](const Tensor& like) { return Tensor::zeros(device, Dtype::f32, like.shape()); };
    const auto weight_of = [&](const Tensor& sink) { return Variable::parameter(w.to(device).to(dtype), sink, "weight"); };
    const auto bias_of = [&](const Tensor& sink) { return Variable::parameter(b.to(device), sink, "bias"); };
    const Tensor weight_sinks[] = {place(w), place(w)}, bias_sinks[] = {place(b), place(b)};
    Variable weight = weight_of(weight_sinks[0]), bias = bias_of(bias_sinks[0]);
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == 1 && own_weight) weight = weight_of(weight_sinks[1]);
      if (turn == 1 && own_bias) bias = bias_of(bias_sinks[1]);
      const Variable input = Variable::leaf(x.to(device).to(dtype));
      backward({linear(input, computed ? multiplied(weight) : weight, bias)}, {g.to(device).to(dtype)});
    }
    std::vector<double> all;
    for (const Tensor& sink : {weight_sinks[0], weight_sinks[1], bias_sinks[0], bias_sinks[1]})
      for (const double value : sink.to_vector<double>()) all.push_back(value);
    return all;
  };
  for (const bool own_weight : {false, true})
    for (const bool own_bias : {false, true})
      for (const bool computed : {false, true})
        expect_close(run(gpu, Dtype::bf16, own_weight, own_bias, computed), run(cpu, Dtype::f32, own_weight, own_bias, computed),
                     computed ? 1.0 / 64 : 1e-5, 1e-3,
                     "own " + std::to_string(own_weight) + std::to_string(own_bias) + (computed ? " computed" : ""));
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
