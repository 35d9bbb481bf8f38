// See token_rows.h.
#include "eval/token_rows.h"

#include <fmt/format.h>

#include "core/error.h"

namespace longhand {

void require_tokens_of(std::span<const int32_t> tokens, int64_t vocab_size, int64_t sequence) {
  for (std::size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= vocab_size)
      throw ValueError("eval: a token is outside the model's vocabulary",
                       {{"token", fmt::format("{} at index {} of sequence {}", tokens[i], i, sequence)},
                        {"vocabulary", fmt::format("{} tokens", vocab_size)},
                        {"try", "the tokenizer that the model was trained with"}});
}

void require_at_least_one(const char* option, int64_t value) {
  if (value < 1) throw ValueError(fmt::format("eval: {} must be at least 1", option), {{option, std::to_string(value)}});
}

TokenRows TokenRows::take(const NextSequence& next, int64_t most, int64_t length, int64_t vocab_size, int64_t& taken) {
  TokenRows result;
  result.first_sequence_ = taken + 1;
  for (std::vector<int32_t> tokens; result.count() < most && next(tokens);) {
    ++taken;
    if (static_cast<int64_t>(tokens.size()) < length)
      throw ValueError("eval: a sequence is shorter than the context",
                       {{"sequence", std::to_string(taken)},
                        {"tokens", std::to_string(tokens.size())},
                        {"context", std::to_string(length)},
                        {"try", "sequences that all reach the context: documents long-first, min-length or packed"}});
    tokens.resize(static_cast<std::size_t>(length));
    require_tokens_of(tokens, vocab_size, taken);
    result.rows_.push_back(std::move(tokens));
  }
  return result;
}

Tensor TokenRows::block(const Device& device, int64_t begin, int64_t end, int64_t copies) const {
  std::vector<int32_t> tokens;
  tokens.reserve(static_cast<std::size_t>(copies * count() * (end - begin)));
  for (int64_t copy = 0; copy < copies; ++copy)
    for (const auto& row : rows_) tokens.insert(tokens.end(), row.begin() + begin, row.begin() + end);
  return Tensor::from(device, {copies * count(), end - begin}, tokens);
}

}  // namespace longhand
