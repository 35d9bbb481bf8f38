// For the tests of models: what must hold in every family. Each check takes the configuration of a small model.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/safetensors.h"
#include "models/checkpoint.h"
#include "models/config_json.h"
#include "models/language_model.h"
#include "tests/support/check.h"

namespace longhand::test {

// What the golden README asks of f32: logits relative to the largest, gradients relative to each tensor's largest.
constexpr double kLogitTolerance = 2e-5, kGradientTolerance = 1e-4;
// Every tensor between two ops is rounded to bf16, 2^-9 = 2e-3 of itself; the roundings of a few layers add up to a few times that.
constexpr double kBf16Tolerance = 2e-2;
// Two orders of the same f32 sums.
constexpr double kPiecesTolerance = 1e-5;

inline std::vector<Device> devices() {
  std::vector<Device> found{Device::cpu()};
  if (cuda_device_count() > 0) found.push_back(Device::cuda());
  return found;
}

// --- small helpers ----------------------------------------------------------------------------------------------

inline Tensor token_pattern(const Device& device, int64_t B, int64_t T, int64_t vocab) {
  std::vector<int32_t> ids(static_cast<std::size_t>(B * T));
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>((i * 7 + i / 5) % static_cast<std::size_t>(vocab));
  return Tensor::from(device, {B, T}, ids);
}

inline std::vector<double> logits_of(const LanguageModel& model, const Tensor& tokens, const RecurrentState& h0 = {},
                                     RecurrentState* h_T = nullptr) {
  const NoGrad no_grad;
  auto out = model.forward(tokens, h0);
  if (h_T != nullptr) *h_T = out.state;
  return model.logits(out.hidden.value()).to_vector<double>();
}

/// Every row of logits [B, T, V], positions [begin, end).
inline std::vector<double> positions(const std::vector<double>& logits, int64_t B, int64_t T, int64_t begin, int64_t end) {
  const auto V = static_cast<int64_t>(logits.size()) / (B * T);
  std::vector<double> part;
  for (int64_t b = 0; b < B; ++b) part.insert(part.end(), logits.begin() + (b * T + begin) * V, logits.begin() + (b * T + end) * V);
  return part;
}

/// Values far from the small initial ones, so that every gradient stands well above the rounding of the loss (about 1e-16 / h).
inline void shake(LanguageModel& model) {
  uint64_t seed = 100;
  for (Parameter& p : model.parameters().all()) add_scaled(p.master, random_tensor(Device::cpu(), p.master.dtype(), p.shape, ++seed), 0.3);
}

inline void expect_same_state(const RecurrentState& actual, const RecurrentState& expected, double tolerance) {
  REQUIRE(actual.layers().size() == expected.layers().size());
  for (std::size_t layer = 0; layer < actual.layers().size(); ++layer) {
    REQUIRE(actual.layers()[layer].size() == expected.layers()[layer].size());
    for (const auto& [name, variable] : expected.layers()[layer])
      expect_close(actual.get(layer, name).value().to_vector<double>(), variable.value().to_vector<double>(), tolerance, 1e-30,
                   "layer " + std::to_string(layer) + " " + name);
  }
}

// --- against the reference cases --------------------------------------------------------------------------------

struct ReferenceCase {
  std::string model;          // a folder of LONGHAND_GOLDEN
  std::string expected = "";  // the folder whose case.safetensors it must reproduce; empty: its own
  bool gradients = false;     // of every parameter; the case must have no others
  double tolerance = kLogitTolerance;

