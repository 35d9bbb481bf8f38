// What is made again in the backward instead of being kept: the same bits for less memory, in every family.
#include "autograd/recompute.h"

#include <cmath>

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "core/allocator.h"
#include "core/error.h"
#include "tests/support/check.h"
#include "tests/support/small_model.h"

namespace longhand {
namespace {

using namespace test;

struct Outcome {
  std::vector<double> loss, states, grads, state_grads;
  int64_t kept_bytes = 0;  // between forward and backward
};

ModelConfig config_of(const std::string& family, bool short_conv, bool whole_slices) {
  ModelConfig config = small_config(family);
  config.d_model = whole_slices ? 256 : 144;  // wider than what counts as a narrow projection
  if (short_conv) config.options["use_short_conv"] = 1;
  return config;
}

// Loss and final state of a batch that starts from a state that wants a gradient too.
Outcome outcome_of(const ModelConfig& config, const Device& device, Dtype dtype, Recompute level, int64_t T) {
  constexpr int64_t B = 3;
  LanguageModel model(config, device, dtype, dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32);
  model.initialize(3);
  model.set_recompute(RecomputePlan(static_cast<std::size_t>(config.n_layer), level));
  const auto ids = [&](uint64_t key) { return Tensor::from(device, {B, T}, random_tokens(static_cast<std::size_t>(B * T), key)); };
  std::vector<LayerState> layers;
  uint64_t seed = 10;
  const RecurrentState zeros = model.zero_state(B);
  for (const LayerState& zero : zeros.layers()) {
    LayerState layer;
    for (const auto& [name, variable] : zero)
      layer[name] = Variable::leaf(random_tensor(device, variable.value().dtype(), variable.shape(), ++seed, 0.5));
    layers.push_back(std::move(layer));
  }
  const RecurrentState h0(layers);
  (void)model.loss({ids(1), ids(2), {}}, h0);  // whatever is made once
  model.parameters().allocate_grads();
  const int64_t before = device.allocator().use().live_bytes;
  Outcome outcome;
  std::vector<Variable> roots;
  std::vector<Tensor> grads;
  {
    const auto result = model.loss({ids(1), ids(2), {}}, h0);
    outcome.loss = result.token_loss.to_vector<double>();
    roots.push_back(result.loss);
    grads.push_back(Tensor::full(device, result.loss.value().dtype(), {}, 1));
    for (const LayerState& layer : result.state.layers())
      for (const auto& [name, variable] : layer) {
        roots.push_back(variable);
        grads.push_back(random_tensor(device, variable.value().dtype(), variable.shape(), ++seed, 0.01));
        for (const double value : variable.value().to_vector<double>()) outcome.states.push_back(value);
      }
  }
  outcome.kept_bytes = device.allocator().use().live_bytes - before;
  backward(roots, grads);
  model.parameters().complete_grads();
  outcome.grads = model.parameters().flat_grad().to_vector<double>();
  for (const LayerState& layer : h0.layers())
    for (const auto& [name, variable] : layer)
      for (const double value : variable.grad().to_vector<double>()) outcome.state_grads.push_back(value);
  return outcome;
}

TEST("recompute: every level gives the same bits of losses, states and gradients, and keeps less than the one before") {
  std::vector<std::pair<Device, Dtype>> places{{Device::cpu(), Dtype::f32}, {Device::cpu(), Dtype::f64}};
  if (cuda_device_count() > 0) places.insert(places.end(), {{Device::cuda(), Dtype::f32}, {Device::cuda(), Dtype::bf16}});
  for (const auto& [device, dtype] : places) {
    for (const char* family : {"mamba1", "mamba2", "gla", "gla with convolutions", "gla in whole chunks"}) {
      CAPTURE(family);
      CAPTURE(device.name());
      CAPTURE(name_of(dtype));
      const std::string kind = family;
      const bool whole = kind == "gla in whole chunks", convolutions = kind == "gla with convolutions";
      const int64_t T = whole ? 128 : 70;
      const ModelConfig config = config_of(whole || convolutions ? "gla" : kind, convolutions, whole);
      const Outcome none = outcome_of(config, device, dtype, Recompute::none, T);
      int64_t kept = none.kept_bytes;
      for (const Recompute level : {Recompute::light, Recompute::projections, Recompute::full}) {
        CAPTURE(name_of(level));
        const Outcome other = outcome_of(config, device, dtype, level, T);
        CHECK(other.loss == none.loss);
        CHECK(other.states == none.states);
        CHECK(other.grads == none.grads);
        CHECK(other.state_grads == none.state_grads);
        CHECK(other.kept_bytes < kept);
        kept = other.kept_bytes;
      }
    }
  }
}

TEST("recompute: on a GPU, too, where the network of GLA has products with swiglu in their epilogues") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  ModelConfig config = config_of("gla", false, true);
  config.options["intermediate_size"] = 5632;  // 3 x 44 tiles of 384 tokens: one for every multiprocessor
  const Outcome exact = outcome_of(config, Device::cuda(), Dtype::f32, Recompute::none, 128);  // linear, swiglu, linear
  const Outcome none = outcome_of(config, Device::cuda(), Dtype::bf16, Recompute::none, 128);
  double apart = 0, all = 0;
  for (std::size_t i = 0; i < exact.grads.size(); ++i) {
    apart += std::pow(none.grads[i] - exact.grads[i], 2);
    all += std::pow(exact.grads[i], 2);
  }
  CHECK(std::sqrt(apart / all) < 0.03);  // operands rounded to 8 bits, through two layers
  for (const Recompute level : {Recompute::light, Recompute::projections, Recompute::full}) {
    CAPTURE(name_of(level));
    const Outcome other = outcome_of(config, Device::cuda(), Dtype::bf16, level, 128);
    CHECK(other.loss == none.loss);
    CHECK(other.states == none.states);
    CHECK(other.grads == none.grads);
    CHECK(other.state_grads == none.state_grads);
    CHECK(other.kept_bytes < none.kept_bytes);
  }
}

TEST("recompute: what is remade is made once, when it is asked for, and goes with the last who keeps it") {
  const Device cpu = Device::cpu();
  int made = 0;
  const Variable x = Variable::leaf(Tensor::full(cpu, Dtype::f32, {4, 6}, 2));
  auto doubled = [&] {
    Variable y = record("double", Tensor::full(cpu, Dtype::f32, {4, 6}, 4), {x}, [](BackwardCall& call) {
      Tensor grad = call.grad(0).clone();
      multiply(grad, 2);
      call.set(0, grad);
    });
    return remade(y, [&made, &cpu] {
      ++made;
      return Tensor::full(cpu, Dtype::f32, {4, 6}, 4);
    });
  };
  {
    const RecomputeScope light(Recompute::light);
    const int64_t before = cpu.allocator().use().live_bytes;
    std::vector<Kept> kept;
    {
      const Variable y = doubled();
      const auto parts = split(y, {2, 4});
      kept = {Kept(y), Kept(parts[1]), Kept(reshape(parts[0], {2, 2, 2}))};
    }
    CHECK(cpu.allocator().use().live_bytes == before);
    CHECK(made == 0);
    CHECK(kept[1].get().shape() == Shape{4, 4});
    CHECK(kept[2].get().to_vector<float>() == std::vector<float>(8, 4));
    CHECK(kept[0].get().same_storage(kept[1].get()));
    CHECK(made == 1);
    kept = {};
    CHECK(cpu.allocator().use().live_bytes == before);
  }
  const Kept whole(doubled());  // without a scope everything is kept
  CHECK(whole.get().to_vector<float>() == std::vector<float>(24, 4));
  CHECK(made == 1);
  const RecomputeScope light(Recompute::light);
  const NoGrad no_grad;
  CHECK(Kept(doubled()).get().defined());
  CHECK(made == 1);
}

TEST("recompute: levels have names, and another is refused") {
  CHECK(parse_recompute("light") == Recompute::light);
  CHECK(std::string(name_of(Recompute::full)) == "full");
  CHECK_THROWS_WITH_AS(parse_recompute("some"), doctest::Contains("none, light, projections or full"), ConfigError);
}

}  // namespace
}  // namespace longhand
