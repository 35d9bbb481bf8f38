// cross_entropy: against a float64 log-softmax by hand, gradients, chunks, masks, extreme logits, tied weights, the GPU against the CPU.
#include "ops/cross_entropy/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "autograd/gradcheck.h"
#include "autograd/parameters.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/philox.h"
#include "core/switches.h"
#include "ops/cross_entropy/cross_entropy_kernels.h"
#include "ops/embedding/embedding.h"
#include "ops/linear/linear.h"
#include "tests/support/check.h"
#include "tests/support/draws.h"

using namespace longhand;
using namespace longhand::test;

namespace {

void set_poison(Switches& s) {
  s.poison = true;
}

Tensor random_f64(Shape shape, uint64_t seed) {
  return random_tensor(Device::cpu(), Dtype::f64, shape, seed);
}

Tensor random_targets(Shape shape, int64_t vocab, uint64_t seed) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < shape.numel(); ++i)
    ids.push_back(static_cast<int32_t>(philox_u64(seed, static_cast<uint64_t>(i)) % static_cast<uint64_t>(vocab)));
  return Tensor::from(Device::cpu(), shape, ids);
}

/// Where the op runs, and in which way: on a GPU in bf16, rows of 8 features may go through the product that writes exponentials, rows of 5
/// never do.
struct Place {
  Device device;
  Dtype dtype;
  int64_t width;
  std::string name() const { return device.name() + " " + name_of(dtype) + " width " + std::to_string(width); }
};
std::vector<Place> places() {
  std::vector<Place> all{{Device::cpu(), Dtype::f64, 5}, {Device::cpu(), Dtype::f32, 8}};
  if (cuda_device_count() == 0) return all;
  for (const auto& [dtype, width] : {std::pair<Dtype, int64_t>{Dtype::f32, 5}, {Dtype::bf16, 5}, {Dtype::bf16, 8}})
    all.push_back({Device::cuda(), dtype, width});
  return all;
}

/// Loss and gradients of a head, each on the CPU.
struct Gradients {
  double loss = 0;
  std::vector<double> token_loss, x, weight;
};
Gradients gradients_of(const Tensor& x, const Tensor& weight, const Tensor& targets, const Tensor& mask,
                       const CrossEntropyOptions& options = {}) {
  const Device device = x.device();
  const Variable leaf_x = Variable::leaf(x), leaf_w = Variable::leaf(weight);
  const auto out = linear_cross_entropy(leaf_x, leaf_w, targets.to(device), mask.defined() ? mask.to(device) : mask, options);
  backward(out.loss);
  return {out.loss.value().item(), out.token_loss.to_vector<double>(), leaf_x.grad().to_vector<double>(),
          leaf_w.grad().to_vector<double>()};
}

/// What the op should give, from the logits, in float64.
struct ByHand {
  std::vector<double> token_loss, grad_logits;
  double loss = 0, largest = 0;
};

ByHand by_hand(const Tensor& x, const Tensor& weight, const Tensor& targets, const Tensor& mask, int64_t vocab, double loss_scale = 1.0) {
  const auto logits = linear(x.to(Device::cpu()).to(Dtype::f64), weight.to(Device::cpu()).to(Dtype::f64)).value().to_vector<double>();
  const auto ids = targets.to_vector<int32_t>();
  const auto weights = mask.defined() ? mask.to_vector<double>() : std::vector<double>(ids.size(), 1.0);
  const auto all = static_cast<std::size_t>(weight.dim(0)), valid = static_cast<std::size_t>(vocab);
  double counted = 0;
  for (double w : weights) counted += w;
  ByHand result;
  result.grad_logits.assign(ids.size() * all, 0.0);
  for (std::size_t r = 0; r < ids.size(); ++r) {
    const double* l = logits.data() + r * all;
    const double top = *std::max_element(l, l + valid);
    for (std::size_t v = 0; v < valid; ++v) result.largest = std::max(result.largest, std::abs(l[v]));
    double sum = 0;
    for (std::size_t v = 0; v < valid; ++v) sum += std::exp(l[v] - top);
    const bool known = ids[r] >= 0 && ids[r] < vocab;
    const auto target = static_cast<std::size_t>(known ? ids[r] : 0);
    result.token_loss.push_back(known ? top + std::log(sum) - l[target] : 0.0);
    result.loss += loss_scale * weights[r] * result.token_loss[r] / counted;
    for (std::size_t v = 0; v < valid && known; ++v)
      result.grad_logits[r * all + v] = loss_scale * weights[r] / counted * (std::exp(l[v] - top) / sum - (v == target ? 1 : 0));
  }
  return result;
}

}  // namespace

