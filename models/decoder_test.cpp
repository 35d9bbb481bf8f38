// The decoder against forward() one token at a time.
#include "models/decoder.h"

#include "autograd/tape.h"
#include "core/error.h"
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
      Decoder decoder(model, state);
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

}  // namespace
}  // namespace longhand
