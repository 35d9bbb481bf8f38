#include "ops/rmsnorm/rmsnorm.h"

#include <cmath>

#include "core/allocator.h"
#include "core/error.h"
#include "core/switches.h"
#include "ops/rmsnorm/rmsnorm_kernels.h"
#include "tests/support/draws.h"
#include "tests/support/left_value.h"
#include "tests/support/parity.h"

using namespace longhand;
using namespace longhand::test;

namespace {

Tensor cpu(Shape shape, const std::vector<double>& values) {
  return Tensor::from<double>(Device::cpu(), shape, values);
}
Tensor random(Shape shape, uint64_t seed) {
  return random_tensor(Device::cpu(), Dtype::f64, shape, seed);
}
Switches poisoned(Switches s) {
  s.poison = true;
  return s;
}
struct Poison : SwitchScope {
  Poison() : SwitchScope([](Switches& s) { s = poisoned(s); }) {}
};

// add_rmsnorm in the dtype of its inputs: y has that of x, or of residual without x.
std::vector<Variable> add_norm(const Variable& x, const Variable& residual, const Variable& weight) {
  auto [y, sum] = add_rmsnorm(x, residual, weight, 1e-5, x ? x.value().dtype() : residual.value().dtype());
  return {y, sum};
}

// All shapes and dtypes of one device: plain and strided, by packs and element by element, one row per warp and one per block.
void compare_on(const Device& device, Dtype activations) {
  const Poison poison;
  struct Size {
    int64_t rows, width;
  };
  std::vector<Size> sizes{{1, 1}, {3, 7}, {5, 64}, {2, 100}, {4, 129}, {3, 512}, {37, 768}, {1, 1024}, {2, 1028}, {5, 2048}};
  if (device.is_cuda()) {
    for (const Size size :
         {Size{7001, 64}, Size{1500, 1028}, Size{900, 2047}, Size{3, 8192}, Size{2, 8196}, Size{3, 16384}, Size{2, 16383}})
      sizes.push_back(size);
    Draws draws(81);
    for (int round = 0; round < 20; ++round)
      sizes.push_back({draws.up_to(200), 7 + draws.up_to(3000)});  // of a row of a few elements the gradient is a difference of equals
  }
  for (const auto [rows, width] : sizes) {
    for (const int64_t padding : {0, 3, 4}) {  // of the rows of x and of the gradients: strided, off and on the pack width
      const std::string what = std::to_string(rows) + " x " + std::to_string(width) + " padding " + std::to_string(padding);
      const auto narrow = [w = width, padding](const Variable& x) { return padding == 0 ? x : split(x, {w, padding})[0]; };
      const Shape wide{rows, width + padding};
      expect_parity([&](const std::vector<Variable>& in) { return std::vector<Variable>{rmsnorm(narrow(in[0]), in[1], 1e-5)}; },
                    {{wide, activations}, {{width}, Dtype::f32, 1.0}}, device, kRmsnormToleranceF32, padding, "rmsnorm " + what);
      expect_parity([&](const std::vector<Variable>& in) { return add_norm(narrow(in[0]), in[1], in[2]); },
                    {{wide, activations}, {{rows, width}, Dtype::f32}, {{width}, Dtype::f32, 1.0}}, device, kRmsnormToleranceF32, padding,
                    "add_rmsnorm " + what);
    }
  }
}

}  // namespace

TEST("rmsnorm of a row worked by hand") {
  // mean of squares 12.5, eps 3.5: rstd = 1/4
  const Variable y = rmsnorm(cpu({1, 2}, {3, 4}), cpu({2}, {2, -1}), 3.5);
  expect_close(y.value().to_vector<double>(), {1.5, -1.0}, 1e-15);
  auto [z, sum] = add_rmsnorm(cpu({1, 2}, {1, 5}), cpu({1, 2}, {2, -1}), cpu({2}, {2, -1}), 3.5, Dtype::f64);
  expect_close(sum.value().to_vector<double>(), {3, 4}, 1e-15);
  expect_close(z.value().to_vector<double>(), {1.5, -1.0}, 1e-15);
}

