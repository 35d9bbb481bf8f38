// GLA against the reference, against itself in pieces, and against finite differences.
#include <cmath>
#include <limits>

#include "tests/support/model_checks.h"

using namespace longhand;
using namespace longhand::test;

namespace {

enum class Kind { plain, odd, convolutions };

// A small model; sizes away from the vector widths of kernels and no output gate when odd.
ModelConfig tiny(Kind kind = Kind::plain) {
  ModelConfig c = default_config("gla");
  c.d_model = kind == Kind::odd ? 6 : 32;
  c.n_layer = 2;
  c.vocab_size = 19;
  c.options = {{"num_heads", 2}, {"intermediate_size", 24}};
  if (kind == Kind::odd)
    c.options = {{"num_heads", 3}, {"expand_v", 1.5}, {"use_output_gate", 0}, {"intermediate_size", 7}, {"clamp_min", -0.03}};
  if (kind == Kind::convolutions) c.options["use_short_conv"] = 1;
  return c;
}

constexpr Kind kKinds[] = {Kind::plain, Kind::odd, Kind::convolutions};

const CheckpointLayout& fla() {
  return model_family("gla").layouts[0];
}

}  // namespace

TEST("gla: FLA's case: logits, loss, final states") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  expect_reference({.model = "fla-gla"});
}

TEST("gla: greedy continuation, one token at a time from the carried state, is the reference's") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  expect_greedy({.model = "fla-gla"});
}

TEST("gla: on a GPU bf16 stays near f32 in every reference case") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  expect_bf16_near_f32({.model = "fla-gla"});
}

TEST("gla: a sequence in pieces from the carried state gives the logits of the whole") {
  for (const Kind kind : kKinds) expect_pieces_equal_whole(tiny(kind));
}

TEST("gla: a whole forward equals steps of one token") {
  for (const Kind kind : kKinds) expect_steps_equal_forward(tiny(kind));
}

TEST("gla: a later token never changes an earlier logit, and rows do not mix") {
  for (const Kind kind : {Kind::plain, Kind::convolutions}) expect_causal(tiny(kind));
}

TEST("gla: gradients of the initial state, with gradients into the final state, agree with finite differences") {
  for (const Kind kind : {Kind::odd, Kind::convolutions}) expect_state_gradients(tiny(kind));
}

TEST("gla: gradients of every parameter agree with finite differences") {
  for (const Kind kind : kKinds) expect_parameter_gradients(tiny(kind));
}

TEST("gla: a limit of 0 for the log gates is what gates divided by a very large number are: nothing is forgotten") {
  const Tensor tokens = token_pattern(Device::cpu(), 2, 23, 19);
  auto logits = [&](const char* option, double value) {
    ModelConfig c = tiny();
    c.options[option] = value;
    c.options["initializer_range"] = 0.5;
    LanguageModel model(c, Device::cpu(), Dtype::f32);
    model.initialize(2);
    return logits_of(model, tokens);
  };
  const auto kept = logits("clamp_min", 0), slow = logits("gate_logit_normalizer", 65536), plain = logits("clamp_min", -10);
  expect_close(slow, kept, 1e-3);  // gates of about 1e-5 over 23 tokens
  double apart = 0;
  for (std::size_t i = 0; i < kept.size(); ++i) apart = std::max(apart, std::abs(kept[i] - plain[i]));
  CHECK(apart > 0.05 * largest(kept));
}

TEST("gla: the state is one matrix per head, and the windows of the convolutions where there are some") {
  const RecurrentState plain = LanguageModel(tiny(), Device::cpu(), Dtype::f32).zero_state(3);
  CHECK(plain.layers()[0].size() == 1);
  CHECK(plain.get(0, "ssm").shape() == Shape{3, 2, 8, 16});
  const RecurrentState windows = LanguageModel(tiny(Kind::convolutions), Device::cpu(), Dtype::f32).zero_state(3);
  CHECK(windows.layers()[0].size() == 4);
  CHECK(windows.get(1, "conv_q").shape() == Shape{3, 3, 16});
  CHECK(windows.get(1, "conv_v").shape() == Shape{3, 3, 32});
}