TEST("cross_entropy: loss of every position and mean against a float64 log-softmax") {
  const SwitchScope poison(set_poison);
  const Tensor targets = random_targets({2, 3}, 97, 3);
  for (const Dtype dtype : {Dtype::f64, Dtype::f32}) {
    const Tensor x = random_f64({2, 3, 33}, 1).to(dtype), w = random_f64({97, 33}, 2).to(dtype);
    const auto [loss, token_loss] = linear_cross_entropy(x, w, targets, {});
    const ByHand expected = by_hand(x, w, targets, {}, 97);
    const double tolerance = dtype == Dtype::f64 ? 1e-13 : 1e-6;
    CHECK(token_loss.shape() == Shape{2, 3});
    CHECK(loss.shape() == Shape{});
    CHECK(loss.value().dtype() == dtype);
    expect_close(token_loss.to_vector<double>(), expected.token_loss, tolerance);
    expect_close({loss.value().item()}, {expected.loss}, tolerance);
  }
}

TEST("cross_entropy: gradients of x and weight, with mask, masked columns, scale and any chunk size") {
  const SwitchScope poison(set_poison);
  const Tensor targets = random_targets({2, 4}, 9, 3);
  const Tensor mask = Tensor::from<float>(Device::cpu(), {2, 4}, {1, 0, 1, 0.25f, 1, 1, 0, 1});
  const std::vector<Tensor> inputs{random_f64({2, 4, 5}, 1), random_f64({11, 5}, 2)};
  for (const int64_t chunk : {0, 1, 3, 8, 100}) {
    const CrossEntropyOptions options{chunk, 9, 0.5};
    const auto f = [&](const std::vector<Variable>& v) {
      return std::vector{linear_cross_entropy(v[0], v[1], targets, mask, options).loss};
    };
    const auto result = gradcheck(f, inputs);
    CHECK_MESSAGE(result.worst < 1e-7, result.where);
    CHECK(f({inputs[0], inputs[1]})[0].value().item() ==
          doctest::Approx(by_hand(inputs[0], inputs[1], targets, mask, 9, 0.5).loss).epsilon(1e-13));
  }
}

TEST("cross_entropy: a gradient for one input alone") {
  const SwitchScope poison(set_poison);
  for (const Place& place : places())
    for (const bool masked : {false, true}) {
      INFO(place.name());
      const Tensor x = random_tensor(place.device, place.dtype, {4, place.width}, 1),
                   w = random_tensor(place.device, place.dtype, {7, place.width}, 2), targets = random_targets({4}, 7, 3).to(place.device),
                   mask = masked ? Tensor::from<float>(place.device, {4}, {1, 0, 0.5f, 1}) : Tensor();
      const Variable leaf_x = Variable::leaf(x), leaf_w = Variable::leaf(w);
      backward(linear_cross_entropy(leaf_x, w, targets, mask).loss);
      backward(linear_cross_entropy(x, leaf_w, targets, mask).loss);
      const Gradients both = gradients_of(x, w, targets, mask);
      CHECK(leaf_x.grad().to_vector<double>() == both.x);
      CHECK(leaf_w.grad().to_vector<double>() == both.weight);
    }
}

TEST("cross_entropy: the target's gradient keeps its digits where softmax is nearly 1") {
  // One feature: logits are 0 and g. softmax - 1 = -1 / (1 + e^g), which 1 - softmax in f32 would round to nothing at g = 20.
  for (const double g : {5.0, 7.0, 20.0, 40.0}) {
    const Variable w = Variable::leaf(Tensor::from<float>(Device::cpu(), {2, 1}, {0.0f, static_cast<float>(g)}));
    const Tensor x = Tensor::full(Device::cpu(), Dtype::f32, {1, 1}, 1.0);
    const auto out = linear_cross_entropy(x, w, Tensor::from<int32_t>(Device::cpu(), {1}, {1}), {});
    backward(out.loss);
    const double miss = 1 / (1 + std::exp(g));
    expect_close(w.grad().to_vector<double>(), {miss, -miss}, 1e-5);
    expect_close({out.token_loss.item()}, {-std::log1p(-miss)}, 1e-5);
  }
}

