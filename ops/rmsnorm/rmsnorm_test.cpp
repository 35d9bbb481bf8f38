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

// Of add_rmsnorm, whose backward knows a bf16 y alone of what was normalised.
ParityTolerance tolerance_of(Dtype activations) {
  return {kRmsnormToleranceF32, activations == Dtype::bf16 ? kRmsnormToleranceFromY : kRmsnormToleranceF32};
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
      if (width == 1 && activations == Dtype::bf16) continue;  // a difference of equals; below from the same y
      expect_parity([&](const std::vector<Variable>& in) { return add_norm(narrow(in[0]), in[1], in[2]); },
                    {{wide, activations}, {{rows, width}, Dtype::f32}, {{width}, Dtype::f32, 1.0}}, device, tolerance_of(activations),
                    padding, "add_rmsnorm " + what);
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
      if (dtype != Dtype::bf16) expect_left("add_rmsnorm", add, {x, weight, residual}, what + " with a residual");  // which keeps y
    }
}

TEST("add_rmsnorm on CUDA in bf16 keeps y alone: of a chain of sums nothing is left") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device device = Device::cuda();
  const Shape shape{512, 1024};
  const Variable weight = Variable::leaf(random_tensor(device, Dtype::f32, {1024}, 1));
  const Variable stream = Variable::leaf(random_tensor(device, Dtype::f32, shape, 2));
  Variable residual = stream;
  std::vector<Variable> xs, ys;
  for (uint64_t i = 0; i < 5; ++i) xs.push_back(Variable::leaf(random_tensor(device, Dtype::bf16, shape, 10 + i)));
  const int64_t before = device.allocator().use().live_bytes;
  for (const Variable& x : xs) {
    const auto out = add_rmsnorm(x, residual, weight, 1e-5, Dtype::bf16);
    ys.push_back(out.y);
    residual = out.residual;
  }
  const int64_t elements = shape[0] * shape[1], kept = device.allocator().use().live_bytes - before;
  CHECK(kept <= elements * (5 * 2 + 4) + elements / 8);  // five y, the last sum, and rstd
  residual = {};
  CHECK(device.allocator().use().live_bytes - before <= elements * 5 * 2 + elements / 8);
}

TEST("add_rmsnorm on CUDA in bf16: the gradients are those of the formula in f64 with the xhat that y tells") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Poison poison;
  const Device gpu = Device::cuda();
  constexpr double eps = 1e-5;
  for (const auto& [rows, width] :
       {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {5, 64}, {37, 768}, {9, 1024}, {4, 1030}, {1500, 2048}, {3, 8196}}) {
    const Shape shape{rows, width};
    const Variable x = Variable::leaf(random_tensor(gpu, Dtype::bf16, shape, 1)),
                   residual = Variable::leaf(random_tensor(gpu, Dtype::f32, shape, 2)),
                   weight = Variable::leaf(random_tensor(gpu, Dtype::f32, {width}, 3, 1.0, 1.0));
    const Tensor grad_y = random_tensor(gpu, Dtype::bf16, shape, 4), grad_sum = random_tensor(gpu, Dtype::f32, shape, 5);
    const auto out = add_rmsnorm(x, residual, weight, eps, Dtype::bf16);
    const auto y = out.y.value().to_vector<double>(), sum = out.residual.value().to_vector<double>(),
               w = weight.value().to_vector<double>(), gy = grad_y.to_vector<double>(), gs = grad_sum.to_vector<double>();
    backward({out.y, out.residual}, {grad_y, grad_sum});
    std::vector<double> grad_residual(y.size()), grad_weight(w.size());
    for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row) {
      double squares = 0, dot = 0;
      const std::size_t begin = row * w.size();
      for (std::size_t c = 0; c < w.size(); ++c) {
        squares += sum[begin + c] * sum[begin + c];
        dot += gy[begin + c] * y[begin + c];
        grad_weight[c] += gy[begin + c] * y[begin + c] / w[c];
      }
      const double of_row = static_cast<double>(width), rstd = 1 / std::sqrt(squares / of_row + eps);
      for (std::size_t c = 0; c < w.size(); ++c)
        grad_residual[begin + c] = rstd * (w[c] * gy[begin + c] - y[begin + c] / w[c] * (dot / of_row)) + gs[begin + c];
    }
    const std::string what = shape.str();
    expect_close(residual.grad().to_vector<double>(), grad_residual, kRmsnormToleranceF32, kSmallScale, what + " residual");
    expect_close(weight.grad().to_vector<double>(), grad_weight, kRmsnormToleranceF32, kSmallScale, what + " weight");
    expect_close(x.grad().to_vector<double>(), grad_residual, kBf16Rounding, kSmallScale, what + " x");
  }
}

