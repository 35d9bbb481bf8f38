#include "ops/causal_conv1d/causal_conv1d.h"

#include <cmath>

#include "core/error.h"
#include "core/switches.h"
#include "ops/causal_conv1d/causal_conv1d_kernels.h"
#include "tests/support/draws.h"
#include "tests/support/parity.h"

using namespace longhand;
using namespace longhand::test;

namespace {

Tensor random(Shape shape, uint64_t seed) {
  return random_tensor(Device::cpu(), Dtype::f64, shape, seed);
}
double silu_of(double x) {
  return x / (1 + std::exp(-x));
}

struct Poison : SwitchScope {
  Poison() : SwitchScope([](Switches& s) { s.poison = true; }) {}
};

std::vector<Variable> conv(const Variable& x, const Variable& weight, const Variable& bias, const Variable& window0) {
  auto [y, window] = causal_conv1d_silu(x, weight, bias, window0);
  return {y, window};
}

// [B, T1 + T2, C] of two [B, T, C], and their first T1 steps alone: for comparing split runs with whole ones.
std::vector<double> joined(const Tensor& first, const Tensor& second) {
  const Tensor whole = Tensor::empty(Device::cpu(), Dtype::f64, {first.dim(0), first.dim(1) + second.dim(1), first.dim(2)});
  copy(whole.slice(1, 0, first.dim(1)), first);
  copy(whole.slice(1, first.dim(1), whole.dim(1)), second);
  return whole.to_vector<double>();
}

void compare_on(const Device& device, Dtype activations) {
  const Poison poison;
  struct Size {
    int64_t B, T, C, W;
  };
  std::vector<Size> sizes{{1, 1, 1, 4}, {2, 2, 3, 4}, {3, 3, 8, 4},  {1, 4, 12, 4}, {2, 37, 64, 4},
                          {2, 5, 7, 1}, {2, 5, 8, 2}, {1, 9, 20, 3}, {2, 6, 12, 5}, {2, 3, 16, 8}};
  if (device.is_cuda()) {
    for (const Size size : {Size{1, 64, 1792, 4}, Size{1, 65, 260, 4}, Size{5, 131, 2320, 4}, Size{1, 5000, 256, 4}, Size{700, 1, 264, 4},
                            Size{3, 100, 129, 6}, Size{64, 129, 128, 4}})
      sizes.push_back(size);
    Draws draws(84);
    for (int round = 0; round < 16; ++round)
      sizes.push_back({draws.up_to(4), draws.up_to(300), draws.up_to(300), draws.once_in(2) ? 4 : draws.between(1, 8)});
  }
  for (const auto [B, T, C, W] : sizes) {
    for (const int64_t padding : {0, 3, 4, 8}) {  // of the rows of x and of the gradients
      for (const bool whole : {true, false}) {    // with bias and window, or without
        if (!whole && padding == 4) continue;
        const std::string what = "B" + std::to_string(B) + " T" + std::to_string(T) + " C" + std::to_string(C) + " W" + std::to_string(W) +
                                 " padding " + std::to_string(padding) + (whole ? "" : ", no bias, no window");
        const auto f = [&, channels = C, width = W](const std::vector<Variable>& in) {
          const Variable x = padding == 0 ? in[0] : split(in[0], {padding, channels})[1];
          auto outputs = conv(x, in[1], in[2], in[3]);
          if (width == 1) outputs.pop_back();
          return outputs;
        };
        const bool window = whole && W > 1;
        expect_parity(f,
                      {{{B, T, C + padding}, activations},
                       {{C, 1, W}, Dtype::f32},
                       {whole ? Shape{C} : Shape{}, Dtype::f32},
                       {window ? Shape{B, W - 1, C} : Shape{}, activations}},
                      device, kCausalConv1dToleranceF32, padding, what);
      }
    }
  }
}

}  // namespace

TEST("causal_conv1d_silu of a sequence worked by hand") {
  // One channel, taps 1 2 3, bias 0.5, x = 1 -1 2 after the window (10, 20).
  const auto t = [](Shape shape, const std::vector<double>& values) { return Tensor::from<double>(Device::cpu(), shape, values); };
  const Tensor x = t({1, 3, 1}, {1, -1, 2}), weight = t({1, 1, 3}, {1, 2, 3}), bias = t({1}, {0.5}), window0 = t({1, 2, 1}, {10, 20});
  auto [y, window] = causal_conv1d_silu(x, weight, bias, window0);
  expect_close(y.value().to_vector<double>(), {silu_of(0.5 + 10 + 40 + 3), silu_of(0.5 + 20 + 2 - 3), silu_of(0.5 + 1 - 2 + 6)}, 1e-15);
  CHECK(window.value().to_vector<double>() == std::vector<double>{-1, 2});
  auto [alone, last] = causal_conv1d_silu(x.slice(1, 0, 1), weight, Variable(), Variable());
  expect_close(alone.value().to_vector<double>(), {silu_of(3)}, 1e-15);
  CHECK(last.value().to_vector<double>() == std::vector<double>{0, 1});  // zeros at the left
}

