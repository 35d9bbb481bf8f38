// The logits, loss, gradients and states of given tokens: against the model itself, and what is refused. The comparison with other
// libraries is in tests/generate_test.cpp.
#include "models/logits.h"

#include <cmath>

#include "autograd/tape.h"
#include "core/error.h"
#include "models/decay.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

const Device kCpu = Device::cpu();
constexpr int64_t kB = 2, kT = 7, kVocab = 13, kPadded = 16;

LanguageModel small_model() {
  ModelConfig c;
  c.d_model = 16;
  c.n_layer = 2;
  c.vocab_size = kVocab;
  c.options = {{"d_state", 8}, {"headdim", 8}};
  LanguageModel model(c, kCpu, Dtype::f32);
  model.initialize(2);
  return model;
}

std::vector<int32_t> ids(int first) {
  std::vector<int32_t> all;
  for (int i = 0; i < kB * kT; ++i) all.push_back((first + 5 * i) % static_cast<int>(kVocab));
  return all;
}

NamedTensors input(const std::vector<int32_t>& tokens, const std::vector<int32_t>& labels = {}) {
  NamedTensors in{"case.safetensors", {{"input_ids", Tensor::from(kCpu, {kB, kT}, tokens)}}, {}, {}};
  if (!labels.empty()) in.tensors["labels"] = Tensor::from(kCpu, {kB, kT}, labels);
  return in;
}

