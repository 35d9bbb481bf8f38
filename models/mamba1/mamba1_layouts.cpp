// Keys and names of Mamba-1 checkpoints. Facts: huggingface/transformers models/mamba, state-spaces/mamba models/config_mamba.py,
// fla-org/flash-linear-attention fla/models/mamba.
#include "models/mamba1/mamba1_layouts.h"

#include "models/layout_keys.h"

namespace longhand::models::mamba1 {
namespace {

using Json = nlohmann::ordered_json;

// dt_rank and dt_init have words for values in both libraries, under different keys.
void read_dt_rank(ConfigReader& reader, const char* key, ModelConfig& c) {
  const Json rank = reader.value(key);
  if (rank.is_null() || rank == "auto") {
    c.options["dt_rank"] = 0;
  } else {
    if (!rank.is_number_integer() || reader.integer(key, 0) < 1) reader.refuse(key, "\"auto\" or a whole number above 0");
    c.options["dt_rank"] = rank.get<double>();
  }
}

void read_dt_init(ConfigReader& reader, const char* key, ModelConfig& c) {
  const std::string how = reader.text(key, "random");
  if (how != "random" && how != "constant") reader.refuse(key, "random or constant");
  c.options["dt_init_constant"] = how == "constant" ? 1 : 0;
}

const char* dt_init_text(const ModelConfig& c) {
  return c.flag("dt_init_constant") ? "constant" : "random";
}

// --- transformers, and FLA's class of the same model_type -----------------------------------------------------

// Options that transformers has no key for.
constexpr auto kOwnOptions = {"A_init_scale"};

bool transformers_matches(const Json& json) {
  return is_text(json, "model_type", "mamba");
}

// Keys that are not read here are leftovers of conversions or say how to run: they may contradict what is read.
ModelConfig transformers_read(const Json& json, const std::string& file) {
  ConfigReader reader(json, file);
  ModelConfig c;
  c.family = "mamba1";
  c.d_model = reader.integer("hidden_size", 768);
  c.n_layer = reader.integer("num_hidden_layers", 32);
  c.tie_embeddings = reader.boolean("tie_word_embeddings", true);
  c.norm_eps = number_of_either(reader, "layer_norm_epsilon", "norm_eps", 1e-5);
  int64_t expand = reader.integer("expand", 2);
  if (reader.has("intermediate_size")) {  // comes before expand
    const int64_t d_inner = reader.integer("intermediate_size", 0);
    if (c.d_model < 1 || d_inner < 1 || d_inner % c.d_model != 0) reader.refuse("intermediate_size", "a multiple of hidden_size");
    expand = d_inner / c.d_model;
  }
  c.options = {{"d_state", static_cast<double>(reader.integer("state_size", 16))},
               {"d_conv", static_cast<double>(reader.integer("conv_kernel", 4))},
               {"expand", static_cast<double>(expand)},
               {"bias", reader.boolean("use_bias", true) ? 1.0 : 0.0},
               {"conv_bias", reader.boolean("use_conv_bias", true) ? 1.0 : 0.0},
               {"dt_scale", reader.number("time_step_scale", 1)},
               {"dt_min", reader.number("time_step_min", 0.001)},
               {"dt_max", reader.number("time_step_max", 0.1)},
               {"dt_init_floor", reader.number("time_step_floor", 1e-4)}};
  read_dt_rank(reader, "time_step_rank", c);
  read_dt_init(reader, "time_step_init_scheme", c);
  require_silu(reader, "silu");
  read_padded_vocab(reader, file, 50280, c, kOwnOptions);
  return c;
}

std::string transformers_obstacle(const ModelConfig&) {
  return "";  // every option has a key, or one of ours
}

Json transformers_write(const ModelConfig& c) {
  return {{"architectures", {"MambaForCausalLM"}},
          {"model_type", "mamba"},
          {"hidden_size", c.d_model},
          {"num_hidden_layers", c.n_layer},
          {"vocab_size", c.padded_vocab()},
          {"state_size", c.count("d_state")},
          {"expand", c.count("expand")},
          {"intermediate_size", c.count("expand") * c.d_model},
          {"conv_kernel", c.count("d_conv")},
          {"time_step_rank", c.count("dt_rank")},
          {"use_bias", c.flag("bias")},
          {"use_conv_bias", c.flag("conv_bias")},
          {"hidden_act", "silu"},
          {"residual_in_fp32", true},
          {"layer_norm_epsilon", c.norm_eps},
          {"tie_word_embeddings", c.tie_embeddings},
          {"time_step_init_scheme", dt_init_text(c)},
          {"time_step_scale", c.option("dt_scale")},
          {"time_step_min", c.option("dt_min")},
          {"time_step_max", c.option("dt_max")},
          {"time_step_floor", c.option("dt_init_floor")},
          {"longhand", own_keys(c, kOwnOptions)}};
}

// --- state-spaces ---------------------------------------------------------------------------------------------

// ssm_cfg; absent means {}.
Json block_of(const Json& json) {
  const auto block = json.find("ssm_cfg");
  return block == json.end() || block->is_null() ? Json::object() : *block;
}

// Mamba-1 is what a file without ssm_cfg.layer means. Converted files of transformers may hold these keys too, as leftovers.
bool state_spaces_matches(const Json& json) {
  if (!json.contains("d_model") || json.contains("model_type")) return false;
  const Json block = block_of(json);
  return block.is_object() && (!block.contains("layer") || is_text(block, "layer", "Mamba1"));
}

ModelConfig state_spaces_read(const Json& json, const std::string& file) {
  ModelConfig c;
  c.family = "mamba1";
  read_state_spaces_skeleton(json, file, c);
  const Json block = block_of(json);
  ConfigReader ssm(block, file + " (ssm_cfg)");
  ssm.ignore("layer");
  ssm.ignore("use_fast_path");
  c.options = {{"d_state", static_cast<double>(ssm.integer("d_state", 16))},
               {"d_conv", static_cast<double>(ssm.integer("d_conv", 4))},
               {"expand", static_cast<double>(ssm.integer("expand", 2))},
               {"bias", ssm.boolean("bias", false) ? 1.0 : 0.0},
               {"conv_bias", ssm.boolean("conv_bias", true) ? 1.0 : 0.0},
               {"dt_scale", ssm.number("dt_scale", 1)},
               {"dt_min", ssm.number("dt_min", 0.001)},
               {"dt_max", ssm.number("dt_max", 0.1)},
               {"dt_init_floor", ssm.number("dt_init_floor", 1e-4)}};
  read_dt_rank(ssm, "dt_rank", c);
  read_dt_init(ssm, "dt_init", c);
  ssm.refuse_unknown();
  return c;
}

// The eight keys of the published files, which every version of the library takes; others only where they say something else than the
// default.
Json state_spaces_write(const ModelConfig& c) {
  ModelConfig plain = c;
  plain.options.clear();
  plain.complete();
  const Json all{{"d_state", c.count("d_state")}, {"d_conv", c.count("d_conv")},         {"expand", c.count("expand")},
                 {"dt_rank", c.count("dt_rank")}, {"dt_init_constant", dt_init_text(c)}, {"dt_scale", c.option("dt_scale")},
                 {"dt_min", c.option("dt_min")},  {"dt_max", c.option("dt_max")},        {"dt_init_floor", c.option("dt_init_floor")},
                 {"bias", c.flag("bias")},        {"conv_bias", c.flag("conv_bias")}};
  Json ssm = Json::object();
  for (const auto& [option, value] : all.items())
    if (c.option(option) != plain.option(option)) ssm[option == "dt_init_constant" ? "dt_init" : option] = value;
  Json json{{"d_model", c.d_model},       {"n_layer", c.n_layer},
            {"vocab_size", c.vocab_size}, {"ssm_cfg", ssm},
            {"rms_norm", true},           {"residual_in_fp32", true},
            {"fused_add_norm", true},     {"pad_vocab_size_multiple", c.pad_vocab_size_multiple}};
  if (!c.tie_embeddings) json["tie_embeddings"] = false;
  return json;
}

using Weights = CheckpointLayout::Weights;
constexpr CheckpointLayout kTable[] = {
    {"hf", Weights::safetensors, false, true, transformers_matches, transformers_read, transformers_obstacle, transformers_write, own_name,
     nullptr},
    {"state-spaces", Weights::torch, true, false, state_spaces_matches, state_spaces_read, state_spaces_skeleton_obstacle,
     state_spaces_write, state_spaces_name, nullptr},
};

}  // namespace

const std::span<const CheckpointLayout> kLayouts = kTable;

}  // namespace longhand::models::mamba1
