// longhand convert: a model folder in the layout of another library.
#pragma once
#include <string>

namespace CLI {
class App;
}

namespace longhand {

struct ConvertCommand {
  std::string model;   // a model folder, a checkpoint, or a run
  std::string layout;  // "hf", "state-spaces", "fla"
  std::string out;
  std::string dtype = "keep";  // or f32, f16, bf16
  bool skip_checksums = false;
};
void add_convert_options(CLI::App& command, ConvertCommand& options);

/// Writes the model in another layout, every tensor bit for bit unless a dtype is asked for; copies tokenizer files. `out` appears whole or
/// not at all. Files that were not read, and values that the dtype turned into 0, are told on stderr.
/// returns  0
/// errors   FileError when `out` exists and is not empty; ConfigError when the layout cannot hold the model; those of open_model()
int run_convert(const ConvertCommand& options);

}  // namespace longhand
