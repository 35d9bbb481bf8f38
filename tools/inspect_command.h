// longhand inspect: what a model folder, a tensor file or a recipe holds.
#pragma once
#include <string>
#include <vector>

namespace longhand {

struct InspectOptions {
  std::string target;                  // a model or run folder, a file of tensors, an index, a recipe, or the word "switches"
  std::vector<std::string> overrides;  // "key=value", for a recipe
  bool all_parameters = false;         // one line per tensor instead of one per kind
};

/// Prints to stdout.
/// returns  0
/// errors   ConfigError for overrides of something that is no recipe; those of reading the target
int run_inspect(const InspectOptions& options);

}  // namespace longhand
