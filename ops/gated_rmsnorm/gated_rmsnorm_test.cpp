#include "ops/gated_rmsnorm/gated_rmsnorm.h"

#include <cmath>

#include "core/error.h"
#include "core/switches.h"
#include "ops/gated_rmsnorm/gated_rmsnorm_kernels.h"
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

// alpha * sin(beta * (i + 1)) + shift: the fixed inputs of the reference values.
Tensor sines(int64_t count, double alpha, double beta, double shift = 0) {
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(alpha * std::sin(beta * static_cast<double>(i + 1)) + shift);
  return Tensor::from<double>(Device::cpu(), {1, count}, values);
}

const std::vector<GatedRmsnormOptions> kForms{{1e-5, 1, false}, {1e-5, 2, false}, {1e-5, 1, true}, {1e-6, 2, true}, {1e-5, 4, false}};

std::string name_of_form(const GatedRmsnormOptions& o) {
  return std::to_string(o.groups) + (o.norm_before_gate ? " groups, norm first" : " groups, gate first");
}

void compare_on(const Device& device, Dtype activations) {
  const Poison poison;
  struct Size {
    int64_t rows, width;
  };
  std::vector<Size> sizes{{1, 4}, {3, 12}, {5, 64}, {2, 100}, {4, 260}, {3, 512}, {37, 768}, {3, 1536}, {2, 2056}, {3, 4100}};
  if (device.is_cuda()) {
    for (const Size size : {Size{7001, 64}, Size{1500, 1544}, Size{700, 1540}, Size{3, 8192}, Size{2, 16384}, Size{2, 32776}})
      sizes.push_back(size);
    Draws draws(83);
    for (int round = 0; round < 5; ++round) sizes.push_back({draws.up_to(100), 4 * draws.up_to(500)});  // a width for all groups
  }
  for (const auto [rows, width] : sizes) {
    for (const GatedRmsnormOptions& options : kForms) {
      if (width / options.groups > 16384) continue;
      for (const int64_t padding : {0, 3, 4, 8}) {  // of the rows of z and of the gradients
        const std::string what =
            std::to_string(rows) + " x " + std::to_string(width) + " " + name_of_form(options) + " padding " + std::to_string(padding);
        const auto f = [&, w = width](const std::vector<Variable>& in) {
          const Variable z = padding == 0 ? in[1] : split(in[1], {padding, w})[1];
          return std::vector<Variable>{gated_rmsnorm(in[0], z, in[2], options)};
        };
        expect_parity(f, {{{rows, width}, activations}, {{rows, width + padding}, activations}, {{width}, Dtype::f32, 1.0}}, device,
                      kGatedRmsnormToleranceF32, padding, what);
        if (options.groups == 1 && !options.norm_before_gate)
          expect_parity(f, {{{rows, width}, activations}, {{rows, width + padding}, activations}, {Shape{}, Dtype::f32}}, device,
                        kGatedRmsnormToleranceF32, padding, what + " gate only");
      }
    }
  }
}

}  // namespace

TEST("gated_rmsnorm gives the reference values") {
  const Tensor y = sines(4, 1, 0.7), z = sines(4, 1, 0.9), weight = sines(4, 1, 0.4, 1).reshape({4});
  const auto run = [&](const GatedRmsnormOptions& options) { return gated_rmsnorm(y, z, weight, options).value().to_vector<double>(); };
  expect_close(run({1e-5, 1, false}), {1.18612969, 2.9485085, 1.06323103, -0.285746755}, 1e-8);
  expect_close(run({1e-5, 2, false}), {0.87482946, 2.17467122, 2.64410843, -0.710612634}, 1e-8);
  expect_close(run({1e-6, 1, true}), {0.642618001, 1.59743463, 0.576034313, -0.154811072}, 1e-8);
}

TEST("gated_rmsnorm without a weight is the gate alone") {
  const Tensor y = sines(4, 1, 0.7), z = sines(4, 1, 0.9);
  std::vector<double> expected = y.to_vector<double>();
  const std::vector<double> gate = z.to_vector<double>();
  for (std::size_t i = 0; i < 4; ++i) expected[i] *= gate[i] / (1 + std::exp(-gate[i]));
  expect_close(gated_rmsnorm(y, z, Variable(), {}).value().to_vector<double>(), expected, 1e-15);
}