TEST("cross_entropy: logits of +-1e4 give finite losses and gradients") {
  for (const Dtype dtype : {Dtype::f32, Dtype::f64}) {
    const Variable w = Variable::leaf(Tensor::from<double>(Device::cpu(), {4, 1}, {1e4, -1e4, 0, 9999}).to(dtype));
    const Tensor x = Tensor::full(Device::cpu(), dtype, {4, 1}, 1.0);
    const auto out = linear_cross_entropy(x, w, Tensor::from<int32_t>(Device::cpu(), {4}, {0, 1, 2, 3}), {});
    backward(out.loss);
    const double near = std::log1p(std::exp(-1.0));
    expect_close(out.token_loss.to_vector<double>(), {near, 2e4 + near, 1e4 + near, 1 + near}, 1e-6);
    expect_close({out.token_loss.to_vector<double>()[0]}, {near}, 1e-6);
    CHECK(first_non_finite(w.grad()) == -1);
    CHECK(w.grad().to_vector<double>()[1] == doctest::Approx(-0.25));
  }
}

TEST("cross_entropy: positions that are not counted need no target; nothing counted is a loss of 0") {
  const SwitchScope poison(set_poison);
  const Tensor x = random_f64({3, 2}, 1), w = random_f64({5, 2}, 2);
  const Tensor targets = Tensor::from<int32_t>(Device::cpu(), {3}, {4, -100, 5});
  const Variable leaf = Variable::leaf(x);
  const auto out = linear_cross_entropy(leaf, w, targets, Tensor::from<float>(Device::cpu(), {3}, {1, 0, 0}));
  backward(out.loss);
  CHECK(out.token_loss.to_vector<double>()[1] == 0.0);
  CHECK(leaf.grad().slice(0, 1, 3).to_vector<double>() == std::vector<double>(4, 0.0));
  for (const Place& place : places()) {
    INFO(place.name());
    const Gradients none =
        gradients_of(random_tensor(place.device, place.dtype, {3, place.width}, 1),
                     random_tensor(place.device, place.dtype, {5, place.width}, 2), targets, Tensor::zeros(Device::cpu(), Dtype::f32, {3}));
    CHECK(none.loss == 0.0);
    CHECK(none.x == std::vector<double>(static_cast<std::size_t>(3 * place.width), 0.0));
    CHECK(none.weight == std::vector<double>(static_cast<std::size_t>(5 * place.width), 0.0));
  }
  CHECK_THROWS_WITH_AS(linear_cross_entropy(x, w, targets, {}), doctest::Contains("-100"), ValueError);
  const Tensor counted = Tensor::from<float>(Device::cpu(), {3}, {1, 0, 1});
  CHECK_THROWS_WITH_AS(linear_cross_entropy(x, w, targets, counted), doctest::Contains("[2]"), ValueError);
}

TEST("cross_entropy: no positions at all") {
  const SwitchScope poison(set_poison);
  for (const Place& place : places())
    for (const Tensor& mask : {Tensor(), Tensor::zeros(Device::cpu(), Dtype::f32, {0})}) {
      INFO(place.name());
      const Gradients none = gradients_of(Tensor::zeros(place.device, place.dtype, {0, place.width}),
                                          Tensor::zeros(place.device, place.dtype, {5, place.width}), random_targets({0}, 5, 1), mask);
      CHECK(none.loss == 0.0);
      CHECK(none.weight == std::vector<double>(static_cast<std::size_t>(5 * place.width), 0.0));
    }
}

