// Choosing token sequences out of documents; see token_sequences.h.
#include "eval/token_sequences.h"

#include <fmt/format.h>

#include <algorithm>
#include <queue>
#include <tuple>

#include "core/error.h"
#include "data/tokenizer.h"

namespace longhand {

SequenceChoice parse_sequence_choice(const std::string& text) {
  for (const auto choice : {SequenceChoice::longest_first, SequenceChoice::min_length, SequenceChoice::all, SequenceChoice::packed})
    if (text == name_of(choice)) return choice;
  throw ConfigError("eval: unknown choice of documents", {{"documents", text}, {"expected", "long-first, min-length, all or packed"}});
}

const char* name_of(SequenceChoice choice) {
  switch (choice) {
    case SequenceChoice::longest_first:
      return "long-first";
    case SequenceChoice::min_length:
      return "min-length";
    case SequenceChoice::all:
      return "all";
    case SequenceChoice::packed:
      break;
  }
  return "packed";
}

DocumentSequences::DocumentSequences(SourceOptions source, std::shared_ptr<const Tokenizer> tokenizer, SequenceOptions options)
    : source_options_(std::move(source)), tokenizer_(std::move(tokenizer)), options_(options), source_(source_options_, tokenizer_) {
  if (options_.context < 1) throw ValueError("eval: the context must be at least 1", {{"context", std::to_string(options_.context)}});
  if (options_.max_sequences < 0)
    throw ValueError("eval: a negative number of sequences", {{"sequences", std::to_string(options_.max_sequences)}});
}

bool DocumentSequences::next(std::vector<int32_t>& tokens) {
  if (options_.max_sequences > 0 && sequences_ == options_.max_sequences) return false;
  const bool found = options_.choice == SequenceChoice::packed ? next_packed(tokens) : next_document(tokens);
  if (!found && sequences_ == 0) refuse_empty();
  if (found) ++sequences_;
  return found;
}

bool DocumentSequences::next_document(std::vector<int32_t>& tokens) {
  const bool longest = options_.choice == SequenceChoice::longest_first && options_.max_sequences > 0;
  if (longest && !chosen_known_) choose_longest();
  const std::size_t least = options_.choice == SequenceChoice::all ? 2 : static_cast<std::size_t>(options_.context) + 1;
  for (TokenDocument document; source_.next(document);) {
    ++documents_;
    if (const auto size = static_cast<int64_t>(document.tokens.size()); size > longest_) longest_ = size, longest_at_ = document.at;
    if (document.tokens.size() < least) continue;
    if (longest && !chosen_.contains({document.at.part, document.at.line})) continue;
    tokens = std::move(document.tokens);
    tokens.resize(std::min(tokens.size(), static_cast<std::size_t>(options_.context) + 1));
    return true;
  }
  return false;
}

bool DocumentSequences::next_packed(std::vector<int32_t>& tokens) {
  const auto context = static_cast<std::size_t>(options_.context);
  for (TokenDocument document; packed_.size() - packed_from_ < context + 1;) {
    if (!source_.next(document)) return false;
    ++documents_;
    tokens_seen_ += static_cast<int64_t>(document.tokens.size());
    packed_.erase(packed_.begin(), packed_.begin() + static_cast<std::ptrdiff_t>(packed_from_));
    packed_from_ = 0;
    packed_.insert(packed_.end(), document.tokens.begin(), document.tokens.end());
  }
  const auto begin = packed_.begin() + static_cast<std::ptrdiff_t>(packed_from_);
  tokens.assign(begin, begin + static_cast<std::ptrdiff_t>(context + 1));
  packed_from_ += context;  // the last target is the next sequence's first input
  return true;
}

// The first pass: the places of the longest documents; among equal lengths the earlier one.
void DocumentSequences::choose_longest() {
  using Candidate = std::tuple<int64_t, int64_t, int64_t>;  // length, -part, -line: the smallest is the first to give up
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> best;
  for (TokenDocument document; source_.next(document);) {
    const auto size = static_cast<int64_t>(document.tokens.size());
    if (size < options_.context + 1) continue;
    best.emplace(size, -document.at.part, -document.at.line);
    if (static_cast<int64_t>(best.size()) > options_.max_sequences) best.pop();
  }
  for (; !best.empty(); best.pop()) chosen_.emplace(-std::get<1>(best.top()), -std::get<2>(best.top()));
  chosen_known_ = true;
  if (source_options_.skip_bad_lines != nullptr) source_options_.skip_bad_lines = seen_before_.get();
  source_ = DocumentSource(source_options_, tokenizer_);
}

void DocumentSequences::refuse_empty() const {
  if (options_.choice == SequenceChoice::packed)
    throw ValueError("eval: the data are too short for one sequence",
                     {{"context", fmt::format("{} tokens and one target", options_.context)},
                      {"found", fmt::format("{} tokens in all", tokens_seen_)},
                      {"try", fmt::format("--context {}, or more data", std::max<int64_t>(1, tokens_seen_ - 1))}});
  std::vector<ErrorRow> rows{{"context", fmt::format("{} tokens and one target", options_.context)}};
  if (longest_ == 0) {
    rows.push_back({"found", "no document at all"});
  } else {
    const auto& parts = source_.parts();
    const auto part = static_cast<std::size_t>(longest_at_.part);
    rows.push_back({"longest", fmt::format("{} tokens with end-of-text, {} line {}", longest_, part < parts.size() ? parts[part].name : "?",
                                           longest_at_.line)});
    rows.push_back(
        {"try",
         fmt::format("--context {} or less, --documents packed (documents one behind the other), --documents all, or longer documents",
                     std::max<int64_t>(1, longest_ - 1))});
  }
  throw ValueError("eval: no document is long enough", rows);
}

}  // namespace longhand