TEST("rmsnorm gradients agree with differences") {
  const Poison poison;
  for (const int64_t width : {1, 2, 5, 8, 13}) {
    const auto result = gradcheck([](const std::vector<Variable>& in) { return std::vector<Variable>{rmsnorm(in[0], in[1], 1e-5)}; },
                                  {random({2, 3, width}, 1), random({width}, 2)});
    INFO(result.where);
    CHECK(result.worst < 1e-7);
  }
}

TEST("add_rmsnorm gradients agree with differences, from y, from the residual and from both") {
  const Poison poison;
  const std::vector<Tensor> inputs{random({2, 3, 5}, 1), random({2, 3, 5}, 2), random({5}, 3)};
  for (const int use : {0, 1, 2}) {
    const auto result = gradcheck(
        [use](const std::vector<Variable>& in) {
          auto outputs = add_norm(in[0], in[1], in[2]);
          if (use == 0) return std::vector<Variable>{outputs[0], add(in[2], in[2])};
          if (use == 1) return std::vector<Variable>{outputs[1], add(in[2], in[2])};
          return outputs;
        },
        inputs);
    INFO("use " << use << " " << result.where);
    CHECK(result.worst < 1e-7);
  }
}

TEST("add_rmsnorm without x passes the residual through, and its gradient joins both uses") {
  const Poison poison;
  const Tensor residual = random({2, 3, 5}, 2);
  const auto outputs = add_norm(Variable(), residual, random({5}, 3));
  CHECK(outputs[1].value().to_vector<double>() == residual.to_vector<double>());
  const auto result =
      gradcheck([](const std::vector<Variable>& in) { return add_norm(Variable(), in[0], in[1]); }, {residual, random({5}, 3)});
  INFO(result.where);
  CHECK(result.worst < 1e-7);
}

TEST("add_rmsnorm feeds a chain: the same residual gradient may be summed twice") {
  const Poison poison;
  const auto result = gradcheck(
      [](const std::vector<Variable>& in) {
        auto first = add_norm(in[0], in[1], in[2]);
        auto second = add_norm(add(first[0], in[0]), first[1], in[2]);
        return std::vector<Variable>{second[0], second[1], add(in[0], in[1])};
      },
      {random({3, 4}, 1), random({3, 4}, 2), random({4}, 3)});
  INFO(result.where);
  CHECK(result.worst < 1e-7);
}

TEST("rmsnorm reads and writes strided rows in place") {
  const Poison poison;
  // Slices of a projection, slices along time, and a layout that needs a copy.
  const auto f = [](const std::vector<Variable>& in) {
    auto parts = split(in[0], {5, 2, 4});
    auto joined = add_norm(parts[0], in[1], in[2]);
    return std::vector<Variable>{joined[0], joined[1], parts[1], rmsnorm(parts[2], split(in[2], {4, 1})[0], 1e-6)};
  };
  const auto result = gradcheck(f, {random({2, 3, 11}, 1), random({2, 3, 5}, 2), random({5}, 3)});
  INFO(result.where);
  CHECK(result.worst < 1e-7);

  const Tensor whole = random({3, 7, 4, 6}, 4), weight = random({6}, 5);
  const Tensor y = rmsnorm(whole, weight, 1e-5).value();
  expect_close(rmsnorm(whole.slice(1, 2, 5), weight, 1e-5).value().to_vector<double>(), y.slice(1, 2, 5).to_vector<double>(), 1e-15);
  expect_close(rmsnorm(whole.slice(1, 2, 5).slice(2, 1, 3), weight, 1e-5).value().to_vector<double>(),
               y.slice(1, 2, 5).slice(2, 1, 3).to_vector<double>(), 1e-15);
}

TEST("rmsnorm does not depend on the scale of x, and rows do not mix") {
  const Tensor x = random({4, 9}, 1), weight = random({9}, 2);
  const auto y = rmsnorm(x, weight, 1e-14).value().to_vector<double>();
  Tensor scaled = x.clone();
  multiply(scaled, 1000);
  expect_close(rmsnorm(scaled, weight, 1e-14).value().to_vector<double>(), y, 1e-10);
  expect_close(rmsnorm(x.slice(0, 2, 3), weight, 1e-14).value().to_vector<double>(), std::vector<double>(y.begin() + 18, y.begin() + 27),
               1e-15);
}

