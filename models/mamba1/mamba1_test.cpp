// Mamba-1 against the reference libraries, against itself in pieces, and against finite differences.
#include <cmath>

#include "tests/support/model_checks.h"

using namespace longhand;
using namespace longhand::test;

namespace {

// A small model; sizes away from the vector widths of kernels, a rank of its own and biases when `odd`.
ModelConfig tiny(bool odd = false) {
  ModelConfig c = default_config("mamba1");
  c.d_model = odd ? 6 : 32;
  c.n_layer = 2;
  c.vocab_size = 19;
  c.pad_vocab_size_multiple = 1;
  if (odd) c.options = {{"d_state", 5}, {"dt_rank", 3}, {"d_conv", 3}, {"expand", 3}, {"bias", 1}, {"conv_bias", 0}};
  return c;
}

const std::string kMixer = "backbone.layers.0.mixer.";

}  // namespace

TEST("mamba1: transformers: logits, loss, every gradient") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  expect_reference({.model = "hf-mamba1", .gradients = true});
}

TEST("mamba1: state-spaces' pytorch_model.bin gives what transformers gives") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  expect_reference({.model = "ss-mamba1", .expected = "hf-mamba1", .gradients = true});
  expect_greedy({.model = "ss-mamba1", .expected = "hf-mamba1"});
}

TEST("mamba1: greedy continuation, one token at a time from the carried state, is the reference's") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  expect_greedy({.model = "hf-mamba1"});
}

TEST("mamba1: on a GPU bf16 stays near f32 in every reference case") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const char* name : {"hf-mamba1", "ss-mamba1"}) expect_bf16_near_f32({.model = name, .expected = "hf-mamba1"});
}

TEST("mamba1: a sequence in pieces from the carried state gives the logits of the whole") {
  for (const bool odd : {false, true}) expect_pieces_equal_whole(tiny(odd));
}

TEST("mamba1: a whole forward equals steps of one token") {
  for (const bool odd : {false, true}) expect_steps_equal_forward(tiny(odd));
}

TEST("mamba1: a later token never changes an earlier logit, and rows do not mix") {
  expect_causal(tiny());
}

TEST("mamba1: gradients of the initial state, with gradients into the final state, agree with finite differences") {
  expect_state_gradients(tiny(true));
}

TEST("mamba1: gradients of every parameter agree with finite differences") {
  for (const bool odd : {false, true}) expect_parameter_gradients(tiny(odd));
}

TEST("mamba1: initialisation follows the published distributions") {
  ModelConfig c = tiny();
  c.d_model = 64;  // d_inner 128, rank 4
  c.vocab_size = 500;
  CHECK(spread(initial_values(c, "backbone.embeddings.weight")) == doctest::Approx(0.02).epsilon(0.02));
  expect_uniform(initial_values(c, kMixer + "in_proj.weight"), 1 / std::sqrt(64.0));
  expect_uniform(initial_values(c, kMixer + "x_proj.weight"), 1 / std::sqrt(128.0));
  expect_uniform(initial_values(c, kMixer + "out_proj.weight"), 1 / std::sqrt(128.0) / std::sqrt(2.0));  // two layers
  expect_uniform(initial_values(c, kMixer + "conv1d.weight"), 0.5);
  expect_uniform(initial_values(c, kMixer + "conv1d.bias"), 0.5);
  expect_uniform(initial_values(c, kMixer + "dt_proj.weight"), 0.5);
  const auto A_log = initial_values(c, kMixer + "A_log");
  for (std::size_t i = 0; i < A_log.size(); ++i) CHECK(std::exp(A_log[i]) == doctest::Approx(static_cast<double>(i % 16 + 1)));
  double mean_log = 0;
  const auto biases = initial_values(c, kMixer + "dt_proj.bias");
  for (double bias : biases) {
    const double dt = std::log1p(std::exp(bias));
    CHECK((dt > 0.00099 && dt < 0.101));
    mean_log += std::log(dt) / static_cast<double>(biases.size());
  }
  CHECK(mean_log == doctest::Approx(std::log(0.01)).epsilon(0.08));  // even in log(dt) between 0.001 and 0.1
  CHECK(initial_values(c, kMixer + "D") == std::vector<double>(128, 1.0));
  c.options["A_init_scale"] = 0.01;
  const auto slow = initial_values(c, kMixer + "A_log");
  for (std::size_t i = 0; i < slow.size(); ++i) CHECK(std::exp(slow[i]) == doctest::Approx(0.01 * static_cast<double>(i % 16 + 1)));
  CHECK(initial_values(c, kMixer + "in_proj.weight") != initial_values(c, "backbone.layers.1.mixer.in_proj.weight"));
  c.options = {{"dt_init_constant", 1}, {"dt_scale", 3}, {"bias", 1}, {"dt_init_floor", 0.1}};
  CHECK(initial_values(c, kMixer + "dt_proj.weight") == std::vector<double>(128 * 4, 1.5));
  CHECK(largest(initial_values(c, kMixer + "in_proj.bias")) == 0);
  for (double bias : initial_values(c, kMixer + "dt_proj.bias")) CHECK(std::log1p(std::exp(bias)) == doctest::Approx(0.1));
}