TEST("gated_rmsnorm gradients agree with differences, per group") {
  const Poison poison;
  for (const GatedRmsnormOptions& options : kForms) {
    const auto f = [&](const std::vector<Variable>& in) { return std::vector<Variable>{gated_rmsnorm(in[0], in[1], in[2], options)}; };
    const auto result = gradcheck(f, {random({2, 3, 8}, 1), random({2, 3, 8}, 2), random({8}, 3)});
    INFO(name_of_form(options) << ": " << result.where);
    CHECK(result.worst < 1e-7);
  }
  const auto gate_only = [](const std::vector<Variable>& in) { return std::vector<Variable>{gated_rmsnorm(in[0], in[1], Variable(), {})}; };
  const auto result = gradcheck(gate_only, {random({5, 3}, 1), random({5, 3}, 2)});
  INFO(result.where);
  CHECK(result.worst < 1e-7);
}

TEST("gated_rmsnorm takes slices of a projection, also seen as heads") {
  const Poison poison;
  // y [B, T, H, dv] beside a gate that is the middle part of a projection; weight [dv] shared by the heads.
  const auto f = [](const std::vector<Variable>& in) {
    auto parts = split(in[1], {3, 8, 2});
    const Variable gate = reshape(parts[1], {2, 3, 2, 4});
    return std::vector<Variable>{gated_rmsnorm(in[0], gate, in[2], {1e-6, 1, true}), parts[0], parts[2]};
  };
  const auto result = gradcheck(f, {random({2, 3, 2, 4}, 1), random({2, 3, 13}, 2), random({4}, 3)});
  INFO(result.where);
  CHECK(result.worst < 1e-7);
  const auto both = [](const std::vector<Variable>& in) {
    auto parts = split(in[0], {4, 1, 4});
    return std::vector<Variable>{gated_rmsnorm(parts[2], parts[0], in[1], {1e-5, 2, false}), parts[1]};
  };
  const auto strided = gradcheck(both, {random({2, 3, 9}, 1), random({4}, 3)});
  INFO(strided.where);
  CHECK(strided.worst < 1e-7);
}

TEST("gated_rmsnorm groups are normalised on their own") {
  const Tensor y = random({3, 12}, 1), z = random({3, 12}, 2), weight = random({12}, 3);
  const auto whole = gated_rmsnorm(y, z, weight, {1e-5, 3, false}).value();
  for (const int64_t g : {0, 1, 2}) {
    const auto part = [g](const Tensor& t) { return t.slice(-1, 4 * g, 4 * g + 4); };
    const auto alone = gated_rmsnorm(part(y), part(z), part(weight), {1e-5, 1, false}).value();
    expect_close(alone.to_vector<double>(), part(whole).to_vector<double>(), 1e-15);
  }
}

TEST("gated_rmsnorm survives gates far from zero") {
  const Tensor y = Tensor::full(Device::cpu(), Dtype::f32, {1, 4}, 2), weight = Tensor::full(Device::cpu(), Dtype::f32, {4}, 1);
  const Tensor z = Tensor::from<float>(Device::cpu(), {1, 4}, std::vector<float>{-1000, 1000, -88, 88});
  const auto devices = cuda_device_count() > 0 ? std::vector<Device>{Device::cpu(), Device::cuda()} : std::vector<Device>{Device::cpu()};
  for (const Device& device : devices)
    expect_close(gated_rmsnorm(y.to(device), z.to(device), weight.to(device), {1e-5, 1, true}).value().to_vector<double>(),
                 {0, 1000, 0, 88}, 1e-5);
}

TEST("gated_rmsnorm of no rows") {
  const Poison poison;
  const Variable y = Variable::leaf(Tensor::empty(Device::cpu(), Dtype::f64, {2, 0, 4})), weight = Variable::leaf(random({4}, 1));
  const Variable o = gated_rmsnorm(y, Tensor::empty(Device::cpu(), Dtype::f64, {2, 0, 4}), weight, {});
  backward({o}, {Tensor::empty(Device::cpu(), Dtype::f64, {2, 0, 4})});
  CHECK(weight.grad().to_vector<double>() == std::vector<double>(4, 0.0));
}

