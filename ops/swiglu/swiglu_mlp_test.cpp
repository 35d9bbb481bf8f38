#include <cmath>

#include "autograd/recompute.h"
#include "core/allocator.h"
#include "core/error.h"
#include "core/switches.h"
#include "ops/common/gemm.h"
#include "ops/linear/linear.h"
#include "ops/swiglu/swiglu.h"
#include "ops/swiglu/swiglu_kernels.h"
#include "ops/swiglu/swiglu_mlp_kernels.h"
#include "tests/support/draws.h"
#include "tests/support/last_row.h"
#include "tests/support/parity.h"

using namespace longhand;
using namespace longhand::test;

namespace {

struct Poison : SwitchScope {
  Poison() : SwitchScope([](Switches& s) { s.poison = true; }) {}
};

struct Size {
  int64_t rows, in, width, out;  // R, in, E, out
  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(in) + ", E " + std::to_string(width) + ", out " + std::to_string(out);
  }
};

Variable mlp(const std::vector<Variable>& in) {
  return swiglu_mlp(in[0], in[1], in[2]);
}
Variable three_ops(const std::vector<Variable>& in) {
  const int64_t E = in[2].shape()[1];
  const auto parts = split(linear(in[0], in[1]), {E, E});
  return linear(swiglu(parts[0], parts[1]), in[2]);
}

/// Whether the GPU has kernels with products of warpgroups.
bool has_warpgroups() {
  return Device::cuda().description().find("kernels of sm_90a") != std::string::npos;
}
bool has_products(const Tensor& x, const Tensor& gate_up, const Tensor& down) {
  const auto fit = on_device<decltype(swiglu_products_fit_cuda)>(x.device(), nullptr, LONGHAND_CUDA_IMPL(swiglu_products_fit_cuda));
  return fit != nullptr && fit(x, gate_up, down);
}
bool has_products(const Size& s, Dtype dtype) {
  const Device gpu = Device::cuda();
  return has_products(Tensor::empty(gpu, dtype, {s.rows, s.in}), Tensor::empty(gpu, dtype, {2 * s.width, s.in}),
                      Tensor::empty(gpu, dtype, {s.out, s.width}));
}

std::vector<Tensor> inputs_of(const Device& device, Dtype dtype, const Size& s) {
  const double in = static_cast<double>(s.in), width = static_cast<double>(s.width);
  return {random_tensor(device, dtype, {s.rows, s.in}, 1), random_tensor(device, dtype, {2 * s.width, s.in}, 2, 1 / std::sqrt(in)),
          random_tensor(device, dtype, {s.out, s.width}, 3, 1 / std::sqrt(width))};
}

struct Outcome {
  std::vector<double> y;
  std::vector<std::vector<double>> grads;  // of x, gate_up, down
  int64_t kept_bytes;
};

Outcome outcome_of(const std::function<Variable(const std::vector<Variable>&)>& f, const std::vector<Tensor>& inputs, Recompute level,
                   const Tensor& grad_y) {
  std::vector<Variable> leaves;
  for (const Tensor& input : inputs) leaves.push_back(Variable::leaf(input));
  const Device& device = inputs[0].device();
  const int64_t before = device.allocator().use().live_bytes;
  Outcome outcome;
  Variable y;
  {
    const RecomputeScope scope(level);
    y = f(leaves);
  }
  outcome.y = y.value().to_vector<double>();
  outcome.kept_bytes = device.allocator().use().live_bytes - before;
  backward({y}, {grad_y});
  for (const Variable& leaf : leaves) outcome.grads.push_back(leaf.grad().to_vector<double>());
  return outcome;
}

