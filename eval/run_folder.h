// Run folders, read without the trainer: what was recorded, where evaluations go. Where the model is: models/model_place.h.
//   RUN/config.toml                      the resolved recipe
//   RUN/metrics.jsonl                    one JSON object a logged step
//   RUN/checkpoints/step-N/              a model folder, with training.json
//   RUN/eval/ppl-NAME.csv, .json         loss by position, and how it was measured
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "models/model_place.h"

namespace longhand {

/// The last component of a folder's path: "small-sp" for "runs/small-sp/".
std::string folder_name(const std::string& path);

/// The keys and values of a TOML file of plain lines, as text, under dotted names: "train.length" -> "2048". Strings lose their quotes,
/// other values stay as they are written. For showing and for looking up a few keys; lines that are no "key = value" are left out and
/// counted.
struct FlatConfig {
  std::vector<std::pair<std::string, std::string>> values;  // in the order of the file
  int64_t lines_left_out = 0;

  std::optional<std::string> get(const std::string& key) const;
};
FlatConfig parse_flat_config(const std::string& text);

/// What a run says about itself; each part may be missing.
struct RunRecord {
  std::optional<std::string> tokenizer;    // "bytes" or the path of a tokenizer.json
  std::optional<std::string> fingerprint;  // of that tokenizer
  std::optional<int64_t> train_length;     // tokens in a training row
};
/// errors  FileError for a record that is there but cannot be read
RunRecord read_run_record(const ModelPlace& place);

/// Logged values by name, each a list of (step, value); where a step was logged again after a resume, the later line counts.
struct Metrics {
  std::map<std::string, std::map<int64_t, double>> values;  // "loss" -> step -> value
  int64_t lines = 0;
  std::vector<std::string> problems;  // sentences for the reader: lines that could not be read
};
/// errors  FileError if the file is missing
Metrics read_metrics(const std::string& path);

}  // namespace longhand