TEST("gated_rmsnorm leaves its output behind the backward with the same bits") {
  const Poison poison;
  for (const auto& [device, dtype] : places_of_activations())
    for (const int64_t width : {4, 12, 64, 100, 1536, 2056, 4100})
      for (const GatedRmsnormOptions& options : kForms)
        for (const bool gate_only : {false, true}) {
          const auto f = [&](const std::vector<Variable>& in) {
            return gated_rmsnorm(in[0], in[1], gate_only ? Variable() : in[2], options);
          };
          expect_left("gated_rmsnorm", f,
                      {random_tensor(device, dtype, {37, width}, 1), random_tensor(device, dtype, {37, width}, 2, 3.0),
                       random_tensor(device, dtype == Dtype::f64 ? dtype : Dtype::f32, {width}, 3)},
                      device.name() + " " + name_of(dtype) + " width " + std::to_string(width) + " " + name_of_form(options) +
                          (gate_only ? " gate only" : ""));
        }
}

TEST("gated_rmsnorm in f32 on the CPU agrees with f64") {
  compare_on(Device::cpu(), Dtype::f32);
}

TEST("gated_rmsnorm on CUDA agrees with the CPU") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  compare_on(Device::cuda(), Dtype::f32);
  compare_on(Device::cuda(), Dtype::bf16);
  // Heads of a projection: two strides per row.
  const auto heads = [](const std::vector<Variable>& in) {
    const Variable gate = reshape(split(in[1], {24, 96, 8})[1], {2, 5, 3, 32});
    return std::vector<Variable>{gated_rmsnorm(in[0], gate, in[2], {1e-6, 1, true})};
  };
  expect_parity(heads, {{{2, 5, 3, 32}, Dtype::bf16}, {{2, 5, 128}, Dtype::bf16}, {{32}, Dtype::f32, 1.0}}, Device::cuda(),
                kGatedRmsnormToleranceF32, 0, "heads");
  // So many that a warp has several: four heads are the rows of a block, three are not.
  for (const int64_t count : {4, 3}) {
    const auto many = [count](const std::vector<Variable>& in) {
      const Variable gate = reshape(split(in[1], {24, count * 64, 8})[1], {1, 2000, count, 64});
      return std::vector<Variable>{gated_rmsnorm(in[0], gate, in[2], {1e-6, 1, true})};
    };
    expect_parity(many, {{{1, 2000, count, 64}, Dtype::bf16}, {{1, 2000, count * 64 + 32}, Dtype::bf16}, {{64}, Dtype::f32, 1.0}},
                  Device::cuda(), kGatedRmsnormToleranceF32, 0, "many heads");
  }
}

TEST("gated_rmsnorm on CUDA gives the same bits twice") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const auto run = [] {
    const auto t = [](uint64_t seed) { return random_tensor(Device::cuda(), Dtype::bf16, {3000, 1536}, seed); };
    const Variable weight = Variable::leaf(random_tensor(Device::cuda(), Dtype::f32, {1536}, 2));
    backward({gated_rmsnorm(t(1), t(3), weight, {1e-5, 2, false})}, {t(4)});
    return weight.grad().to_vector<float>();
  };
  CHECK(run() == run());
}

TEST("gated_rmsnorm names what does not fit") {
  const Tensor y = random({2, 6}, 1), z = random({2, 6}, 2), weight = random({6}, 3);
  CHECK_THROWS_AS(gated_rmsnorm(y, random({2, 5}, 2), weight, {}), ShapeError);
  CHECK_THROWS_AS(gated_rmsnorm(y, Variable(), weight, {}), ShapeError);
  CHECK_THROWS_AS(gated_rmsnorm(y, z, random({5}, 3), {}), ShapeError);
  CHECK_THROWS_AS(gated_rmsnorm(y, z, weight, {1e-5, 4, false}), ShapeError);
  CHECK_THROWS_AS(gated_rmsnorm(y, z, weight, {1e-5, 0, false}), ValueError);
  CHECK_THROWS_AS(gated_rmsnorm(y, z, weight, {-1.0, 1, false}), ValueError);
  CHECK_THROWS_AS(gated_rmsnorm(y, z.to(Dtype::f32), weight, {}), DtypeError);
  CHECK_THROWS_AS(gated_rmsnorm(y, z, weight.to(Dtype::f32), {}), DtypeError);
  try {
    gated_rmsnorm(y, z, weight, {1e-5, 4, false});
  } catch (const ShapeError& e) {
    CHECK(std::string(e.what()).rfind("gated_rmsnorm: groups does not divide the last axis", 0) == 0);
  }
}
