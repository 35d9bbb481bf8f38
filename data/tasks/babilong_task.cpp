// Training on BABILong: a mixture of bAbI files and lengths.
#include <algorithm>
#include <filesystem>

#include "core/error.h"
#include "data/tasks/babilong.h"
#include "data/tasks/continuation.h"
#include "data/tasks/draws.h"
#include "data/tasks/task.h"

namespace longhand {
namespace {

constexpr int kMostTries = 10'000;
constexpr int64_t kHeldOutEvery = 20;  // story 19, 39, ... of a file; a file of fewer stories is not split
constexpr int64_t kShrink = 16;        // tokens that a sample loses beyond what it is too long by

// The questions of the stories that are held out, or of the others. A story's questions follow each other, each with all facts of the one
// before.
std::vector<BabiSample> split(std::vector<BabiSample> all, bool held_out) {
  std::vector<int64_t> story;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const bool same = i > 0 && all[i - 1].facts.size() <= all[i].facts.size() &&
                      std::equal(all[i - 1].facts.begin(), all[i - 1].facts.end(), all[i].facts.begin());
    story.push_back(i == 0 ? 0 : story.back() + (same ? 0 : 1));
  }
  if (story.empty() || story.back() + 1 < kHeldOutEvery) return all;
  std::vector<BabiSample> taken;
  for (std::size_t i = 0; i < all.size(); ++i)
    if ((story[i] % kHeldOutEvery == kHeldOutEvery - 1) == held_out) taken.push_back(std::move(all[i]));
  return taken;
}

class BabilongTask : public Task {
 public:
  explicit BabilongTask(const TaskContext& context) : tokenizer_(context.tokenizer), row_tokens_(context.row_tokens) {
    const TaskOptions& o = context.options;
    if (o.babi.empty()) throw ConfigError("task babilong: no bAbI file", {{"try", "--set task.babi=qa1_single-supporting-fact_train.txt"}});
    for (const std::string& file : o.babi) {
      stories_.push_back(split(read_babi(file), context.held_out));
      if (stories_.back().empty()) throw FileError("task babilong: a file without a question", {{"file", file}});
      names_ +=
          (names_.empty() ? "" : " ") + std::filesystem::path(file).filename().string() + ":" + std::to_string(stories_.back().size());
    }
    if (o.lengths.empty()) lengths_ = {0};
    for (const std::string& length : o.lengths) lengths_.push_back(parse_length(length));
    for (std::size_t f = 0; f < stories_.size(); ++f)
      for (const int64_t length : lengths_)
        if (std::none_of(stories_[f].begin(), stories_[f].end(), [&](const BabiSample& story) { return fits(story, length); }))
          throw ConfigError(
              "task babilong: no story of a file has few enough lines for a length",
              {{"file", o.babi[f]}, {"length", std::to_string(length)}, {"lines", "at most " + std::to_string(most_babi_lines(length))}});
    // Of a length, kBabilongPromptTokens are for instruction and examples, which samples of training do not have.
    if (const int64_t longest = *std::max_element(lengths_.begin(), lengths_.end()) - kBabilongPromptTokens; longest > row_tokens_)
      throw ConfigError("task babilong: a row cannot hold the longest samples",
                        {{"row", std::to_string(row_tokens_) + " tokens (train.length + 1)"},
                         {"longest text", std::to_string(longest) + " tokens, a length less those of the prompt"}});
    if (std::any_of(lengths_.begin(), lengths_.end(), [](int64_t length) { return length > 0; }))
      background_ = Background(BackgroundOptions{.files = context.files, .set_name = o.book_set});
    else if (!o.book_set.empty())
      throw ConfigError("task babilong: length 0 is the facts alone, and needs no books",
                        {{"task.book_set", o.book_set}, {"try", "leave the key out, or add a length"}});
  }

  TaskSample sample(uint64_t key) const override {
    Draws draws(key);
    // File and length are drawn once, whatever stories do not fit: the mixture is the one that was asked for.
    const auto& stories = stories_[static_cast<std::size_t>(draws.below(std::ssize(stories_)))];
    const int64_t wanted = lengths_[static_cast<std::size_t>(draws.below(std::ssize(lengths_)))];
    for (int tries = 0; tries < kMostTries; ++tries) {
      const BabiSample& story = stories[static_cast<std::size_t>(draws.below(std::ssize(stories)))];
      if (!fits(story, wanted)) continue;
      for (int64_t length = wanted;;) {
        TaskSample sample = make(story, length, philox_key(key, static_cast<uint64_t>(tries)));
        const int64_t excess = std::ssize(sample.tokens) - row_tokens_;
        if (excess <= 0) return sample;
        if (length == 0) break;
        length = std::max<int64_t>(0, length - excess - kShrink);
      }
    }
    throw ValueError("task babilong: no story fits into a row",
                     {{"row", std::to_string(row_tokens_) + " tokens"}, {"length", std::to_string(wanted)}});
  }

  std::vector<std::pair<std::string, std::string>> made_with() const override {
    std::string lengths;
    for (const int64_t length : lengths_) lengths += (lengths.empty() ? "" : " ") + std::to_string(length);
    return {{"task", "babilong"},
            {"tokenizer", tokenizer_->fingerprint()},
            {"babi", names_},
            {"lengths", lengths},
            {"books", background_.fingerprint()}};
  }

 private:
  static bool fits(const BabiSample& story, int64_t length) {
    const int64_t most = most_babi_lines(length);
    return most == 0 || std::ssize(story.facts) + 1 <= most;
  }

  TaskSample make(const BabiSample& story, int64_t length, uint64_t key) const {
    const std::string text = babilong_text(story, background_, {.length = length}, *tokenizer_, key);
    TaskSample sample{encoded(*tokenizer_, babilong_prompt({}, text, story.question)), 0};
    sample.prompt = std::ssize(sample.tokens);
    tokenizer_->encode(" " + story.answer + ".", sample.tokens);
    sample.tokens.push_back(tokenizer_->end_of_text());
    return sample;
  }

  std::shared_ptr<const Tokenizer> tokenizer_;
  int64_t row_tokens_;
  std::vector<std::vector<BabiSample>> stories_;  // by file
  std::string names_;
  std::vector<int64_t> lengths_;
  Background background_;
};

}  // namespace

std::unique_ptr<Task> make_babilong_task(const TaskContext& context) {
  return std::make_unique<BabilongTask>(context);
}

}  // namespace longhand
