// Training on passkey retrieval: keys at any depth, lengths uniform in a range.
#include "core/error.h"
#include "data/tasks/draws.h"
#include "data/tasks/passkey.h"
#include "data/tasks/task.h"

namespace longhand {
namespace {

class PasskeyTask : public Task {
 public:
  PasskeyTask(std::shared_ptr<const Tokenizer> tokenizer, int64_t digits, int64_t min_length, int64_t max_length)
      : tokenizer_(std::move(tokenizer)), digits_(digits), min_length_(min_length), max_length_(max_length) {}

  TaskSample sample(uint64_t key) const override {
    PasskeyOptions options{.unit = PasskeyUnit::tokens, .digits = digits_, .seed = key};
    std::vector<int32_t> answer = passkey_answer(*tokenizer_, passkey_key(options, 0));
    answer.push_back(tokenizer_->end_of_text());
    options.length = Draws(philox_key(key, hash_name("length"))).between(min_length_, max_length_) - std::ssize(answer);
    TaskSample sample{passkey_sample(options, *tokenizer_, 0).prompt, options.length};
    sample.tokens.insert(sample.tokens.end(), answer.begin(), answer.end());
    return sample;
  }

  std::vector<std::pair<std::string, std::string>> made_with() const override {
    return {{"task", "passkey"},
            {"tokenizer", tokenizer_->fingerprint()},
            {"digits", std::to_string(digits_)},
            {"min_length", std::to_string(min_length_)},
            {"max_length", std::to_string(max_length_)}};
  }

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  int64_t digits_, min_length_, max_length_;
};

}  // namespace

std::unique_ptr<Task> make_passkey_task(const TaskContext& context) {
  const TaskOptions& o = context.options;
  const int64_t high = o.max_length > 0 ? o.max_length : context.row_tokens, low = o.min_length > 0 ? o.min_length : high;
  const int64_t answer = (o.digits == 0 ? 5 : o.digits) + 2;  // at most: a blank, a token a digit, the point
  const int64_t least = least_passkey_tokens(*context.tokenizer, o.digits) + answer + 1;
  if (low > high || low < least || high > context.row_tokens)
    throw ConfigError("task passkey: samples of these lengths do not fit",
                      {{"min_length", std::to_string(low)},
                       {"max_length", std::to_string(high)},
                       {"expected", "from " + std::to_string(least) + " to " + std::to_string(context.row_tokens) +
                                        " tokens (a row is train.length + 1)"}});
  return std::make_unique<PasskeyTask>(context.tokenizer, o.digits, low, high);
}

}  // namespace longhand
