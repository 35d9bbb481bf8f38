// Mamba-2 against the reference libraries, against itself in pieces, and against finite differences.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/files.h"
#include "core/safetensors.h"
#include "models/checkpoint.h"
#include "models/language_model.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

const Device kCpu = Device::cpu();

// What the golden README asks of f32: logits relative to the largest, gradients relative to each tensor's largest.
constexpr double kLogitTolerance = 2e-5, kGradientTolerance = 1e-4;

std::vector<Device> devices() {
  std::vector<Device> found{kCpu};
  if (cuda_device_count() > 0) found.push_back(Device::cuda());
  return found;
}

// A small model of awkward sizes; two groups, d_model not a multiple of the vector width of a kernel when `odd`.
ModelConfig tiny(bool odd = false) {
  ModelConfig c;
  c.d_model = odd ? 6 : 32;
  c.n_layer = 2;
  c.vocab_size = 19;
  c.pad_vocab_size_multiple = 1;
  c.options = {{"d_state", odd ? 5 : 16}, {"headdim", odd ? 3 : 16}, {"ngroups", 2}, {"chunk_size", 8}};
  return c;
}

// Values far from the small initial ones, so that every gradient stands well above the rounding of the loss (about 1e-16 / h).
void shake(LanguageModel& model) {
  uint64_t seed = 100;
  for (Parameter& p : model.parameters().all()) add_scaled(p.master, random_tensor(kCpu, p.master.dtype(), p.shape, ++seed), 0.3);
}

Tensor tokens_of(const Device& device, int64_t B, int64_t T, int64_t vocab) {
  std::vector<int32_t> ids(static_cast<std::size_t>(B * T));
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>((i * 7 + i / 5) % static_cast<std::size_t>(vocab));
  return Tensor::from(device, {B, T}, ids);
}

std::vector<double> logits_of(const LanguageModel& model, const Tensor& tokens, const RecurrentState& h0 = {},
                              RecurrentState* h_T = nullptr) {
  const NoGrad no_grad;
  auto out = model.forward(tokens, h0);
  if (h_T != nullptr) *h_T = out.state;
  return model.logits(out.hidden).value().to_vector<double>();
}

// Row b, positions [begin, end) of logits [B, T, V].
std::vector<double> positions(const std::vector<double>& logits, int64_t B, int64_t T, int64_t begin, int64_t end) {
  const auto V = static_cast<int64_t>(logits.size()) / (B * T);
  std::vector<double> part;
  for (int64_t b = 0; b < B; ++b) part.insert(part.end(), logits.begin() + (b * T + begin) * V, logits.begin() + (b * T + end) * V);
  return part;
}

void compare_with_reference(const std::string& name, bool gradients) {
  const auto golden = folder_from("LONGHAND_GOLDEN");
  const std::string folder = *golden + "/" + name;
  const NamedTensors expected = read_safetensors(folder + "/case.safetensors");
  for (const Device& device : devices()) {
    CAPTURE(device.name());
    const auto model = load_model(folder, device, Dtype::f32);
    const Tensor tokens = expected.at("input_ids").to(device);
    RecurrentState h_T;
    expect_close(logits_of(*model, tokens, {}, &h_T), expected.at("logits").to_vector<double>(), kLogitTolerance, 1e-30, name + " logits");

    model->parameters().clear_grads();
    const auto loss = model->loss({tokens, expected.at("labels").to(device), {}});
    CHECK(loss.loss.value().item() == doctest::Approx(expected.at("loss").item()).epsilon(1e-5));
    for (std::size_t layer = 0; layer < h_T.layers().size(); ++layer)
      for (const auto& [state, variable] : h_T.layers()[layer])
        if (const std::string key = "final_state." + std::to_string(layer) + "." + state; expected.contains(key))
          expect_close(variable.value().to_vector<double>(), expected.at(key).to_vector<double>(), kLogitTolerance, 1e-30, key);
    if (!gradients) continue;
    backward(loss.loss);
    int compared = 0;
    for (const Parameter& p : model->parameters().all()) {
      REQUIRE_MESSAGE(expected.contains("grad." + p.name), p.name);
      expect_close(p.grad.to_vector<double>(), expected.at("grad." + p.name).to_vector<double>(), kGradientTolerance, 1e-30,
                   "grad." + p.name);
      ++compared;
    }
    CHECK(compared == 20);
  }
}