TEST("cross_entropy: positions that are not counted add nothing, whatever they hold") {
  const SwitchScope poison(set_poison);
  constexpr int64_t kRows = 6, kVocab = 300;
  const Tensor mask = Tensor::from<float>(Device::cpu(), {kRows}, {1, 0, 0.5f, 0, 0, 1});
  std::vector<int32_t> ids = random_targets({kRows}, kVocab, 3).to_vector<int32_t>();
  ids[3] = std::numeric_limits<int32_t>::min();
  ids[4] = std::numeric_limits<int32_t>::max();
  const Tensor targets = Tensor::from(Device::cpu(), {kRows}, ids);
  for (const Place& place : places()) {
    const Tensor w = random_tensor(place.device, place.dtype, {kVocab, place.width}, 2);
    const auto with = [&](double value) {
      const Tensor x = random_tensor(place.device, place.dtype, {kRows, place.width}, 1);
      for (const int64_t r : {1, 3, 4}) fill(x.slice(0, r, r + 1), value);
      return gradients_of(x, w, targets, mask, {4, 0, 1.0});
    };
    const Gradients expected = with(0);
    CHECK(std::isfinite(expected.loss));
    for (const double value : {1e4, -1e4, 3e38, std::numeric_limits<double>::infinity(), std::nan("")}) {
      INFO(place.name(), ", filled with ", value);
      const Gradients actual = with(value);
      CHECK(actual.loss == expected.loss);
      CHECK(actual.x == expected.x);
      CHECK(actual.weight == expected.weight);
      for (const std::size_t r : {0, 2, 3, 4, 5}) CHECK(actual.token_loss[r] == expected.token_loss[r]);  // row 1 has a target
    }
  }
}

TEST("cross_entropy: gradients kept without the factors of their rows get them on the way out") {
  const Tensor gradient = Tensor::from<float>(Device::cpu(), {2, 3}, {1, 2, 3, 4, 5, 6}),
               upstream = Tensor::full(Device::cpu(), Dtype::f32, {}, 2), factors = Tensor::from<float>(Device::cpu(), {2}, {0.5f, -3});
  for (int gpu = 0; gpu <= std::min(1, cuda_device_count()); ++gpu) {
    const Device device = gpu > 0 ? Device::cuda() : Device::cpu();
    const Tensor destination = Tensor::full(device, Dtype::f32, {2, 3}, 10);
    const auto scale = on_device(device, &scale_gradient_cpu, LONGHAND_CUDA_IMPL(scale_gradient_cuda));
    scale(gradient.to(device), upstream.to(device), factors.to(device), destination, 0.5);
    CHECK(destination.to_vector<float>() == std::vector<float>{6, 7, 8, -19, -25, -31});
  }
}

TEST("cross_entropy: a head tied to the embedding gets both gradients, as a leaf and as a parameter") {
  const SwitchScope poison(set_poison);
  const Tensor tokens = random_targets({2, 3}, 7, 1), targets = random_targets({2, 3}, 7, 2);
  auto loss_of = [&](const Variable& w) {
    return linear_cross_entropy(embedding(tokens, w, Dtype::f64), w, targets, {}, {2, 0, 3.0}).loss;
  };
  ParameterSet set;
  Parameter* w = set.declare("embedding.weight", {7, 4}, {init_normal(1.0)});
  set.allocate(Device::cpu(), Dtype::f64, Dtype::f64);
  set.initialize(1);
  const auto result = gradcheck([&](const auto& v) { return std::vector{loss_of(v[0])}; }, {w->master.clone()});
  CHECK_MESSAGE(result.worst < 1e-7, result.where);
  const Variable leaf = Variable::leaf(w->master.clone());
  backward(loss_of(leaf));
  fill(set.flat_grad(), std::nan(""));
  backward(loss_of(w->variable));
  expect_close(w->grad.to_vector<double>(), leaf.grad().to_vector<double>(), 1e-14);
}

TEST("cross_entropy: what does not fit is named") {
  const Tensor x = Tensor::zeros(Device::cpu(), Dtype::f32, {2, 3, 4}), w = Tensor::zeros(Device::cpu(), Dtype::f32, {5, 4});
  const Tensor targets = random_targets({2, 3}, 5, 1);
  CHECK_THROWS_AS(linear_cross_entropy(x, Tensor::zeros(Device::cpu(), Dtype::f32, {5, 6}), targets, {}), ShapeError);
  CHECK_THROWS_WITH_AS(linear_cross_entropy(x, w, random_targets({6}, 5, 1), {}), doctest::Contains("targets"), ShapeError);
  CHECK_THROWS_WITH_AS(linear_cross_entropy(x, w, targets, Tensor::zeros(Device::cpu(), Dtype::f32, {2})), doctest::Contains("mask"),
                       ShapeError);
  CHECK_THROWS_WITH_AS(linear_cross_entropy(x, w, targets, {}, {0, 6, 1.0}), doctest::Contains("valid_vocab"), ValueError);
  CHECK_THROWS_WITH_AS(linear_cross_entropy(x, w, Tensor::from<int32_t>(Device::cpu(), {2, 3}, {0, 1, 2, 3, 5, 4}), {}),
                       doctest::Contains("[1, 1]"), ValueError);
}

