#include "ops/swiglu/swiglu.h"

#include <cmath>

#include "core/error.h"
#include "core/switches.h"
#include "ops/swiglu/swiglu_kernels.h"
#include "tests/support/draws.h"
#include "tests/support/left_value.h"
#include "tests/support/parity.h"

using namespace longhand;
using namespace longhand::test;

namespace {

Tensor random(Shape shape, uint64_t seed) {
  return random_tensor(Device::cpu(), Dtype::f64, shape, seed);
}

struct Poison : SwitchScope {
  Poison() : SwitchScope([](Switches& s) { s.poison = true; }) {}
};

void compare_on(const Device& device, Dtype activations) {
  const Poison poison;
  struct Size {
    int64_t rows, width;
  };
  std::vector<Size> sizes{{1, 1}, {3, 4}, {2, 8}, {5, 7}, {37, 100}, {3, 2816}};
  if (device.is_cuda()) {
    sizes.push_back({4097, 1032});
    Draws draws(82);
    for (int round = 0; round < 20; ++round) sizes.push_back({draws.up_to(200), draws.up_to(3000)});
  }
  for (const auto [rows, width] : sizes)
    for (const int64_t padding : {0, 1, 4, 8}) {  // in front of the gate in its projection, and behind the gradient
      const auto f = [&, w = width](const std::vector<Variable>& in) {
        if (padding == 0) return std::vector<Variable>{swiglu(in[0], in[1])};
        return std::vector<Variable>{swiglu(split(in[0], {padding, w})[1], in[1])};
      };
      expect_parity(f, {{{rows, width + padding}, activations}, {{rows, width}, activations}}, device, kSwigluToleranceF32, padding,
                    std::to_string(rows) + " x " + std::to_string(width) + " padding " + std::to_string(padding));
    }
}

}  // namespace

TEST("swiglu of a worked case") {
  const Tensor gate = Tensor::from<double>(Device::cpu(), {1, 4}, std::vector<double>{0, 1, -2, std::log(3.0)});
  const Tensor up = Tensor::from<double>(Device::cpu(), {1, 4}, std::vector<double>{5, 2, 3, 4});
  // sigmoid of log 3 is 3/4
  expect_close(swiglu(gate, up).value().to_vector<double>(), {0, 2 / (1 + std::exp(-1.0)), -6 / (1 + std::exp(2.0)), 3 * std::log(3.0)},
               1e-15);
}

TEST("swiglu leaves its output behind the backward with the same bits") {
  const Poison poison;
  for (const auto& [device, dtype] : places_of_activations())
    for (const int64_t width : {1, 7, 8, 100, 1032})
      expect_left(
          "swiglu", [](const std::vector<Variable>& in) { return swiglu(in[0], in[1]); },
          {random_tensor(device, dtype, {37, width}, 1, 3.0), random_tensor(device, dtype, {37, width}, 2)},
          device.name() + " " + name_of(dtype) + " width " + std::to_string(width));
}

TEST("swiglu gradients agree with differences, for both halves of one projection too") {
  const Poison poison;
  const auto plain = [](const std::vector<Variable>& in) { return std::vector<Variable>{swiglu(in[0], in[1])}; };
  const auto apart = gradcheck(plain, {random({2, 3, 5}, 1), random({2, 3, 5}, 2)});
  INFO(apart.where);
  CHECK(apart.worst < 1e-7);
  const auto halves = [](const std::vector<Variable>& in) {
    const auto parts = split(in[0], {5, 1, 5});
    return std::vector<Variable>{swiglu(parts[0], parts[2]), parts[1]};
  };
  const auto joined = gradcheck(halves, {random({2, 3, 11}, 3)});
  INFO(joined.where);
  CHECK(joined.worst < 1e-7);
}

TEST("swiglu gives a gradient only where one is wanted") {
  const Variable gate = Variable::leaf(random({2, 4}, 1)), up = Variable::leaf(random({2, 4}, 2));
  const Tensor grad = random({2, 4}, 3);
  backward({swiglu(gate, up)}, {grad});
  const Variable gate_alone = Variable::leaf(gate.value()), up_alone = Variable::leaf(up.value());
  backward({swiglu(gate_alone, up.value())}, {grad});
  backward({swiglu(gate.value(), up_alone)}, {grad});
  CHECK(gate_alone.grad().to_vector<double>() == gate.grad().to_vector<double>());
  CHECK(up_alone.grad().to_vector<double>() == up.grad().to_vector<double>());
}

TEST("swiglu survives gates far from zero") {
  const Tensor gate = Tensor::from<float>(Device::cpu(), {1, 4}, std::vector<float>{-1000, 1000, -88, 88});
  const Tensor up = Tensor::full(Device::cpu(), Dtype::f32, {1, 4}, 2);
  const auto devices = cuda_device_count() > 0 ? std::vector<Device>{Device::cpu(), Device::cuda()} : std::vector<Device>{Device::cpu()};
  for (const Device& device : devices) {
    const Variable leaf = Variable::leaf(gate.to(device));
    const Variable y = swiglu(leaf, up.to(device));
    expect_close(y.value().to_vector<double>(), {0, 2000, 0, 176}, 1e-6);
    backward({y}, {up.to(device)});
    expect_close(leaf.grad().to_vector<double>(), {0, 4, 0, 4}, 1e-6);
  }
}

TEST("swiglu of no rows") {
  const Variable gate = Variable::leaf(Tensor::empty(Device::cpu(), Dtype::f64, {2, 0, 4}));
  const Variable y = swiglu(gate, Tensor::empty(Device::cpu(), Dtype::f64, {2, 0, 4}));
  backward({y}, {Tensor::empty(Device::cpu(), Dtype::f64, {2, 0, 4})});
  CHECK(gate.grad().numel() == 0);
}

TEST("swiglu in f32 on the CPU agrees with f64") {
  compare_on(Device::cpu(), Dtype::f32);
}

TEST("swiglu on CUDA agrees with the CPU") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  compare_on(Device::cuda(), Dtype::f32);
  compare_on(Device::cuda(), Dtype::bf16);
}

TEST("swiglu names what does not fit") {
  const Tensor gate = random({2, 6}, 1), up = random({2, 6}, 2);
  CHECK_THROWS_AS(swiglu(gate, random({2, 5}, 2)), ShapeError);
  CHECK_THROWS_AS(swiglu(gate, Variable()), ShapeError);
  CHECK_THROWS_AS(swiglu(Variable(), up), ShapeError);
  CHECK_THROWS_AS(swiglu(gate, up.to(Dtype::f32)), DtypeError);
  CHECK_THROWS_AS(swiglu(gate.to(Dtype::bf16), up.to(Dtype::bf16)), DtypeError);
  try {
    swiglu(gate, random({2, 5}, 2));
  } catch (const ShapeError& e) {
    const std::string text = e.what();
    CHECK(text.rfind("swiglu: gate and up differ in shape", 0) == 0);
    CHECK(text.find("[2, 6]") != std::string::npos);
    CHECK(text.find("[2, 5]") != std::string::npos);
  }
}
