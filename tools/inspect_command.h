// longhand inspect: what a model folder, a tensor file or a recipe holds.
#pragma once
#include <string>

namespace longhand {

struct InspectOptions {
  std::string target;           // a model or run folder, a .safetensors file, a recipe, or the word "switches"
  bool all_parameters = false;  // one line per tensor instead of one per kind
};

/// Prints to stdout; returns the exit code.
int run_inspect(const InspectOptions& options);

}  // namespace longhand
