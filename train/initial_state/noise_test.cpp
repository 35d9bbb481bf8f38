// Noise and its statistics: moments, keys, probability, cover, and fitted statistics against a direct computation.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/philox.h"
#include "tests/support/check.h"
#include "train/host_link.h"
#include "train/initial_state/initial_state.h"
#include "train/initial_state/noise_rule.h"
#include "train/initial_state/row_kernels.h"

namespace longhand {
namespace {

using test::expect_close;

// Sampling errors of n independent N(mean, std^2) numbers: std / sqrt(n) of their mean, std^2 sqrt(2 / n) of their variance, 1 / sqrt(n) of
// a correlation. Draws are keyed, so a test that is within this many of them once stays there.
constexpr double kErrors = 4;

constexpr int64_t kHeads = 3, kHeadElements = 5 * 8;

// Two layers such as those of a model: with heads, and without; windows beside them.
RecurrentState zero_state(int64_t rows) {
  const Device cpu = Device::cpu();
  return RecurrentState(
      {{{"ssm", Tensor::zeros(cpu, Dtype::f32, {rows, kHeads, 5, 8})}, {"conv", Tensor::zeros(cpu, Dtype::f32, {rows, 3, 7})}},
       {{"ssm", Tensor::zeros(cpu, Dtype::f32, {rows, 6, 9})}, {"conv_q", Tensor::zeros(cpu, Dtype::bf16, {rows, 3, 2})}}});
}

class Strategy {
 public:
  explicit Strategy(const std::string& name, const InitialStateOptions& options = {}, uint64_t seed = 5)
      : link_(make_host_link(Device::cpu())),
        state_(make_initial_state(
            name, {.zero_state = &zero_state, .device = Device::cpu(), .link = *link_, .seed = seed, .options = options})) {}
  InitialState* operator->() const { return state_.get(); }