/// The network and its gradients from its formulas in f64, with the roundings to bf16 that the op promises where `rounds`.
/// inputs  in f64, x already rows
Outcome by_hand(const std::vector<Tensor>& inputs, const Tensor& grad_y, bool rounds) {
  const Tensor &x = inputs[0], &gate_up = inputs[1], &down = inputs[2];
  const Device& cpu = x.device();
  const int64_t R = x.dim(0), E = down.dim(1);
  const auto rounded = [&](const Tensor& t) { return rounds ? t.to(Dtype::bf16).to(Dtype::f64) : t; };
  const auto product = [&](bool transpose_a, const Tensor& a, bool transpose_b, const Tensor& b) {
    const Tensor c = Tensor::empty(cpu, Dtype::f64, {a.dim(transpose_a ? 1 : 0), b.dim(transpose_b ? 0 : 1)});
    gemm(transpose_a, a, transpose_b, b, c);
    return c;
  };
  const Tensor both = rounded(product(false, x, true, gate_up));  // [R, 2 E]
  const auto halves = split(both, {E, E});
  const Tensor grad_h = rounded(product(false, grad_y, false, down));
  const Tensor h = Tensor::empty(cpu, Dtype::f64, {R, E}), grad_both = Tensor::empty(cpu, Dtype::f64, {R, 2 * E});
  swiglu_fwd_cpu({halves[0].value(), halves[1].value(), h});
  swiglu_bwd_cpu({grad_h, halves[0].value(), halves[1].value(), grad_both.slice(1, 0, E), grad_both.slice(1, E, 2 * E), {}});
  const Tensor h_rounded = rounded(h), grads = rounded(grad_both);
  return {product(false, h_rounded, true, down).to_vector<double>(),
          {product(false, grads, false, gate_up).to_vector<double>(), product(true, grads, false, x).to_vector<double>(),
           product(true, grad_y, false, h_rounded).to_vector<double>()},
          0};
}

/// On the GPU against the CPU in f64. x is a slice of rows that are wider by x_padding, as the gradient's are by grad_padding.
void compare(const Size& s, Dtype dtype, int64_t x_padding, int64_t grad_padding) {
  if (is_left_out()) return;
  const std::string what = s.text() + " " + name_of(dtype) + " padding " + std::to_string(x_padding) + " " + std::to_string(grad_padding);
  INFO(what);
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  const auto on_cpu = inputs_of(cpu, dtype, s);
  std::vector<Tensor> on_gpu, reference;
  for (const Tensor& input : on_cpu) on_gpu.push_back(input.to(gpu)), reference.push_back(input.to(Dtype::f64));
  if (x_padding > 0) {
    on_gpu[0] = Tensor::empty(gpu, dtype, {s.rows, s.in + x_padding}).slice(1, 0, s.in);
    copy(on_gpu[0], on_cpu[0].to(gpu));
  }
  const Tensor grad = random_tensor(cpu, dtype, {s.rows, s.out + grad_padding}, 4);
  const Outcome actual = outcome_of(mlp, on_gpu, Recompute::none, grad.to(gpu).slice(1, 0, s.out));
  const Outcome expected = by_hand(reference, grad.to(Dtype::f64).slice(1, 0, s.out), dtype == Dtype::bf16);
  // bf16: the roundings on the way are those of the reference, but for the few that lie so near a tie that the order of a sum decides: 2^-8
  // of one term, which shows where terms are few.
  const bool few = std::min({s.in, s.width, s.out}) < 32;
  const double tolerance = dtype != Dtype::bf16 ? 1e-5 : (few ? 3 : 1) * kBf16Rounding;
  expect_close(actual.y, expected.y, tolerance, kSmallScale, what + " y");
  for (std::size_t i = 0; i < 3; ++i)
    expect_close(actual.grads[i], expected.grads[i], tolerance, kSmallScale, what + " gradient of input " + std::to_string(i));
}

// A tile for each of at least 132 multiprocessors: rows and widths at, below and above multiples of a tile, of a box and of a pack; sums of
// one box and of several.
const std::vector<Size> kSizesOfProducts{{17000, 8, 8, 8},      {16897, 64, 128, 72},  {1536, 72, 1408, 64},
                                         {1500, 136, 1512, 40}, {129, 64, 16896, 128}, {2048, 320, 1160, 200}};

}  // namespace

TEST("swiglu_mlp is the product of its parts, on the CPU to the bit") {
  const Poison poison;
  for (const Dtype dtype : {Dtype::f32, Dtype::f64})
    for (const Size& s : {Size{1, 1, 1, 1}, {5, 7, 6, 3}, {64, 32, 48, 32}}) {
      const auto inputs = inputs_of(Device::cpu(), dtype, s);
      const Tensor grad = random_tensor(Device::cpu(), dtype, {s.rows, s.out}, 4);
      const Outcome whole = outcome_of(mlp, inputs, Recompute::none, grad), parts = outcome_of(three_ops, inputs, Recompute::none, grad);
      CHECK(whole.y == parts.y);
      CHECK(whole.grads == parts.grads);
    }
}

TEST("swiglu_mlp gradients agree with differences") {
  const auto check = gradcheck([](const std::vector<Variable>& in) { return std::vector<Variable>{mlp(in)}; },
                               inputs_of(Device::cpu(), Dtype::f64, {4, 3, 5, 2}));
  INFO(check.where);
  CHECK(check.worst < 1e-7);
}

