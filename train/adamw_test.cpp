// AdamW against the formula written out for one number at a time, in double.
#include "train/adamw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "core/error.h"
#include "core/philox.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

using test::expect_close;

constexpr double kF32Tolerance = 4e-7;  // a few roundings a step of numbers near the largest weight
constexpr AdamWRule kRule{.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 0.5};

// Parameters of awkward sizes, with and without decay, in mixed order.
void declare(ParameterSet& set) {
  auto normal = [](bool decay) { return ParameterOptions{init_normal(0.5), decay, false}; };
  set.declare("embedding", {7, 13}, normal(true));
  set.declare("layers.0.A_log", {5}, normal(false));
  set.declare("layers.0.weight", {300, 700}, normal(true));
  set.declare("layers.1.A_log", {5}, normal(false));
  set.declare("layers.1.weight", {3}, normal(true));
  set.declare("norm", {70}, normal(false));
}

std::vector<double> gradient_of(const Parameter& p, int step, double scale) {
  std::vector<double> g(static_cast<std::size_t>(p.shape.numel()));
  const uint64_t key = philox_key(hash_name(p.name.c_str()), static_cast<uint64_t>(step));
  for (std::size_t i = 0; i < g.size(); ++i) g[i] = scale * static_cast<double>(philox_normal(key, i));
  return g;
}

void set_gradients(ParameterSet& set, int step, double scale) {
  for (const Parameter& p : set.all())
    copy(p.grad, Tensor::from<double>(Device::cpu(), p.shape, gradient_of(p, step, scale)).to(p.grad.dtype()));
}

// The formula of adamw.h, one number at a time.
struct ScalarAdamW {
  struct Moments {
    std::vector<double> m, v;
  };
  std::map<std::string, std::vector<double>> weights;
  std::map<std::string, Moments> moments;
  int t = 0;
  double norm = 0;

  void step(const ParameterSet& set, int seed, double scale, double lr, double weight_decay, const std::set<std::string>& no_decay) {
    double squares = 0;
    for (const Parameter& p : set.all())
      for (const double g : gradient_of(p, seed, scale)) squares += g * g;
    norm = std::sqrt(squares);
    const double factor = kRule.clip > 0 ? std::min(1.0, kRule.clip / norm) : 1.0;
    ++t;
    for (const Parameter& p : set.all()) {
      auto& w = weights[p.name];
      auto& [m, v] = moments[p.name];
      m.resize(w.size());
      v.resize(w.size());
      const auto gradient = gradient_of(p, seed, scale);
      const double decay = p.options.decay && !no_decay.contains(p.name) ? weight_decay : 0;
      for (std::size_t i = 0; i < w.size(); ++i) {
        const double g = gradient[i] * factor;
        m[i] = kRule.beta1 * m[i] + (1 - kRule.beta1) * g;
        v[i] = kRule.beta2 * v[i] + (1 - kRule.beta2) * g * g;
        const double m_hat = m[i] / (1 - std::pow(kRule.beta1, t)), v_hat = v[i] / (1 - std::pow(kRule.beta2, t));
        w[i] -= lr * decay * w[i] + lr * m_hat / (std::sqrt(v_hat) + kRule.eps);
      }
    }
  }
};

// Five steps with changing rates on one device, against the scalar form; small and large gradients, so that clipping is off and on.
void compare_with_scalar(const Device& device, Dtype master, Dtype compute, double tolerance) {
  ParameterSet set;
  declare(set);
  set.allocate(device, master, compute);
  set.initialize(7);
  const std::set<std::string> no_decay{"embedding"};
  AdamW optimizer(set, {.rule = kRule, .no_decay = no_decay});
  ScalarAdamW scalar;
  for (const Parameter& p : set.all()) scalar.weights[p.name] = p.master.to_vector<double>();
  const Tensor loss = Tensor::full(device, master, {}, 1.25);
  for (int step = 0; step < 5; ++step) {
    const double scale = step % 2 == 0 ? 1e-4 : 3, lr = 1e-3 * (step + 1), weight_decay = 0.3 / (step + 1);
    set_gradients(set, step, scale);
    optimizer.set_rates(lr, weight_decay);
    optimizer.step(loss);
    scalar.step(set, step, scale, lr, weight_decay, no_decay);
    const StepReport report = optimizer.report();
    CHECK(report.grad_norm == doctest::Approx(scalar.norm).epsilon(1e-6));
    CHECK(report.loss == 1.25);
    CHECK(report.updates == step + 1);
  }
  for (const Parameter& p : set.all()) {
    expect_close(p.master.to_vector<double>(), scalar.weights[p.name], tolerance, 1e-30, p.name);
    if (set.flat_compute()) CHECK(p.variable.value().to_vector<float>() == p.master.to(Dtype::bf16).to_vector<float>());
  }
  const auto saved = optimizer.save();
  for (const Parameter& p : set.all()) {
    expect_close(saved.at("first_moment." + p.name).to_vector<double>(), scalar.moments[p.name].m, tolerance, 1e-30, p.name);
    expect_close(saved.at("second_moment." + p.name).to_vector<double>(), scalar.moments[p.name].v, tolerance, 1e-30, p.name);
  }
}

