// What all `longhand eval` commands share: their options, the model and the sequences these name, progress, and where results go.
#pragma once
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "eval/run_folder.h"
#include "eval/token_rows.h"
#include "models/language_model.h"
#include "tools/device_options.h"

namespace CLI {
class App;
}

namespace longhand {

class Communicator;

struct EvalOptions {
  std::string model;                            // a model folder, a checkpoint or a run folder (its latest checkpoint)
  std::vector<std::string> data;                // shards, token caches, folders of them
  int64_t context = 0;                          // tokens of each sequence; at least 1
  int64_t chunk = 2048;                         // tokens of a row in one forward
  int64_t batch = 8;                            // rows at once
  int64_t sequences = 0;                        // at most so many; 0: all
  std::string documents = "long-first";         // long-first, min-length, all, packed (see token_sequences.h)
  bool packed = false;                          // the same as documents = "packed"
  std::string tokenizer;                        // "": the one that the run records (not needed for token caches)
  std::string out;                              // CSV; "-": to stdout, with the summary on stderr
  std::string device = "auto", dtype = "auto";  // see device_options.h
  int64_t train_length = 0;                     // marks the end of the training length; 0: the one that the run records
  int threads = 1;                              // tokenising threads
  bool skip_bad_lines = false;
};

/// Declares them on a subcommand.
/// every_length   whether the measure can take sequences shorter than the context (--documents all)
void add_eval_options(CLI::App& command, EvalOptions& options, bool every_length);

/// A measurement from its options to its files. Of several processes each takes its sequences, and process 0 speaks and writes.
class EvalSession {
 public:
  /// Opens the data and the model, and says on stderr what is measured on what.
  /// name       of the measure, as its files begin: "ppl"
  /// processes  that measure together; null: this one is alone
  /// errors   ConfigError when the tokenizer is unknown or another than the run's, or --out ends in .json; those of DocumentSequences
  EvalSession(const EvalOptions& options, const std::string& name, const Communicator* processes = nullptr);
  ~EvalSession();
  EvalSession(const EvalSession&) = delete;
  EvalSession& operator=(const EvalSession&) = delete;

  const LanguageModel& model() const;
  /// Of several processes number p takes the sequences p, p + processes, ...
  NextSequence next();
  int64_t train_length() const;  // 0: unknown

  /// One line on stderr at most every few seconds.
  EvalProgressCall progress();

  /// Says on stderr what was read, how fast, and which lines were left out.
  void finish(int64_t sequences, int64_t tokens);

  struct Result {
    std::string csv;
    std::string suffix;  // of a second table: "histogram" gives NAME.histogram.csv; "" for the first
  };
  /// Where the summary is printed: stdout, or stderr when stdout takes the CSV.
  std::FILE* summary_stream() const;

  /// Writes each table to --out and, when the model belongs to a run and --out is not in the run's eval folder, to
  /// RUN/eval/NAME-DATA-DOCUMENTS-CONTEXT[-nN][-tag]-TYPE[-step-N].csv; the first has a .json of the same name beside it that says how it
  /// was measured. Only the first goes to stdout (--out -), and before any file: a full disk must not lose what was measured.
  /// measure  in words, for the description
  /// tag      what else tells this measurement from others of the same data; may be empty
  /// more     added to the description
  void write(const std::string& measure, const std::string& tag, const std::vector<Result>& results, const nlohmann::ordered_json& more);

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace longhand