TEST("gla: initialisation follows the published distributions") {
  ModelConfig c = tiny(Kind::convolutions);
  c.d_model = 64;
  c.vocab_size = 300;
  const std::string layer = "model.layers.1.";
  for (const double range : {0.02, 0.05}) {
    c.options["initializer_range"] = range;
    for (const std::string name : {"model.embeddings.weight", "lm_head.weight"})
      CHECK(spread(initial_values(c, name)) == doctest::Approx(range).epsilon(0.03));
    for (const std::string name : {"attn.q_proj.weight", "attn.g_proj.weight", "attn.gk_proj.0.weight", "attn.o_proj.weight",
                                   "mlp.gate_proj.weight", "mlp.down_proj.weight"})
      CHECK_MESSAGE(spread(initial_values(c, layer + name)) == doctest::Approx(range).epsilon(0.05), name);
  }
  CHECK(largest(initial_values(c, layer + "attn.q_proj.weight")) > 2.5 * 0.05);  // normal, not uniform
  CHECK(spread(initial_values(c, layer + "attn.v_conv1d.weight")) == doctest::Approx(0.05).epsilon(0.2));
  CHECK(initial_values(c, layer + "attn.gk_proj.1.bias") == std::vector<double>(32, 0.0));
  c.options["gate_bias_init"] = 3;
  CHECK(initial_values(c, layer + "attn.gk_proj.1.bias") == std::vector<double>(32, 3.0));
  CHECK(initial_values(c, layer + "attn.g_norm_swish_gate.weight") == std::vector<double>(32, 1.0));
  CHECK(initial_values(c, layer + "mlp_norm.weight") == std::vector<double>(64, 1.0));
}

TEST("gla: biases and norms take no weight decay") {
  for (const Kind kind : kKinds) expect_decay_rule(tiny(kind));
}

TEST("gla: a saved model is the same model") {
  for (const Kind kind : kKinds) {
    ModelConfig c = tiny(kind);
    c.pad_vocab_size_multiple = 8;
    c.tie_embeddings = kind == Kind::odd;
    expect_config_survives_layouts(c);
    expect_same_after_saving(c);
  }
}

TEST("gla: configurations of FLA, older keys too") {
  const ModelConfig plain = config_from("gla", "fla", R"({"model_type": "gla"})");
  CHECK(plain.d_model == 2048);
  CHECK(plain.n_layer == 24);
  CHECK(plain.count("intermediate_size") == 5632);  // of hidden_ratio 4
  CHECK(plain.vocab_size == 32000);
  CHECK_FALSE(plain.tie_embeddings);
  CHECK(plain.norm_eps == 1e-6);
  CHECK(plain.option("clamp_min") == -std::numeric_limits<double>::infinity());
  const ModelConfig older = config_from("gla", "fla",
                                        R"({"model_type": "gla", "hidden_size": 1024, "rms_norm_eps": 1e-5, "share_conv_kernel": true,
    "attn_mode": "fused_chunk", "max_position_embeddings": 4096, "fuse_cross_entropy": true, "fuse_norm": false, "num_kv_heads": 4,
    "torch_dtype": "bfloat16", "transformers_version": "4.40", "use_cache": true, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": null,
    "hidden_act": "silu", "intermediate_size": 512, "clamp_min": -1.5, "feature_map": null, "attn": null, "attnres_block_size": null})");
  CHECK(older.norm_eps == 1e-5);
  CHECK(older.count("intermediate_size") == 512);
  CHECK(older.option("clamp_min") == -1.5);
  CHECK(config_from("gla", "fla", R"({"model_type": "gla", "norm_eps": 1e-4, "rms_norm_eps": 1e-5})").norm_eps == 1e-4);
  for (const char* key : {R"("num_kv_heads": 2)", R"("feature_map": "relu")", R"("elementwise_affine": false)", R"("use_gk": false)",
                          R"("use_gv": true)", R"("attn": {"layers": [1]})", R"("hidden_act": "gelu")", R"("attn_mode": "magic")",
                          R"("use_short_conv": true, "share_conv_kernel": true)", R"("attnres_block_size": 4)", R"("novelty": 1)",
                          R"("expand_k": 0.3)", R"("clamp_min": 1)"}) {
    const std::string message = refusal_of_config("gla", "fla", std::string(R"({"model_type": "gla", )") + key + "}");
    const std::string text = key, name = text.substr(text.rfind("\":") == 0 ? 0 : 1, text.find("\":") - 1);
    CHECK_MESSAGE(!message.empty(), key);
    if (name != "use_short_conv") CHECK_MESSAGE(message.find(name) != std::string::npos, key, " in ", message);
  }
}

