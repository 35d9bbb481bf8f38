// Keys and names of GLA checkpoints. Facts: fla-org/flash-linear-attention fla/models/gla, fla/layers/gla.py, fla/modules/mlp.py.
#include "models/gla/gla_layouts.h"

#include <cmath>

#include "core/error.h"
#include "models/layout_keys.h"

namespace longhand::models::gla {
namespace {

using Json = nlohmann::ordered_json;

// Say how to run, store or name things, or belong to the tokenizer; the function of the model does not depend on them.
constexpr const char* kHarmless[] = {"_name_or_path",
                                     "architectures",
                                     "auto_map",
                                     "bos_token_id",
                                     "chunk_size_feed_forward",
                                     "dtype",
                                     "eos_token_id",
                                     "id2label",
                                     "is_decoder",
                                     "is_encoder_decoder",
                                     "label2id",
                                     "max_position_embeddings",
                                     "model_type",
                                     "output_attentions",
                                     "output_hidden_states",
                                     "pad_token_id",
                                     "problem_type",
                                     "return_dict",
                                     "torch_dtype",
                                     "transformers_version",
                                     "use_cache",
                                     "use_l2warp"};

// Options that FLA has no key for.
constexpr auto kOwnOptions = {"gate_bias_init"};

bool fla_matches(const Json& json) {
  return is_text(json, "model_type", "gla");
}

ModelConfig fla_read(const Json& json, const std::string& file) {
  ConfigReader reader(json, file);
  ModelConfig c;
  c.family = "gla";
  c.d_model = reader.integer("hidden_size", 2048);
  c.n_layer = reader.integer("num_hidden_layers", 24);
  c.tie_embeddings = reader.boolean("tie_word_embeddings", false);
  c.norm_eps = reader.number("norm_eps", reader.number("rms_norm_eps", 1e-6));  // the second is what older files call it
  const int64_t heads = reader.integer("num_heads", 4);
  const bool short_conv = reader.boolean("use_short_conv", false);
  c.options = {{"num_heads", static_cast<double>(heads)},
               {"expand_k", reader.number("expand_k", 0.5)},
               {"expand_v", reader.number("expand_v", 1)},
               {"use_output_gate", reader.boolean("use_output_gate", true) ? 1.0 : 0.0},
               {"clamp_min", reader.number("clamp_min", -std::numeric_limits<double>::infinity())},
               {"use_short_conv", short_conv ? 1.0 : 0.0},
               {"conv_size", static_cast<double>(reader.integer("conv_size", 4))},
               {"hidden_ratio", reader.number("hidden_ratio", 4)},
               {"intermediate_size", static_cast<double>(reader.integer("intermediate_size", 0))},
               {"initializer_range", reader.number("initializer_range", 0.02)},
               {"gate_low_rank_dim", kPublishedGateRank},
               {"gate_logit_normalizer", kPublishedGateNormalizer}};
  require_silu(reader, "swish");
  const std::string mode = reader.text("attn_mode", "chunk");  // names of kernels for the same function
  if (mode != "chunk" && mode != "fused_chunk" && mode != "fused_recurrent")
    reader.refuse("attn_mode", "chunk, fused_chunk or fused_recurrent");
  reader.require("num_kv_heads", heads);
  reader.require("feature_map", nullptr);
  reader.require("elementwise_affine", true);
  reader.require("use_gk", true);
  reader.require("use_gv", false);
  reader.require("attn", nullptr);
  if (short_conv) reader.require("share_conv_kernel", false);
  else reader.ignore("share_conv_kernel");
  read_padded_vocab(reader, file, 32000, c, kOwnOptions);
  for (const char* key : kHarmless) reader.ignore(key);
  for (const auto& [key, value] : json.items())
    if (key.starts_with("fuse_") || value.is_null()) reader.ignore(key);  // which kernels to take; not set
  reader.refuse_unknown();
  return c;
}

std::string fla_obstacle(const ModelConfig& c) {
  if (c.option("gate_low_rank_dim") != kPublishedGateRank) return "FLA has no key for gate_low_rank_dim, which is always 16";
  if (c.option("gate_logit_normalizer") != kPublishedGateNormalizer) return "FLA has no key for gate_logit_normalizer, which is always 16";
  return "";
}

Json fla_write(const ModelConfig& c) {
  auto number = [&](const char* option) {
    const double value = c.option(option);
    return value == std::floor(value) ? Json(static_cast<int64_t>(value)) : Json(value);
  };
  return {{"architectures", {"GLAForCausalLM"}},
          {"model_type", "gla"},
          {"hidden_size", c.d_model},
          {"num_hidden_layers", c.n_layer},
          {"num_heads", c.count("num_heads")},
          {"num_kv_heads", nullptr},
          {"expand_k", number("expand_k")},
          {"expand_v", number("expand_v")},
          {"hidden_ratio", number("hidden_ratio")},
          {"intermediate_size", c.count("intermediate_size")},
          {"feature_map", nullptr},
          {"attn_mode", "chunk"},
          {"use_short_conv", c.flag("use_short_conv")},
          {"conv_size", c.count("conv_size")},
          {"use_output_gate", c.flag("use_output_gate")},
          {"clamp_min", std::isinf(c.option("clamp_min")) ? Json() : Json(c.option("clamp_min"))},
          {"hidden_act", "swish"},
          {"elementwise_affine", true},
          {"norm_eps", c.norm_eps},
          {"use_gk", true},
          {"use_gv", false},
          {"attn", nullptr},
          {"fuse_norm", true},
          {"tie_word_embeddings", c.tie_embeddings},
          {"initializer_range", c.option("initializer_range")},
          {"vocab_size", c.padded_vocab()},
          {"longhand", own_keys(c, kOwnOptions)}};
}

// Files written with fuse_norm false call the head norm g_norm; files from before February 2025 hold gate_proj and up_proj as one matrix.
void fla_modernize(std::map<std::string, Tensor>& tensors, const ModelConfig& c, const std::string& file) {
  const int64_t width = c.count("intermediate_size");
  for (int64_t layer = 0; layer < c.n_layer; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const std::string norm = prefix + "attn.g_norm.weight", gated_norm = prefix + "attn.g_norm_swish_gate.weight";
    if (c.flag("use_output_gate") && tensors.contains(norm) && !tensors.contains(gated_norm)) {
      tensors[gated_norm] = tensors.at(norm);
      tensors.erase(norm);
    }
    const std::string gate = prefix + "mlp.gate_proj.weight", up = prefix + "mlp.up_proj.weight";
    if (tensors.contains(gate) && !tensors.contains(up)) {
      const Tensor joined = tensors.at(gate);
      if (!(joined.shape() == Shape{2 * width, c.d_model}))
        throw FileError("gla: without up_proj, gate_proj must hold both matrices",
                        {{"file", file},
                         {"tensor", gate},
                         {"found", joined.shape().str()},
                         {"expected", Shape{2 * width, c.d_model}.str() + ", or " + up}});
      tensors[gate] = joined.slice(0, 0, width);
      tensors[up] = joined.slice(0, width, 2 * width);
    }
  }
}

constexpr CheckpointLayout kTable[] = {
    {"fla", CheckpointLayout::Weights::safetensors, false, true, fla_matches, fla_read, fla_obstacle, fla_write, own_name, fla_modernize},
};

}  // namespace

const std::span<const CheckpointLayout> kLayouts = kTable;

}  // namespace longhand::models::gla