namespace {

struct CudaCase {
  int64_t rows, vocab, valid, width, chunk;
  bool apart = false;  // rows of x do not begin at multiples of 16 bytes
};

/// Whether the GPU has kernels with products of warpgroups, without which nothing writes exponentials.
bool has_warpgroups() {
  return Device::cuda().description().find("kernels of sm_90a") != std::string::npos;
}

/// Whether the GPU takes a product that writes exponentials.
bool forms_exponentials(const Tensor& x, const Tensor& weight) {
  const auto tell = on_device<bool(const Tensor&, const Tensor&)>(x.device(), nullptr, LONGHAND_CUDA_IMPL(forms_exponentials_cuda));
  return tell(x.reshape({x.numel() / x.dim(-1), x.dim(-1)}), weight);
}

/// Loss and gradients on the GPU against float64; from three rows on one that is not counted and has no target.
void expect_cuda_parity(const CudaCase& c, Dtype dtype) {
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  const int64_t valid = c.valid > 0 ? c.valid : c.vocab;
  const Tensor x = random_tensor(cpu, dtype, {1, c.rows, c.width}, 1), w = random_tensor(cpu, dtype, {c.vocab, c.width}, 2, 0.5);
  Tensor targets = random_targets({1, c.rows}, valid, 3);
  Tensor mask;
  if (c.rows > 2) {  // the second position is not counted and has no target
    std::vector<float> weights(static_cast<std::size_t>(c.rows), 1.0f);
    auto ids = targets.to_vector<int32_t>();
    weights[1] = 0;
    weights[2] = 0.5f;
    ids[1] = -100;
    mask = Tensor::from(cpu, {1, c.rows}, weights);
    targets = Tensor::from(cpu, {1, c.rows}, ids);
  }
  const ByHand expected = by_hand(x, w, targets, mask, valid, 2.0);
  const CrossEntropyOptions options{c.chunk, c.valid, 2.0};
  const Tensor targets_gpu = targets.to(gpu), mask_gpu = mask.defined() ? mask.to(gpu) : mask;
  const Tensor sink = Tensor::full(gpu, Dtype::f32, {c.vocab, c.width}, std::nan(""));
  Tensor x_gpu = x.to(gpu);
  if (c.apart) {
    x_gpu = Tensor::empty(gpu, dtype, {1, c.rows, c.width + 1}).slice(-1, 0, c.width);
    copy(x_gpu, x.to(gpu));
  }
  const Variable leaf_x = Variable::leaf(x_gpu), parameter = Variable::parameter(w.to(gpu), sink, "head");
  const auto out = linear_cross_entropy(leaf_x, parameter, targets_gpu, mask_gpu, options);
  const auto evaluated = linear_cross_entropy(x_gpu, w.to(gpu), targets_gpu, mask_gpu, options);
  backward({out.loss}, {Tensor::full(gpu, Dtype::f32, {}, 0.5)});

  const std::string what =
      w.describe() + " rows " + std::to_string(c.rows) + (c.apart ? " apart" : "") + " chunk " + std::to_string(c.chunk);
  const double evaluation = kCrossEntropyToleranceF32 * (1 + expected.largest);
  const bool exponentials = forms_exponentials(x_gpu, w.to(gpu)), fits = c.width % 8 == 0 && (!c.apart || c.rows == 1);
  CHECK_MESSAGE(exponentials == (dtype == Dtype::bf16 && fits && has_warpgroups()), what);
  const double rounded = kCrossEntropyToleranceBf16 * (1 + expected.largest);
  const double training = dtype == Dtype::f32 || exponentials ? evaluation : rounded,
               gradients = dtype == Dtype::f32 ? evaluation : (exponentials ? kCrossEntropyToleranceExponentials : rounded);
  expect_close(evaluated.token_loss.to_vector<double>(), expected.token_loss, evaluation, 1.0, what + " evaluation");
  expect_close(out.token_loss.to_vector<double>(), expected.token_loss, training, 1.0, what + " token_loss");
  expect_close({out.loss.value().item()}, {expected.loss}, training, 1.0, what + " loss");
  const Tensor grad_logits = Tensor::from(cpu, {c.rows, c.vocab}, expected.grad_logits);
  const Tensor x64 = x.to(Dtype::f64).reshape({c.rows, c.width}), w64 = w.to(Dtype::f64);
  const Variable by_x = Variable::leaf(x64), by_w = Variable::leaf(w64);
  backward({linear(by_x, by_w)}, {grad_logits});
  multiply(by_x.grad(), 0.5);
  multiply(by_w.grad(), 0.5);
  expect_close(leaf_x.grad().to_vector<double>(), by_x.grad().to_vector<double>(), gradients, 1e-6, what + " grad_x");
  expect_close(sink.to_vector<double>(), by_w.grad().to_vector<double>(), gradients, 1e-6, what + " grad_weight");
}

}  // namespace

