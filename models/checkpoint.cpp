// See checkpoint.h.
#include "models/checkpoint.h"

#include <filesystem>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/safetensors.h"
#include "models/config_json.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;

struct FoundConfig {
  ModelConfig config;
  const CheckpointLayout* layout;
};

FoundConfig find_config(const std::string& folder) {
  const std::string file = folder + "/config.json";
  const auto json = parse_python_json(read_text_file(file, 16 << 20), file);
  for (const ModelFamily* family : model_families()) {
    for (const CheckpointLayout& layout : family->layouts) {
      if (!layout.matches(json)) continue;
      ModelConfig config = layout.read(json, file);
      config.complete();
      return {std::move(config), &layout};
    }
  }
  throw ConfigError("model: config.json describes no model that longhand knows",
                    {{"file", file}, {"model_type", json.contains("model_type") ? json["model_type"].dump() : "(absent)"}});
}

// Puts the tensors of a folder into the model's masters.
void fill_parameters(LanguageModel& model, const std::string& folder, const CheckpointLayout& layout) {
  const std::string file = folder + "/model.safetensors";
  if (!fs::exists(file))
    throw FileError("model: no weights that longhand can read", {{"folder", folder}, {"expected", "model.safetensors"}});
  const NamedTensors stored = read_safetensors(file);
  std::set<std::string> used;
  for (Parameter& p : model.parameters().all()) {
    const std::string name = layout.tensor_name(p.name);
    const Tensor& tensor = stored.at(name);
    used.insert(name);
    if (!(tensor.shape() == p.shape))
      throw FileError("model: a tensor has another shape than the configuration says",
                      {{"file", file}, {"tensor", name}, {"found", tensor.shape().str()}, {"expected", p.shape.str()}});
    if (!is_floating(tensor.dtype())) throw FileError("model: a weight is not floating point", {{"file", file}, {"tensor", name}, {"found", tensor.describe()}});
    if (const int64_t index = first_non_finite(tensor); index >= 0)
      throw FileError("model: a weight is NaN or infinite", {{"file", file}, {"tensor", name}, {"index", std::to_string(index)}});
    copy(p.master, tensor.to(p.master.dtype()));
  }
  if (const std::string head = "lm_head.weight"; model.config().tie_embeddings && stored.contains(head)) {  // a second name for the embedding
    used.insert(head);
    const Parameter* embedding = &model.parameters().all().front();
    if (stored.at(head).to(Dtype::f32).to_vector<float>() != embedding->master.to(Dtype::f32).to_vector<float>())
      throw FileError("model: the head is tied to the embedding, but the file has two different tensors", {{"file", file}, {"tensor", head}});
  }
  for (const auto& [name, tensor] : stored.tensors)
    if (!used.contains(name)) throw FileError("model: a tensor that the configuration does not expect", {{"file", file}, {"tensor", name}});
  model.parameters().refresh_compute();
}

bool same_shape(const ModelConfig& a, const ModelConfig& b) {
  return a.family == b.family && a.d_model == b.d_model && a.n_layer == b.n_layer && a.padded_vocab() == b.padded_vocab() && a.tie_embeddings == b.tie_embeddings;
}

}  // namespace

ModelConfig read_model_config(const std::string& folder) { return find_config(folder).config; }

std::unique_ptr<LanguageModel> load_model(const std::string& folder, const Device& device, Dtype compute_dtype, Dtype master_dtype) {
  const FoundConfig found = find_config(folder);
  auto model = std::make_unique<LanguageModel>(found.config, device, compute_dtype, master_dtype);
  fill_parameters(*model, folder, *found.layout);
  return model;
}

void load_weights(LanguageModel& model, const std::string& folder) {
  const FoundConfig found = find_config(folder);
  if (!same_shape(found.config, model.config()))
    throw ConfigError("model: the folder holds a model of another shape",
                      {{"folder", folder},
                       {"found", found.config.family + ", d_model " + std::to_string(found.config.d_model) + ", n_layer " + std::to_string(found.config.n_layer) +
                                     ", vocabulary " + std::to_string(found.config.padded_vocab())},
                       {"expected", model.config().family + ", d_model " + std::to_string(model.config().d_model) + ", n_layer " +
                                        std::to_string(model.config().n_layer) + ", vocabulary " + std::to_string(model.config().padded_vocab())}});
  fill_parameters(model, folder, *found.layout);
}

void save_model(const LanguageModel& model, const std::string& folder) {
  const ModelConfig& config = model.config();
  for (const CheckpointLayout& layout : model_family(config.family).layouts) {
    if (!layout.expresses(config)) continue;
    fs::create_directories(folder);
    std::map<std::string, Tensor> tensors;
    for (const Parameter& p : model.parameters().all()) tensors[layout.tensor_name(p.name)] = p.master;
    write_safetensors(folder + "/model.safetensors", tensors, {{"format", "pt"}});
    write_file_atomically(folder + "/config.json", layout.write(config).dump(2) + "\n");
    return;
  }
  throw ConfigError("model: no library's layout can express this model", {{"family", config.family}});
}

}  // namespace longhand