TEST("rmsnorm keeps a NaN") {
  const auto y = rmsnorm(cpu({2, 2}, {std::nan(""), 1, 1, 1}), cpu({2}, {1, 1}), 1e-5).value().to_vector<double>();
  CHECK(std::isnan(y[0]));
  CHECK(std::isnan(y[1]));
  CHECK(std::isfinite(y[2]));
}

TEST("rmsnorm of no rows") {
  const Poison poison;
  const Variable x = Variable::leaf(Tensor::empty(Device::cpu(), Dtype::f64, {0, 3, 4})), weight = Variable::leaf(random({4}, 1));
  auto outputs = add_norm(x, Variable::leaf(Tensor::empty(Device::cpu(), Dtype::f64, {0, 3, 4})), weight);
  CHECK(outputs[0].shape() == Shape{0, 3, 4});
  backward({outputs[0]}, {Tensor::empty(Device::cpu(), Dtype::f64, {0, 3, 4})});
  CHECK(weight.grad().to_vector<double>() == std::vector<double>(4, 0.0));
}

TEST("rmsnorm and add_rmsnorm leave their output behind the backward with the same bits") {
  const Poison poison;
  for (const auto& [device, dtype] : places_of_activations())
    for (const int64_t width : {1, 7, 64, 768, 1030, 2056}) {
      const Dtype wide = dtype == Dtype::f64 ? dtype : Dtype::f32;
      const Tensor x = random_tensor(device, dtype, {37, width}, 1), weight = random_tensor(device, wide, {width}, 2),
                   residual = random_tensor(device, wide, {37, width}, 3);
      const std::string what = device.name() + " " + name_of(dtype) + " width " + std::to_string(width);
      expect_left(
          "rmsnorm", [](const std::vector<Variable>& in) { return rmsnorm(in[0], in[1], 1e-5); }, {x, weight}, what);
      const auto add = [&](const std::vector<Variable>& in) { return add_rmsnorm(in[0], in[2], in[1], 1e-5, dtype).y; };
      expect_left("add_rmsnorm", add, {x, weight, residual}, what + " with a residual");
    }
}

TEST("add_rmsnorm: of a chain every second sum is kept as its parts, to the same bits") {
  const Poison poison;
  for (const auto& [device, dtype] : places_of_activations())
    for (const int64_t width : {5, 128, 1024}) {
      const Dtype wide = dtype == Dtype::f64 ? dtype : Dtype::f32;
      const Shape shape{33, width};
      CAPTURE(device.name());
      CAPTURE(name_of(dtype));
      CAPTURE(width);
      const auto gradients = [&](Recompute level, int64_t& kept_bytes) {
        const RecomputeScope scope(level);
        const Variable weight = Variable::leaf(random_tensor(device, wide, {width}, 1)),
                       stream = Variable::leaf(random_tensor(device, wide, shape, 2));
        std::vector<Variable> leaves{weight, stream}, roots;
        std::vector<Tensor> grads;
        Variable residual = stream;
        std::vector<Kept> kept;  // what others keep of the same values
        std::vector<std::vector<double>> values;
        for (uint64_t i = 0; i < 5; ++i) {
          leaves.push_back(Variable::leaf(random_tensor(device, dtype, shape, 10 + i)));
          grads.push_back(random_tensor(device, dtype, shape, 20 + i));
        }
        grads.push_back(random_tensor(device, wide, shape, 30));
        const int64_t before = device.allocator().use().live_bytes;
        for (std::size_t i = 0; i < 5; ++i) {
          const auto out = add_rmsnorm(leaves[2 + i], residual, weight, 1e-5, dtype);
          for (const Variable& output : {out.residual, out.y}) {
            kept.push_back(Kept(output));
            values.push_back(output.value().to_vector<double>());
          }
          residual = out.residual;
          roots.push_back(Variable(out.y));
        }
        roots.push_back(residual);
        kept_bytes = device.allocator().use().live_bytes - before;
        for (std::size_t i = 0; i < kept.size(); ++i) CHECK(kept[i].get().to_vector<double>() == values[i]);
        backward(roots, grads);
        std::vector<double> all;
        for (const Variable& leaf : leaves)
          for (const double value : leaf.grad().to_vector<double>()) all.push_back(value);
        return all;
      };
      int64_t kept_whole = 0, kept_in_parts = 0;
      const auto whole = gradients(Recompute::none, kept_whole), in_parts = gradients(Recompute::light, kept_in_parts);
      CHECK(whole == in_parts);
      CHECK(kept_whole - kept_in_parts >= 2 * 33 * width * size_of(wide));  // of five sums the first and the third
    }
}

