// See model_config.h.
#include "models/model_config.h"

#include <cmath>

#include "core/error.h"
#include "core/nearest.h"
#include "models/model_family.h"

namespace longhand {

double ModelConfig::option(const std::string& name) const {
  const auto found = options.find(name);
  if (found == options.end()) throw ConfigError("model: the family has no such option", {{"family", family}, {"option", name}});
  return found->second;
}

void ModelConfig::complete() {
  const ModelFamily& known = model_family(family);
  std::vector<std::string> names;
  for (const ModelOption& row : known.options) names.emplace_back(row.name);
  for (const auto& [name, value] : options) {
    bool found = false;
    for (const auto& candidate : names) found = found || candidate == name;
    if (!found) throw ConfigError("model: unknown option", {{"family", family}, {"option", name}, {"nearest", nearest_name(name, names)}});
  }
  for (const ModelOption& row : known.options) options.emplace(row.name, row.default_value);
  auto require = [&](bool holds, const char* what, int64_t value) {
    if (!holds) throw ConfigError(std::string("model: ") + what, {{"family", family}, {"given", std::to_string(value)}});
  };
  require(d_model > 0 && d_model <= 1 << 20, "d_model must be between 1 and 2^20", d_model);
  require(n_layer > 0 && n_layer <= 10'000, "n_layer must be between 1 and 10000", n_layer);
  require(vocab_size > 0 && vocab_size <= 1 << 24, "vocab_size must be between 1 and 2^24", vocab_size);
  require(pad_vocab_size_multiple > 0 && pad_vocab_size_multiple <= 1 << 16, "pad_vocab_size_multiple must be between 1 and 65536",
          pad_vocab_size_multiple);
  if (!(norm_eps > 0 && norm_eps < 1))
    throw ConfigError("model: norm_eps must be between 0 and 1", {{"family", family}, {"given", std::to_string(norm_eps)}});
  known.settle(*this);
}

ModelConfig default_config(const std::string& family) {
  ModelConfig config;
  config.family = family;
  model_family(family).defaults(config);
  return config;
}

void require_option(const ModelConfig& config, bool holds, const char* rule, const char* name) {
  if (!holds) throw ConfigError(config.family + ": " + rule, {{"option", name}, {"given", std::to_string(config.option(name))}});
}

void require_sizes(const ModelConfig& config, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    const double value = config.option(name);
    require_option(config, value >= 1 && value <= 65536 && value == std::floor(value), "a size must be a whole number between 1 and 65536",
                   name);
  }
}

void require_choices(const ModelConfig& config, std::initializer_list<const char*> names) {
  for (const char* name : names) require_option(config, config.option(name) == 0 || config.option(name) == 1, "a choice is 0 or 1", name);
}

}  // namespace longhand
