// See checkpoint.h.
#include "models/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/safetensors.h"
#include "models/config_json.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
constexpr std::size_t kProblemsShown = 8;
constexpr int64_t kBlock = int64_t{1} << 22;  // elements that are checked, converted and let go of at a time

struct FoundConfig {
  ModelConfig config;
  const CheckpointLayout* layout;
  SpecialTokens special_tokens;
};
constexpr const char *kBeginToken = "bos_token_id", *kEndToken = "eos_token_id", *kFillToken = "pad_token_id";

FoundConfig find_config(const std::string& folder) {
  const std::string file = folder + "/config.json";
  const auto json = parse_python_json(read_text_file(file, 16 << 20), file);
  for (const ModelFamily* family : model_families()) {
    for (const CheckpointLayout& layout : family->layouts) {
      if (!layout.matches(json)) continue;
      ModelConfig config = layout.read(json, file);
      config.complete();
      SpecialTokens tokens;
      for (const char* key : {kBeginToken, kEndToken, kFillToken})
        if (json.contains(key) && json[key].is_number_integer()) tokens[key] = ConfigReader(json, file).integer(key, 0);
      return {std::move(config), &layout, std::move(tokens)};
    }
  }
  auto shown = [&](const char* key) { return json.contains(key) ? json[key].dump() : "(absent)"; };
  throw ConfigError("model: config.json describes no model that longhand knows",
                    {{"file", file}, {"model_type", shown("model_type")}, {"ssm_cfg", shown("ssm_cfg")}});
}

// Calls f(begin, end) for every block of `n` elements.
template <class F>
void for_each_block(int64_t n, F&& f) {
  for (int64_t begin = 0; begin < n; begin += kBlock) f(begin, std::min(n, begin + kBlock));
}

Tensor flat(const Tensor& tensor) {
  return tensor.contiguous().reshape({tensor.numel()});
}

// a, b  of `stored`
bool same_values(const NamedTensors& stored, const Tensor& a, const Tensor& b) {
  if (!(a.shape() == b.shape())) return false;
  if (a.raw() == b.raw() && a.dtype() == b.dtype()) return true;
  const Tensor left = flat(a), right = flat(b);
  bool same = true;
  for_each_block(a.numel(), [&](int64_t begin, int64_t end) {
    if (!same) return;
    const Tensor x = left.slice(0, begin, end), y = right.slice(0, begin, end);
    const bool same_bytes =
        x.dtype() == y.dtype() && std::memcmp(x.raw(), y.raw(), static_cast<std::size_t>(x.numel() * size_of(x.dtype()))) == 0;
    same = same_bytes || x.to_vector<double>() == y.to_vector<double>();
    stored.release_pages(x);
    stored.release_pages(y);
  });
  return same;
}

// The problems of a folder, collected: a wrong configuration shows in many tensors, and the list says which mistake it is.
class Problems {
 public:
  void add(const char* kind, std::string what) {
    if (rows_.size() < kProblemsShown) rows_.push_back({kind, std::move(what)});
    ++count_;
  }
  void throw_if_any(const std::string& file) const {
    if (count_ == 0) return;
    std::vector<ErrorRow> rows{{"file", file}};
    rows.insert(rows.end(), rows_.begin(), rows_.end());
    if (count_ > rows_.size()) rows.push_back({"and", std::to_string(count_ - rows_.size()) + " more"});
    throw FileError("model: the weights are not those of the configuration", std::move(rows));
  }

 private:
  std::vector<ErrorRow> rows_;
  std::size_t count_ = 0;
};