TEST("causal_conv1d_silu gradients agree with differences, for every width and for sequences shorter than the window") {
  const Poison poison;
  for (const int64_t W : {1, 2, 3, 4, 8}) {
    for (const int64_t T : {1, 2, 3, 4, 7}) {
      const auto f = [W](const std::vector<Variable>& in) {
        auto outputs = conv(in[0], in[1], in[2], W > 1 ? in[3] : Variable());
        if (W == 1) outputs[1] = in[3];
        return outputs;
      };
      const auto result =
          gradcheck(f, {random({2, T, 3}, 1), random({3, 1, W}, 2), random({3}, 3), random({2, std::max<int64_t>(W - 1, 1), 3}, 4)});
      INFO("W " << W << " T " << T << " " << result.where);
      CHECK(result.worst < 1e-7);
    }
  }
}

TEST("causal_conv1d_silu gradients with parts absent") {
  const Poison poison;
  for (const int64_t T : {1, 2, 3, 6}) {
    const Tensor x = random({2, T, 3}, 1), weight = random({3, 1, 4}, 2), bias = random({3}, 3), window0 = random({2, 3, 3}, 4);
    const auto check = [&](const char* what, const std::function<std::vector<Variable>(const std::vector<Variable>&)>& f,
                           const std::vector<Tensor>& inputs) {
      const auto result = gradcheck(f, inputs);
      INFO(what << " T " << T << " " << result.where);
      CHECK(result.worst < 1e-7);
    };
    check("no bias", [](const std::vector<Variable>& in) { return conv(in[0], in[1], Variable(), in[2]); }, {x, weight, window0});
    check("no window", [](const std::vector<Variable>& in) { return conv(in[0], in[1], in[2], Variable()); }, {x, weight, bias});
    check("only y", [](const std::vector<Variable>& in) { return std::vector<Variable>{conv(in[0], in[1], in[2], in[3])[0]}; },
          {x, weight, bias, window0});
    check("only the window", [](const std::vector<Variable>& in) { return std::vector<Variable>{conv(in[0], in[1], in[2], in[3])[1]}; },
          {x, weight, bias, window0});
    check("x is a constant", [&](const std::vector<Variable>& in) { return conv(x, in[0], bias, in[1]); }, {weight, window0});
  }
}

TEST("causal_conv1d_silu of a split sequence equals that of the whole, gradients too") {
  const Poison poison;
  const int64_t T = 9;
  const Tensor x = random({2, T, 5}, 1), weight = random({5, 1, 4}, 2), bias = random({5}, 3), window0 = random({2, 3, 5}, 4),
               grad_y = random({2, T, 5}, 5), grad_window = random({2, 3, 5}, 6);
  const auto leaf = [](const Tensor& t) { return Variable::leaf(t); };
  const Variable x0 = leaf(x), w0 = leaf(weight), b0 = leaf(bias), s0 = leaf(window0);
  const auto whole = conv(x0, w0, b0, s0);
  backward(whole, {grad_y, grad_window});
  for (const int64_t s : {1, 2, 3, 4, 7, 8}) {
    const Variable xa = leaf(x.slice(1, 0, s)), xb = leaf(x.slice(1, s, T)), w = leaf(weight), b = leaf(bias), start = leaf(window0);
    const auto first = conv(xa, w, b, start);
    const auto second = conv(xb, w, b, first[1]);
    expect_close(joined(first[0].value(), second[0].value()), whole[0].value().to_vector<double>(), 1e-14);
    expect_close(second[1].value().to_vector<double>(), whole[1].value().to_vector<double>(), 1e-14);
    backward({first[0], second[0], second[1]}, {grad_y.slice(1, 0, s), grad_y.slice(1, s, T), grad_window});
    expect_close(joined(xa.grad(), xb.grad()), x0.grad().to_vector<double>(), 1e-13);
    expect_close(w.grad().to_vector<double>(), w0.grad().to_vector<double>(), 1e-13);
    expect_close(b.grad().to_vector<double>(), b0.grad().to_vector<double>(), 1e-13);
    expect_close(start.grad().to_vector<double>(), s0.grad().to_vector<double>(), 1e-13);
  }
}

TEST("causal_conv1d_silu looks back only, and rows and channels do not mix") {
  const Tensor x = random({2, 6, 3}, 1), weight = random({3, 1, 4}, 2), bias = random({3}, 3);
  const auto before = causal_conv1d_silu(x, weight, bias, Variable()).y.value().to_vector<double>();
  const Tensor changed = x.clone();
  fill(changed.slice(0, 1, 2).slice(1, 3, 4).slice(2, 1, 2), 5);
  const auto after = causal_conv1d_silu(changed, weight, bias, Variable()).y.value().to_vector<double>();
  for (std::size_t i = 0; i < before.size(); ++i) {
    const std::size_t b = i / 18, t = i / 3 % 6, c = i % 3;
    CHECK((before[i] == after[i]) == !(b == 1 && t >= 3 && c == 1));
  }
}

