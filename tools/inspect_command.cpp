// See inspect_command.h.
#include "tools/inspect_command.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <optional>
#include <regex>

#include "core/error.h"
#include "core/switches.h"
#include "eval/run_folder.h"
#include "models/checkpoint.h"
#include "tools/model_text.h"
#include "train/recipe.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;

std::string option_text(double value) {
  if (std::isinf(value)) return value > 0 ? "unlimited" : "-inf";
  return fmt::format("{}", value);
}

// "backbone.layers.3.mixer.D" -> "backbone.layers.*.mixer.D"
std::string kind_of(const std::string& name) {
  static const std::regex number(R"(\.layers\.\d+\.)");
  return std::regex_replace(name, number, ".layers.*.");
}

// stored  the folder that the model comes from; null: only a configuration
void print_model(const ModelConfig& config, bool all_parameters, const StoredModel* stored = nullptr) {
  const LanguageModel model = LanguageModel::plan(config);
  const ModelConfig& c = model.config();
  fmt::print("configuration\n  {:<28}{}\n", "family", c.family);
  for (const auto& [name, value] :
       {std::pair{"d_model", c.d_model}, {"n_layer", c.n_layer}, {"vocab_size", c.vocab_size}, {"vocab_size padded", c.padded_vocab()}})
    fmt::print("  {:<28}{}\n", name, value);
  fmt::print("  {:<28}{}\n  {:<28}{}\n", "tie_embeddings", c.tie_embeddings, "norm_eps", c.norm_eps);
  for (const ModelOption& row : model_family(c.family).options)
    fmt::print("  {:<28}{:<12}{}\n", row.name, option_text(c.option(row.name)), row.meaning);

  struct Kind {
    std::string name;
    Shape shape;
    int64_t tensors = 0, elements = 0;
    bool decay = true;
    std::map<std::string, Tensor> stored;
  };
  std::vector<Kind> kinds;
  for (const Parameter& p : model.parameters().all()) {
    const std::string name = all_parameters ? p.name : kind_of(p.name);
    Kind* kind = nullptr;
    for (Kind& k : kinds)
      if (k.name == name) kind = &k;
    if (kind == nullptr) kind = &kinds.emplace_back(Kind{name, p.shape, 0, 0, p.options.decay, {}});
    ++kind->tensors;
    if (stored != nullptr) kind->stored[p.name] = stored->tensor(p.name);
    kind->elements += p.shape.numel();
  }
  fmt::print("\nparameters\n  {:<48}{:<20}{:>8}{:>16}  {:<14}{}\n", "name", "shape", "tensors", "elements", "weight decay",
             stored != nullptr ? "stored" : "");
  for (const Kind& k : kinds)
    fmt::print("  {:<48}{:<20}{:>8}{:>16}  {:<14}{}\n", k.name, k.shape.str(), k.tensors, grouped(k.elements), k.decay ? "yes" : "no",
               stored != nullptr ? dtypes_text(k.stored) : "");
  const int64_t embedding = model.parameter_count() - model.non_embedding_parameter_count();
  const int64_t final_norm = c.d_model;
  fmt::print("  {:<76}{:>16}\n", "total", grouped(model.parameter_count()));
  fmt::print("  {:<76}{:>16}\n", "without embedding and head", grouped(model.parameter_count() - embedding));
  fmt::print("  {:<76}{:>16}\n", "per layer", grouped((model.non_embedding_parameter_count() - final_norm) / c.n_layer));

  fmt::print("\ncompute\n  {:<28}{:.4g} GFLOP/token\n  {:<28}{:.4g} GFLOP/token\n", "forward", model.forward_flops_per_token() / 1e9,
             "training", model.training_flops_per_token() / 1e9);
  fmt::print("  {:<28}{} bytes in f32, {} in bf16\n", "weights", grouped(model.parameter_count() * 4),
             grouped(model.parameter_count() * 2));

  fmt::print("\nrecurrent state of one sequence (f32)\n");
  std::map<std::string, std::pair<Shape, int64_t>> states;
  int64_t bytes = 0;
  const RecurrentState state = model.zero_state(1);
  for (const LayerState& layer : state.layers()) {
    for (const auto& [name, variable] : layer) {
      auto& entry = states[name];
      entry.first = variable.shape();
      entry.second += variable.value().numel();
      bytes += variable.value().numel() * 4;
    }
  }
  for (const auto& [name, entry] : states)
    fmt::print("  {:<28}{:<20}{:>24} elements in all layers\n", name, entry.first.str(), grouped(entry.second));
  fmt::print("  {:<28}{} bytes\n", "total", grouped(bytes));
}