TEST("cross_entropy: CUDA agrees with float64, odd sizes, masks, chunks, rows beyond shared memory") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope poison(set_poison);
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
    for (const CudaCase& c : {CudaCase{1, 1, 0, 8, 0},
                              {5, 97, 0, 33, 0},
                              {5, 97, 90, 33, 2},
                              {6, 4100, 4097, 16, 4},
                              {3, 50280, 50277, 24, 0},
                              {3, 50280, 50277, 21, 0},
                              {2, 130001, 0, 8, 0},
                              {300, 517, 0, 72, 0},
                              {257, 1111, 1000, 200, 150},
                              {129, 256, 0, 64, 128}})
      for (const bool apart : {false, true}) {
        if (apart && (dtype == Dtype::f32 || c.width % 8 != 0)) continue;
        CudaCase one = c;
        one.apart = apart;
        expect_cuda_parity(one, dtype);
      }
}

TEST("cross_entropy: CUDA agrees with float64 at random sizes") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope poison(set_poison);
  Draws draws(71);
  for (int round = 0; round < 24; ++round) {
    CudaCase c{draws.up_to(40), draws.up_to(9000), 0, draws.up_to(100), 0};
    if (draws.once_in(2)) c.width = (c.width + 7) / 8 * 8;
    if (draws.once_in(2)) c.valid = draws.between(1, c.vocab);
    if (draws.once_in(2)) c.chunk = draws.between(1, c.rows);
    expect_cuda_parity(c, round % 2 == 0 ? Dtype::bf16 : Dtype::f32);
  }
}

TEST("cross_entropy: CUDA keeps the digits of the target's gradient") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  for (const auto& [dtype, width] : {std::pair<Dtype, int64_t>{Dtype::f32, 1}, {Dtype::bf16, 1}, {Dtype::bf16, 8}})
    for (const double g : {5.0, 7.0, 20.0, 40.0}) {  // exact in bf16, and so are eighths
      std::vector<float> rows(static_cast<std::size_t>(2 * width), 0.0f);
      std::fill(rows.begin() + width, rows.end(), static_cast<float>(g) / static_cast<float>(width));
      const Gradients actual = gradients_of(Tensor::full(gpu, dtype, {1, width}, 1.0), Tensor::from(gpu, {2, width}, rows).to(dtype),
                                            Tensor::from<int32_t>(gpu, {1}, {1}), {});
      const double miss = 1 / (1 + std::exp(g));
      std::vector<double> expected(static_cast<std::size_t>(2 * width), miss);
      std::fill(expected.begin() + width, expected.end(), -miss);
      INFO(name_of(dtype), " width ", width, " logit ", g);
      expect_close(actual.weight, expected, dtype == Dtype::f32 ? 1e-5 : 0x1p-7);
      expect_close({actual.loss}, {-std::log1p(-miss)}, 1e-5);
      expect_close(actual.x, std::vector<double>(static_cast<std::size_t>(width), -miss * g / static_cast<double>(width)),
                   dtype == Dtype::f32 ? 1e-5 : 0x1p-7);
    }
}

