// See continuation_score.h.
#include "eval/continuation_score.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "eval/row_stream.h"

namespace longhand {
namespace {

constexpr int64_t kLogitRows = 64;

// The score of one token out of its row of logits.
void score_token(std::span<const float> logits, int32_t target, ContinuationScore& score) {
  const auto best = std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - static_cast<double>(*best));
  const double value = static_cast<double>(logits[static_cast<std::size_t>(target)]) - static_cast<double>(*best) - std::log(sum);
  if (!std::isfinite(value))
    throw NumericError("eval: the probability of a token is not a positive number",
                       {{"token", std::to_string(target)}, {"try", "LONGHAND_CHECK=1 to see which layer it comes from"}});
  score.log_likelihood += value;
  score.predicted.push_back(static_cast<int32_t>(best - logits.begin()));
}

}  // namespace

std::vector<ContinuationScore> score_continuations(const LanguageModel& model, const std::vector<ScoredRow>& rows,
                                                   const ContinuationOptions& options) {
  std::vector<std::vector<int32_t>> read;  // the last token of a target is never read
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].context.empty() || rows[i].target.empty())
      throw ValueError("eval: a continuation needs a context and a target of at least one token",
                       {{"row", std::to_string(i)},
                        {"context", std::to_string(rows[i].context.size()) + " tokens"},
                        {"target", std::to_string(rows[i].target.size()) + " tokens"}});
    require_tokens_of(rows[i].target, model.config().vocab_size, static_cast<int64_t>(i) + 1);
    read.push_back(rows[i].context);
    read.back().insert(read.back().end(), rows[i].target.begin(), rows[i].target.end() - 1);
  }
  // Scoring needs no final states, so rows may be padded behind their last token: nothing looks back at it.
  std::size_t longest = 0;
  std::vector<int64_t> sizes;
  for (const auto& row : read) longest = std::max(longest, row.size()), sizes.push_back(std::ssize(row));
  for (auto& row : read) row.resize(longest, 0);

  std::vector<ContinuationScore> scores(rows.size());
  read_rows(model, read, options.chunk, [&](const RowChunk& chunk) {
    for (std::size_t k = 0; k < chunk.rows.size(); ++k) {
      const std::size_t i = chunk.rows[k];
      const auto first = std::ssize(rows[i].context) - 1, end = first + std::ssize(rows[i].target);  // places that predict the target
      for (int64_t from = std::max(first, chunk.begin); from < std::min(end, chunk.begin + chunk.width); from += kLogitRows) {
        const int64_t to = std::min({from + kLogitRows, end, chunk.begin + chunk.width});
        const auto row = static_cast<int64_t>(k);
        const Tensor logits = model.logits(chunk.hidden.slice(0, row, row + 1).slice(1, from - chunk.begin, to - chunk.begin));
        const std::vector<float> values = logits.to_vector<float>();
        const auto V = static_cast<std::size_t>(logits.dim(-1));
        for (int64_t p = from; p < to; ++p)
          score_token(std::span(values).subspan(static_cast<std::size_t>(p - from) * V, V),
                      rows[i].target[static_cast<std::size_t>(p - first)], scores[i]);
      }
    }
    int64_t tokens = 0;
    for (const std::size_t i : chunk.rows) tokens += std::clamp<int64_t>(sizes[i] - chunk.begin, 0, chunk.width);
    if (options.progress) options.progress(tokens);
  });
  for (std::size_t i = 0; i < rows.size(); ++i) scores[i].greedy = scores[i].predicted == rows[i].target;
  return scores;
}

}  // namespace longhand