TEST("adamw: equals the scalar formula over several steps, f64") {
  compare_with_scalar(Device::cpu(), Dtype::f64, Dtype::f64, 1e-12);
}

TEST("adamw: equals the scalar formula over several steps, f32") {
  compare_with_scalar(Device::cpu(), Dtype::f32, Dtype::f32, kF32Tolerance);
}

TEST("adamw: equals the scalar formula on a GPU, with and without a bf16 copy") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  compare_with_scalar(Device::cuda(), Dtype::f32, Dtype::f32, kF32Tolerance);
  compare_with_scalar(Device::cuda(), Dtype::f32, Dtype::bf16, kF32Tolerance);
}

TEST("adamw: decay segments cover the flat buffer, and the list names what takes no decay") {
  ParameterSet set;
  declare(set);
  set.allocate(Device::cpu(), Dtype::f32, Dtype::f32);
  const AdamW plain(set, {});
  REQUIRE(plain.segments().size() == 2);
  CHECK(plain.segments()[0].decays);
  CHECK(plain.segments()[0].end == set.decayed_elements());
  CHECK(plain.segments()[1].end == set.flat_master().numel());
  const AdamW without(set, {.rule = {}, .no_decay = {"layers.0.weight"}});
  REQUIRE(without.segments().size() == 4);  // embedding | weight | weight of layer 1 | no decay
  CHECK_FALSE(without.segments()[1].decays);
  CHECK(without.segments()[1].end - without.segments()[1].begin >= 300 * 700);
  CHECK(plain.describe_no_decay() == std::vector<std::string>{"layers.*.A_log  2 x [5]", "norm  [70]"});
  CHECK_THROWS_AS(AdamW(set, {.rule = {}, .no_decay = {"nobody"}}), ValueError);
}

void check_skips(const Device& device) {
  ParameterSet set;
  declare(set);
  set.allocate(device, Dtype::f32, device.is_cuda() ? Dtype::bf16 : Dtype::f32);
  set.initialize(1);
  AdamW optimizer(set, {});
  optimizer.set_rates(1e-2, 0.1);
  const Tensor good = Tensor::full(device, Dtype::f32, {}, 2), bad = Tensor::full(device, Dtype::f32, {}, NAN);
  set_gradients(set, 0, 1);
  optimizer.step(good);
  const auto weights = set.flat_master().to_vector<float>();
  const auto moments = optimizer.save().at("first_moment.norm").to_vector<float>();

  optimizer.step(bad);  // a loss that is no number
  CHECK(optimizer.report().skipped == 1);
  CHECK(std::isnan(optimizer.report().loss));
  fill(set.all()[2].grad.select(0, 299).slice(0, 699, 700), std::numeric_limits<double>::infinity());
  optimizer.step(good);  // one infinite gradient
  CHECK(optimizer.report().skipped == 2);
  CHECK(optimizer.report().skipped_in_a_row == 2);
  CHECK(optimizer.report().updates == 1);
  CHECK(std::isinf(optimizer.report().grad_norm));
  CHECK(set.flat_master().to_vector<float>() == weights);
  CHECK(optimizer.save().at("first_moment.norm").to_vector<float>() == moments);

  set_gradients(set, 1, 1);
  optimizer.step(good);
  CHECK(optimizer.report().skipped == 2);
  CHECK(optimizer.report().skipped_in_a_row == 0);
  CHECK(optimizer.report().updates == 2);
  CHECK(set.flat_master().to_vector<float>() != weights);
}

TEST("adamw: a loss or gradient that is not finite changes nothing and is counted") {
  check_skips(Device::cpu());
  if (cuda_device_count() > 0) check_skips(Device::cuda());
}