void print_weights(const StoredModel& model) {
  const WeightFiles& weights = model.weights;
  fmt::print("\nweights\n  {:<28}{}\n", "layout", model.layout->name);
  for (const std::string& path : weights.paths)
    fmt::print("  {:<28}{} bytes\n", fs::path(path).filename().string(), grouped(static_cast<int64_t>(fs::file_size(path))));
  fmt::print("  {:<28}{}, {}\n", "tensors", weights.stored.tensors.size(), dtypes_text(weights.stored.tensors));
  weights.warn();
  fmt::print("  names and shapes are those of the configuration\n");
}

void print_folder(const std::string& folder, bool all_parameters) {
  fmt::print("model {}\n", folder);
  const ModelConfig config = read_model_config(folder);
  const auto names = weight_file_names();
  if (std::none_of(names.begin(), names.end(), [&](const std::string& name) { return fs::exists(folder + "/" + name); })) {
    print_model(config, all_parameters);
    fmt::print("\nweights\n  none in this folder\n");
    return;
  }
  std::optional<StoredModel> stored;
  try {
    stored = open_model(folder);
  } catch (const Error&) {
    print_model(config, all_parameters);  // what the files should be
    throw;
  }
  print_model(config, all_parameters, &*stored);
  print_weights(*stored);
}

void print_tensors(const std::string& file) {
  const WeightFiles files = read_tensor_file(file);
  const NamedTensors& stored = files.stored;
  files.warn();
  for (const auto& [key, value] : stored.metadata) fmt::print("metadata {}: {}\n", key, value);
  if (files.paths.size() > 1 || files.paths.front() != file)
    for (const std::string& path : files.paths) fmt::print("shard {}\n", path);
  fmt::print("{:<60}{:<8}{}\n", "tensor", "dtype", "shape");
  int64_t elements = 0, bytes = 0;
  std::map<std::pair<const void*, std::string>, std::string> seen;  // by memory and shape
  for (const auto& [name, tensor] : stored.tensors) {
    const bool empty = tensor.numel() == 0;
    const auto [first, fresh] = seen.try_emplace({tensor.raw(), tensor.describe()}, name);
    fmt::print("{:<60}{:<8}{}{}\n", name, name_of(tensor.dtype()), tensor.shape().str(),
               fresh || empty ? "" : "  the same memory as " + first->second);
    if (!fresh) continue;
    elements += tensor.numel();
    bytes += tensor.numel() * size_of(tensor.dtype());
  }
  fmt::print("{} tensors, {} elements, {} bytes\n", stored.tensors.size(), grouped(elements), grouped(bytes));
}

bool is_tensor_file(const std::string& target) {
  for (const char* ending : {".safetensors", ".bin", ".pt", ".pth", ".index.json"})
    if (target.ends_with(ending)) return true;
  return false;
}

void print_switches() {
  for (const SwitchRow& row : switch_table()) fmt::print("{:<23}{:<10}{}\n", row.name, row.values, row.shows);
}

}  // namespace

int run_inspect(const InspectOptions& options) {
  const std::string& target = options.target;
  if (!options.overrides.empty() && !target.ends_with(".toml"))
    throw ConfigError("inspect: only a recipe has keys to set", {{"target", target}, {"expected", "RECIPE.toml"}});
  if (target == "switches") {
    print_switches();
  } else if (is_tensor_file(target)) {
    print_tensors(target);
  } else if (target.ends_with(".toml")) {
    print_model(recipe_model_config(target, options.overrides), options.all_parameters);
  } else {
    print_folder(find_model(target).model_folder, options.all_parameters);
  }
  return 0;
}

}  // namespace longhand
