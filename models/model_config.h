// ModelConfig: what defines a model's shape, for every family. Options that only one family has are numbers by name, listed in the family's
// table with their defaults, so that recipes, config files and `inspect` share one list.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <map>
#include <span>
#include <string>

namespace longhand {

/// One option of a model family; booleans are 0 and 1.
struct ModelOption {
  const char* name;
  double default_value;
  const char* meaning;
};

struct ModelConfig {
  std::string family = "mamba2";
  int64_t d_model = 768;
  int64_t n_layer = 24;
  int64_t vocab_size = 50277;            // tokens that exist
  int64_t pad_vocab_size_multiple = 16;  // rows of the embedding are rounded up to this
  bool tie_embeddings = true;
  double norm_eps = 1e-5;
  std::map<std::string, double> options;  // every option of the family, defaults filled in by complete()

  int64_t padded_vocab() const { return (vocab_size + pad_vocab_size_multiple - 1) / pad_vocab_size_multiple * pad_vocab_size_multiple; }
  double option(const std::string& name) const;  // ConfigError for a name the family does not have
  int64_t count(const std::string& name) const { return static_cast<int64_t>(option(name)); }
  bool flag(const std::string& name) const { return option(name) != 0; }

  /// Fills in defaults and derived values, and checks every value.
  /// errors  ConfigError naming the option, its value and what it may be; an unknown option with the nearest known one
  void complete();
};

/// The configuration of a family where nothing else is said; the sizes are still those of ModelConfig.
/// errors  ConfigError naming the known families
ModelConfig default_config(const std::string& family);

// What families check their options with. errors  ConfigError "<family>: <rule>" naming option and value

void require_option(const ModelConfig& config, bool holds, const char* rule, const char* name);
/// Whole numbers from 1 to 65536.
void require_sizes(const ModelConfig& config, std::initializer_list<const char*> names);
/// 0 or 1.
void require_choices(const ModelConfig& config, std::initializer_list<const char*> names);

}  // namespace longhand