TEST("add_rmsnorm on CUDA in bf16: of no rows, and gradients that one input alone wants") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Poison poison;
  const Device gpu = Device::cuda();
  const Variable none = Variable::leaf(Tensor::empty(gpu, Dtype::bf16, {0, 3, 8})),
                 of_none = Variable::leaf(random_tensor(gpu, Dtype::f32, {8}, 1));
  const auto empty = add_rmsnorm(none, Variable::leaf(Tensor::empty(gpu, Dtype::f32, {0, 3, 8})), of_none, 1e-5, Dtype::bf16);
  CHECK(empty.y.shape() == Shape{0, 3, 8});
  backward({empty.y}, {Tensor::empty(gpu, Dtype::bf16, {0, 3, 8})});
  CHECK(of_none.grad().to_vector<float>() == std::vector<float>(8, 0.0f));

  for (const int64_t width : {64, 1024}) {
    const Tensor values[] = {random_tensor(gpu, Dtype::bf16, {70, width}, 1), random_tensor(gpu, Dtype::f32, {70, width}, 2),
                             random_tensor(gpu, Dtype::f32, {width}, 3)};
    const auto gradients = [&](int alone) {  // -1: all want theirs
      std::vector<Variable> in;
      for (int i = 0; i < 3; ++i) in.push_back(alone < 0 || alone == i ? Variable::leaf(values[i]) : Variable(values[i]));
      const auto out = add_rmsnorm(in[0], in[1], in[2], 1e-5, Dtype::bf16);
      backward({out.y, out.residual}, {random_tensor(gpu, Dtype::bf16, {70, width}, 4), random_tensor(gpu, Dtype::f32, {70, width}, 5)});
      std::vector<std::vector<float>> found;
      for (int i = 0; i < 3; ++i)
        found.push_back(in[static_cast<std::size_t>(i)].grad().defined() ? in[static_cast<std::size_t>(i)].grad().to_vector<float>()
                                                                         : std::vector<float>());
      return found;
    };
    const auto all = gradients(-1);
    for (int alone = 0; alone < 3; ++alone) {
      const auto found = gradients(alone);
      for (std::size_t i = 0; i < 3; ++i) CHECK(found[i] == (static_cast<int>(i) == alone ? all[i] : std::vector<float>()));
    }
  }
}

TEST("add_rmsnorm on CUDA in bf16 gives every weight its gradient, one that is zero too") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Poison poison;
  for (const int64_t width : {64, 1024, 1030}) {
    std::vector<double> weights = random({width}, 3).to_vector<double>();
    const std::vector<double> edge{0.0, -0.0, 1e-30, -1e-30, 0x1p-41, -0x1p-39, 1e-6};
    std::copy(edge.begin(), edge.end(), weights.begin() + 5);
    const auto gradients = [&](const Device& device, bool wide) {
      const auto leaf = [&](const Tensor& values, Dtype narrow) {
        return Variable::leaf(values.to(narrow).to(wide ? Dtype::f64 : narrow).to(device));
      };
      const Shape shape{300, width};
      const Variable x = leaf(random(shape, 1), Dtype::bf16), residual = leaf(random(shape, 2), Dtype::f32),
                     weight = leaf(cpu({width}, weights), Dtype::f32);
      const auto out = add_rmsnorm(x, residual, weight, 1e-5, wide ? Dtype::f64 : Dtype::bf16);
      backward({out.y}, {random(shape, 4).to(Dtype::bf16).to(wide ? Dtype::f64 : Dtype::bf16).to(device)});
      return std::vector<std::vector<double>>{out.y.value().to_vector<double>(), weight.grad().to_vector<double>(),
                                              residual.grad().to_vector<double>()};
    };
    const auto actual = gradients(Device::cuda(), false), expected = gradients(Device::cpu(), true);
    const double tolerance[] = {kBf16Rounding, kRmsnormToleranceFromY, kRmsnormToleranceFromY};
    for (std::size_t i = 0; i < actual.size(); ++i)
      expect_close(actual[i], expected[i], tolerance[i], kSmallScale, "width " + std::to_string(width) + " of " + std::to_string(i));
    for (std::size_t c = 5; c < 5 + edge.size(); ++c) {  // by themselves: y as good as the weight, sums of 300 products of size 1
      CAPTURE(c);
      for (std::size_t row = 0; row < 300; ++row)
        CHECK(std::abs(actual[0][row * weights.size() + c]) <= 6 * std::max(std::abs(weights[c]), 0x1p-40));
      CHECK(std::abs(actual[1][c] - expected[1][c]) < 0.02 * std::sqrt(300.0));
    }
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
    expect_parity(without_x, {inputs[1], inputs[2]}, device, tolerance_of(Dtype::bf16), 0, "without x");
    expect_parity(only_y, inputs, device, tolerance_of(Dtype::bf16), 0, "only y");
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