TEST("rmsnorm in f32 on the CPU agrees with f64") {
  compare_on(Device::cpu(), Dtype::f32);
}

TEST("rmsnorm on CUDA agrees with the CPU") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  compare_on(Device::cuda(), Dtype::f32);
  compare_on(Device::cuda(), Dtype::bf16);
}

TEST("add_rmsnorm on CUDA normalises the unrounded sum, also without x, and takes absent gradients") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Poison poison;
  const Device device = Device::cuda();
  const auto without_x = [](const std::vector<Variable>& in) {
    const Dtype y_dtype = in[0].value().dtype() == Dtype::f64 ? Dtype::f64 : Dtype::bf16;
    auto [y, sum] = add_rmsnorm(Variable(), in[0], in[1], 1e-5, y_dtype);
    return std::vector<Variable>{y, sum};
  };
  const auto only_y = [](const std::vector<Variable>& in) { return std::vector<Variable>{add_norm(in[0], in[1], in[2])[0]}; };
  const auto only_sum = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{add_norm(in[0], in[1], in[2])[1], reshape(in[2], {in[2].shape()[0], 1})};
  };
  for (const int64_t width : {768, 770, 2048}) {
    const std::vector<ParityInput> inputs{{{2, 9, width}, Dtype::bf16}, {{2, 9, width}, Dtype::f32}, {{width}, Dtype::f32, 1.0}};
    expect_parity(without_x, {inputs[1], inputs[2]}, device, kRmsnormToleranceF32, 0, "without x");
    expect_parity(only_y, inputs, device, kRmsnormToleranceF32, 0, "only y");
    expect_parity(only_sum, inputs, device, kRmsnormToleranceF32, 0, "only the sum");
  }
}

TEST("rmsnorm on CUDA gives the same bits twice") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const auto run = [] {
    const Variable x = Variable::leaf(random_tensor(Device::cuda(), Dtype::bf16, {5000, 768}, 1)),
                   weight = Variable::leaf(random_tensor(Device::cuda(), Dtype::f32, {768}, 2));
    backward({rmsnorm(x, weight, 1e-5)}, {random_tensor(Device::cuda(), Dtype::bf16, {5000, 768}, 3)});
    return weight.grad().to_vector<float>();
  };
  CHECK(run() == run());
}

TEST("rmsnorm names what does not fit") {
  const Tensor x = random({2, 4}, 1), weight = random({4}, 2);
  CHECK_THROWS_AS(rmsnorm(x, random({5}, 2), 1e-5), ShapeError);
  CHECK_THROWS_AS(rmsnorm(x, Variable(), 1e-5), ShapeError);
  CHECK_THROWS_AS(rmsnorm(Variable(), weight, 1e-5), ShapeError);
  CHECK_THROWS_AS(rmsnorm(x, weight.to(Dtype::f32), 1e-5), DtypeError);
  CHECK_THROWS_AS(rmsnorm(x.to(Dtype::bf16), weight.to(Dtype::f32), 1e-5), DtypeError);
  CHECK_THROWS_AS(rmsnorm(x, weight, 0.0), ValueError);
  CHECK_THROWS_AS(add_rmsnorm(random({3, 4}, 1), x, weight, 1e-5, Dtype::f64), ShapeError);
  CHECK_THROWS_AS(add_rmsnorm(x.to(Dtype::f32), x, weight, 1e-5, Dtype::f64), DtypeError);
  CHECK_THROWS_AS(add_rmsnorm(x, x, weight, 1e-5, Dtype::f32), DtypeError);
  CHECK_THROWS_AS(add_rmsnorm(x, Variable(), weight, 1e-5, Dtype::f64), ShapeError);
  try {
    rmsnorm(x, random({5}, 2), 1e-5);
  } catch (const ShapeError& e) {
    CHECK(std::string(e.what()).rfind("rmsnorm: weight does not match", 0) == 0);
    CHECK(std::string(e.what()).find("weight [4]") != std::string::npos);
  }
}