TEST("swiglu_mlp on CUDA agrees with the CPU, at sizes with products of its own and without") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Poison poison;
  for (const Size& s : {Size{1, 8, 8, 8}, {37, 24, 40, 16}, {5, 7, 9, 3}, {300, 64, 136, 64}})
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
      CHECK(!has_products(s, dtype));
      compare(s, dtype, 0, 0);
    }
  for (const Size& s : kSizesOfProducts) {
    CHECK(has_products(s, Dtype::bf16) == has_warpgroups());
    CHECK(!has_products(s, Dtype::f32));
    compare(s, Dtype::bf16, 0, 0);
  }
  compare({1500, 72, 1512, 40}, Dtype::bf16, 8, 8);
  compare({1500, 72, 1512, 40}, Dtype::bf16, 0, 3);  // rows of the gradient off multiples of 16 bytes
  compare({1500, 72, 1512, 40}, Dtype::bf16, 3, 0);  // and of x: the general path
  compare({1500, 72, 1508, 40}, Dtype::bf16, 0, 0);
}

TEST("swiglu_mlp on CUDA agrees with the CPU at random sizes") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Poison poison;
  Draws draws(83);
  for (int round = 0; round < 12; ++round) {
    Size s{0, 8 * draws.up_to(40), 8 * draws.up_to(300), 8 * draws.up_to(20)};
    s.rows = 133 * 128 / ((s.width + 127) / 128) + 128 + draws.up_to(300);
    CHECK(has_products(s, Dtype::bf16) == has_warpgroups());
    compare(s, Dtype::bf16, 8 * draws.between(0, 1), 8 * draws.between(0, 1));
  }
}

TEST("swiglu_mlp on CUDA: every level gives the same bits and keeps less than the one before, and so does the same call again") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Poison poison;
  const Device gpu = Device::cuda();
  for (const Size& s : {Size{1500, 72, 1512, 40}, {17000, 136, 120, 64}, {100, 136, 128, 64}}) {
    INFO(s.text());
    const auto inputs = inputs_of(gpu, Dtype::bf16, s);
    const Tensor grad = random_tensor(gpu, Dtype::bf16, {s.rows, s.out}, 4);
    const Outcome none = outcome_of(mlp, inputs, Recompute::none, grad);
    const Outcome again = outcome_of(mlp, inputs, Recompute::none, grad);
    CHECK(again.y == none.y);
    CHECK(again.grads == none.grads);
    int64_t kept = none.kept_bytes;
    for (const Recompute level : {Recompute::light, Recompute::projections}) {
      CAPTURE(name_of(level));
      const Outcome other = outcome_of(mlp, inputs, level, grad);
      CHECK(other.y == none.y);
      CHECK(other.grads == none.grads);
      CHECK(other.kept_bytes < kept);
      kept = other.kept_bytes;
    }
    const NoGrad no_grad;
    CHECK(mlp({inputs[0], inputs[1], inputs[2]}).value().to_vector<double>() == none.y);
  }
}

TEST("swiglu_mlp on every device gives a gradient only where one is wanted, the same for one input as for all") {
  std::vector<std::pair<Device, Dtype>> places{{Device::cpu(), Dtype::f64}};
  if (cuda_device_count() > 0) places.emplace_back(Device::cuda(), Dtype::bf16);
  for (const auto& [device, dtype] : places)
    for (const Recompute level : {Recompute::none, Recompute::light, Recompute::projections}) {
      CAPTURE(device.name());
      CAPTURE(name_of(level));
      const RecomputeScope scope(level);
      const Size s = device.is_cuda() ? Size{1500, 72, 1512, 40} : Size{5, 7, 6, 3};
      const auto inputs = inputs_of(device, dtype, s);
      const Tensor grad = random_tensor(device, dtype, {s.rows, s.out}, 4);
      const Outcome all = outcome_of(mlp, inputs, level, grad);
      for (std::size_t i = 0; i < 3; ++i) {
        std::vector<Variable> alone{inputs[0], inputs[1], inputs[2]};
        alone[i] = Variable::leaf(inputs[i]);
        backward({mlp(alone)}, {grad});
        CHECK(alone[i].grad().to_vector<double>() == all.grads[i]);
      }
    }
}

