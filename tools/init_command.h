// longhand init: a model folder with fresh weights.
#pragma once
#include <optional>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace longhand {

struct InitCommand {
  std::string recipe;
  std::vector<std::string> overrides;  // "key=value"
  std::string out;
  std::string layout;           // empty: the first of the family that can hold the model
  std::string dtype = "f32";    // or f16, bf16
  std::optional<int64_t> seed;  // absent: the recipe's
};
void add_init_options(CLI::App& command, InitCommand& options);

/// The weights with which `longhand train` would begin with this recipe and seed. `out` appears whole or not at all.
/// returns  0
/// errors   ConfigError for a recipe that starts from other weights, or a layout that cannot hold the model; FileError when `out` exists
///          and is not empty
int run_init(const InitCommand& options);

}  // namespace longhand
