// Tokenised documents in order, out of shards and token caches, with reading and tokenising done ahead in background threads.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/shard_reader.h"

namespace longhand {

class Tokenizer;

/// A place in the data. `part` counts the shards in the order they were given (a cache counts as the shards it was made from), so a place
/// means the same whether it is read from the shards or from their cache.
struct DocumentPosition {
  int64_t epoch = 0;  // from 0
  int64_t part = -1;  // -1: the first part of the epoch
  int64_t line = 0;   // the document's line in the shard, from 1; 0: the first document
  int64_t token = 0;  // offset in the document's tokens
  bool operator==(const DocumentPosition&) const = default;
};

struct TokenDocument {
  DocumentPosition at;          // token is 0
  std::vector<int32_t> tokens;  // the text's tokens, then the end-of-text id
  int64_t text_bytes = 0;       // UTF-8 bytes of the text
  std::string set_name;         // meta.pile_set_name, or ""
};

/// One shard of the data: a shard file, or a shard's part of a cache.
struct DataPart {
  std::string name;   // the shard's file name without its folder
  int64_t bytes = 0;  // the size of the shard's file
  std::string path;   // the file it is read from
};

struct SourceOptions {
  std::vector<std::string> files;  // shards, caches, folders of them
  uint64_t seed = 0;               // keys the order of the parts in each epoch
  bool shuffle_parts = false;      // false: the order given
  int64_t epochs = 1;              // 0: endless
  int threads = 1;                 // tokenising threads beside one reading thread; 0: everything in the caller's thread
  BadLines* skip_bad_lines = nullptr;
  int64_t ahead_bytes = int64_t{32} << 20;  // text read ahead (one document more may be in the air)
};

/// Hands out the documents of every epoch, part after part, in the order of their lines, for any number of threads.
/// memory   ahead_bytes of text and tokens, plus one document, plus what ShardReader holds
/// errors   those of ShardReader and TokenCache, thrown by next() in the caller's thread at the place where they belong in the order;
///          ConfigError if a cache was made with another tokenizer; FileError if epochs is 0 and there is no document at all
class DocumentSource {
 public:
  /// `tokenizer` may be null when all files are caches. Starts with the first document at or behind `start`.
  DocumentSource(SourceOptions options, std::shared_ptr<const Tokenizer> tokenizer, DocumentPosition start = {});
  ~DocumentSource();
  DocumentSource(DocumentSource&&) noexcept;
  DocumentSource& operator=(DocumentSource&&) noexcept;

  /// False after the last epoch.
  bool next(TokenDocument& document);

  /// The documents at these places, wherever they are, in the order asked for. One pass over each part named.
  std::vector<TokenDocument> fetch(const std::vector<DocumentPosition>& places) const;

  const std::vector<DataPart>& parts() const;
  /// "name:bytes" of every part in order, joined by blanks: equal for a set of shards and for their cache.
  std::string parts_signature() const;
  /// Fingerprint of the tokenizer (of the caches when there is none).
  std::string tokenizer_fingerprint() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace longhand
