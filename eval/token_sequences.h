// Which token sequences an evaluation scores: documents, or documents packed one behind the other.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "data/document_source.h"

namespace longhand {

/// Fills `tokens` with the next sequence (at least 2 tokens) and returns true; false when there is none left.
using NextSequence = std::function<bool(std::vector<int32_t>& tokens)>;

/// For a context of N positions a sequence has at most N + 1 tokens: N inputs and, one further, N targets.
enum class SequenceChoice {
  longest_first,  // documents of at least N + 1 tokens; under a limit, the longest of the data
  min_length,     // documents of at least N + 1 tokens; under a limit, the first in the order of the data
  all,            // every document of at least 2 tokens; a short one counts up to its end
  packed,         // documents one behind the other, each closed by end-of-text; sequence i begins at token i N of the data
};

/// "long-first", "min-length", "all" or "packed". errors  ConfigError naming these
SequenceChoice parse_sequence_choice(const std::string& text);
const char* name_of(SequenceChoice choice);

struct SequenceOptions {
  int64_t context = 2048;
  SequenceChoice choice = SequenceChoice::longest_first;
  int64_t max_sequences = 0;  // 0: as many as there are
};

/// The sequences of shards or token caches, cut to context + 1 tokens. A limit with longest_first reads the data twice: once for the
/// lengths, once for the tokens, so that memory does not grow with the number of documents; bad lines count once.
/// errors  those of DocumentSource; ValueError from the first next() when the data hold no sequence, naming the longest document found
class DocumentSequences {
 public:
  DocumentSequences(SourceOptions source, std::shared_ptr<const Tokenizer> tokenizer, SequenceOptions options);

  bool next(std::vector<int32_t>& tokens);

  int64_t sequences() const { return sequences_; }       // handed out so far
  int64_t documents_seen() const { return documents_; }  // read so far in the last pass
  int64_t longest_document() const { return longest_; }  // tokens, end-of-text included
  std::string tokenizer_fingerprint() const { return source_.tokenizer_fingerprint(); }

 private:
  bool next_document(std::vector<int32_t>& tokens);
  bool next_packed(std::vector<int32_t>& tokens);
  void choose_longest();
  [[noreturn]] void refuse_empty() const;

  SourceOptions source_options_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  SequenceOptions options_;
  std::unique_ptr<BadLines> seen_before_ = std::make_unique<BadLines>();  // the bad lines of the second pass
  DocumentSource source_;
  bool chosen_known_ = false;
  std::set<std::pair<int64_t, int64_t>> chosen_;  // part and line of the documents that longest_first takes
  std::vector<int32_t> packed_;                   // tokens of the documents read last
  std::size_t packed_from_ = 0;                   // the first of them that is not handed out yet
  int64_t sequences_ = 0, documents_ = 0, longest_ = 0, tokens_seen_ = 0;
  DocumentPosition longest_at_;
};

}  // namespace longhand
