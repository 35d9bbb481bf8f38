// The decoder against forward() one token at a time.
#include "models/decoder.h"

#include <algorithm>
#include <cmath>

#include "autograd/tape.h"
#include "core/error.h"
#include "ops/token_step/token_step.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

ModelConfig tiny(const std::string& family) {
  ModelConfig c;
  c.family = family;
  c.d_model = 16;
  c.n_layer = 2;
  c.vocab_size = 40;
  if (family == "mamba2") c.options = {{"d_state", 8}, {"headdim", 8}};
  if (family == "mamba1") c.options = {{"d_state", 4}};
  if (family == "gla") c.options = {{"num_heads", 2}, {"use_short_conv", 1}, {"intermediate_size", 32}};
  return c;
}

TEST("decoder: step after step gives the bits of forward and logits, in every family, on every device") {
  std::vector<std::pair<Device, Dtype>> places{{Device::cpu(), Dtype::f32}, {Device::cpu(), Dtype::f64}};
  if (cuda_device_count() > 0) places.insert(places.end(), {{Device::cuda(), Dtype::f32}, {Device::cuda(), Dtype::bf16}});
  for (const auto& [device, dtype] : places) {
    for (const char* family : {"mamba1", "mamba2", "gla"}) {
      CAPTURE(family);
      CAPTURE(device.name());
      LanguageModel model(tiny(family), device, dtype, dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32);
      model.initialize(5);
      const NoGrad no_grad;
      RecurrentState state = model.forward(Tensor::from(device, {3, 4}, std::vector<int32_t>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12})).state;
      const auto given = state.get(0, "ssm").value().to_vector<double>();
      Decoder decoder(model, state, {.joined_kernels = false});
      for (int32_t step = 0; step < 5; ++step) {
        const std::vector<int32_t> tokens{step, 7 * step % 40, 39 - step};
        const Tensor& logits = decoder.step(tokens);
        REQUIRE(logits.shape() == Shape{3, model.config().padded_vocab()});
        const auto expected = model.forward(Tensor::from(device, {3, 1}, tokens), state);
        CHECK(logits.to_vector<double>() == model.logits(expected.hidden.value()).to_vector<double>());
        if (step == 0) CHECK(state.get(0, "ssm").value().to_vector<double>() == given);  // the caller's state is left alone
        state = expected.state;
        for (std::size_t layer = 0; layer < state.layers().size(); ++layer)
          for (const auto& [name, variable] : state.layers()[layer])
            CHECK(decoder.state().get(layer, name).value().to_vector<double>() == variable.value().to_vector<double>());
      }
      CHECK_THROWS_AS(decoder.step(std::vector<int32_t>{1, 2}), ShapeError);
    }
  }
}

TEST("decoder: joined kernels agree with forward and logits, token after token, with a graph and without, in every family") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  std::vector<ModelConfig> configs{tiny("mamba1"), tiny("mamba2"), tiny("gla")};
  for (ModelConfig& config : configs) config.d_model = 64;
  configs[1].options = {{"d_state", 32}, {"headdim", 32}, {"ngroups", 2}};
  configs[2].options = {{"num_heads", 2}, {"intermediate_size", 32}};
  configs.push_back(tiny("mamba2"));  // whose states of many rows pass through shared memory
  configs[3].d_model = 256;
  configs[3].options = {{"d_state", 128}, {"headdim", 64}};
  const NoGrad no_grad;
  for (const ModelConfig& config : configs)
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
      for (const int64_t rows :
           {int64_t{1}, int64_t{3}, int64_t{8}, int64_t{10}, int64_t{16}, int64_t{25}, kTokenStepRows + 2, int64_t{256}}) {
        CAPTURE(config.family);
        CAPTURE(name_of(dtype));
        CAPTURE(rows);
        LanguageModel model(config, gpu, dtype);
        model.initialize(5);
        REQUIRE(model.has_step(rows));
        std::vector<int32_t> prompt(static_cast<std::size_t>(rows * 7));
        for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<int32_t>(i * 11 % 40);
        RecurrentState state = model.forward(Tensor::from(gpu, {rows, 7}, prompt)).state;
        const RecurrentState stepped = state.clone();
        Decoder joined(model, state), plain(model, state, {.joined_kernels = false});
        CHECK(joined.joined_kernels());
        CHECK_FALSE(plain.joined_kernels());
        for (int32_t step = 0; step < 6; ++step) {
          std::vector<int32_t> tokens;
          for (int64_t b = 0; b < rows; ++b) tokens.push_back(static_cast<int32_t>((7 * step + 3 * b) % 40));
          const auto logits = joined.step(tokens).to_vector<double>(), expected = plain.step(tokens).to_vector<double>();
          CHECK(logits == model.step(Tensor::from(gpu, {rows, 1}, tokens), stepped).to_vector<double>());
          double largest = 0, worst = 0;
          for (std::size_t k = 0; k < expected.size(); ++k) {
            largest = std::max(largest, std::abs(expected[k]));
            worst = std::max(worst, std::abs(logits[k] - expected[k]));
          }
          CHECK(largest > 0);
          CHECK(worst < largest * (dtype == Dtype::f32 ? 1e-4 : 5e-2));  // the roundings of all kernels, carried on by the states
          for (std::size_t layer = 0; layer < 2; ++layer)
            CHECK(joined.state().get(layer, "ssm").value().to_vector<float>() == stepped.get(layer, "ssm").value().to_vector<float>());
        }
      }
}

}  // namespace
}  // namespace longhand