TEST("gla: what FLA has no key for is an obstacle") {
  ModelConfig c = tiny();
  c.complete();
  CHECK(fla().obstacle(c).empty());
  c.options["gate_low_rank_dim"] = 8;
  CHECK(fla().obstacle(c).find("gate_low_rank_dim") != std::string::npos);
  c.options["gate_low_rank_dim"] = 16;
  c.options["gate_logit_normalizer"] = 8;
  CHECK(fla().obstacle(c).find("gate_logit_normalizer") != std::string::npos);
}

TEST("gla: tensors of older files get today's names and shapes") {
  ModelConfig c = tiny();
  c.n_layer = 1;
  c.complete();
  const Device cpu = Device::cpu();
  const Tensor joined = random_tensor(cpu, Dtype::f32, {48, 32}, 1), norm = random_tensor(cpu, Dtype::f32, {16}, 2);
  const std::string layer = "model.layers.0.";
  std::map<std::string, Tensor> tensors{{layer + "mlp.gate_proj.weight", joined}, {layer + "attn.g_norm.weight", norm}};
  fla().modernize(tensors, c, "old.safetensors");
  REQUIRE(tensors.size() == 3);
  const auto all = joined.to_vector<float>();
  const auto half = all.begin() + 24 * 32;
  CHECK(tensors.at(layer + "mlp.gate_proj.weight").to_vector<float>() == std::vector<float>(all.begin(), half));
  CHECK(tensors.at(layer + "mlp.up_proj.weight").to_vector<float>() == std::vector<float>(half, all.end()));
  CHECK(tensors.at(layer + "mlp.up_proj.weight").same_storage(joined));  // views, not copies
  CHECK(tensors.at(layer + "attn.g_norm_swish_gate.weight").to_vector<float>() == norm.to_vector<float>());
  const auto before = tensors;
  fla().modernize(tensors, c, "new.safetensors");  // nothing more to do
  CHECK(tensors.size() == before.size());

  tensors = {{layer + "mlp.gate_proj.weight", norm}};
  CHECK_THROWS_WITH_AS(fla().modernize(tensors, c, "bad.safetensors"), doctest::Contains("bad.safetensors"), FileError);

  ModelConfig ungated = tiny(Kind::odd);
  ungated.complete();
  tensors = {{layer + "attn.g_norm.weight", norm}};
  fla().modernize(tensors, ungated, "ungated.safetensors");
  CHECK(tensors.contains(layer + "attn.g_norm.weight"));  // its name where nothing gates
}

TEST("gla: options outside what it can be are refused by name") {
  expect_refused(tiny(), "num_heads", 3);  // divides neither 16 nor 32
  expect_refused(tiny(), "expand_k", 0);
  expect_refused(tiny(), "expand_v", -1);
  expect_refused(tiny(), "conv_size", 9);
  expect_refused(tiny(), "clamp_min", 0.5);
  expect_refused(tiny(), "clamp_min", std::nan(""));
  expect_refused(tiny(), "gate_logit_normalizer", 0);
  expect_refused(tiny(), "intermediate_size", -1);
  expect_refused(tiny(), "use_output_gate", 0.5);
  expect_refused(tiny(), "initializer_range", -0.1);
  expect_refused(tiny(), "d_state", 16);
}
