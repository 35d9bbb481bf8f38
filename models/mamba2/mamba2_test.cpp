// Mamba-2 against the reference libraries, against itself in pieces, and against finite differences.
#include <cmath>
#include <filesystem>
#include <limits>

#include "core/files.h"
#include "tests/support/model_checks.h"

using namespace longhand;
using namespace longhand::test;

namespace {

const Device kCpu = Device::cpu();

// A small model of awkward sizes; two groups, d_model not a multiple of the vector width of a kernel when `odd`.
ModelConfig tiny(bool odd = false) {
  ModelConfig c = default_config("mamba2");
  c.d_model = odd ? 6 : 32;
  c.n_layer = 2;
  c.vocab_size = 19;
  c.pad_vocab_size_multiple = 1;
  c.options = {{"d_state", odd ? 5 : 16}, {"headdim", odd ? 3 : 16}, {"ngroups", 2}, {"chunk_size", 8}};
  return c;
}

// Weights rounded to 11 bits: 2^-12 each, and some tens of them in every logit.
constexpr double kHalfTolerance = 2e-3;

}  // namespace

TEST("mamba2: transformers with one group: logits, loss, every gradient") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  expect_reference({.model = "hf-mamba2-g1", .gradients = true});
}

TEST("mamba2: transformers with two groups, whose norm is over the whole inner width") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  expect_reference({.model = "hf-mamba2-g2", .gradients = true});
}

TEST("mamba2: state-spaces with two groups, whose norm is per group, and its final states") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  expect_reference({.model = "ss-mamba2-g2"});
}

TEST("mamba2: state-spaces' pytorch_model.bin in half precision") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  expect_reference({.model = "ss-mamba2-fp16", .expected = "hf-mamba2-g1", .tolerance = kHalfTolerance});
}

TEST("mamba2: greedy continuation, one token at a time from the carried state, is the reference's") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  for (const char* name : {"hf-mamba2-g1", "hf-mamba2-g2", "ss-mamba2-g2"}) expect_greedy({.model = name});
}

TEST("mamba2: on a GPU bf16 stays near f32 in every reference case") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const char* name : {"hf-mamba2-g1", "hf-mamba2-g2", "ss-mamba2-g2"}) expect_bf16_near_f32({.model = name});
  expect_bf16_near_f32({.model = "ss-mamba2-fp16", .expected = "hf-mamba2-g1"});
}

TEST("mamba2: a sequence in pieces from the carried state gives the logits of the whole") {
  for (const bool odd : {false, true}) expect_pieces_equal_whole(tiny(odd));
}

TEST("mamba2: a whole forward equals steps of one token") {
  for (const bool odd : {false, true}) expect_steps_equal_forward(tiny(odd));
}

TEST("mamba2: a later token never changes an earlier logit, and rows do not mix") {
  expect_causal(tiny());
}

TEST("mamba2: gradients of the initial state, with gradients into the final state, agree with finite differences") {
  expect_state_gradients(tiny(true));
}

TEST("mamba2: gradients of every parameter agree with finite differences") {
  for (const bool odd : {false, true}) expect_parameter_gradients(tiny(odd));
}

TEST("mamba2: initialisation follows the published distributions") {
  ModelConfig c = tiny();
  c.d_model = 64;
  c.vocab_size = 500;
  const std::string mixer = "backbone.layers.0.mixer.";
  CHECK(spread(initial_values(c, "backbone.embeddings.weight")) == doctest::Approx(0.02).epsilon(0.02));
  expect_uniform(initial_values(c, mixer + "in_proj.weight"), 1 / std::sqrt(64.0));
  expect_uniform(initial_values(c, mixer + "out_proj.weight"), 1 / std::sqrt(128.0) / std::sqrt(2.0));  // two layers
  expect_uniform(initial_values(c, mixer + "conv1d.weight"), 0.5);
  expect_uniform(initial_values(c, mixer + "conv1d.bias"), 0.5);
  for (double a_log : initial_values(c, mixer + "A_log")) CHECK((a_log >= 0 && a_log <= std::log(16.0)));
  for (double bias : initial_values(c, mixer + "dt_bias")) {
    const double dt = std::log1p(std::exp(bias));
    CHECK((dt > 0.00099 && dt < 0.101));
  }
  CHECK(initial_values(c, mixer + "D") == std::vector<double>(8, 1.0));
  CHECK(initial_values(c, mixer + "in_proj.weight") != initial_values(c, "backbone.layers.1.mixer.in_proj.weight"));
  c.tie_embeddings = false;
  expect_uniform(initial_values(c, "lm_head.weight"), 1 / std::sqrt(64.0));
}