template <class Problem>
std::string refusal(const NamedTensors& in, const LogitsOptions& options = {}) {
  LanguageModel model = small_model();
  try {
    logits_and_loss(model, in, options);
  } catch (const Problem& problem) {
    return problem.what();
  }
  return "no such error";
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST("logits, loss and states are those of the model, whatever the chunk and the type of the ids") {
  LanguageModel model = small_model();
  const auto tokens = ids(1), labels = ids(4);
  const auto whole = logits_and_loss(model, input(tokens, labels));
  CHECK(whole.at("logits").shape() == Shape{kB, kT, kPadded});
  CHECK(whole.size() == 2 + 2 * 2);  // logits, loss, two states of two layers
  const NoGrad no_grad;
  auto direct = model.forward(Tensor::from(kCpu, {kB, kT}, tokens));
  expect_close(whole.at("logits").to_vector<double>(), model.logits(direct.hidden.value()).to_vector<double>(), 1e-6);
  expect_close(whole.at("final_state.1.ssm").to_vector<double>(), direct.state.get(1, "ssm").value().to_vector<double>(), 1e-6);

  double loss = 0;  // from the logits, in f64
  const auto values = whole.at("logits").to_vector<double>();
  for (std::size_t i = 0; i < labels.size(); ++i) {
    double sum = 0;
    for (std::size_t v = 0; v < kPadded; ++v) sum += std::exp(values[i * kPadded + v]);
    loss += (std::log(sum) - values[i * kPadded + static_cast<std::size_t>(labels[i])]) / static_cast<double>(labels.size());
  }
  CHECK(whole.at("loss").item() == doctest::Approx(loss).epsilon(1e-6));

  for (const int64_t chunk : {1, 3, 5, 6, 1000}) {
    const auto parts = logits_and_loss(model, input(tokens, labels), {.chunk = chunk});
    for (const auto& [name, tensor] : whole)
      expect_close(parts.at(name).to_vector<double>(), tensor.to_vector<double>(), 1e-5, 1e-30, name);
  }
  NamedTensors wide = input(tokens, labels);
  for (auto& [name, tensor] : wide.tensors) tensor = Tensor::from(kCpu, {kB, kT}, tensor.to_vector<int64_t>());
  CHECK(logits_and_loss(model, wide).at("logits").to_vector<float>() == whole.at("logits").to_vector<float>());
  CHECK_FALSE(logits_and_loss(model, input(tokens)).contains("loss"));
}

TEST("the loss is taken from the hidden states of the logits: every token goes through the layers once") {
  LanguageModel model = small_model();
  int64_t tokens = 0;
  const DecayScope scope([&](const Decay& decay) { tokens += decay.rows * decay.tokens; });
  logits_and_loss(model, input(ids(1), ids(4)), {.chunk = 4});
  CHECK(tokens == kB * kT * model.config().n_layer);
}

TEST("gradients are those of the loss over the labels that count") {
  LanguageModel model = small_model();
  const auto tokens = ids(1);
  auto labels = ids(4);
  for (const std::size_t i : {0, 5, 13}) labels[i] = -100;
  const auto result = logits_and_loss(model, input(tokens, labels), {.gradients = true});
  CHECK(result.at("loss").item() == doctest::Approx(logits_and_loss(model, input(tokens, labels)).at("loss").item()).epsilon(1e-6));
  int compared = 0;
  for (Parameter& p : model.parameters().all()) {  // along the gradient the loss changes by its squared norm
    const Tensor grad = result.at("grad." + p.name);
    CHECK(grad.shape() == p.shape);
    double squared = 0;
    for (const double g : grad.to_vector<double>()) squared += g * g;
    const double h = 2e-3 / std::sqrt(squared);
    const auto loss_at = [&](double step) {
      add_scaled(p.master, grad, step);
      const double loss = logits_and_loss(model, input(tokens, labels)).at("loss").item();
      add_scaled(p.master, grad, -step);
      return loss;
    };
    if (squared > 1e-6) CHECK_MESSAGE((loss_at(h) - loss_at(-h)) / (2 * h) == doctest::Approx(squared).epsilon(0.02), p.name);
    ++compared;
  }
  CHECK(compared == 2 + 2 * 9);
  const auto again = logits_and_loss(model, input(tokens, labels), {.gradients = true});  // not the sum of two calls
  for (const auto& [name, tensor] : result) expect_close(again.at(name).to_vector<double>(), tensor.to_vector<double>(), 1e-4, 1e-30, name);
}

TEST("tokens and labels that cannot be are refused by index and file") {
  auto tokens = ids(1), labels = ids(4);
  tokens[9] = kVocab;  // row 1, position 2
  CHECK(holds(refusal<ValueError>(input(tokens)), "input_ids[1, 2]  13"));
  tokens[9] = -1;
  CHECK(holds(refusal<ValueError>(input(tokens)), "input_ids[1, 2]  -1"));
  CHECK(holds(refusal<ValueError>(input(tokens)), "case.safetensors"));
  tokens[9] = -100;  // that is for labels only
  CHECK(holds(refusal<ValueError>(input(tokens)), "input_ids[1, 2]  -100"));
  tokens[9] = 0;
  labels[3] = -99;
  CHECK(holds(refusal<ValueError>(input(tokens, labels)), "labels[0, 3]"));
  CHECK(holds(refusal<ValueError>(input(tokens, std::vector<int32_t>(kB * kT, -100))), "no label counts"));
  CHECK(holds(refusal<ValueError>(input(tokens), {.gradients = true}), "there are no labels"));
  CHECK(holds(refusal<ValueError>(input(tokens), {.chunk = 0}), "chunk"));
  CHECK(holds(refusal<FileError>({"empty.safetensors", {}, {}, {}}), "empty.safetensors"));
  NamedTensors in = input(tokens, ids(4));
  in.tensors["labels"] = in.tensors["labels"].slice(1, 0, 3);
  CHECK(holds(refusal<ShapeError>(in), "one label for each id"));
  in = input(tokens);
  in.tensors["input_ids"] = in.tensors["input_ids"].reshape({kB * kT});
  CHECK(holds(refusal<ShapeError>(in), "[B, T]"));
  in.tensors["input_ids"] = Tensor::zeros(kCpu, Dtype::f32, {kB, kT});
  CHECK(holds(refusal<DtypeError>(in), "i32 or i64"));
  in.tensors["input_ids"] = Tensor::zeros(kCpu, Dtype::i32, {kB, 0});
  CHECK(holds(refusal<ShapeError>(in), "not empty"));
}