namespace {

/// What the products write has the bits that swiglu makes of their gate, up and gradient of h, and nothing beside it is touched.
void expect_bits(const std::vector<Size>& sizes) {
  const Device gpu = Device::cuda();
  for (const Size& s : sizes) {
    INFO(s.text());
    const auto inputs = inputs_of(gpu, Dtype::bf16, s);
    const int64_t R = s.rows, E = s.width;
    constexpr double kMark = 42;
    // [R + 1, gate, 8 columns, up, 8 columns]: what is beside the results keeps its mark
    const auto marked = [&] { return Tensor::full(gpu, Dtype::bf16, {R + 1, 2 * E + 16}, kMark); };
    const auto first = [&](const Tensor& t) { return t.slice(0, 0, R).slice(1, 0, E); };
    const auto second = [&](const Tensor& t) { return t.slice(0, 0, R).slice(1, E + 8, 2 * E + 8); };
    const auto is_marked = [&](const Tensor& t) {
      for (const Tensor& part : {t.slice(0, R, R + 1), t.slice(1, E, E + 8), t.slice(1, 2 * E + 8, 2 * E + 16)})
        for (const double v : part.to_vector<double>())
          if (v != kMark) return false;
      return true;
    };
    const auto same = [](const Tensor& a, const Tensor& b) { return a.to_vector<double>() == b.to_vector<double>(); };
    const auto empty = [&] { return Tensor::full(gpu, Dtype::bf16, {R, E}, std::nan("")); };
    const Tensor both = marked(), h = empty(), h_alone = empty(), expected = empty();
    SwigluProduct product{inputs[0], inputs[1].slice(0, 0, E), inputs[1].slice(0, E, 2 * E), first(both), second(both), h};
    on_device<decltype(swiglu_product_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(swiglu_product_cuda))(product);
    product.gate = product.up = {};
    product.h = h_alone;
    on_device<decltype(swiglu_product_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(swiglu_product_cuda))(product);
    on_device<decltype(swiglu_fwd_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(swiglu_fwd_cuda))({first(both), second(both), expected});
    CHECK(is_marked(both));
    CHECK(same(h, expected));
    CHECK(same(h_alone, expected));

    // up = 1 and an open gate: silu(128) is 128 and its slope 1, so that grad_gate is the gradient of h, rounded, and grad_up 128 of it
    const Tensor grad_y = random_tensor(gpu, Dtype::bf16, {R, s.out}, 4), grads = marked(), grads_late = marked(), late = empty();
    SwigluProductBackward back{grad_y, inputs[2], first(both), second(both), first(grads), second(grads), {}};
    on_device<decltype(swiglu_product_bwd_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(swiglu_product_bwd_cuda))(back);
    back.grad_gate = first(grads_late), back.grad_up = second(grads_late), back.h = late;
    on_device<decltype(swiglu_product_bwd_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(swiglu_product_bwd_cuda))(back);
    CHECK(is_marked(grads));
    CHECK(is_marked(grads_late));
    CHECK(same(grads, grads_late));
    CHECK(same(late, expected));
    const Tensor wide = Tensor::full(gpu, Dtype::bf16, {R, E}, 128), one = Tensor::full(gpu, Dtype::bf16, {R, E}, 1);
    const Tensor scaled = empty(), grad_h = empty(), grad_gate = empty(), grad_up = empty();
    on_device<decltype(swiglu_product_bwd_cuda)>(
        gpu, nullptr, LONGHAND_CUDA_IMPL(swiglu_product_bwd_cuda))({grad_y, inputs[2], wide, one, grad_h, scaled, {}});
    multiply(scaled, 1.0 / 128);
    CHECK(same(grad_h, scaled));
    on_device<decltype(swiglu_bwd_cuda)>(gpu, nullptr,
                                         LONGHAND_CUDA_IMPL(swiglu_bwd_cuda))({grad_h, first(both), second(both), grad_gate, grad_up, {}});
    CHECK(same(first(grads), grad_gate));
    CHECK(same(second(grads), grad_up));
  }
}

}  // namespace

TEST("swiglu_mlp on CUDA: products leave swiglu's own bits") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  if (!has_warpgroups()) SKIP("no products of warpgroups");
  expect_bits(kSizesOfProducts);
}

TEST("swiglu_mlp on CUDA: the smallest products leave swiglu's own bits") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  if (!has_warpgroups()) SKIP("no products of warpgroups");
  expect_bits({{1, 8, 8, 8}, {129, 72, 136, 200}, {300, 136, 264, 8}});
}