// The 8 tokens that greedily follow row 0, one step at a time from the carried state.
void compare_greedy(const std::string& name) {
  const std::string folder = *folder_from("LONGHAND_GOLDEN") + "/" + name;
  const NamedTensors expected = read_safetensors(folder + "/case.safetensors");
  for (const Device& device : devices()) {
    const auto model = load_model(folder, device, Dtype::f32);
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
    CHECK(produced == expected.at("greedy").to_vector<int32_t>());
  }
}

}  // namespace

TEST("transformers' Mamba-2 with one group: logits, loss, every gradient") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  compare_with_reference("hf-mamba2-g1", true);
}

TEST("transformers' Mamba-2 with two groups, whose norm is over the whole inner width") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  compare_with_reference("hf-mamba2-g2", true);
}

TEST("state-spaces' Mamba-2 with two groups, whose norm is per group, and its final states") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  compare_with_reference("ss-mamba2-g2", false);
}

TEST("greedy continuation, one token at a time from the carried state, is the reference's") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  for (const char* name : {"hf-mamba2-g1", "hf-mamba2-g2", "ss-mamba2-g2"}) compare_greedy(name);
}

TEST("parameter counts of the official sizes") {
  struct Size {
    int64_t d_model, n_layer, total, without_embedding, per_layer;
  };
  for (const Size& size : {Size{768, 24, 128'989'632, 90'368'448, 3'765'320}, Size{1024, 48, 368'346'624, 316'851'712, 6'601'056},
                           Size{1536, 48, 780'161'280, 702'918'912, 14'644'112}, Size{2048, 48, 1'343'757'312, 1'240'767'488, 25'849'280},
                           Size{2560, 64, 2'702'599'680, 2'573'862'400, 40'216'560}}) {
    ModelConfig c;
    c.d_model = size.d_model;
    c.n_layer = size.n_layer;
    const LanguageModel model = LanguageModel::plan(c);
    CHECK(model.parameter_count() == size.total);
    CHECK(model.non_embedding_parameter_count() == size.without_embedding);
    CHECK((model.non_embedding_parameter_count() - c.d_model) / c.n_layer == size.per_layer);
  }
}

TEST("FLOPs per token and state sizes of mamba2-130m are the published ones") {
  ModelConfig c;
  const LanguageModel model = LanguageModel::plan(c);
  CHECK(model.forward_flops_per_token() / 1e9 == doctest::Approx(0.287).epsilon(0.01));
  c.n_layer = 1;
  const RecurrentState state = LanguageModel::plan(c).zero_state(1);
  CHECK(24 * state.get(0, "ssm").value().numel() == 4'718'592);
  CHECK(24 * (state.get(0, "ssm").value().numel() + state.get(0, "conv").value().numel()) == 4'847'616);
}

TEST("a sequence in pieces from the carried state gives the logits of the whole") {
  for (const bool odd : {false, true}) {
    for (const Device& device : devices()) {
      LanguageModel model(tiny(odd), device, Dtype::f32);
      model.initialize(3);
      constexpr int64_t B = 2, T = 23;
      const Tensor tokens = tokens_of(device, B, T, 19);
      RecurrentState whole_state;
      const auto whole = logits_of(model, tokens, {}, &whole_state);
      for (const int64_t s : {1, 2, 3, 7, 8, 9, 22}) {
        RecurrentState middle, end;
        const auto head = logits_of(model, tokens.slice(1, 0, s).clone(), {}, &middle);
        const auto tail = logits_of(model, tokens.slice(1, s, T).clone(), middle, &end);
        expect_close(head, positions(whole, B, T, 0, s), 1e-5);
        expect_close(tail, positions(whole, B, T, s, T), 1e-5);
        for (const char* name : {"ssm", "conv"})
          expect_close(end.get(1, name).value().to_vector<double>(), whole_state.get(1, name).value().to_vector<double>(), 1e-5, 1e-30,
                       name);
      }
    }
  }
}

