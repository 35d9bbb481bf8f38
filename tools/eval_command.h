// `longhand eval ppl --model DIR --data FILE... --context N`: loss and perplexity by position.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace longhand {

struct EvalPplOptions {
  std::string model;                     // a model folder, a checkpoint or a run folder (its latest checkpoint)
  std::vector<std::string> data;         // shards, token caches, folders of them
  int64_t context = 0;                   // positions of each sequence; at least 1
  int64_t chunk = 2048;                  // tokens of a row in one forward
  int64_t batch = 8;                     // rows at once
  int64_t sequences = 0;                 // at most so many; 0: all
  std::string documents = "long-first";  // long-first, min-length, all, packed (see token_sequences.h)
  bool packed = false;                   // the same as documents = "packed"
  std::string tokenizer;                 // "" : the one that the run records (not needed for token caches)
  std::string out;                       // CSV of every position; "-": to stdout, with the summary on stderr
  std::string device = "auto";           // cpu, cuda, cuda:N; auto: a GPU where there is one
  std::string dtype = "auto";            // f32, bf16, f64; auto: bf16 on a GPU, f32 on a CPU
  int64_t train_length = 0;              // marks the end of the training length; 0: the one that the run records
  int threads = 1;                       // tokenising threads
  bool skip_bad_lines = false;
};

/// Declares the options of `longhand eval ppl` on its subcommand.
void add_eval_ppl_options(CLI::App& command, EvalPplOptions& options);

/// Prints one line an octave of positions on stdout. The curve goes to --out and, when the model belongs to a run and --out is not in the
/// run's eval folder, to RUN/eval/ppl-DATA-CONTEXT-step-N.csv; each CSV has a .json of the same name beside it that says how it was
/// measured. returns  0 errors   ConfigError when the tokenizer is unknown or another than the run's; those of position_loss and
/// DocumentSequences
int run_eval_ppl(const EvalPplOptions& options);

}  // namespace longhand