// Three optimizers with parts of one set each against one that has it all.
void check_shared(const Device& device, Dtype compute) {
  ParameterSet whole_set, shared_set;
  for (ParameterSet* set : {&whole_set, &shared_set}) {
    declare(*set);
    set->allocate(device, Dtype::f32, compute);
    set->initialize(3);
  }
  const AdamWOptions options{.rule = kRule, .no_decay = {}};
  AdamW whole(whole_set, options);
  const int64_t n = shared_set.flat_master().numel();
  std::vector<std::unique_ptr<AdamW>> shared;
  for (const std::vector<Part>& own : {std::vector<Part>{{0, 64}, {1024, 9984}}, {{64, 1024}, {100032, n}}, {{9984, 100032}}})
    shared.push_back(std::make_unique<AdamW>(shared_set, options, own));
  const Tensor loss = Tensor::full(device, Dtype::f32, {}, 1.5), part_of_loss = Tensor::full(device, Dtype::f32, {}, 0.5);
  auto check_same_bits = [&] {
    CHECK(shared_set.flat_master().to_vector<float>() == whole_set.flat_master().to_vector<float>());
    if (compute != Dtype::f32) CHECK(shared_set.flat_compute().to_vector<float>() == whole_set.flat_compute().to_vector<float>());
  };
  for (int step = 0; step < 4; ++step) {
    set_gradients(whole_set, step, step % 2 == 0 ? 1 : 1e-3);
    set_gradients(shared_set, step, step % 2 == 0 ? 1 : 1e-3);
    whole.set_rates(1e-3, 0.1);
    whole.step(loss);
    // The sums of all are those of the one, so that the bits are the same: taken before anything is updated, as processes do.
    const Tensor sums = whole.control().slice(0, kControlLossSum, kControlSquareSum + 1).clone();
    std::vector<double> added(2);
    for (auto& optimizer : shared) {
      optimizer->set_rates(1e-3, 0.1);
      optimizer->step(part_of_loss, [&](const Tensor& own) {
        const auto numbers = own.to_vector<double>();
        added[0] += numbers[0], added[1] += numbers[1];
        copy(own, sums);
      });
    }
    CHECK(added[0] == 1.5);
    CHECK(added[1] == doctest::Approx(sums.to_vector<double>()[1]).epsilon(1e-12));
    check_same_bits();
    CHECK(shared[1]->report().grad_norm == whole.report().grad_norm);
  }
  // What they save together is what the one saves, and each takes its part from that.
  const auto saved = whole.save();
  std::map<std::string, std::vector<double>> together;
  for (const auto& optimizer : shared)
    for (const auto& [name, parts] : optimizer->save_own(optimizer == shared[0]))
      for (const auto& [begin, values] : parts.runs) {
        auto& all = together[name];
        all.resize(static_cast<std::size_t>(parts.shape.numel()), NAN);
        const auto numbers = values.to_vector<double>();
        std::copy(numbers.begin(), numbers.end(), all.begin() + begin);
      }
  for (const auto& [name, tensor] : saved) CHECK(together[name] == tensor.to_vector<double>());
  CHECK_THROWS_AS(shared[0]->save(), ValueError);
  for (auto& optimizer : shared) optimizer->load(saved);
  set_gradients(whole_set, 5, 1), set_gradients(shared_set, 5, 1);
  whole.step(loss);
  for (auto& optimizer : shared)
    optimizer->step(part_of_loss, [&](const Tensor& own) { copy(own, whole.control().slice(0, kControlLossSum, kControlSquareSum + 1)); });
  check_same_bits();
}

TEST("adamw: several optimizers that share a set do what one does, bit for bit") {
  check_shared(Device::cpu(), Dtype::f32);
  if (cuda_device_count() == 0) return;
  check_shared(Device::cuda(), Dtype::f32);
  check_shared(Device::cuda(), Dtype::bf16);
}

TEST("adamw: saved and loaded moments go on bit for bit") {
  auto run = [](bool reload) {
    ParameterSet set;
    declare(set);
    set.allocate(Device::cpu(), Dtype::f32, Dtype::f32);
    set.initialize(3);
    AdamW first(set, {.rule = kRule, .no_decay = {}}), second(set, {.rule = kRule, .no_decay = {}});
    const Tensor loss = Tensor::full(Device::cpu(), Dtype::f32, {}, 1);
    for (int step = 0; step < 4; ++step) {
      if (step == 2 && reload) second.load(first.save());
      AdamW& optimizer = step >= 2 && reload ? second : first;
      set_gradients(set, step, 1);
      optimizer.set_rates(1e-3, 0.1);
      optimizer.step(loss);
    }
    return set.flat_master().to_vector<float>();
  };
  CHECK(run(true) == run(false));
  ParameterSet set;
  declare(set);
  set.allocate(Device::cpu(), Dtype::f32, Dtype::f32);
  AdamW optimizer(set, {});
  auto saved = optimizer.save();
  saved.erase("first_moment.norm");
  CHECK_THROWS_WITH_AS(optimizer.load(saved), doctest::Contains("first_moment.norm"), FileError);
}

}  // namespace
}  // namespace longhand
