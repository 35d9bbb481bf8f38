// `longhand logits --model DIR --tokens F.safetensors --out F.safetensors [--gradients]`: a model's numbers, to compare or to study.
#pragma once
#include <string>

namespace CLI {
class App;
}

namespace longhand {

struct LogitsCommand {
  std::string model;            // a model folder, a checkpoint or a run folder (its latest checkpoint)
  std::string tokens;           // safetensors with input_ids [B, T] and perhaps labels [B, T]
  std::string out;              // safetensors to write
  bool gradients = false;       // of the loss by every parameter
  std::string device = "auto";  // cpu, cuda, cuda:N; auto: a GPU where there is one
  std::string dtype = "f32";    // f32, bf16, f64
};

/// Declares the options of `longhand logits` on its subcommand.
void add_logits_options(CLI::App& command, LogitsCommand& options);

/// Writes the tensors of logits_and_loss (models/logits.h) to `out`; a summary on stderr.
/// returns  0
int run_logits(const LogitsCommand& options);

}  // namespace longhand
