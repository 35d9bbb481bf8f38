// What the tasks of `longhand eval` share: their options, the model, the log of samples that makes them resumable, progress, summaries.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "eval/run_folder.h"
#include "eval/sample_log.h"
#include "models/language_model.h"
#include "tools/device_options.h"

namespace CLI {
class App;
}

namespace longhand {

struct TaskSessionOptions {
  std::string model;      // a model folder, a checkpoint or a run folder (its latest checkpoint)
  std::string tokenizer;  // "": the one that the run records
  std::string out;        // JSONL, a line for each sample
  bool fresh = false;     // remove `out` first, instead of going on from it
  int64_t chunk = 2048;   // tokens of a row in one forward
  int64_t batch = 16;     // samples at once
  std::string device = "auto", dtype = "auto";
};

/// Declares them on a subcommand.
void add_task_options(CLI::App& command, TaskSessionOptions& options);

class TaskSession {
 public:
  /// Opens the model and its tokenizer.
  /// name        of the task: "passkey"
  /// errors      ConfigError when the tokenizer is unknown or another than the run's, or when --out does not end in .jsonl
  TaskSession(const TaskSessionOptions& options, std::string name);

  const LanguageModel& model() const { return *model_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  int64_t batch() const { return options_.batch; }
  int64_t chunk() const { return options_.chunk; }

  /// Opens the log: --out, or for a model that belongs to a run RUN/eval/NAME-TAG-HASH-TYPE[-step-N].jsonl, or none, which is said on
  /// stderr. tag       what a reader wants to see of the settings; HASH is of all of them settings  of the task; those of the model are
  /// added
  SampleLog& open_log(const std::string& tag, nlohmann::ordered_json settings, int64_t samples);

  /// Runs the samples that are not done, `batch` at a time, in `order`.
  /// run  gets their numbers and adds each to the log
  void each_batch(const std::vector<int64_t>& order, const std::function<void(const std::vector<int64_t>&)>& run);
  /// The same in the order of their numbers.
  void each_batch(const std::function<void(const std::vector<int64_t>&)>& run);

  /// Counts tokens that were read, and says on stderr every few seconds how far it is.
  std::function<void(int64_t)> progress();

  /// Prints the table on stdout as it is, and writes it as CSV beside the log, with a .json that describes it.
  ///   NAME.jsonl, NAME.csv, NAME.json
  /// Tokens, time and memory are those of the samples that were run now; where none was, those of an earlier description stay.
  struct Table {
    std::vector<std::string> columns;
    std::vector<std::vector<std::string>> rows;
  };
  void finish(const std::string& measure, const Table& table, const nlohmann::ordered_json& more);

 private:
  using Clock = std::chrono::steady_clock;
  void say_progress();

  TaskSessionOptions options_;
  std::string name_;
  ModelPlace place_;
  DeviceChoice device_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::unique_ptr<LanguageModel> model_;
  nlohmann::ordered_json settings_;
  std::string path_;
  std::unique_ptr<SampleLog> log_;
  int64_t samples_ = 0, tokens_ = 0;
  Clock::time_point start_, printed_;
};

/// The text of predicted ids: their bytes, and "?" for an id that pads the vocabulary.
std::string text_of(const Tokenizer& tokenizer, const std::vector<int32_t>& ids);

/// "0.8125", with as many digits as a share of some thousand samples has.
std::string share_text(double share);

}  // namespace longhand