  std::string folder() const { return *folder_from("LONGHAND_GOLDEN") + "/" + model; }
  NamedTensors values() const {
    return read_safetensors(*folder_from("LONGHAND_GOLDEN") + "/" + (expected.empty() ? model : expected) + "/case.safetensors");
  }
};

/// Logits, loss, and where the case has them final states (GLA's are called S there) and gradients, on every device in f32.
inline void expect_reference(const ReferenceCase& c) {
  const NamedTensors expected = c.values();
  for (const Device& device : devices()) {
    CAPTURE(device.name());
    const auto model = load_model(c.folder(), device, Dtype::f32);
    const Tensor tokens = expected.at("input_ids").to(device);
    RecurrentState h_T;
    expect_close(logits_of(*model, tokens, {}, &h_T), expected.at("logits").to_vector<double>(), c.tolerance, 1e-30, c.model + " logits");
    for (const auto& [name, tensor] : expected.tensors) {
      if (!name.starts_with("final_state.")) continue;
      const auto dot = name.rfind('.');
      const std::string state = name.substr(dot + 1) == "S" ? "ssm" : name.substr(dot + 1);
      expect_close(h_T.get(std::stoul(name.substr(12)), state).value().to_vector<double>(), tensor.to_vector<double>(), c.tolerance, 1e-30,
                   name);
    }
    model->parameters().clear_grads();
    const auto loss = model->loss({tokens, expected.at("labels").to(device), {}});
    CHECK(loss.loss.value().item() == doctest::Approx(expected.at("loss").item()).epsilon(c.tolerance));
    if (!c.gradients) continue;
    backward(loss.loss);
    std::ptrdiff_t compared = 0;
    for (const Parameter& p : model->parameters().all()) {
      REQUIRE_MESSAGE(expected.contains("grad." + p.name), p.name);
      expect_close(p.grad.to_vector<double>(), expected.at("grad." + p.name).to_vector<double>(), kGradientTolerance, 1e-30,
                   "grad." + p.name);
      ++compared;
    }
    CHECK(compared == std::count_if(expected.tensors.begin(), expected.tensors.end(),
                                    [](const auto& named) { return named.first.starts_with("grad."); }));
  }
}

/// On a GPU: the logits of a bf16 model are near those of the f32 model, and not rounded themselves.
/// The reference cases are tiny and random, and some are ill-conditioned: storing the weights in bf16 moves the logits of ss-mamba2-g2 by
/// up to 9e-2 in f64 arithmetic. Storing activations in bf16 rounds about as often once more, so twice what the weights alone do is
/// allowed.
inline void expect_bf16_near_f32(const ReferenceCase& c) {
  const Device gpu = Device::cuda();
  const auto wide = load_model(c.folder(), gpu, Dtype::f32), narrow = load_model(c.folder(), gpu, Dtype::bf16);
  const Tensor tokens = c.values().at("input_ids").to(gpu);
  const auto exact = logits_of(*wide, tokens);
  for (Parameter& p : wide->parameters().all()) copy(p.master, p.master.to(Dtype::bf16).to(Dtype::f32));
  const auto rounded = logits_of(*wide, tokens);
  double largest = 0, moved = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    largest = std::max(largest, std::abs(exact[i]));
    moved = std::max(moved, std::abs(rounded[i] - exact[i]));
  }
  expect_close(logits_of(*narrow, tokens), exact, std::max(kBf16Tolerance, 2 * moved / largest), 1e-30, c.model + " bf16 logits");
  const NoGrad no_grad;
  CHECK(narrow->logits(narrow->forward(tokens).hidden.value()).dtype() == Dtype::f32);
}

/// The 8 tokens that greedily follow row 0, one step at a time from the carried state.
inline void expect_greedy(const ReferenceCase& c) {
  const NamedTensors expected = c.values();
  for (const Device& device : devices()) {
    const auto model = load_model(c.folder(), device, Dtype::f32);
    const Tensor prompt = expected.at("input_ids").slice(0, 0, 1).clone().to(device);
    RecurrentState state;
    auto logits = logits_of(*model, prompt, {}, &state);
    const auto vocab = static_cast<std::ptrdiff_t>(model->config().padded_vocab());
    std::vector<int32_t> produced;
    for (int i = 0; i < 8; ++i) {
      const auto last = logits.end() - vocab;
      produced.push_back(static_cast<int32_t>(std::max_element(last, logits.end()) - last));
      logits = logits_of(*model, Tensor::from(device, {1, 1}, std::vector<int32_t>{produced.back()}), state, &state);
    }
    CHECK_MESSAGE(produced == expected.at("greedy").to_vector<int32_t>(), c.model);
  }
}

// --- what a recurrent model is ----------------------------------------------------------------------------------

/// A sequence in two pieces, the second from the carried state, gives logits and final state of the whole.
inline void expect_pieces_equal_whole(const ModelConfig& config) {
  constexpr int64_t B = 2, T = 23;
  for (const Device& device : devices()) {
    LanguageModel model(config, device, Dtype::f32);
    model.initialize(3);
    const Tensor tokens = token_pattern(device, B, T, config.vocab_size);
    RecurrentState whole_state;
    const auto whole = logits_of(model, tokens, {}, &whole_state);
    for (const int64_t s : {1, 2, 3, 7, 8, 9, 16, 17, 22}) {
      CAPTURE(s);
      RecurrentState middle, end;
      const auto head = logits_of(model, tokens.slice(1, 0, s).clone(), {}, &middle);
      const auto tail = logits_of(model, tokens.slice(1, s, T).clone(), middle, &end);
      expect_close(head, positions(whole, B, T, 0, s), kPiecesTolerance);
      expect_close(tail, positions(whole, B, T, s, T), kPiecesTolerance);
      expect_same_state(end, whole_state, kPiecesTolerance);
    }
  }
}