TEST("mamba1: the tensors without weight decay are those of the reference, although A_log is a matrix") {
  expect_decay_rule(tiny());
  expect_decay_rule(tiny(true));
}

TEST("mamba1: a saved model is the same model") {
  for (const bool odd : {false, true}) {
    ModelConfig c = tiny(odd);
    c.pad_vocab_size_multiple = 8;
    c.tie_embeddings = !odd;
    expect_config_survives_layouts(c);
    expect_same_after_saving(c);
  }
  ModelConfig c = tiny();
  c.options = {{"dt_init_constant", 1}, {"dt_scale", 2}, {"dt_min", 0.002}, {"dt_max", 0.2}, {"dt_init_floor", 1e-3}};
  expect_config_survives_layouts(c);
}

TEST("mamba1: configurations of transformers") {
  const ModelConfig plain = config_from("mamba1", "hf", R"({"model_type": "mamba"})");
  CHECK(plain.d_model == 768);
  CHECK(plain.n_layer == 32);
  CHECK(plain.padded_vocab() == 50280);
  CHECK(plain.tie_embeddings);
  CHECK(plain.count("dt_rank") == 48);  // "auto"
  CHECK(plain.flag("bias"));            // the library's own default, which its published models do not use
  const ModelConfig wide = config_from(
      "mamba1", "hf",
      R"({"model_type": "mamba", "hidden_size": 8, "intermediate_size": 24, "expand": 2, "time_step_rank": 5, "time_step_init_scheme": "constant",
          "d_model": 99, "ssm_cfg": {}, "rms_norm": true, "time_step_max": 0.2, "layer_norm_epsilon": 1e-6})");
  CHECK(wide.count("expand") == 3);  // intermediate_size comes before expand
  CHECK(wide.d_model == 8);          // d_model is a leftover
  CHECK(wide.count("dt_rank") == 5);
  CHECK(wide.flag("dt_init_constant"));
  CHECK(wide.option("dt_max") == 0.2);
  CHECK(wide.norm_eps == 1e-6);
  auto refused = [](const char* keys, const char* part) {
    const std::string message = refusal_of_config("mamba1", "hf", std::string(R"({"model_type": "mamba", )") + keys + "}");
    CHECK_MESSAGE(message.find(part) != std::string::npos, message, " lacks ", part);
  };
  refused(R"("hidden_size": 8, "intermediate_size": 20)", "intermediate_size");
  refused(R"("time_step_rank": "many")", "time_step_rank");
  refused(R"("time_step_rank": 0)", "time_step_rank");
  refused(R"("hidden_act": "gelu")", "hidden_act");
  refused(R"("time_step_init_scheme": "magic")", "time_step_init_scheme");
  refused(R"("state_size": 0)", "d_state");
}

