// Training on synthetic copying: words of random length, drawn anew for every sample.
#include "core/error.h"
#include "data/tasks/copying.h"
#include "data/tasks/draws.h"
#include "data/tasks/letter_tokenizer.h"
#include "data/tasks/task.h"

namespace longhand {
namespace {

constexpr int64_t kMinLength = 8, kMaxLength = 50;

class CopyTask : public Task {
 public:
  CopyTask(const CopyOptions& options, int64_t min_length, int64_t max_length)
      : options_(options), min_length_(min_length), max_length_(max_length) {}

  TaskSample sample(uint64_t key) const override {
    const int64_t length = Draws(philox_key(key, hash_name("length"))).between(min_length_, max_length_);
    CopyExample example = copy_example(options_, length, key);
    return {std::move(example.tokens), example.prompt};
  }

  std::vector<std::pair<std::string, std::string>> made_with() const override {
    return {{"task", "copy"},
            {"tokenizer", LetterTokenizer(options_.alphabet).fingerprint()},
            {"variant", name_of(options_.variant)},
            {"ngram", std::to_string(options_.ngram)},
            {"answer_length", std::to_string(options_.answer_length)},
            {"min_length", std::to_string(min_length_)},
            {"max_length", std::to_string(max_length_)}};
  }

 private:
  CopyOptions options_;
  int64_t min_length_, max_length_;
};

}  // namespace

std::unique_ptr<Task> make_copy_task(const TaskContext& context) {
  const TaskOptions& o = context.options;
  const auto* letters = dynamic_cast<const LetterTokenizer*>(context.tokenizer.get());
  if (letters == nullptr)
    throw ConfigError("task copy: its tokens are letters",
                      {{"data.tokenizer", context.tokenizer->name()}, {"expected", "letters:1 to letters:26"}});
  const CopyOptions options{
      .variant = copy_variant_from(o.variant), .alphabet = letters->letters(), .ngram = o.ngram, .answer_length = o.answer_length};
  if (options.variant == CopyVariant::duplicate_ngram)
    throw ConfigError("task copy: a variant for evaluation only",
                      {{"variant", o.variant}, {"expected", "copy, prefix-ngram, suffix-ngram"}});
  const int64_t low = o.min_length > 0 ? o.min_length : kMinLength, high = o.max_length > 0 ? o.max_length : kMaxLength;
  if (low > high)
    throw ConfigError("task copy: the least length is above the largest",
                      {{"min_length", std::to_string(low)}, {"max_length", std::to_string(high)}});
  if (longest_copy_example(options, high) > context.row_tokens)
    throw ConfigError("task copy: a row cannot hold the longest example",
                      {{"row", std::to_string(context.row_tokens) + " tokens (train.length + 1)"},
                       {"longest", std::to_string(longest_copy_example(options, high)) + " tokens"},
                       {"try", "a larger train.length or a smaller max_length"}});
  for (const int64_t length : {low, high}) (void)copy_example(options, length, 0);  // says what is wrong with the options
  return std::make_unique<CopyTask>(options, low, high);
}

}  // namespace longhand
