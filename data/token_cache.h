// The token cache: the documents of one or several shards as token ids, in one file that is mapped into memory. data/README.md has the
// format.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/files.h"
#include "data/shard_reader.h"

namespace longhand {

class Tokenizer;
struct TokenDocument;

/// A shard that a cache was made from.
struct CachedShard {
  std::string name = {};       // file name without its folder
  int64_t bytes = 0;           // size of the shard's file
  int64_t first_document = 0;  // its documents in the cache: [first_document, first_document + documents)
  int64_t documents = 0;
  int64_t text_bytes = 0;
};

/// A cache opened for reading. Opening checks sizes, offsets, the table of documents and the description; tokens are looked at when read.
/// errors   FileError with file, byte and reason if the file is no cache, of another version, cut or changed
class TokenCache {
 public:
  explicit TokenCache(const std::string& path);

  /// True if the file begins as a cache does.
  static bool is_cache(const std::string& path);

  int64_t tokens() const { return tokens_; }
  int64_t documents() const { return documents_; }
  const std::vector<CachedShard>& shards() const { return shards_; }
  const std::string& tokenizer_name() const { return tokenizer_name_; }
  const std::string& fingerprint() const { return fingerprint_; }  // of the tokenizer
  const std::string& path() const { return file_.path(); }

  int64_t line_of(int64_t document) const;  // its line in its shard

  /// Fills tokens (the end-of-text id included), text_bytes, set_name and at.line of `out`.
  /// errors   FileError if a token is outside the vocabulary
  void read(int64_t document, TokenDocument& out) const;

  /// Reads every token and compares the checksum. errors  FileError if the tokens changed
  void verify() const;

 private:
  MappedFile file_;
  int64_t tokens_ = 0, documents_ = 0, token_bytes_ = 0, documents_at_ = 0, vocab_size_ = 0;
  uint64_t tokens_checksum_ = 0;
  std::string tokenizer_name_, fingerprint_;
  std::vector<CachedShard> shards_;
  std::vector<std::string> set_names_;
};

struct CacheOptions {
  int threads = 1;
  BadLines* skip_bad_lines = nullptr;
};

struct CacheSummary {
  int64_t shards = 0, documents = 0, text_bytes = 0, tokens = 0, file_bytes = 0;
};

/// Tokenises `files` (shards, folders or other caches) into the cache `out`, which appears under its name only when whole.
CacheSummary write_token_cache(const std::string& out, const std::vector<std::string>& files, std::shared_ptr<const Tokenizer> tokenizer,
                               const CacheOptions& options);

}  // namespace longhand