TEST("mamba2: the tensors without weight decay are those of the reference") {
  expect_decay_rule(tiny());
}

TEST("mamba2: a saved model is the same model, in both libraries' layouts") {
  for (const int groups : {1, 2}) {  // two groups with a norm per group: only state-spaces computes that
    ModelConfig c = tiny();
    c.options["ngroups"] = groups;
    c.pad_vocab_size_multiple = 8;
    expect_config_survives_layouts(c);
    expect_same_after_saving(c);
    c.complete();
    CHECK(checkpoint_layout(c) == (groups == 2 ? "state-spaces" : "hf"));
  }
}

TEST("mamba2: folders that are not a whole model are refused with the name of what is wrong") {
  const ScratchFolder scratch;
  ModelConfig c = tiny();
  c.options["ngroups"] = 1;  // so that transformers' layout is written
  LanguageModel model(c, kCpu, Dtype::f32);
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

TEST("mamba2: options outside what it can be are refused by name") {
  expect_refused(tiny(), "headdim", 7);
  expect_refused(tiny(), "ngroups", 3);
  expect_refused(tiny(), "d_state", 0);
  expect_refused(tiny(), "d_state", 1.5);
  expect_refused(tiny(), "d_stats", 16);
  expect_refused(tiny(), "d_conv", 9);
  expect_refused(tiny(), "dt_min", 0);    // its logarithm would make dt_bias NaN
  expect_refused(tiny(), "dt_min", 0.2);  // above dt_max
  expect_refused(tiny(), "dt_init_floor", 0);
  expect_refused(tiny(), "A_init_min", 0);
  expect_refused(tiny(), "A_init_max", 0.5);  // below A_init_min
  expect_refused(tiny(), "dt_limit_min", -1);
  expect_refused(tiny(), "dt_limit_max", 0);
  expect_refused(tiny(), "conv_init", -1);
  expect_refused(tiny(), "rmsnorm", 2);
  ModelConfig c = tiny();
  c.norm_eps = 0;
  CHECK_THROWS_AS(LanguageModel::plan(c), ConfigError);
}

TEST("mamba2: with one group both libraries' norms are the same, and so are their configurations") {
  const ModelConfig hf =
      config_from("mamba2", "hf", R"({"model_type": "mamba2", "hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1})");
  const ModelConfig ours = config_from("mamba2", "state-spaces", R"({"d_model": 32, "ssm_cfg": {"layer": "Mamba2", "headdim": 16}})");
  CHECK(hf.options == ours.options);
  const ModelConfig two =
      config_from("mamba2", "hf", R"({"model_type": "mamba2", "hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 2})");
  CHECK_FALSE(two.flag("norm_per_group"));
}

TEST("mamba2: how the norm takes its mean is in no file: the layout says it, and one group leaves nothing to say") {
  for (const int groups : {1, 2}) {
    ModelConfig c = tiny();
    c.options["ngroups"] = groups;
    for (const int per_group : {0, 1}) {
      c.options["norm_per_group"] = per_group;
      ModelConfig whole = c;
      whole.complete();
      int written = 0;
      for (const CheckpointLayout& layout : model_family("mamba2").layouts) {
        if (!layout.obstacle(whole).empty()) continue;
        CHECK(layout.write(whole).dump().find("norm_per_group") == std::string::npos);
        ++written;
      }
      CHECK(written == (groups == 1 ? 2 : 1));
      expect_config_survives_layouts(c);
    }
  }
}

