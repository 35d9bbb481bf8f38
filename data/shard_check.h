// What a shard or a cache holds, counted by reading all of it.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "data/shard_reader.h"

namespace longhand {

class Tokenizer;

struct ShardCount {
  int64_t documents = 0;
  int64_t text_bytes = 0;   // UTF-8 bytes of the documents' text
  int64_t characters = -1;  // Unicode code points; -1: not known (a cache holds no text)
  int64_t tokens = -1;      // of the text; the end-of-text ids not counted; -1: not counted (no tokenizer)
  int64_t bad_lines = 0;    // left out
};

struct CheckOptions {
  std::shared_ptr<const Tokenizer> tokenizer;  // null: tokens of shards are not counted
  bool skip_bad_lines = false;
  int threads = 1;
};

/// Reads a shard to its end, or verifies every byte of a token cache.
/// errors  FileError with the first fault
ShardCount check_shard(const std::string& path, const CheckOptions& options = {});

}  // namespace longhand