/// A whole forward equals steps of one token from a state of zeros.
inline void expect_steps_equal_forward(const ModelConfig& config) {
  constexpr int64_t B = 2, T = 11;
  for (const Device& device : devices()) {
    LanguageModel model(config, device, Dtype::f32);
    model.initialize(4);
    const Tensor tokens = token_pattern(device, B, T, config.vocab_size);
    RecurrentState whole_state, state = model.zero_state(B);
    const auto whole = logits_of(model, tokens, {}, &whole_state);
    for (int64_t t = 0; t < T; ++t)
      expect_close(logits_of(model, tokens.slice(1, t, t + 1).clone(), state, &state), positions(whole, B, T, t, t + 1), kPiecesTolerance);
    expect_same_state(state, whole_state, kPiecesTolerance);
  }
}

/// A later token never changes an earlier logit, and rows do not mix; bit for bit.
inline void expect_causal(const ModelConfig& config) {
  constexpr int64_t B = 2, T = 12, kChanged = 8;
  for (const Device& device : devices()) {
    LanguageModel model(config, device, Dtype::f32);
    model.initialize(5);
    const Tensor tokens = token_pattern(Device::cpu(), B, T, config.vocab_size);
    const auto before = logits_of(model, tokens.to(device));
    const Tensor other = tokens.clone();
    int32_t& token = other.data<int32_t>()[T + kChanged];  // row 1
    token = (token + 1) % static_cast<int32_t>(config.vocab_size);
    const auto after = logits_of(model, other.to(device));
    for (const int64_t row : {0, 1}) {
      const int64_t same = (row == 0 ? T : T + kChanged) * static_cast<int64_t>(before.size()) / (B * T);
      REQUIRE(std::equal(before.begin(), before.begin() + same, after.begin()));
    }
    CHECK(before != after);
  }
}

// --- gradients, in f64 on the CPU -------------------------------------------------------------------------------

/// Gradients of every tensor of the initial state, with gradients into the loss and into every tensor of the final state.
inline void expect_state_gradients(const ModelConfig& config) {
  constexpr int64_t B = 2, T = 11;
  LanguageModel model(config, Device::cpu(), Dtype::f64, Dtype::f64);
  model.initialize(6);
  shake(model);
  const Tensor tokens = token_pattern(Device::cpu(), B, T, config.vocab_size),
               targets = token_pattern(Device::cpu(), B, T, config.vocab_size - 2);
  const RecurrentState zero = model.zero_state(B);
  std::vector<Tensor> h0;
  for (const LayerState& layer : zero.layers())
    for (const auto& [name, variable] : layer)
      h0.push_back(random_tensor(Device::cpu(), Dtype::f64, variable.shape(), 10 + h0.size(), 0.5));
  const auto f = [&](const std::vector<Variable>& in) {
    RecurrentState state = zero;
    std::size_t at = 0;
    for (LayerState& layer : state.layers())
      for (auto& [name, variable] : layer) variable = in[at++];
    auto out = model.loss({tokens, targets, {}}, state);
    std::vector<Variable> outputs{out.loss};
    for (const LayerState& layer : out.state.layers())
      for (const auto& [name, variable] : layer) outputs.push_back(variable);
    return outputs;
  };
  const auto result = gradcheck(f, h0);
  CHECK_MESSAGE(result.worst < 1e-7, result.where);
}

/// Gradients of a few elements of every parameter.
inline void expect_parameter_gradients(const ModelConfig& config) {
  LanguageModel model(config, Device::cpu(), Dtype::f64, Dtype::f64);
  model.initialize(6);
  shake(model);
  const TokenBatch batch{
      token_pattern(Device::cpu(), 2, 11, config.vocab_size), token_pattern(Device::cpu(), 2, 11, config.vocab_size - 2), {}};
  model.parameters().clear_grads();
  backward(model.loss(batch).loss);
  auto loss_value = [&] {
    const NoGrad no_grad;
    return model.loss(batch).loss.value().item();
  };
  for (Parameter& p : model.parameters().all()) {
    double* values = p.master.data<double>();
    const auto grads = p.grad.to_vector<double>();
    double scale = 1e-6;
    for (double g : grads) scale = std::max(scale, std::abs(g));
    for (int64_t i = 0; i < p.shape.numel(); i += std::max<int64_t>(p.shape.numel() / 5, 1)) {
      const double h = 1e-5, kept = values[i];
      values[i] = kept + h;
      const double up = loss_value();
      values[i] = kept - h;
      const double down = loss_value();
      values[i] = kept;
      CHECK_MESSAGE(std::abs((up - down) / (2 * h) - grads[static_cast<std::size_t>(i)]) / scale < 1e-5, p.name);
    }
  }
}