void require_tensors(const StoredModel& model) {
  const auto& stored = model.weights.stored.tensors;
  const LanguageModel plan = LanguageModel::plan(model.config);
  Problems problems;
  std::set<std::string> used;
  for (const Parameter& p : plan.parameters().all()) {
    const std::string name = model.layout->tensor_name(p.name);
    used.insert(name);
    const auto found = stored.find(name);
    if (found == stored.end()) problems.add("missing", name + " " + p.shape.str());
    else if (!(found->second.shape() == p.shape))
      problems.add("shape", name + " " + found->second.shape().str() + ", expected " + p.shape.str());
    else if (!is_floating(found->second.dtype()))
      problems.add("type", name + " " + name_of(found->second.dtype()) + ", expected a floating type");
  }
  const ModelFamily& family = model_family(model.config.family);
  const std::string head = model.layout->tensor_name(family.head_name), embedding = model.layout->tensor_name(family.embedding_name);
  if (const auto second = stored.find(head); model.config.tie_embeddings && second != stored.end()) {
    used.insert(head);  // a second name for the embedding
    if (const auto first = stored.find(embedding);
        first != stored.end() && !same_values(model.weights.stored, first->second, second->second))
      problems.add("tied", head + " is another tensor than " + embedding + ", but the configuration ties them");
  }
  for (const auto& [name, tensor] : stored)
    if (!used.contains(name)) problems.add("unknown", name + " " + tensor.shape().str());
  problems.throw_if_any(model.weights.stored.path);
}

[[noreturn]] void refuse_non_finite(const StoredModel& model, const std::string& name, int64_t index) {
  throw FileError("model: a weight is NaN or infinite",
                  {{"file", model.weights.stored.path}, {"tensor", name}, {"index", std::to_string(index) + " (row-major)"}});
}

void fill_parameters(LanguageModel& model, const StoredModel& stored) {
  for (Parameter& p : model.parameters().all()) {
    const Tensor from = flat(stored.tensor(p.name)), to = p.master.reshape({p.shape.numel()});
    for_each_block(p.shape.numel(), [&](int64_t begin, int64_t end) {
      const Tensor block = from.slice(0, begin, end);
      if (const int64_t index = first_non_finite(block); index >= 0)
        refuse_non_finite(stored, stored.layout->tensor_name(p.name), begin + index);
      copy(to.slice(0, begin, end), block);
      stored.weights.stored.release_pages(block);
    });
  }
  model.parameters().refresh_compute();
}

// Tensors by longhand's names, written under the layout's.
void write_model(const ModelConfig& config, const std::map<std::string, Tensor>& tensors, const std::string& folder,
                 const SaveOptions& options, const SpecialTokens& tokens, std::function<void(const Tensor&)> on_written) {
  const CheckpointLayout& layout = find_layout(config, options.layout);
  const ModelFamily& family = model_family(config.family);
  const std::string file = weights_file_of(layout);
  for (const std::string& other : weight_file_names())
    if (other != file && fs::exists(folder + "/" + other))
      throw FileError("model: the folder has other weights, which a reader might take for these",
                      {{"folder", folder}, {"found", other}, {"to write", file}, {"try", "an empty folder"}});
  std::map<std::string, Tensor> named;
  for (const auto& [name, tensor] : tensors) named[layout.tensor_name(name)] = tensor;
  if (config.tie_embeddings && layout.lists_tied_head) named[layout.tensor_name(family.head_name)] = tensors.at(family.embedding_name);
  nlohmann::ordered_json json = layout.write(config);
  for (const char* key : {kBeginToken, kEndToken, kFillToken})
    if (layout.names_special_tokens) json[key] = tokens.contains(key) ? nlohmann::ordered_json(tokens.at(key)) : nullptr;
  fs::create_directories(folder);
  const TensorFileOptions write{.stored_as = options.dtype, .on_written = std::move(on_written), .on_zeroed = options.on_zeroed};
  if (layout.weights == CheckpointLayout::Weights::torch) write_torch_file(folder + "/" + file, named, write);
  else write_safetensors(folder + "/" + file, named, {{"format", "pt"}}, write);
  write_file_atomically(folder + "/config.json", python_json_text(json));
}

SpecialTokens special_tokens(const SaveOptions& options) {
  if (!options.end_of_text) return {};
  return {{kBeginToken, *options.end_of_text}, {kEndToken, *options.end_of_text}};
}

bool same_configuration(const ModelConfig& a, const ModelConfig& b) {
  return a.family == b.family && a.d_model == b.d_model && a.n_layer == b.n_layer && a.padded_vocab() == b.padded_vocab() &&
         a.tie_embeddings == b.tie_embeddings && a.norm_eps == b.norm_eps && a.options == b.options;
}

}  // namespace

