// BABILong: the facts of a bAbI story scattered over pages of a book, and a question behind them.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "data/tasks/babi.h"
#include "data/tasks/background.h"
#include "data/tokenizer.h"

namespace longhand {

inline constexpr int64_t kBabilongPromptTokens = 300;  // of a length, kept free for what stands around the text

struct BabilongOptions {
  int64_t length = 0;                   // in tokens, those of the prompt included; 0: facts alone
  double facts_from = 0, facts_to = 1;  // share of the text in which facts may stand
};

/// Lines that a story may have at this length: floor((length - 300) / 8), at least 2; 0 (any number) for length 0.
int64_t most_babi_lines(int64_t length);

/// The text of a sample.
///   needed   = length - 300 - tokens of the facts
///   sentences of windows of 10 * needed bytes (see Background), those shorter than 10 tokens left out, until there are `needed` tokens;
///   the
///              last sentence is cut to fit
///   gap of each fact: uniform, with replacement, among the gaps g = 0 .. sentences with  from <= g / (sentences + 1) < to; sorted, so that
///              facts keep their order; a fact stands before the sentence of its gap
/// Everything is counted in tokens of `tokenizer`, each fact and sentence with a blank before it. The text is that of the tokens, without
/// white space at its ends.
/// holds      a function of the arguments alone
/// errors     ValueError for a length that needs a background where there is none, or a range without a gap
/// source     Kuratov et al. 2024, arXiv:2406.10149; it counts in GPT-2's tokens and splits sentences with another set of rules
std::string babilong_text(const BabiSample& story, const Background& background, const BabilongOptions& options, const Tokenizer& tokenizer,
                          uint64_t key);

/// The answers of a bAbI task as published, those of lists (qa8) one by one; none for a name that is no qa1 .. qa20.
std::vector<std::string> babilong_labels(const std::string& task);

/// What stands around the text, of one task; every part may be empty.
struct BabilongPrompt {
  std::string instruction, examples, post_prompt;
};

/// The prompts of a JSON file: {"qa1": {"instruction": text, "examples": [text, ...], "post_prompt": text}, ...}; each example becomes a
/// block <example> ... </example>. errors  FileError naming the file and what is wrong
std::map<std::string, BabilongPrompt> read_babilong_prompts(const std::string& path);

///   instruction, examples, post_prompt, <context> text </context>, "Question: " question      an empty line between, white space at the
///                                                                                              ends taken off
std::string babilong_prompt(const BabilongPrompt& around, const std::string& text, const std::string& question);

}  // namespace longhand