TEST("swiglu_mlp on CUDA of more than 2^31 elements") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  constexpr int64_t kGroups = 750;
  const Size s{512, 64, 2816, 64};  // 750 times so many rows: gate and up have 2.16e9 elements
  if (!has_room(gpu, int64_t{24} << 30)) SKIP("less than 24 GiB of free GPU memory");
  // All rows but the last 512 are zeros.
  std::vector<Tensor> inputs = inputs_of(Device::cpu(), Dtype::bf16, s), reference;
  for (const Tensor& input : inputs) reference.push_back(input.to(Dtype::f64));
  const Tensor grad = random_tensor(Device::cpu(), Dtype::bf16, {s.rows, s.out}, 4);
  const Outcome expected = by_hand(reference, grad.to(Dtype::f64), true);
  const auto last = [&](const Tensor& t) { return zeros_with_last_row(t.reshape({1, s.rows, t.dim(1)}), kGroups, gpu); };
  const std::vector<Variable> in{Variable::leaf(last(inputs[0])), Variable::leaf(inputs[1].to(gpu)), Variable::leaf(inputs[2].to(gpu))};
  const Variable y = mlp(in);
  backward({y}, {last(grad)});
  const auto last_of = [&](const Tensor& t) { return t.slice(0, kGroups - 1, kGroups).to_vector<double>(); };
  const auto compare_with = [](const std::vector<double>& actual, const std::vector<double>& wanted, const char* what) {
    expect_close(actual, wanted, kBf16Rounding, kSmallScale, what);
  };
  compare_with(last_of(y.value()), expected.y, "y");
  compare_with(last_of(in[0].grad()), expected.grads[0], "gradient of x");
  compare_with(in[1].grad().to_vector<double>(), expected.grads[1], "gradient of gate_up");
  compare_with(in[2].grad().to_vector<double>(), expected.grads[2], "gradient of down");
}

TEST("swiglu_mlp of no rows") {
  for (const Device& device :
       cuda_device_count() > 0 ? std::vector<Device>{Device::cpu(), Device::cuda()} : std::vector<Device>{Device::cpu()}) {
    const Variable x = Variable::leaf(Tensor::empty(device, Dtype::f32, {2, 0, 8}));
    const Variable gate_up = Variable::leaf(Tensor::full(device, Dtype::f32, {32, 8}, 1));
    const Variable y = swiglu_mlp(x, gate_up, Tensor::full(device, Dtype::f32, {8, 16}, 1));
    CHECK(y.shape() == Shape{2, 0, 8});
    backward({y}, {Tensor::empty(device, Dtype::f32, {2, 0, 8})});
    CHECK(x.grad().numel() == 0);
  }
}

TEST("swiglu_mlp names what does not fit") {
  const Tensor x = random_tensor(Device::cpu(), Dtype::f64, {2, 6}, 1), gate_up = random_tensor(Device::cpu(), Dtype::f64, {8, 6}, 2),
               down = random_tensor(Device::cpu(), Dtype::f64, {6, 4}, 3);
  CHECK(swiglu_mlp(x, gate_up, down).shape() == Shape{2, 6});
  CHECK_THROWS_AS(swiglu_mlp(x, gate_up.slice(0, 0, 7), down), ShapeError);
  CHECK_THROWS_AS(swiglu_mlp(x.slice(1, 0, 5), gate_up, down), ShapeError);
  CHECK_THROWS_AS(swiglu_mlp(x, gate_up, down.reshape({24})), ShapeError);
  CHECK_THROWS_AS(swiglu_mlp(x, Variable(), down), ShapeError);
  CHECK_THROWS_AS(swiglu_mlp(Variable(), gate_up, down), ShapeError);
  CHECK_THROWS_AS(swiglu_mlp(x, gate_up, down.to(Dtype::f32)), DtypeError);
  const Tensor narrow = gate_up.slice(0, 0, 6);
  for (const char* part : {"swiglu_mlp: x, gate_up and down do not fit together", "[6, 6]", "[6, 4]"})
    CHECK_THROWS_WITH_AS(swiglu_mlp(x, narrow, down), doctest::Contains(part), ShapeError);
  const Variable named = Variable::leaf(down.to(Dtype::f32), "mlp.down_proj.weight");
  CHECK_THROWS_WITH_AS(swiglu_mlp(x, gate_up, named), doctest::Contains("[6, 4] f32 cpu \"mlp.down_proj.weight\""), DtypeError);
}