ModelConfig read_model_config(const std::string& folder) {
  return find_config(folder).config;
}

StoredModel open_model(const std::string& folder, Checksums checksums) {
  FoundConfig found = find_config(folder);
  StoredModel model{folder, std::move(found.config), found.layout, read_weight_files(folder, checksums), std::move(found.special_tokens)};
  if (model.layout->modernize != nullptr) model.layout->modernize(model.weights.stored.tensors, model.config, model.weights.stored.path);
  require_tensors(model);
  return model;
}

std::unique_ptr<LanguageModel> load_model(const std::string& folder, const Device& device, Dtype compute_dtype, Dtype master_dtype) {
  const StoredModel stored = open_model(folder);
  stored.weights.warn();
  auto model = std::make_unique<LanguageModel>(stored.config, device, compute_dtype, master_dtype);
  fill_parameters(*model, stored);
  return model;
}

void load_weights(LanguageModel& model, const std::string& folder) {
  const ModelConfig found = read_model_config(folder);
  if (!same_configuration(found, model.config())) {
    const auto shown = [](const ModelConfig& c) {
      return c.family + ", d_model " + std::to_string(c.d_model) + ", n_layer " + std::to_string(c.n_layer) + ", vocabulary " +
             std::to_string(c.padded_vocab());
    };
    throw ConfigError("model: the folder holds a model of another configuration",
                      {{"folder", folder}, {"found", shown(found)}, {"expected", shown(model.config())}});
  }
  const StoredModel stored = open_model(folder);
  stored.weights.warn();
  fill_parameters(model, stored);
}

void save_model(const LanguageModel& model, const std::string& folder, const SaveOptions& options) {
  std::map<std::string, Tensor> tensors;
  for (const Parameter& p : model.parameters().all()) tensors[p.name] = p.master;
  write_model(model.config(), tensors, folder, options, special_tokens(options), {});
}

void convert_model(const StoredModel& model, const std::string& folder, const SaveOptions& options) {
  find_layout(model.config, options.layout);  // refused before anything is read
  std::map<std::string, Tensor> tensors;
  const LanguageModel plan = LanguageModel::plan(model.config);
  for (const Parameter& p : plan.parameters().all()) {
    const Tensor& tensor = model.tensor(p.name);
    if (const int64_t index = first_non_finite(tensor); index >= 0) refuse_non_finite(model, model.layout->tensor_name(p.name), index);
    model.weights.stored.release_pages(tensor);
    tensors[p.name] = tensor;
  }
  const SpecialTokens tokens = options.end_of_text ? special_tokens(options) : model.special_tokens;
  write_model(model.config, tensors, folder, options, tokens, [&](const Tensor& written) { model.weights.stored.release_pages(written); });
}

const CheckpointLayout& find_layout(const ModelConfig& config, const std::string& wanted) {
  std::vector<ErrorRow> rows{{"family", config.family}};
  if (!wanted.empty()) rows.push_back({"asked", wanted});
  for (const CheckpointLayout& layout : model_family(config.family).layouts) {
    const std::string obstacle = layout.obstacle(config);
    if (obstacle.empty() && (wanted.empty() || wanted == layout.name)) return layout;
    rows.push_back({layout.name, obstacle.empty() ? "can hold it" : obstacle});
  }
  throw ConfigError(
      wanted.empty() ? "model: no library's checkpoint layout can express this configuration" : "model: this layout cannot hold this model",
      std::move(rows));
}

std::string checkpoint_layout(const ModelConfig& config) {
  return find_layout(config).name;
}

std::vector<std::string> layout_names() {
  std::set<std::string> names;
  for (const ModelFamily* family : model_families())
    for (const CheckpointLayout& layout : family->layouts) names.insert(layout.name);
  return {names.begin(), names.end()};
}

const char* weights_file_of(const CheckpointLayout& layout) {
  return layout.weights == CheckpointLayout::Weights::torch ? "pytorch_model.bin" : "model.safetensors";
}

}  // namespace longhand