 private:
  std::unique_ptr<HostLink> link_;
  std::unique_ptr<InitialState> state_;
};

std::vector<int64_t> ids(int64_t begin, int64_t end) {
  std::vector<int64_t> out;
  for (int64_t id = begin; id < end; ++id) out.push_back(id);
  return out;
}

// The state that rows `row_ids` of a step start from.
RecurrentState begun(const Strategy& strategy, int64_t step, const std::vector<int64_t>& row_ids, int64_t micro = 0) {
  const BatchInfo info{.step = step, .micro = micro, .rows = std::ssize(row_ids), .resets = {}, .row_ids = row_ids};
  strategy->prepare(info);
  return strategy->begin(info);
}
void ended(const Strategy& strategy, const RecurrentState& h_T, int64_t micro = 0) {
  strategy->end({.step = 0, .micro = micro, .rows = h_T.rows(), .resets = {}, .row_ids = {}}, h_T);
}

std::vector<double> values(const RecurrentState& state, std::size_t layer = 0, const char* name = "ssm") {
  return state.get(layer, name).value().to_vector<double>();
}

// A state whose elements are keyed numbers around `mean`, different in each head.
RecurrentState made_up_state(int64_t rows, uint64_t key, double mean = 0) {
  RecurrentState state = zero_state(rows);
  for (LayerState& layer : state.layers()) {
    for (auto& [name, variable] : layer) {
      const Tensor& t = variable.value();
      const int64_t head = t.rank() == 4 ? t.dim(2) * t.dim(3) : t.numel() / rows, heads = t.rank() == 4 ? t.dim(1) : 1;
      std::vector<float> numbers;
      for (int64_t i = 0; i < t.numel(); ++i) {
        const auto h = static_cast<double>(i / head % heads);
        numbers.push_back(static_cast<float>(mean + h + (1 + h) * philox_normal(key, static_cast<uint64_t>(i))));
      }
      variable = Variable(Tensor::from(Device::cpu(), t.shape(), numbers).to(t.dtype()));
    }
  }
  return state;
}

struct Sample {
  double count = 0, mean = 0, variance = 0;
};

Sample sample_of(const std::vector<double>& v) {
  Sample s{static_cast<double>(v.size()), 0, 0};
  for (const double x : v) s.mean += x / s.count;
  for (const double x : v) s.variance += (x - s.mean) * (x - s.mean) / s.count;
  return s;
}

void expect_normal(const std::vector<double>& v, double mean, double std) {
  const Sample s = sample_of(v);
  CHECK(std::abs(s.mean - mean) < kErrors * std / std::sqrt(s.count));
  CHECK(std::abs(s.variance - std * std) < kErrors * std * std * std::sqrt(2 / s.count));
  const auto beyond = std::count_if(v.begin(), v.end(), [&](double x) { return std::abs(x - mean) > 2 * std; });
  constexpr double kShare = 0.0455;  // of a normal distribution beyond two standard deviations
  CHECK(std::abs(static_cast<double>(beyond) / s.count - kShare) < kErrors * std::sqrt(kShare * (1 - kShare) / s.count));
}

void expect_independent(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  const Sample sa = sample_of(a), sb = sample_of(b);
  double product = 0;
  for (std::size_t i = 0; i < a.size(); ++i) product += (a[i] - sa.mean) * (b[i] - sb.mean) / sa.count;
  CHECK(std::abs(product / std::sqrt(sa.variance * sb.variance)) < kErrors / std::sqrt(sa.count));
}

std::vector<double> row_of(const RecurrentState& state, int64_t b) {
  return values(state.select_rows({b}));
}

// --- random-noise -----------------------------------------------------------------------------------------------

TEST("random-noise: every tensor is drawn from N(0, sigma^2)") {
  const Strategy strategy("random-noise", {.sigma = 0.3});
  const RecurrentState h0 = begun(strategy, 0, ids(0, 200));
  expect_normal(values(h0, 0, "ssm"), 0, 0.3);
  expect_normal(values(h0, 0, "conv"), 0, 0.3);
  expect_normal(values(h0, 1, "ssm"), 0, 0.3);
  expect_normal(values(h0, 1, "conv_q"), 0, 0.3);
}

TEST("random-noise: an element is keyed by seed, step, row, tensor and place, and by nothing else") {
  const Strategy strategy("random-noise", {.sigma = 0.5});
  const RecurrentState h0 = begun(strategy, 7, {3, 1000, 4});
  uint64_t key = philox_key(philox_key(5, hash_name("random-noise")), 7);
  key = philox_key(philox_key(key, 1000), hash_name("layers.0.ssm"));
  std::vector<double> expected;
  for (uint64_t e = 0; e < kHeads * kHeadElements; ++e) expected.push_back(static_cast<double>(0.5F * philox_normal(key, e)));
  CHECK(row_of(h0, 1) == expected);

  CHECK(row_of(begun(strategy, 7, {1000}), 0) == expected);  // alone, in another batch
  CHECK(row_of(begun(strategy, 7, ids(990, 1010), 3), 10) == expected);
  const std::vector<int64_t> many = ids(0, 100);
  const auto here = values(begun(strategy, 7, many));
  expect_independent(here, values(begun(strategy, 8, many)));
  expect_independent(here, values(begun(strategy, 7, ids(100, 200))));
  expect_independent(here, values(begun(Strategy("random-noise", {.sigma = 0.5}, 6), 7, many)));
  const auto first = row_of(begun(strategy, 7, many), 0), second = row_of(begun(strategy, 7, many), 1);
  expect_independent(first, second);
  std::vector<double> other_layer = values(begun(strategy, 7, many), 1, "ssm");
  expect_independent(other_layer, std::vector<double>(here.begin(), here.begin() + std::ssize(other_layer)));
}

TEST("noise: four numbers of a block are those that are drawn one by one") {
  for (uint64_t quad = 0; quad < 5; ++quad) {
    float n[4];
    philox_normals(9, quad, n);
    for (uint64_t i = 0; i < 4; ++i) CHECK(n[i] == philox_normal(9, 4 * quad + i));
  }
}

// --- probability and cover --------------------------------------------------------------------------------------

TEST("initial states: rows are treated with the probability, by seed, step and row id, not by their place") {
  constexpr int64_t kRows = 400;
  constexpr double kProbability = 0.3;
  for (const InitialStateStrategy& entry : initial_state_strategies()) {
    const std::string name = entry.name;
    if (name == "zero") continue;
    CAPTURE(name);
    auto treated = [&](const std::vector<int64_t>& row_ids, int64_t step) {
      const Strategy strategy(name, {.probability = kProbability});
      begun(strategy, 0, row_ids);
      ended(strategy, made_up_state(kRows, 1, 5));
      const RecurrentState h0 = begun(strategy, step, row_ids);
      const auto ssm = values(h0);
      std::vector<bool> out;
      for (int64_t b = 0; b < kRows; ++b) {
        const auto row = ssm.begin() + b * kHeads * kHeadElements;
        const auto zeros = std::count(row, row + kHeads * kHeadElements, 0.0);
        CHECK((zeros == 0 || zeros == kHeads * kHeadElements));
        out.push_back(zeros == 0);
      }
      return out;
    };
    std::vector<int64_t> forward = ids(1000, 1000 + kRows), reversed(forward.rbegin(), forward.rend());
    const auto drawn = treated(forward, 7);
    auto in_reverse = treated(reversed, 7);
    const double share = static_cast<double>(std::count(drawn.begin(), drawn.end(), true)) / kRows;
    CHECK(std::abs(share - kProbability) < kErrors * std::sqrt(kProbability * (1 - kProbability) / kRows));
    std::reverse(in_reverse.begin(), in_reverse.end());
    CHECK(drawn == in_reverse);
    CHECK(drawn != treated(forward, 8));
  }
}

TEST("initial states: cover ssm leaves the convolution's window to zeros") {
  for (const InitialStateStrategy& entry : initial_state_strategies()) {
    const std::string name = entry.name;
    if (name == "zero") continue;
    CAPTURE(name);
    for (const char* cover : {"all", "ssm"}) {
      const Strategy strategy(name, {.cover = cover});
      begun(strategy, 0, ids(0, 4));
      ended(strategy, made_up_state(4, 1));
      const RecurrentState h0 = begun(strategy, 1, ids(0, 4));
      REQUIRE(h0.layers().size() == 2);
      for (std::size_t layer : {0, 1}) {
        REQUIRE(h0.get(layer, "ssm"));
        const auto ssm = values(h0, layer);
        CHECK(std::count(ssm.begin(), ssm.end(), 0.0) == 0);
        CHECK(h0.layers()[layer].size() == (cover == std::string("all") ? 2 : 1));
      }
    }
  }
}

TEST("initial states: an unknown name and options out of range are refused") {
  auto refusal = [](const std::string& name, const InitialStateOptions& options) {
    try {
      const Strategy strategy(name, options);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  CHECK(refusal("zero", {}) == "accepted");
  CHECK(refusal("state-pasing", {}).find("nearest  state-passing") != std::string::npos);
  CHECK(refusal("random_noise", {}).find("nearest  random-noise") != std::string::npos);
  CHECK(refusal("random-noise", {.cover = "conv"}).find("known  all, ssm") != std::string::npos);
  CHECK(refusal("random-noise", {.probability = 1.5}).find("probability") != std::string::npos);
  CHECK(refusal("random-noise", {.sigma = -0.1}).find("sigma") != std::string::npos);
  CHECK(refusal("random-noise", {.sigma = std::numeric_limits<double>::infinity()}).find("sigma") != std::string::npos);
  CHECK(refusal("fitted-noise", {.statistics_per = "layer"}).find("head, channel") != std::string::npos);
  CHECK(refusal("fitted-noise", {.statistics_decay = 1.01}).find("decay") != std::string::npos);
}

// --- fitted-noise -----------------------------------------------------------------------------------------------

// Which group element e of a tensor's row belongs to, said tensor by tensor.
std::size_t group_by_hand(const std::string& full_name, int64_t e, bool by_channel) {
  if (full_name == "layers.0.ssm") return static_cast<std::size_t>(e / kHeadElements);
  if (!by_channel) return 0;
  if (full_name == "layers.0.conv") return static_cast<std::size_t>(e % 7);
  if (full_name == "layers.1.conv_q") return static_cast<std::size_t>(e % 2);
  return static_cast<std::size_t>(e / 9);  // layers.1.ssm [B, 6, 9]
}

// All elements of a tensor in some states, by group.
std::vector<std::vector<double>> elements_by_group(const std::vector<RecurrentState>& states, const std::string& full_name,
                                                   bool by_channel) {
  std::vector<std::vector<double>> groups;
  for (const RecurrentState& state : states) {
    const Tensor t = state.named_tensors().at(full_name);
    const auto v = t.to_vector<double>();
    const int64_t width = t.numel() / t.dim(0);
    for (int64_t i = 0; i < t.numel(); ++i) {
      const std::size_t g = group_by_hand(full_name, i % width, by_channel);
      if (groups.size() <= g) groups.resize(g + 1);
      groups[g].push_back(v[static_cast<std::size_t>(i)]);
    }
  }
  return groups;
}

TEST("fitted-noise: statistics equal those over all final states in two passes, far from zero too") {
  for (const char* per : {"head", "channel"}) {
    for (const double mean : {0.0, 1e4}) {
      CAPTURE(per);
      CAPTURE(mean);
      const Strategy strategy("fitted-noise", {.statistics_per = per, .statistics_decay = 1});
      std::vector<RecurrentState> seen;
      for (int64_t step = 0; step < 5; ++step) {
        begun(strategy, step, ids(0, 2 + step));
        seen.push_back(made_up_state(2 + step, static_cast<uint64_t>(step), mean));
        ended(strategy, seen.back());
      }
      const auto stored = strategy->save();
      CHECK(stored.size() == 4);
      for (const auto& [name, moments] : stored) {
        const std::string full_name = name.substr(std::string("statistics.").size());
        CAPTURE(full_name);
        const auto groups = elements_by_group(seen, full_name, per == std::string("channel"));
        REQUIRE(moments.shape() == Shape{std::ssize(groups), 3});
        const auto m = moments.to_vector<double>();
        for (std::size_t g = 0; g < groups.size(); ++g) {
          const Sample expected = sample_of(groups[g]);
          CHECK(m[3 * g] == expected.count);
          CHECK(std::abs(m[3 * g + 1] - expected.mean) < 1e-12 * (1 + mean));
          CHECK(m[3 * g + 2] / m[3 * g] == doctest::Approx(expected.variance).epsilon(1e-9));
        }
      }
    }
  }
}

std::vector<std::vector<double>> stored_values(const Strategy& strategy) {
  std::vector<std::vector<double>> out;
  for (const auto& [name, moments] : strategy->save()) out.push_back(moments.to_vector<double>());
  return out;
}

TEST("fitted-noise: however the rows of a step are cut into micro-batches, statistics and draws are the same bits") {
  auto after = [](int64_t micro_batches) {
    const Strategy strategy("fitted-noise");
    std::vector<double> drawn;
    for (int64_t step = 0; step < 3; ++step) {
      const RecurrentState whole = made_up_state(12, static_cast<uint64_t>(step));
      const int64_t rows = 12 / micro_batches;
      for (int64_t m = 0; m < micro_batches; ++m) {
        const auto row_ids = ids(100 * step + m * rows, 100 * step + (m + 1) * rows);
        for (const double v : values(begun(strategy, step, row_ids, m))) drawn.push_back(v);
        ended(strategy, whole.select_rows(ids(m * rows, (m + 1) * rows)), m);
      }
    }
    return std::pair(stored_values(strategy), drawn);
  };
  const auto whole = after(1);
  for (const int64_t micro_batches : {2, 3, 12}) {
    const auto cut = after(micro_batches);
    CHECK(cut.first == whole.first);
    CHECK(cut.second == whole.second);
  }
}

TEST("fitted-noise: zeros while nothing has been seen, then N(mean, std^2) of each head") {
  const Strategy strategy("fitted-noise");
  for (const double v : values(begun(strategy, 0, ids(0, 50)))) CHECK(v == 0);
  const RecurrentState h_T = made_up_state(50, 3, -2);
  ended(strategy, h_T);
  const auto fitted = elements_by_group({h_T}, "layers.0.ssm", false);
  const auto drawn = elements_by_group({begun(strategy, 1, ids(0, 200))}, "layers.0.ssm", false);
  REQUIRE(drawn.size() == kHeads);
  for (std::size_t h = 0; h < drawn.size(); ++h) {
    const Sample expected = sample_of(fitted[h]);
    expect_normal(drawn[h], expected.mean, std::sqrt(expected.variance));
  }
}

TEST("fitted-noise: a final state's weight falls by the decay with every step") {
  const std::vector<RecurrentState> states{made_up_state(4, 1), made_up_state(6, 2, 1), made_up_state(5, 3, -1)};
  for (const double decay : {0.0, 0.5, 1.0}) {
    CAPTURE(decay);
    const Strategy strategy("fitted-noise", {.statistics_decay = decay});
    for (std::size_t step = 0; step < states.size(); ++step) {
      begun(strategy, static_cast<int64_t>(step), ids(0, states[step].rows()));
      ended(strategy, states[step]);
    }
    double weight = 0, mean = 0, square = 0;
    for (std::size_t step = 0; step < states.size(); ++step) {
      const double w = std::pow(decay, static_cast<double>(states.size() - 1 - step));
      const auto groups = elements_by_group({states[step]}, "layers.0.ssm", false);
      for (const double v : groups[1]) weight += w, mean += w * v, square += w * v * v;
    }
    mean /= weight;
    const auto m = strategy->save().at("statistics.layers.0.ssm").to_vector<double>();
    CHECK(m[3] == doctest::Approx(weight).epsilon(1e-12));
    CHECK(m[4] == doctest::Approx(mean).epsilon(1e-9));
    CHECK(m[5] / m[3] == doctest::Approx(square / weight - mean * mean).epsilon(1e-9));
  }
}

TEST("fitted-noise: a row that is not finite is left out, the others count") {
  const RecurrentState good = made_up_state(3, 1);
  RecurrentState bad = good.clone();
  fill(bad.layers()[0]["ssm"].value().slice(0, 1, 2).slice(1, 2, 3).slice(2, 0, 1).slice(3, 0, 1), std::nan(""));
  const Strategy strategy("fitted-noise"), other("fitted-noise");
  begun(strategy, 0, ids(0, 3));
  ended(strategy, bad);
  begun(other, 0, ids(0, 3));
  ended(other, good);
  const auto m = strategy->save().at("statistics.layers.0.ssm").to_vector<double>();
  const auto all = other->save().at("statistics.layers.0.ssm").to_vector<double>();
  CHECK(std::vector<double>(m.begin(), m.begin() + 6) == std::vector<double>(all.begin(), all.begin() + 6));
  CHECK(m[6] == 2 * kHeadElements);
  CHECK(std::isfinite(m[7]));
  CHECK(std::isfinite(m[8]));
}

// --- the GPU against the CPU ------------------------------------------------------------------------------------

TEST("row kernels: a GPU keeps the same rows, draws the same numbers and finds the same moments") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device cpu = Device::cpu(), gpu = Device::cuda();
  struct Case {
    Shape shape;
    StateGroups groups;
  };
  const Case cases[] = {{{5, 3, 4, 6}, {3, 24}},     {{2, 24, 64, 128}, {24, 8192}},
                        {{3, 3, 1, 1}, {3, 1}},      {{4, 3, 37}, {37, 1}},
                        {{6, 1536, 16}, {1, 24576}}, {{6, 7, 5}, {7, 5}},
                        {{1, 1, 1}, {1, 1}},         {{0, 3, 8}, {1, 24}}};
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    for (const auto& [shape, groups] : cases) {
      CAPTURE(shape.str());
      const std::string type = name_of(dtype);
      CAPTURE(type);
      const int64_t rows = shape[0];
      std::vector<int64_t> keys;
      for (int64_t b = 0; b < rows; ++b) keys.push_back(b % 3 == 1 ? 0 : static_cast<int64_t>(philox_u64(1, static_cast<uint64_t>(b))));
      std::vector<float> normals;
      for (int64_t g = 0; g < groups.count; ++g)
        normals.insert(normals.end(), {static_cast<float>(g % 5) - 2, 1 + static_cast<float>(g % 3)});
      const Shape normals_shape{groups.count, 2};
      const Tensor expected = Tensor::empty(cpu, dtype, shape), drawn = Tensor::empty(gpu, dtype, shape);
      draw_normals(expected, Tensor::from(cpu, {rows}, keys), 77, Tensor::from(cpu, normals_shape, normals), groups);
      draw_normals(drawn, Tensor::from(gpu, {rows}, keys), 77, Tensor::from(gpu, normals_shape, normals), groups);
      const auto a = drawn.to_vector<double>(), e = expected.to_vector<double>();
      const double rounding = dtype == Dtype::bf16 ? 0x1p-7 : 0x1p-23;  // of the result on both sides: half a unit each, at most
      constexpr double kMostStd = 3;
      for (std::size_t i = 0; i < a.size(); ++i)
        if (!(std::abs(a[i] - e[i]) <= kMostStd * kNormalTolerance + rounding * std::abs(e[i]))) FAIL(i << ": " << a[i] << " " << e[i]);

      for (const std::vector<int64_t>& marks : {keys, std::vector<int64_t>(keys.rbegin(), keys.rend())}) {
        const Tensor there = expected.to(gpu), here = expected.clone();
        clear_rows(there, Tensor::from(gpu, {rows}, marks));
        clear_rows(here, Tensor::from(cpu, {rows}, marks));
        CHECK(there.to_vector<double>() == here.to_vector<double>());
        for (const double all : {0.0, 2.0}) {
          clear_rows(there, Tensor::from(gpu, {rows}, marks), Tensor::full(gpu, Dtype::f64, {1}, all));
          clear_rows(here, Tensor::from(cpu, {rows}, marks), Tensor::full(cpu, Dtype::f64, {1}, all));
          CHECK(there.to_vector<double>() == here.to_vector<double>());
          if (all > 0) CHECK(here.to_vector<double>() == std::vector<double>(static_cast<std::size_t>(here.numel()), 0.0));
        }
      }

      const Tensor on_cpu = Tensor::zeros(cpu, Dtype::f64, {rows, groups.count + 2, 3}),
                   on_gpu = Tensor::zeros(gpu, Dtype::f64, {rows, groups.count + 2, 3});
      row_moments(expected, groups, on_cpu, 1);
      row_moments(expected.to(gpu), groups, on_gpu, 1);
      expect_close(on_gpu.to_vector<double>(), on_cpu.to_vector<double>(), 1e-12);
      const Tensor cpu_sum = Tensor::zeros(cpu, Dtype::f64, {groups.count + 2, 3}),
                   gpu_sum = Tensor::zeros(gpu, Dtype::f64, {groups.count + 2, 3});
      merge_rows(cpu_sum, on_cpu);
      merge_rows(gpu_sum, on_cpu.to(gpu));
      expect_close(gpu_sum.to_vector<double>(), cpu_sum.to_vector<double>(), 1e-13);
      const Tensor cpu_normals = Tensor::zeros(cpu, Dtype::f32, {groups.count + 2, 2}),
                   gpu_normals = Tensor::zeros(gpu, Dtype::f32, {groups.count + 2, 2});
      refresh_normals(cpu_sum, cpu_normals, 0.75);
      refresh_normals(gpu_sum, gpu_normals, 0.75);
      expect_close(gpu_normals.to_vector<double>(), cpu_normals.to_vector<double>(), 1e-6);
      expect_close(gpu_sum.to_vector<double>(), cpu_sum.to_vector<double>(), 1e-13);
    }
  }
}

}  // namespace
}  // namespace longhand
