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
  auto shown = [&](const char* key) { return json.contains(key) ? json[key].dump() : "(absent)"; };
  throw ConfigError("model: config.json describes no model that longhand knows",
                    {{"file", file}, {"model_type", shown("model_type")}, {"ssm_cfg", shown("ssm_cfg")}});
}

// Puts the tensors of a folder into the model's masters.
void fill_parameters(LanguageModel& model, const std::string& folder, const CheckpointLayout& layout) {
  const std::string file = folder + "/model.safetensors";
  if (!fs::exists(file)) {
    std::string others;
    for (const char* name : {"pytorch_model.bin", "model.safetensors.index.json"})
      if (fs::exists(folder + "/" + name)) others += (others.empty() ? "" : ", ") + std::string(name);
    throw FileError("model: no weights that longhand can read", {{"folder", folder},
                                                                 {"expected", "model.safetensors"},
                                                                 {"found", others.empty() ? "no weights" : others},
                                                                 {"try", "one safetensors file with the weights under the same names"}});
  }
  const NamedTensors stored = read_safetensors(file);
  std::set<std::string> used;
  for (Parameter& p : model.parameters().all()) {
    const std::string name = layout.tensor_name(p.name);
    const Tensor& tensor = stored.at(name);
    used.insert(name);
    if (!(tensor.shape() == p.shape))
      throw FileError("model: a tensor has another shape than the configuration says",
                      {{"file", file}, {"tensor", name}, {"found", tensor.shape().str()}, {"expected", p.shape.str()}});
    if (!is_floating(tensor.dtype()))
      throw FileError("model: a weight is not floating point", {{"file", file}, {"tensor", name}, {"found", tensor.describe()}});
    if (const int64_t index = first_non_finite(tensor); index >= 0)
      throw FileError("model: a weight is NaN or infinite", {{"file", file}, {"tensor", name}, {"index", std::to_string(index)}});
    copy(p.master, tensor.to(p.master.dtype()));
  }
  const ModelFamily& family = model_family(model.config().family);
  if (const std::string head = layout.tensor_name(family.head_name); model.config().tie_embeddings && stored.contains(head)) {
    used.insert(head);  // a second name for the embedding
    const Tensor& embedding = stored.at(layout.tensor_name(family.embedding_name));
    if (!(stored.at(head).shape() == embedding.shape()) || stored.at(head).to_vector<double>() != embedding.to_vector<double>())
      throw FileError("model: the head is tied to the embedding, but the file has two different tensors",
                      {{"file", file}, {"tensor", head}});
  }
  for (const auto& [name, tensor] : stored.tensors)
    if (!used.contains(name)) throw FileError("model: a tensor that the configuration does not expect", {{"file", file}, {"tensor", name}});
  model.parameters().refresh_compute();
}

const CheckpointLayout& layout_for(const ModelConfig& config) {
  std::vector<ErrorRow> rows{{"family", config.family}};
  for (const CheckpointLayout& layout : model_family(config.family).layouts) {
    const std::string obstacle = layout.obstacle(config);
    if (obstacle.empty()) return layout;
    rows.emplace_back(layout.name, obstacle);
  }
  throw ConfigError("model: no library's checkpoint layout can express this configuration", std::move(rows));
}

bool same_configuration(const ModelConfig& a, const ModelConfig& b) {
  return a.family == b.family && a.d_model == b.d_model && a.n_layer == b.n_layer && a.padded_vocab() == b.padded_vocab() &&
         a.tie_embeddings == b.tie_embeddings && a.norm_eps == b.norm_eps && a.options == b.options;
}

}  // namespace

ModelConfig read_model_config(const std::string& folder) {
  return find_config(folder).config;
}

std::unique_ptr<LanguageModel> load_model(const std::string& folder, const Device& device, Dtype compute_dtype, Dtype master_dtype) {
  const FoundConfig found = find_config(folder);
  auto model = std::make_unique<LanguageModel>(found.config, device, compute_dtype, master_dtype);
  fill_parameters(*model, folder, *found.layout);
  return model;
}

void load_weights(LanguageModel& model, const std::string& folder) {
  const FoundConfig found = find_config(folder);
  if (!same_configuration(found.config, model.config()))
    throw ConfigError(
        "model: the folder holds a model of another configuration",
        {{"folder", folder},
         {"found", found.config.family + ", d_model " + std::to_string(found.config.d_model) + ", n_layer " +
                       std::to_string(found.config.n_layer) + ", vocabulary " + std::to_string(found.config.padded_vocab())},
         {"expected", model.config().family + ", d_model " + std::to_string(model.config().d_model) + ", n_layer " +
                          std::to_string(model.config().n_layer) + ", vocabulary " + std::to_string(model.config().padded_vocab())}});
  fill_parameters(model, folder, *found.layout);
}

void save_model(const LanguageModel& model, const std::string& folder) {
  const ModelConfig& config = model.config();
  const CheckpointLayout& layout = layout_for(config);
  fs::create_directories(folder);
  std::map<std::string, Tensor> tensors;
  for (const Parameter& p : model.parameters().all()) tensors[layout.tensor_name(p.name)] = p.master;
  write_safetensors(folder + "/model.safetensors", tensors, {{"format", "pt"}});
  write_file_atomically(folder + "/config.json", python_json_text(layout.write(config)));
}

std::string checkpoint_layout(const ModelConfig& config) {
  return layout_for(config).name;
}

}  // namespace longhand