TEST("a whole forward equals steps of one token") {
  LanguageModel model(tiny(), kCpu, Dtype::f32);
  model.initialize(4);
  const Tensor tokens = tokens_of(kCpu, 2, 11, 19);
  const auto whole = logits_of(model, tokens);
  RecurrentState state = model.zero_state(2);
  for (int64_t t = 0; t < 11; ++t)
    expect_close(logits_of(model, tokens.slice(1, t, t + 1).clone(), state, &state), positions(whole, 2, 11, t, t + 1), 1e-5);
}

TEST("a later token never changes an earlier logit, and rows do not mix") {
  LanguageModel model(tiny(), kCpu, Dtype::f32);
  model.initialize(5);
  const Tensor tokens = tokens_of(kCpu, 2, 12, 19);
  const auto before = logits_of(model, tokens);
  tokens.data<int32_t>()[12 + 8] = (tokens.data<int32_t>()[12 + 8] + 1) % 19;  // row 1, position 8
  const auto after = logits_of(model, tokens);
  for (std::size_t i = 0; i < before.size(); ++i) {
    const std::size_t row = i / (12 * 19), t = i / 19 % 12;
    if (row == 0 || t < 8) REQUIRE(before[i] == after[i]);
  }
  CHECK(before != after);
}

TEST("gradients of the initial state, with gradients into the final state, agree with finite differences") {
  LanguageModel model(tiny(true), kCpu, Dtype::f64, Dtype::f64);
  model.initialize(6);
  shake(model);
  constexpr int64_t B = 2, T = 11;
  const Tensor tokens = tokens_of(kCpu, B, T, 19), targets = tokens_of(kCpu, B, T, 17);
  std::vector<Tensor> h0;
  const RecurrentState zero = model.zero_state(B);
  for (std::size_t layer = 0; layer < 2; ++layer)
    for (const char* name : {"ssm", "conv"})
      h0.push_back(random_tensor(kCpu, Dtype::f64, zero.get(layer, name).shape(), 10 + h0.size(), 0.5));
  // Loss and final state of every layer count, so gradients flow in at the end and out at the beginning.
  const auto f = [&](const std::vector<Variable>& in) {
    RecurrentState state({{{"ssm", in[0]}, {"conv", in[1]}}, {{"ssm", in[2]}, {"conv", in[3]}}});
    auto out = model.loss({tokens, targets, {}}, state);
    return std::vector<Variable>{out.loss, out.state.get(0, "ssm"), out.state.get(0, "conv"), out.state.get(1, "ssm"),
                                 out.state.get(1, "conv")};
  };
  const auto result = gradcheck(f, h0);
  CHECK_MESSAGE(result.worst < 1e-7, result.where);
}

