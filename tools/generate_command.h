// `longhand generate --model DIR --prompt TEXT`: continue texts.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "eval/sampling.h"

namespace CLI {
class App;
}

namespace longhand {

struct GenerateCommand {
  std::string model;  // a model folder, a checkpoint or a run folder (its latest checkpoint)
  std::vector<std::string> prompts;
  std::string prompt_file;    // one prompt: the whole file; "-": stdin
  std::string prompts_file;   // a prompt a line, {"prompt": ...} or {"text": ...}; "-": stdin
  std::string tokenizer;      // "": the one that the run records, or tokenizer.json beside the model
  bool parse_special = true;  // <|endoftext|> in a prompt is its id
  int64_t max_tokens = 128;
  SamplingOptions sampling;
  std::vector<std::string> stop;
  std::string load_state, save_state;
  int64_t chunk = 2048, batch = 16;
  std::string device = "auto", dtype = "auto";
  bool json = false;  // one object a row instead of the text
  bool echo = false;  // the prompt before its continuation
};

/// Declares the options of `longhand generate` on its subcommand.
void add_generate_options(CLI::App& command, GenerateCommand& options);

/// One prompt: its continuation on stdout, token by token; several: each when it is whole, in order, with a newline after it. Speed on
/// stderr.
/// returns  0, or 128 + the signal that ended it; the state is saved then too
/// errors   ConfigError when there is no prompt and no state, or the tokenizer is unknown or another than the run's; FileError, when stdout
///          takes no more or its reader goes away too: the state is saved first; those of generate()
int run_generate(const GenerateCommand& options);

}  // namespace longhand