TEST("mamba2: limits of dt survive a file, the unlimited end too") {
  for (const double upper : {0.5, std::numeric_limits<double>::infinity()}) {
    ModelConfig c = tiny();
    c.options["ngroups"] = 1;  // both libraries express it
    c.options["dt_limit_min"] = 0.01;
    c.options["dt_limit_max"] = upper;
    expect_config_survives_layouts(c);
  }
}

TEST("mamba2: a state of another model is refused") {
  LanguageModel model(tiny(), kCpu, Dtype::f32);
  model.initialize(1);
  RecurrentState state = model.zero_state(1);
  state.layers()[1]["h"] = state.layers()[1].at("ssm");
  CHECK_THROWS_AS(model.forward(token_pattern(kCpu, 1, 3, 19), state), ValueError);
}

TEST("mamba2: configurations of FLA, whose class has the same model_type") {
  const std::string published = R"({"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 16,
    "expand": 2, "num_heads": 8, "head_dim": 16, "conv_kernel": 4, "use_bias": false, "use_conv_bias": true, "hidden_act": "silu",
    "chunk_size": 64, "fuse_norm": true, "tie_word_embeddings": false, "norm_eps": 1e-6, "n_groups": )";
  const auto text = [&](const std::string& more) { return published + "1" + more + "}"; };
  const ModelConfig plain = config_from("mamba2", "hf", text(""));
  CHECK(plain.norm_eps == 1e-6);
  CHECK(std::isinf(plain.option("dt_limit_max")));
  const ModelConfig other = config_from("mamba2", "hf", text(R"(, "rmsnorm": true, "norm_before_gate": true, "D_has_hdim": true,
    "dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 1e-3, "dt_limit": [0.5, 2], "A_init_range": [2, 8], "conv_init": 0.1)"));
  for (const auto& [option, value] : {std::pair{"norm_before_gate", 1.0},
                                      {"D_has_hdim", 1.0},
                                      {"dt_min", 0.01},
                                      {"dt_max", 0.2},
                                      {"dt_init_floor", 1e-3},
                                      {"dt_limit_min", 0.5},
                                      {"dt_limit_max", 2.0},
                                      {"A_init_min", 2.0},
                                      {"A_init_max", 8.0},
                                      {"conv_init", 0.1}})
    CHECK_MESSAGE(other.option(option) == value, option);
  CHECK_FALSE(config_from("mamba2", "hf", text(R"(, "rmsnorm": false)")).flag("rmsnorm"));
  for (const auto& [keys, part] : {std::pair{R"(, "layer_norm_epsilon": 1e-5)", "norm_eps"},
                                   {R"(, "dt_limit": [0, 2], "time_step_limit": [0, 1])", "dt_limit"},
                                   {R"(, "dt_min": 0.01, "time_step_min": 0.001)", "dt_min"}}) {
    const std::string message = refusal_of_config("mamba2", "hf", text(keys));
    CHECK_MESSAGE(message.find(part) != std::string::npos, message, " lacks ", part);
  }
  CHECK(refusal_of_config("mamba2", "hf", published + "2}").find("n_groups") != std::string::npos);

  // transformers itself once wrote norm_before_gate, and gates first all the same.
  const ModelConfig transformers =
      config_from("mamba2", "hf", R"({"model_type": "mamba2", "layer_norm_epsilon": 1e-5, "norm_before_gate": true})");
  CHECK_FALSE(transformers.flag("norm_before_gate"));
}

TEST("mamba2: sizes of a file that no product can hold are refused") {
  for (const char* keys : {R"("vocab_size": 9223372036854775807)", R"("num_heads": 9223372036854775807, "head_dim": 2)",
                           R"("expand": 4294967296, "hidden_size": 4294967296)", R"("vocab_size": 18446744073709551615)",
                           R"("longhand": {"vocab_size": 9223372036854775807, "pad_vocab_size_multiple": 16})"})
    CHECK_MESSAGE(!refusal_of_config("mamba2", "hf", std::string(R"({"model_type": "mamba2", )") + keys + "}").empty(), keys);
}