TEST("causal_conv1d_silu takes strided x and gradients") {
  const Poison poison;
  const auto f = [](const std::vector<Variable>& in) {
    auto parts = split(in[0], {2, 3, 1});
    auto outputs = conv(parts[1], in[1], in[2], in[3]);
    auto tail = split(outputs[0], {2, 1});  // their gradients meet in one buffer
    return std::vector<Variable>{tail[1], outputs[1], parts[0], add(tail[0], parts[0])};
  };
  const auto result = gradcheck(f, {random({2, 5, 6}, 1), random({3, 1, 4}, 2), random({3}, 3), random({2, 3, 3}, 4)});
  INFO(result.where);
  CHECK(result.worst < 1e-7);
}

TEST("causal_conv1d_silu without a step passes the window on") {
  const Poison poison;
  const Variable window0 = Variable::leaf(random({2, 3, 5}, 1)), weight = Variable::leaf(random({5, 1, 4}, 2));
  const Tensor none = Tensor::empty(Device::cpu(), Dtype::f64, {2, 0, 5});
  const auto outputs = conv(none, weight, Variable(), window0);
  CHECK(outputs[0].shape() == Shape{2, 0, 5});
  CHECK(outputs[1].value().to_vector<double>() == window0.value().to_vector<double>());
  const Tensor grad = random({2, 3, 5}, 3);
  backward({outputs[1]}, {grad});
  CHECK(window0.grad().to_vector<double>() == grad.to_vector<double>());
  CHECK(conv(none, weight, Variable(), Variable())[1].value().to_vector<double>() == std::vector<double>(30, 0.0));
  CHECK(conv(Tensor::empty(Device::cpu(), Dtype::f64, {0, 4, 5}), weight, Variable(), Variable())[1].shape() == Shape{0, 3, 5});
}

TEST("causal_conv1d_silu in f32 on the CPU agrees with f64") {
  compare_on(Device::cpu(), Dtype::f32);
}

TEST("causal_conv1d_silu on CUDA agrees with the CPU") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  compare_on(Device::cuda(), Dtype::f32);
  compare_on(Device::cuda(), Dtype::bf16);
}

TEST("causal_conv1d_silu on CUDA: a split sequence gives the bits of the whole, and two runs the same gradients") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Poison poison;
  const Device device = Device::cuda();
  const Tensor x = random_tensor(device, Dtype::bf16, {3, 130, 264}, 1), weight = random_tensor(device, Dtype::f32, {264, 1, 4}, 2),
               bias = random_tensor(device, Dtype::f32, {264}, 3);
  const auto whole = conv(x, weight, bias, Variable());
  for (const int64_t s : {1, 2, 3, 64, 129}) {
    const auto first = conv(x.slice(1, 0, s), weight, bias, Variable());
    const auto second = conv(x.slice(1, s, 130), weight, bias, first[1]);
    CHECK(first[0].value().to_vector<float>() == whole[0].value().slice(1, 0, s).to_vector<float>());
    CHECK(second[0].value().to_vector<float>() == whole[0].value().slice(1, s, 130).to_vector<float>());
    CHECK(second[1].value().to_vector<float>() == whole[1].value().to_vector<float>());
  }
  const auto gradients = [&] {
    const Variable w = Variable::leaf(weight), b = Variable::leaf(bias);
    backward({conv(x, w, b, Variable())[0]}, {random_tensor(device, Dtype::bf16, {3, 130, 264}, 4)});
    return std::pair{w.grad().to_vector<float>(), b.grad().to_vector<float>()};
  };
  CHECK(gradients() == gradients());
}

TEST("causal_conv1d_silu names what does not fit") {
  const Tensor x = random({2, 5, 3}, 1), weight = random({3, 1, 4}, 2), bias = random({3}, 3), window0 = random({2, 3, 3}, 4);
  CHECK_THROWS_AS(causal_conv1d_silu(random({5, 3}, 1), weight, bias, window0), ShapeError);
  CHECK_THROWS_AS(causal_conv1d_silu(x, random({4, 1, 4}, 2), bias, window0), ShapeError);
  CHECK_THROWS_AS(causal_conv1d_silu(x, random({3, 1, 9}, 2), bias, Variable()), ValueError);
  CHECK_THROWS_AS(causal_conv1d_silu(x, weight, random({4}, 3), window0), ShapeError);
  CHECK_THROWS_AS(causal_conv1d_silu(x, weight, bias, random({2, 4, 3}, 4)), ShapeError);
  CHECK_THROWS_AS(causal_conv1d_silu(x, weight.to(Dtype::f32), bias, window0), DtypeError);
  CHECK_THROWS_AS(causal_conv1d_silu(x, weight, bias, window0.to(Dtype::f32)), DtypeError);
  try {
    causal_conv1d_silu(x, weight, bias, random({2, 4, 3}, 4));
  } catch (const ShapeError& e) {
    CHECK(std::string(e.what()).rfind("causal_conv1d_silu: window0 does not match x and weight", 0) == 0);
    CHECK(std::string(e.what()).find("[2, 3, 3] f64") != std::string::npos);
  }
}