TEST("cross_entropy: CUDA makes loss and gradients NaN where a counted target is no class, in its row alone") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  for (const auto& [dtype, width] : {std::pair<Dtype, int64_t>{Dtype::f32, 1}, {Dtype::bf16, 1}, {Dtype::bf16, 8}})
    for (const int32_t bad : {2, -1, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()}) {
      INFO(name_of(dtype), " width ", width, " target ", bad);
      const Gradients actual = gradients_of(Tensor::full(gpu, dtype, {2, width}, 1.0), random_tensor(gpu, dtype, {2, width}, 1),
                                            Tensor::from<int32_t>(gpu, {2}, {1, bad}), {});
      CHECK(std::isnan(actual.loss));
      CHECK(std::isfinite(actual.token_loss[0]));
      CHECK(std::isnan(actual.token_loss[1]));
      for (std::size_t i = 0; i < actual.x.size(); ++i) CHECK(std::isnan(actual.x[i]) == (i >= static_cast<std::size_t>(width)));
      for (const double g : actual.weight) CHECK(std::isnan(g));
    }
}

TEST("cross_entropy: CUDA, a target as unlikely as the range of exponentials allows, and less likely yet") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope poison(set_poison);
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  constexpr int64_t kVocab = 300, kWidth = 8;
  // Logits are gap * first + second, with first from 0, of the target, to 1; the third feature adds a little to gradients alone.
  const Tensor w = random_tensor(cpu, Dtype::bf16, {kVocab, kWidth}, 1);
  std::vector<float> first(static_cast<std::size_t>(kVocab), 1.0f);
  for (std::size_t v = 0; v < first.size(); ++v) first[v] = v == 0 ? 0.0f : v % 3 == 0 ? 0.5f : 1.0f;
  copy(w.slice(1, 0, 1), Tensor::from(cpu, {kVocab, 1}, first).to(Dtype::bf16));
  if (has_warpgroups()) REQUIRE(forms_exponentials(Tensor::zeros(gpu, Dtype::bf16, {1, kWidth}), w.to(gpu)));
  for (const double gap : {50.0, 55.0, 56.0, 56.5, 57.0, 58.0, 60.0, 62.0, 63.0, 70.0, 80.0, 90.0, 140.0})
    for (const double scale : {1.0, 0x1p-20}) {
      INFO("gap ", gap, " scale ", scale);
      const Tensor x = Tensor::from<double>(cpu, {1, kWidth}, {gap, 1, 0x1p-8, 0, 0, 0, 0, 0}).to(Dtype::bf16),
                   targets = Tensor::from<int32_t>(cpu, {1}, {0});
      const ByHand expected = by_hand(x, w, targets, {}, kVocab, scale);
      const Gradients actual = gradients_of(x.to(gpu), w.to(gpu), targets, {}, {0, 0, scale});
      const double gradients = has_warpgroups() ? kCrossEntropyToleranceExponentials : kCrossEntropyToleranceBf16 * (1 + expected.largest);
      const double losses = (has_warpgroups() ? kCrossEntropyToleranceF32 : kCrossEntropyToleranceBf16) * (1 + expected.largest);
      expect_close(actual.token_loss, expected.token_loss, losses, 1.0, "token_loss");
      const Variable by_x = Variable::leaf(x.to(Dtype::f64)), by_w = Variable::leaf(w.to(Dtype::f64));
      backward({linear(by_x, by_w)}, {Tensor::from(cpu, {1, kVocab}, expected.grad_logits)});
      expect_close(actual.x, by_x.grad().to_vector<double>(), gradients, 1e-30, "grad_x");
      expect_close(actual.weight, by_w.grad().to_vector<double>(), gradients, 1e-30, "grad_weight");
      // The small feature's column by itself: its digits are the first to go where s x is too small.
      const auto column = [&](const std::vector<double>& all) {
        std::vector<double> one;
        for (std::size_t v = 0; v < static_cast<std::size_t>(kVocab); ++v) one.push_back(all[v * kWidth + 2]);
        return one;
      };
      expect_close(column(actual.weight), column(by_w.grad().to_vector<double>()), gradients, 1e-30, "grad_weight of a small feature");
    }
}