TEST("gradients of every parameter agree with finite differences") {
  for (const bool odd : {false, true}) {
    LanguageModel model(tiny(odd), kCpu, Dtype::f64, Dtype::f64);
    model.initialize(6);
    shake(model);
    const Tensor tokens = tokens_of(kCpu, 2, 11, 19), targets = tokens_of(kCpu, 2, 11, 17);
    model.parameters().clear_grads();
    backward(model.loss({tokens, targets, {}}).loss);
    auto loss_value = [&] {
      const NoGrad no_grad;
      return model.loss({tokens, targets, {}}).loss.value().item();
    };
    for (Parameter& p : model.parameters().all()) {  // a few elements of each
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
}

TEST("initialisation follows the published distributions") {
  ModelConfig c = tiny();
  c.d_model = 64;
  c.vocab_size = 500;
  LanguageModel model(c, kCpu, Dtype::f32);
  model.initialize(1);
  auto values = [&](const std::string& name) { return model.parameters().find(name)->master.to_vector<double>(); };
  auto largest = [](const std::vector<double>& v) {
    return std::abs(*std::max_element(v.begin(), v.end(), [](double a, double b) { return std::abs(a) < std::abs(b); }));
  };
  auto std_of = [](const std::vector<double>& v) {
    double sum = 0;
    for (double x : v) sum += x * x;
    return std::sqrt(sum / static_cast<double>(v.size()));
  };
  CHECK(std_of(values("backbone.embeddings.weight")) == doctest::Approx(0.02).epsilon(0.02));
  const auto in_proj = values("backbone.layers.0.mixer.in_proj.weight");
  CHECK(largest(in_proj) <= 0.125);
  CHECK(std_of(in_proj) == doctest::Approx(0.125 / std::sqrt(3.0)).epsilon(0.02));
  CHECK(largest(values("backbone.layers.0.mixer.out_proj.weight")) <= 1 / std::sqrt(128.0) / std::sqrt(2.0));
  CHECK(largest(values("backbone.layers.1.mixer.conv1d.weight")) <= 0.5);
  CHECK(largest(values("backbone.layers.1.mixer.conv1d.bias")) > 0.3);
  for (double a_log : values("backbone.layers.0.mixer.A_log")) CHECK((a_log >= 0 && a_log <= std::log(16.0)));
  for (double bias : values("backbone.layers.0.mixer.dt_bias")) {
    const double dt = std::log1p(std::exp(bias));
    CHECK((dt > 0.00099 && dt < 0.101));
  }
  CHECK(values("backbone.layers.0.mixer.D") == std::vector<double>(8, 1.0));
  CHECK(values("backbone.layers.0.mixer.in_proj.weight") != values("backbone.layers.1.mixer.in_proj.weight"));
}

TEST("the tensors without weight decay are those of the reference") {
  const LanguageModel model = LanguageModel::plan(tiny());
  for (const Parameter& p : model.parameters().all()) {
    const bool spared =
        p.name.ends_with("bias") || p.name.ends_with("A_log") || p.name.ends_with(".D") || p.name.find("norm") != std::string::npos;
    CHECK_MESSAGE(p.options.decay != spared, p.name);
  }
}

TEST("a saved model is the same model, in both libraries' layouts") {
  for (const int groups : {1, 2}) {  // two groups with a norm per group: only state-spaces computes that
    const ScratchFolder scratch;
    ModelConfig c = tiny();
    c.options["ngroups"] = groups;
    c.pad_vocab_size_multiple = 8;
    LanguageModel model(c, kCpu, Dtype::f32);
    model.initialize(9);
    save_model(model, scratch.path());
    const auto read = load_model(scratch.path(), kCpu, Dtype::f32);
    CHECK(read->config().vocab_size == 19);
    CHECK(read->config().padded_vocab() == 24);
    CHECK(read->config().options == model.config().options);
    for (const Parameter& p : model.parameters().all())
      CHECK(p.master.to_vector<float>() == read->parameters().find(p.name)->master.to_vector<float>());
    const std::string config = read_text_file(scratch.file("config.json"));
    CHECK((config.find("ssm_cfg") != std::string::npos) == (groups == 2));
  }
}

TEST("folders that are not a whole model are refused with the name of what is wrong") {
  const ScratchFolder scratch;
  LanguageModel model(tiny(), kCpu, Dtype::f32);
  model.initialize(9);
  auto refusal = [&] {
    try {
      load_model(scratch.path(), kCpu, Dtype::f32);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  save_model(model, scratch.path());
  auto tensors = read_safetensors(scratch.file("model.safetensors")).tensors;
  auto broken = tensors;
  broken.erase("backbone.norm_f.weight");
  write_safetensors(scratch.file("model.safetensors"), broken);
  CHECK(refusal().find("backbone.norm_f.weight") != std::string::npos);
  broken = tensors;
  broken["backbone.extra"] = tensors.begin()->second;
  write_safetensors(scratch.file("model.safetensors"), broken);
  CHECK(refusal().find("backbone.extra") != std::string::npos);
  broken = tensors;
  broken["backbone.norm_f.weight"] = Tensor::zeros(kCpu, Dtype::f32, {7});
  write_safetensors(scratch.file("model.safetensors"), broken);
  CHECK(refusal().find("[7]") != std::string::npos);
  broken["backbone.norm_f.weight"] = Tensor::full(kCpu, Dtype::f32, {32}, NAN);
  write_safetensors(scratch.file("model.safetensors"), broken);
  CHECK(refusal().find("NaN") != std::string::npos);
  const std::string config = read_text_file(scratch.file("config.json"));
  write_file_atomically(scratch.file("config.json"), "{\"model_type\": \"llama\"}");
  CHECK(refusal().find("llama") != std::string::npos);
  write_file_atomically(scratch.file("config.json"), "{\"model_type\": 7, \"d_model\": 32, \"ssm_cfg\": {\"layer\": \"Mamba3\"}}");
  CHECK(refusal().find("Mamba3") != std::string::npos);
  write_file_atomically(scratch.file("config.json"), "{\"d_model\": 32, \"ssm_cfg\": {\"layer\": 3}}");
  CHECK(refusal().find(scratch.file("config.json")) != std::string::npos);
  write_file_atomically(scratch.file("config.json"),
                        "{\"d_model\": 32, \"n_layer\": 2, \"vocab_size\": 19, \"ssm_cfg\": {\"layer\": \"Mamba2\", \"d_statte\": 16}}");
  CHECK(refusal().find("d_statte") != std::string::npos);
  std::filesystem::remove(scratch.file("model.safetensors"));
  write_file_atomically(scratch.file("config.json"), config);
  CHECK(refusal().find("model.safetensors") != std::string::npos);
  write_file_atomically(scratch.file("pytorch_model.bin"), "");
  CHECK(refusal().find("pytorch_model.bin") != std::string::npos);
}

TEST("options outside what Mamba-2 can be are refused by name") {
  auto refusal = [](const char* option, double value) {
    ModelConfig c = tiny();
    c.options[option] = value;
    CHECK_THROWS_AS(LanguageModel::plan(c), ConfigError);
  };
  refusal("headdim", 7);
  refusal("ngroups", 3);
  refusal("d_state", 0);
  refusal("d_state", 1.5);
  refusal("d_stats", 16);
  refusal("dt_min", 0);    // its logarithm would make dt_bias NaN
  refusal("dt_min", 0.2);  // above dt_max
  refusal("dt_init_floor", 0);
  refusal("A_init_min", 0);
  refusal("A_init_max", 0.5);  // below A_init_min
  refusal("dt_limit_min", -1);
  refusal("dt_limit_max", 0);
  refusal("conv_init", -1);
  refusal("rmsnorm", 2);
  ModelConfig c = tiny();
  c.norm_eps = 0;
  CHECK_THROWS_AS(LanguageModel::plan(c), ConfigError);
}

TEST("limits of dt survive a file, the unlimited end too") {
  for (const int groups : {1, 2}) {  // transformers' layout, state-spaces' layout
    for (const double upper : {0.5, std::numeric_limits<double>::infinity()}) {
      const ScratchFolder scratch;
      ModelConfig c = tiny();
      c.options["ngroups"] = groups;
      c.options["dt_limit_min"] = 0.01;
      c.options["dt_limit_max"] = upper;
      LanguageModel model(c, kCpu, Dtype::f32);
      model.initialize(9);
      save_model(model, scratch.path());
      CHECK(read_model_config(scratch.path()).options == model.config().options);
    }
  }
}

TEST("a state of another model is refused") {
  LanguageModel model(tiny(), kCpu, Dtype::f32);
  model.initialize(1);
  RecurrentState state = model.zero_state(1);
  state.layers()[1]["h"] = state.layers()[1].at("ssm");
  CHECK_THROWS_AS(model.forward(tokens_of(kCpu, 1, 3, 19), state), ValueError);
}