// --- parameters, configurations, files --------------------------------------------------------------------------

/// The values that a seed gives to the parameter `name`.
inline std::vector<double> initial_values(const ModelConfig& config, const std::string& name) {
  LanguageModel model(config, Device::cpu(), Dtype::f32);
  model.initialize(1);
  const Parameter* parameter = model.parameters().find(name);
  REQUIRE_MESSAGE(parameter != nullptr, name);
  return parameter->master.to_vector<double>();
}

inline double largest(const std::vector<double>& values) {
  double found = 0;
  for (double v : values) found = std::max(found, std::abs(v));
  return found;
}

/// Root mean square: the standard deviation of values around zero.
inline double spread(const std::vector<double>& values) {
  double sum = 0;
  for (double v : values) sum += v * v;
  return std::sqrt(sum / static_cast<double>(values.size()));
}

/// U(-bound, bound): nothing outside, and the spread of a uniform distribution.
inline void expect_uniform(const std::vector<double>& values, double bound) {
  CHECK(largest(values) <= bound * (1 + 1e-6));
  CHECK(spread(values) == doctest::Approx(bound / std::sqrt(3.0)).epsilon(0.05));
}

/// Exactly the biases, norms and parameters of a recurrence (A_log, D) take no weight decay.
inline void expect_decay_rule(const ModelConfig& config) {
  const LanguageModel model = LanguageModel::plan(config);
  for (const Parameter& p : model.parameters().all()) {
    const bool spared =
        p.name.ends_with("bias") || p.name.ends_with("A_log") || p.name.ends_with(".D") || p.name.find("norm") != std::string::npos;
    CHECK_MESSAGE(p.options.decay != spared, p.name);
  }
}

/// Every layout that has no obstacle gives the configuration back from its own file.
inline void expect_config_survives_layouts(ModelConfig config) {
  config.complete();
  int survived = 0;
  for (const CheckpointLayout& layout : model_family(config.family).layouts) {
    if (!layout.obstacle(config).empty()) continue;
    CAPTURE(layout.name);
    const auto json = parse_python_json(python_json_text(layout.write(config)), "config.json");
    REQUIRE(layout.matches(json));
    ModelConfig read = layout.read(json, "config.json");
    read.complete();
    CHECK(read.family == config.family);
    CHECK(read.d_model == config.d_model);
    CHECK(read.n_layer == config.n_layer);
    CHECK(read.vocab_size == config.vocab_size);
    CHECK(read.padded_vocab() == config.padded_vocab());
    CHECK(read.tie_embeddings == config.tie_embeddings);
    CHECK(read.norm_eps == config.norm_eps);
    CHECK(read.options == config.options);
    ++survived;
  }
  CHECK(survived > 0);
}

/// A saved model, read again, is the same model.
inline void expect_same_after_saving(const ModelConfig& config) {
  const ScratchFolder scratch;
  LanguageModel model(config, Device::cpu(), Dtype::f32);
  model.initialize(9);
  save_model(model, scratch.path());
  const auto read = load_model(scratch.path(), Device::cpu(), Dtype::f32);
  CHECK(read->config().options == model.config().options);
  CHECK(read->parameters().all().size() == model.parameters().all().size());
  for (const Parameter& p : model.parameters().all()) {
    REQUIRE_MESSAGE(read->parameters().find(p.name) != nullptr, p.name);
    CHECK(p.master.to_vector<float>() == read->parameters().find(p.name)->master.to_vector<float>());
  }
}

/// The configuration that the layout `name` of a family reads from this JSON text.
inline ModelConfig config_from(const std::string& family, const std::string& name, const std::string& text) {
  for (const CheckpointLayout& layout : model_family(family).layouts) {
    if (layout.name != name) continue;
    const auto json = parse_python_json(text, "config.json");
    REQUIRE_MESSAGE(layout.matches(json), text);
    ModelConfig config = layout.read(json, "config.json");
    config.complete();
    return config;
  }
  FAIL("no layout ", name);
  return {};
}

/// The message with which it refuses this text; empty when it does not.
inline std::string refusal_of_config(const std::string& family, const std::string& name, const std::string& text) {
  try {
    config_from(family, name, text);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

inline void expect_refused(ModelConfig config, const char* option, double value) {
  config.options[option] = value;
  CHECK_THROWS_AS_MESSAGE(LanguageModel::plan(config), ConfigError, option);
}

}  // namespace longhand::test