TEST("mamba1: configurations of FLA, whose class has the same model_type") {
  const std::string published = R"({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 16,
    "expand": 2, "conv_kernel": 4, "use_bias": false, "use_conv_bias": true, "hidden_act": "silu", "time_step_rank": 4, "fuse_norm": true,
    "tie_word_embeddings": false, "norm_eps": 1e-6)";
  CHECK(config_from("mamba1", "hf", published + "}").norm_eps == 1e-6);
  CHECK(config_from("mamba1", "hf", published + R"(, "layer_norm_epsilon": 1e-6})").norm_eps == 1e-6);
  CHECK(refusal_of_config("mamba1", "hf", published + R"(, "layer_norm_epsilon": 1e-5})").find("norm_eps") != std::string::npos);
}

TEST("mamba1: configurations of state-spaces") {
  const std::string published = R"("d_model": 32, "n_layer": 3, "vocab_size": 96, "rms_norm": true, "residual_in_fp32": true,
    "fused_add_norm": true, "pad_vocab_size_multiple": 8)";
  auto text = [&](const std::string& more) { return "{" + published + more + "}"; };
  const ModelConfig plain = config_from("mamba1", "state-spaces", text(R"(, "ssm_cfg": {})"));
  CHECK(plain.tie_embeddings);
  CHECK(plain.norm_eps == 1e-5);
  CHECK(plain.options == config_from("mamba1", "state-spaces", text(R"(, "ssm_cfg": {"dt_rank": 2, "dt_init": "random"})")).options);
  CHECK(plain.options == config_from("mamba1", "state-spaces", text("")).options);  // absent means {}
  CHECK(plain.options == config_from("mamba1", "state-spaces", text(R"(, "ssm_cfg": null)")).options);
  CHECK(plain.count("dt_rank") == 2);
  const ModelConfig other =
      config_from("mamba1", "state-spaces",
                  text(R"(, "tie_embeddings": false, "ssm_cfg": {"layer": "Mamba1", "d_state": 4, "dt_rank": 3, "use_fast_path": false})"));
  CHECK_FALSE(other.tie_embeddings);
  CHECK(other.count("d_state") == 4);
  CHECK(other.count("dt_rank") == 3);
  auto refused = [&](const char* more, const char* part) {
    const std::string message = refusal_of_config("mamba1", "state-spaces", text(more));
    CHECK_MESSAGE(message.find(part) != std::string::npos, message, " lacks ", part);
  };
  refused(R"(, "ssm_cfg": {"d_stat": 4})", "d_stat");
  refused(R"(, "ssm_cfg": {"headdim": 64})", "headdim");
  refused(R"(, "ssm_cfg": {}, "attn_layer_idx": [3])", "attn_layer_idx");
  refused(R"(, "ssm_cfg": {}, "d_intermediate": 64)", "d_intermediate");
  refused(R"(, "ssm_cfg": {}, "novelty": 1)", "novelty");

  // What longhand writes is what was published: the eight keys, and no more where nothing is special.
  for (const CheckpointLayout& layout : model_family("mamba1").layouts) {
    if (std::string(layout.name) != "state-spaces") continue;
    CHECK(layout.write(plain).size() == 8);
    CHECK(layout.write(plain)["ssm_cfg"].empty());
    CHECK(layout.write(other)["ssm_cfg"].size() == 2);
    ModelConfig eps = plain;
    eps.norm_eps = 1e-6;
    CHECK(layout.obstacle(eps).find("norm_eps") != std::string::npos);
  }
}

TEST("mamba1: options outside what it can be are refused by name") {
  expect_refused(tiny(), "d_state", 0);
  expect_refused(tiny(), "d_conv", 9);
  expect_refused(tiny(), "expand", 1.5);
  expect_refused(tiny(), "dt_rank", -1);
  expect_refused(tiny(), "dt_scale", 0);
  expect_refused(tiny(), "dt_min", 0);
  expect_refused(tiny(), "dt_max", 0);
  expect_refused(tiny(), "bias", 2);
  expect_refused(tiny(), "headdim", 64);
}
