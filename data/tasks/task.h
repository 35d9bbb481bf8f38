// Tasks to train on: each makes samples out of keys, and batches are made of these (task_batches.h). Adding a task is one file and one line
// of the table in task.cpp.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "data/tokenizer.h"

namespace longhand {

/// What is to be read, and behind it what is to be learnt.
struct TaskSample {
  std::vector<int32_t> tokens;  // ends with the token that closes a document
  int64_t prompt = 0;           // the first so many are given: they do not count in the loss
};

/// The settings of all tasks; each looks at its own.
struct TaskOptions {
  int64_t min_length = 0, max_length = 0;  // copy: letters of a word, 0: 8 and 50; passkey: tokens of a sample, 0: those of a row
  std::string variant = "copy";            // copy: see copying.h
  int64_t ngram = 3;                       // copy: letters of the n-grams
  int64_t answer_length = 0;               // copy: letters of the answer; 0: all
  int64_t digits = 0;                      // passkey: of the key; 0: 1 to 50000
  std::vector<std::string> babi = {};      // babilong: bAbI files; each sample takes one of them
  std::vector<std::string> lengths = {};   // babilong: "0k", "1k", ...; each sample takes one of them
  std::string book_set = {};               // babilong: only books with this meta.pile_set_name; "": all
};

struct TaskContext {
  TaskOptions options;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::vector<std::string> files;  // shards of the recipe: the background of babilong
  int64_t row_tokens = 0;          // a sample has at most so many
  bool held_out = false;           // babilong: of the stories that training leaves out, instead of those that it takes; says on stderr
                                   // which files have too few stories to leave any out
};

class Task {
 public:
  virtual ~Task();
  /// A function of the key alone, of at most row_tokens tokens; any number of threads may ask.
  virtual TaskSample sample(uint64_t key) const = 0;
  /// The task ("task"), the tokenizer, and the settings that decide the samples, by name.
  virtual std::vector<std::pair<std::string, std::string>> made_with() const = 0;
};

struct TaskKind {
  const char* name;
  const char* meaning;
  const char* settings;  // members of TaskOptions that it looks at, each between blanks
  bool reads_files;      // whether it looks at TaskContext::files
  std::unique_ptr<Task> (*make)(const TaskContext&);
};
std::span<const TaskKind> task_kinds();

/// errors  ConfigError for an unknown name, a tokenizer that the task cannot use, or a setting that does not fit
std::unique_ptr<Task> make_task(const std::string& name, const TaskContext& context);

/// 16000 for "16k", 1000000 for "1M", 512 for "512"; with k = 1024: 16384, 1048576, 512.
/// errors  ConfigError for another text
int64_t parse_length(const std::string& text, int64_t k = 1000);

}  // namespace longhand