TEST("cross_entropy: CUDA, rows whose target is hopelessly unlikely, among others that are not and by themselves") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  if (!has_warpgroups()) SKIP("this GPU takes the pass over logits, which the other cases test");
  const SwitchScope poison(set_poison);
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  struct HopelessCase {
    int64_t rows, vocab, width, every;  // every: which rows are
  };
  for (const HopelessCase& c : {HopelessCase{140, 700, 16, 27}, {70, 517, 72, 1}, {33, 37, 200, 32}, {1, 5001, 8, 1}}) {
    INFO(c.rows, " rows, ", c.vocab, " classes, ", c.width, " features, one in ", c.every);
    Tensor x = random_tensor(cpu, Dtype::bf16, {c.rows, c.width}, 1), w = random_tensor(cpu, Dtype::bf16, {c.vocab, c.width}, 2, 0.5);
    for (int64_t r = 0; r < c.rows; r += c.every) multiply(x.slice(0, r, r + 1), 64.0);  // logits of some hundreds
    REQUIRE(forms_exponentials(x.to(gpu), w.to(gpu)));
    const Tensor targets = random_targets({c.rows}, c.vocab, 3);
    std::vector<float> weights(static_cast<std::size_t>(c.rows), 1.0f);
    if (c.rows > 27) weights[27] = 0;
    const Tensor mask = Tensor::from(cpu, {c.rows}, weights);
    const ByHand expected = by_hand(x, w, targets, mask, c.vocab);
    CHECK(*std::max_element(expected.token_loss.begin(), expected.token_loss.end()) > 100);
    const double tolerance = kCrossEntropyToleranceF32 * (1 + expected.largest);
    const auto evaluated = linear_cross_entropy(x.to(gpu), w.to(gpu), targets.to(gpu), mask.to(gpu));
    expect_close(evaluated.token_loss.to_vector<double>(), expected.token_loss, tolerance, 1.0, "evaluation");
    const Gradients actual = gradients_of(x.to(gpu), w.to(gpu), targets, mask);
    expect_close(actual.token_loss, expected.token_loss, tolerance, 1.0, "token_loss");
    const Variable by_x = Variable::leaf(x.to(Dtype::f64)), by_w = Variable::leaf(w.to(Dtype::f64));
    backward({linear(by_x, by_w)}, {Tensor::from(cpu, {c.rows, c.vocab}, expected.grad_logits)});
    expect_close(actual.x, by_x.grad().to_vector<double>(), kCrossEntropyToleranceExponentials, 1e-6, "grad_x");
    expect_close(actual.weight, by_w.grad().to_vector<double>(), kCrossEntropyToleranceExponentials, 1e-6, "grad_weight");
    CHECK(gradients_of(x.to(gpu), w.to(gpu), targets, mask).x == actual.x);
  }
}

TEST("cross_entropy: CUDA gives finite numbers for logits of +-1e4, and the same bits twice") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  for (const auto& [dtype, width] : {std::pair{Dtype::f32, 1}, {Dtype::bf16, 1}, {Dtype::bf16, 8}}) {
    std::vector<float> first_column(static_cast<std::size_t>(4 * width), 0.0f);
    const float logits[4] = {1e4f, -1e4f, 0, 5000};
    for (int v = 0; v < 4; ++v) first_column[static_cast<std::size_t>(v * width)] = logits[v];
    const Tensor weight = Tensor::from(gpu, {4, width}, first_column).to(dtype), x = Tensor::full(gpu, dtype, {4, width}, 1.0);
    auto run = [&] {
      const Variable w = Variable::leaf(weight);
      const auto out = linear_cross_entropy(x, w, Tensor::from<int32_t>(gpu, {4}, {0, 1, 2, 3}), {});
      backward(out.loss);
      auto values = out.token_loss.to_vector<double>();
      for (const double v : w.grad().to_vector<double>()) values.push_back(v);
      return values;
    };
    const auto values = run();
    expect_close({values[1], values[2], values[3]}, {2e4, 1e4, 5000}, 0x1p-8);
    for (const double v : values) CHECK(std::isfinite(v));
    CHECK(values == run());
  }
}
