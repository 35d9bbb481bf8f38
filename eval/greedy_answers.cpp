// See greedy_answers.h.
#include "eval/greedy_answers.h"

#include "core/error.h"
#include "eval/generation.h"
#include "eval/row_stream.h"

namespace longhand {

std::vector<std::string> greedy_answers(const LanguageModel& model, const std::vector<std::vector<int32_t>>& prompts,
                                        const Tokenizer& tokenizer, const AnswerOptions& options) {
  if (prompts.empty()) return {};
  std::vector<std::vector<int32_t>> read = prompts;
  GenerationState start;
  for (auto& row : read) {
    if (row.empty()) throw ValueError("eval: an empty prompt");
    SequenceState sequence;
    sequence.pending = {row.back()};
    row.pop_back();
    sequence.read = std::ssize(row);
    start.sequences.push_back(std::move(sequence));
  }
  start.recurrent = read_rows(model, read, options.chunk, [&](const RowChunk& chunk) {
    if (options.progress) options.progress(std::ssize(chunk.rows) * chunk.width);
  });
  const Generation generation = generate(model, {},
                                         {.max_tokens = options.max_tokens,
                                          .sampling = {.temperature = 0},
                                          .batch = std::ssize(prompts),
                                          .end_of_text = tokenizer.end_of_text(),
                                          .tokenizer = &tokenizer,
                                          .keep_state = false},
                                         start);
  std::vector<std::string> texts;
  for (const GeneratedRow& row : generation.rows) texts.push_back(row.text);
  return texts;
}

}  // namespace longhand
