// The decays shown by a forward pass are those by which its states fade.
#include "models/decay.h"

#include <fmt/format.h>

#include <cmath>

#include "core/device.h"
#include "tests/support/small_model.h"

using namespace longhand;
using namespace longhand::test;

namespace {

// The recurrent state of `layer` after the tokens, when it begins with `value` everywhere and all other states with zeros.
std::vector<double> state_from(const LanguageModel& model, const Tensor& tokens, std::size_t layer, double value) {
  const NoGrad no_grad;
  const RecurrentState h0 = model.zero_state(tokens.dim(0));
  fill(h0.get(layer, "ssm").value(), value);
  return model.forward(tokens, h0).state.get(layer, "ssm").value().to_vector<double>();
}

}  // namespace

TEST("decay: a state of ones is left with the product of the decays, in every family") {
  constexpr int64_t B = 2, T = 5;
  for (const Device& device : devices())
    for (const char* family : kFamilies) {
      const Dtype dtype = device.is_cuda() ? Dtype::f32 : Dtype::f64;
      const auto model = shaken_model(family, dtype, device);
      const Tensor tokens = token_pattern(device, B, T, kSmallVocab);
      std::vector<Decay> decays;
      {
        const NoGrad no_grad;
        const DecayScope scope([&](const Decay& decay) { decays.push_back(decay); });
        model->forward(tokens);
      }
      REQUIRE(decays.size() == 2);
      for (std::size_t layer = 0; layer < 2; ++layer) {
        // The recurrence is linear in its state, and nothing in this layer before the state depends on it.
        const auto zeros = state_from(*model, tokens, layer, 0), ones = state_from(*model, tokens, layer, 1);
        const Decay& d = decays[layer];
        CHECK(d.rows == B);
        CHECK(d.tokens == T);
        const auto size = static_cast<int64_t>(ones.size()), inner = size / (B * d.units * d.entries);  // elements that share an entry
        std::vector<double> left, expected;
        for (int64_t i = 0; i < size; ++i) {
          const int64_t n = i / inner % d.entries, u = i / inner / d.entries % d.units, b = i / inner / d.entries / d.units;
          double product = 1;
          for (int64_t t = 0; t < T; ++t)
            product *=
                std::exp(-d.rate[static_cast<std::size_t>((b * T + t) * d.units + u)] * d.A[static_cast<std::size_t>(u * d.entries + n)]);
          left.push_back(ones[static_cast<std::size_t>(i)] - zeros[static_cast<std::size_t>(i)]);
          expected.push_back(product);
        }
        CHECK(*std::max_element(expected.begin(), expected.end()) > 1e-3);
        expect_close(left, expected, dtype == Dtype::f64 ? 1e-11 : 1e-4, 1e-3, fmt::format("{} layer {}", family, layer));
      }
    }
}

TEST("decay: limits of dt, and gates at their clamp, are those of the model") {
  const Tensor dt = Tensor::from(Device::cpu(), {1, 1, 3}, std::vector<double>{-50, 0, 50});
  const Tensor zero = Tensor::zeros(Device::cpu(), Dtype::f64, {3});
  CHECK(decay_of_steps(dt, zero, zero, 3, 0.01, 2).rate == std::vector<double>{0.01, std::log(2.0), 2});
  const auto open = decay_of_steps(dt, zero, zero, 3).rate;
  CHECK(open[0] == doctest::Approx(std::exp(-50.0)));
  CHECK(open[2] == doctest::Approx(50));
  const auto gates = decay_of_gates(dt, 1, 16, -2).rate;
  CHECK(gates[0] == 2);
  CHECK(gates[1] == doctest::Approx(std::log(2.0) / 16));
  CHECK(gates[2] == doctest::Approx(std::exp(-50.0) / 16));
}

TEST("decay: the innermost scope observes, and nothing is observed outside") {
  const auto model = small_model(Dtype::f32);
  const Tensor tokens = token_pattern(Device::cpu(), 1, 3, kSmallVocab);
  int outer = 0, inner = 0;
  {
    const DecayScope first([&](const Decay&) { ++outer; });
    {
      const DecayScope second([&](const Decay&) { ++inner; });
      model->forward(tokens);
    }
    model->forward(tokens);
  }
  model->forward(tokens);
  CHECK(inner == 2);
  CHECK(outer == 2);
}
