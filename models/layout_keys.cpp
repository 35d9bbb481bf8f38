// See layout_keys.h.
#include "models/layout_keys.h"

#include "models/mamba_backbone.h"

namespace longhand {

using Json = nlohmann::ordered_json;

bool is_text(const Json& json, const char* key, const char* text) {
  const auto found = json.find(key);
  return found != json.end() && *found == text;
}

void require_silu(ConfigReader& reader, const char* fallback) {
  const std::string activation = reader.text("hidden_act", fallback);
  if (activation != "silu" && activation != "swish") reader.refuse("hidden_act", "silu or swish");
}

double number_of_either(ConfigReader& reader, const char* key, const char* flas_key, double fallback) {
  const double flas = reader.number(flas_key, fallback), value = reader.number(key, flas);
  if (reader.has(flas_key) && flas != value) reader.refuse(flas_key, std::string("what ") + key + " says");
  return value;
}

void read_padded_vocab(ConfigReader& reader, const std::string& file, int64_t fallback, ModelConfig& c,
                       std::initializer_list<const char*> options) {
  const int64_t rows = reader.integer("vocab_size", fallback);
  c.vocab_size = rows;
  c.pad_vocab_size_multiple = 1;
  const Json own = reader.value("longhand");
  if (!own.is_object()) return;
  ConfigReader extra(own, file);
  c.vocab_size = extra.integer("vocab_size", rows);
  c.pad_vocab_size_multiple = extra.integer("pad_vocab_size_multiple", 1);
  if (c.pad_vocab_size_multiple < 1 || c.padded_vocab() != rows) reader.refuse("vocab_size", "the padded size of longhand.vocab_size");
  for (const char* name : options)
    if (extra.has(name)) c.options[name] = extra.number(name, 0);
}

Json own_keys(const ModelConfig& c, std::initializer_list<const char*> options) {
  Json own{{"vocab_size", c.vocab_size}, {"pad_vocab_size_multiple", c.pad_vocab_size_multiple}};
  for (const char* name : options) own[name] = json_from_number(c.option(name));
  return own;
}

std::string own_name(const std::string& parameter) {
  return parameter;
}

void read_state_spaces_skeleton(const Json& json, const std::string& file, ModelConfig& c) {
  ConfigReader reader(json, file);
  c.d_model = reader.integer("d_model", 2560);
  c.n_layer = reader.integer("n_layer", 64);
  c.vocab_size = reader.integer("vocab_size", 50277);
  c.pad_vocab_size_multiple = reader.integer("pad_vocab_size_multiple", 8);
  c.tie_embeddings = reader.boolean("tie_embeddings", true);
  c.norm_eps = 1e-5;  // no key says it
  reader.require("d_intermediate", 0);
  reader.require("attn_layer_idx", Json::array());
  reader.require("rms_norm", true);
  reader.ignore("residual_in_fp32");  // longhand's residual is always f32
  reader.ignore("fused_add_norm");    // no effect on the result
  reader.ignore("attn_cfg");
  reader.ignore("ssm_cfg");  // the family's part
  reader.refuse_unknown();
}

std::string state_spaces_name(const std::string& parameter) {
  return parameter == kMambaEmbedding ? "backbone.embedding.weight" : parameter;
}

std::string state_spaces_skeleton_obstacle(const ModelConfig& c) {
  return c.norm_eps == 1e-5 ? "" : "state-spaces has no key for norm_eps, which is always 1e-5";
}

}  // namespace longhand
