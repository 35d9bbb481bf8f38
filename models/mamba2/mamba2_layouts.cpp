// Keys and names of Mamba-2 checkpoints. Facts: huggingface/transformers models/mamba2, state-spaces/mamba models/config_mamba.py,
// fla-org/flash-linear-attention fla/models/mamba2.
#include "models/mamba2/mamba2_layouts.h"

#include <cmath>

#include "core/error.h"
#include "models/layout_keys.h"

namespace longhand::models::mamba2 {
namespace {

using Json = nlohmann::ordered_json;

void read_limits(ConfigReader& reader, const char* key, ModelConfig& config) {
  const Json limits = reader.value(key);
  if (limits.is_null()) return;
  if (!limits.is_array() || limits.size() != 2 || std::isnan(json_number(limits[0])) || std::isnan(json_number(limits[1])))
    reader.refuse(key, "a list of two numbers");
  config.options["dt_limit_min"] = json_number(limits[0]);
  config.options["dt_limit_max"] = json_number(limits[1]);
}

// No limits is the default of both libraries, and left out.
void write_limits(Json& json, const char* key, const ModelConfig& config) {
  const double low = config.option("dt_limit_min"), high = config.option("dt_limit_max");
  if (low > 0 || std::isfinite(high)) json[key] = {json_from_number(low), json_from_number(high)};
}

void read_A_range(ConfigReader& reader, ModelConfig& config) {
  const Json range = reader.value("A_init_range");
  if (range.is_null()) return;
  if (!range.is_array() || range.size() != 2 || !range[0].is_number() || !range[1].is_number())
    reader.refuse("A_init_range", "a list of two numbers");
  config.options["A_init_min"] = range[0].get<double>();
  config.options["A_init_max"] = range[1].get<double>();
}

// --- transformers, and FLA's class of the same model_type -----------------------------------------------------

// Options that transformers has no key for.
constexpr auto kOwnOptions = {"A_init_min", "A_init_max", "conv_init"};

bool transformers_matches(const Json& json) {
  return is_text(json, "model_type", "mamba2");
}

// transformers once wrote norm_before_gate true, and has always gated first: there it says nothing.
void read_norm_of_fla(ConfigReader& reader, ModelConfig& c) {
  if (!reader.has("norm_eps")) return;
  c.options["norm_before_gate"] = reader.boolean("norm_before_gate", false) ? 1 : 0;
  if (c.option("ngroups") != 1) reader.refuse("n_groups", "1: FLA's versions do not take the norm over several groups in one way");
}

// Keys that are not read here are leftovers of conversions or say how to run: they may contradict what is read.
ModelConfig transformers_read(const Json& json, const std::string& file) {
  ConfigReader reader(json, file);
  ModelConfig c;
  c.family = "mamba2";
  c.d_model = reader.integer("hidden_size", 4096);
  c.n_layer = reader.integer("num_hidden_layers", 64);
  c.tie_embeddings = reader.boolean("tie_word_embeddings", false);
  c.norm_eps = number_of_either(reader, "layer_norm_epsilon", "norm_eps", 1e-5);
  const int64_t heads = reader.integer("num_heads", 128), headdim = reader.integer("head_dim", 64), expand = reader.integer("expand", 2);
  if (heads * headdim != expand * c.d_model) reader.refuse("num_heads", "num_heads * head_dim = expand * hidden_size");
  c.options = {{"d_state", static_cast<double>(reader.integer("state_size", 128))},
               {"d_conv", static_cast<double>(reader.integer("conv_kernel", 4))},
               {"expand", static_cast<double>(expand)},
               {"headdim", static_cast<double>(headdim)},
               {"ngroups", static_cast<double>(reader.integer("n_groups", 8))},
               {"chunk_size", static_cast<double>(reader.integer("chunk_size", 256))},
               {"bias", reader.boolean("use_bias", false) ? 1.0 : 0.0},
               {"conv_bias", reader.boolean("use_conv_bias", true) ? 1.0 : 0.0},
               {"dt_min", number_of_either(reader, "time_step_min", "dt_min", 0.001)},
               {"dt_max", number_of_either(reader, "time_step_max", "dt_max", 0.1)},
               {"dt_init_floor", number_of_either(reader, "time_step_floor", "dt_init_floor", 1e-4)},
               {"conv_init", reader.number("conv_init", 0)},
               {"rmsnorm", reader.boolean("rmsnorm", true) ? 1.0 : 0.0},
               {"D_has_hdim", reader.boolean("D_has_hdim", false) ? 1.0 : 0.0},
               {"norm_per_group", 0.0}};
  read_norm_of_fla(reader, c);
  read_A_range(reader, c);
  if (reader.has("time_step_limit")) reader.require("dt_limit", reader.value("time_step_limit"));
  read_limits(reader, reader.has("dt_limit") ? "dt_limit" : "time_step_limit", c);
  reader.require("rms_norm", true);
  require_silu(reader, "silu");
  read_padded_vocab(reader, file, 32768, c, kOwnOptions);
  return c;
}

std::string transformers_obstacle(const ModelConfig& c) {
  if (c.flag("norm_per_group") && c.count("ngroups") > 1) return "transformers takes the gated norm over all of d_inner, not per group";
  if (!c.flag("rmsnorm")) return "transformers always has the gated norm (rmsnorm)";
  if (c.flag("norm_before_gate")) return "transformers gates before the norm, never after (norm_before_gate)";
  if (c.flag("D_has_hdim")) return "transformers has one D per head, not per channel (D_has_hdim)";
  return "";
}

Json transformers_write(const ModelConfig& c) {
  Json json{{"architectures", {"Mamba2ForCausalLM"}},
            {"model_type", "mamba2"},
            {"hidden_size", c.d_model},
            {"num_hidden_layers", c.n_layer},
            {"vocab_size", c.padded_vocab()},
            {"state_size", c.count("d_state")},
            {"num_heads", c.count("expand") * c.d_model / c.count("headdim")},
            {"head_dim", c.count("headdim")},
            {"expand", c.count("expand")},
            {"n_groups", c.count("ngroups")},
            {"conv_kernel", c.count("d_conv")},
            {"chunk_size", c.count("chunk_size")},
            {"use_bias", c.flag("bias")},
            {"use_conv_bias", c.flag("conv_bias")},
            {"hidden_act", "silu"},
            {"rms_norm", true},
            {"residual_in_fp32", true},
            {"layer_norm_epsilon", c.norm_eps},
            {"tie_word_embeddings", c.tie_embeddings},
            {"time_step_min", c.option("dt_min")},
            {"time_step_max", c.option("dt_max")},
            {"time_step_floor", c.option("dt_init_floor")}};
  write_limits(json, "time_step_limit", c);
  json["longhand"] = own_keys(c, kOwnOptions);
  return json;
}

// --- state-spaces ---------------------------------------------------------------------------------------------

bool state_spaces_matches(const Json& json) {
  const auto block = json.find("ssm_cfg");
  return json.contains("d_model") && block != json.end() && block->is_object() && is_text(*block, "layer", "Mamba2");
}

ModelConfig state_spaces_read(const Json& json, const std::string& file) {
  ModelConfig c;
  c.family = "mamba2";
  read_state_spaces_skeleton(json, file, c);
  const Json& block = json.at("ssm_cfg");
  ConfigReader ssm(block, file + " (ssm_cfg)");
  ssm.ignore("layer");
  ssm.ignore("use_mem_eff_path");
  ssm.require("d_ssm", nullptr);
  auto size = [&](const char* key, int64_t fallback) { c.options[key] = static_cast<double>(ssm.integer(key, fallback)); };
  auto flag = [&](const char* key, bool fallback) { c.options[key] = ssm.boolean(key, fallback) ? 1.0 : 0.0; };
  size("d_state", 128), size("d_conv", 4), size("expand", 2), size("headdim", 64), size("ngroups", 1), size("chunk_size", 256);
  flag("D_has_hdim", false), flag("rmsnorm", true), flag("norm_before_gate", false), flag("bias", false), flag("conv_bias", true);
  c.options["dt_min"] = ssm.number("dt_min", 0.001);
  c.options["dt_max"] = ssm.number("dt_max", 0.1);
  c.options["dt_init_floor"] = ssm.number("dt_init_floor", 1e-4);
  c.options["conv_init"] = ssm.number("conv_init", 0);
  c.options["norm_per_group"] = 1;
  read_limits(ssm, "dt_limit", c);
  read_A_range(ssm, c);
  ssm.refuse_unknown();
  return c;
}

std::string state_spaces_obstacle(const ModelConfig& c) {
  if (!c.flag("norm_per_group") && c.count("ngroups") > 1) return "state-spaces takes the gated norm per group, not over all of d_inner";
  return state_spaces_skeleton_obstacle(c);
}

Json state_spaces_write(const ModelConfig& c) {
  Json ssm{{"layer", "Mamba2"},
           {"d_state", c.count("d_state")},
           {"d_conv", c.count("d_conv")},
           {"expand", c.count("expand")},
           {"headdim", c.count("headdim")},
           {"ngroups", c.count("ngroups")},
           {"chunk_size", c.count("chunk_size")},
           {"A_init_range", {c.option("A_init_min"), c.option("A_init_max")}},
           {"D_has_hdim", c.flag("D_has_hdim")},
           {"rmsnorm", c.flag("rmsnorm")},
           {"norm_before_gate", c.flag("norm_before_gate")},
           {"dt_min", c.option("dt_min")},
           {"dt_max", c.option("dt_max")},
           {"dt_init_floor", c.option("dt_init_floor")},
           {"bias", c.flag("bias")},
           {"conv_bias", c.flag("conv_bias")}};
  if (c.option("conv_init") > 0) ssm["conv_init"] = c.option("conv_init");
  write_limits(ssm, "dt_limit", c);
  return {{"d_model", c.d_model},
          {"d_intermediate", 0},
          {"n_layer", c.n_layer},
          {"vocab_size", c.vocab_size},
          {"ssm_cfg", ssm},
          {"attn_layer_idx", Json::array()},
          {"attn_cfg", Json::object()},
          {"rms_norm", true},
          {"residual_in_fp32", true},
          {"fused_add_norm", true},
          {"pad_vocab_size_multiple", c.pad_vocab_size_multiple},
          {"tie_embeddings", c.tie_embeddings}};
}

using Weights = CheckpointLayout::Weights;
constexpr CheckpointLayout kTable[] = {
    {"hf", Weights::safetensors, false, true, transformers_matches, transformers_read, transformers_obstacle, transformers_write, own_name,
     nullptr},
    {"state-spaces", Weights::torch, true, false, state_spaces_matches, state_spaces_read, state_spaces_obstacle, state_spaces_write,
     state_spaces_name, nullptr},
};

}  // namespace

const std::span<const CheckpointLayout> kLayouts = kTable;

}  // namespace longhand::models::mamba2
