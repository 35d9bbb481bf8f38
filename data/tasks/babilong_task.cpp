// Training on BABILong: a mixture of bAbI files and lengths.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>

#include "core/error.h"
#include "data/tasks/babilong.h"
#include "data/tasks/continuation.h"
#include "data/tasks/draws.h"
#include "data/tasks/task.h"

namespace longhand {
namespace {

constexpr int kMostTries = 10'000;
constexpr int64_t kHeldOutEvery = 20;  // different stories; a file of fewer is not divided
constexpr int64_t kShrink = 16;        // tokens that a sample loses beyond what it is too long by

struct Parts {
  std::vector<BabiSample> trained, held_out;
  bool divided = true;  // otherwise both are the whole file
};

// Of the different stories of a file, in the order of their texts, each twentieth is held out, wherever it stands: files repeat stories,
// some of them several times. A story's questions follow each other, each with all facts of the one before.
Parts divide(std::vector<BabiSample> all) {
  std::vector<std::size_t> last(all.size());  // of each question, the last one of its story: that one has all facts
  for (std::size_t i = all.size(); i-- > 0;) {
    const bool goes_on = i + 1 < all.size() && all[i].facts.size() <= all[i + 1].facts.size() &&
                         std::equal(all[i].facts.begin(), all[i].facts.end(), all[i + 1].facts.begin());
    last[i] = goes_on ? last[i + 1] : i;
  }
  std::map<std::vector<std::string>, bool> held_out;  // by the facts of a story
  for (const std::size_t i : last) held_out[all[i].facts] = false;
  if (std::ssize(held_out) < kHeldOutEvery) return {all, all, false};
  int64_t number = 0;
  for (auto& [facts, held] : held_out) held = ++number % kHeldOutEvery == 0;
  std::vector<bool> of_question;
  for (const std::size_t i : last) of_question.push_back(held_out.at(all[i].facts));
  Parts parts;
  for (std::size_t i = 0; i < all.size(); ++i) (of_question[i] ? parts.held_out : parts.trained).push_back(std::move(all[i]));
  return parts;
}

// The stories of each file to train on, or those to validate on. A question that is held out with the facts before it is not trained on in
// any file: different stories may begin alike.
std::vector<std::vector<BabiSample>> stories_of(const std::vector<std::string>& files, bool held_out) {
  std::vector<Parts> parts;
  for (const std::string& file : files) {
    parts.push_back(divide(read_babi(file)));
    if (parts.back().trained.empty()) throw FileError("task babilong: a file without a question", {{"file", file}});
    if (held_out && !parts.back().divided)
      fmt::print(stderr, "babilong: {} has fewer than {} different stories: none is held out, and validation asks what training has seen\n",
                 file, kHeldOutEvery);
  }
  std::set<std::pair<std::vector<std::string>, std::string>> asked;
  for (const Parts& part : parts)
    if (part.divided)
      for (const BabiSample& sample : part.held_out) asked.emplace(sample.facts, sample.question);
  std::vector<std::vector<BabiSample>> taken;
  for (std::size_t f = 0; f < files.size(); ++f) {
    taken.push_back(std::move(held_out ? parts[f].held_out : parts[f].trained));
    if (held_out) continue;
    std::erase_if(taken.back(), [&](const BabiSample& sample) { return asked.contains({sample.facts, sample.question}); });
    if (taken.back().empty())
      throw ConfigError("task babilong: every question of a file is held out with another file",
                        {{"file", files[f]}, {"try", "leave it out of task.babi"}});
  }
  return taken;
}

class BabilongTask : public Task {
 public:
  explicit BabilongTask(const TaskContext& context) : tokenizer_(context.tokenizer), row_tokens_(context.row_tokens) {
    const TaskOptions& o = context.options;
    if (o.babi.empty()) throw ConfigError("task babilong: no bAbI file", {{"try", "--set task.babi=qa1_single-supporting-fact_train.txt"}});
    stories_ = stories_of(o.babi, context.held_out);
    for (std::size_t f = 0; f < stories_.size(); ++f)
      names_ +=
          (names_.empty() ? "" : " ") + std::filesystem::path(o.babi[f]).filename().string() + ":" + std::to_string(stories_[f].size());
    if (o.lengths.empty()) lengths_ = {0};
    for (const std::string& length : o.lengths) lengths_.push_back(parse_length(length));
    for (std::size_t f = 0; f < stories_.size(); ++f)
      for (const int64_t length : lengths_)
        if (std::none_of(stories_[f].begin(), stories_[f].end(), [&](const BabiSample& story) { return fits(story, length); }))
          throw ConfigError(context.held_out ? "task babilong: no held-out story of a file has few enough lines for a length"
                                             : "task babilong: no story of a file has few enough lines for a length",
                            {{"file", o.babi[f]},
                             {"length", std::to_string(length)},
                             {"lines", "at most " + std::to_string(most_babi_lines(length))},
                             {"try", context.held_out ? "a greater length, or a file with more stories that fit: each twentieth is held out"
                                                      : "a greater length, or a file with shorter stories"}});
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
    return {{"task", "babilong"}, {"tokenizer", tokenizer_->fingerprint()},
            {"babi", names_},     {"held_out", "each " + std::to_string(kHeldOutEvery) + "th of the different stories"},
            {"lengths", lengths}, {"books", background_.fingerprint()}};
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
