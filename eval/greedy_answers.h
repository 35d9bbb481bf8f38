// What a model says behind prompts, always the most probable token.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "models/language_model.h"

namespace longhand {

struct AnswerOptions {
  int64_t max_tokens = 20;
  int64_t chunk = 2048;                               // tokens of each prompt at once; the state is carried on
  std::function<void(int64_t tokens)> progress = {};  // after each chunk: tokens read by all rows together
};

/// The continuation of every prompt, up to max_tokens tokens or the end of text; prompts of any lengths are read together.
/// memory   of the device: one chunk and one state per prompt, whatever the prompts' length; of the host: the tokens, twice
/// errors   ValueError for an empty prompt or a token outside the vocabulary
std::vector<std::string> greedy_answers(const LanguageModel& model, const std::vector<std::vector<int32_t>>& prompts,
                                        const Tokenizer& tokenizer, const AnswerOptions& options = {});

}  // namespace longhand
