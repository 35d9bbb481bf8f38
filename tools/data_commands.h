// `longhand data check`, `longhand data pack`, `longhand tokenize --out` and `longhand bench data`. Each returns the exit code; tables go
// to stdout, messages to stderr.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "data/shard_writer.h"

namespace longhand {

struct DataCheckOptions {
  std::vector<std::string> files;  // shards, token caches, folders
  std::string tokenizer;           // "": tokens of shards are not counted
  bool skip_bad_lines = false;
  int threads = 2;
};

/// One line a file: documents, bytes, characters and tokens, or its first fault; then the sums. 1 if any file has a fault.
int run_data_check(const DataCheckOptions& options);

/// Packs a folder and lists what was left out.
int run_data_pack(const PackOptions& options);

struct TokenCacheOptions {
  std::string tokenizer;
  std::string out;                 // *.tokens by custom
  std::vector<std::string> files;  // shards, folders, caches
  bool skip_bad_lines = false;
  int threads = 2;
};

/// Writes a token cache.
int run_tokenize_cache(const TokenCacheOptions& options);

struct BenchDataOptions {
  std::vector<std::string> files;
  std::string tokenizer = "bytes";
  int threads = 2;                             // of the last row
  int64_t tokenize_bytes = int64_t{32} << 20;  // text that the single-thread tokenizing row is measured on, from the beginning
};

/// MB/s of text (10^6 bytes a second): reading; reading and parsing; tokenizing on one core; and batches out of the whole pipeline.
int run_bench_data(const BenchDataOptions& options);

}  // namespace longhand
