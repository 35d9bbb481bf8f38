// Documents out of a shard (*.jsonl.zst or *.jsonl), one JSON object a line, read as a stream.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "data/byte_source.h"

namespace longhand {

/// One document as the shard holds it.
struct Document {
  std::string text;         // UTF-8; may be empty and may hold any character
  std::string set_name;     // meta.pile_set_name, or ""
  int64_t line = 0;         // its line, from 1
  int64_t byte_offset = 0;  // where that line begins in the decompressed text
};

/// Counts the bad lines that were left out and keeps the first few messages. Any number of threads may add.
class BadLines {
 public:
  void add(const std::string& message);
  int64_t count() const;
  std::vector<std::string> first() const;  // at most kKept messages, in the order they came

  static constexpr int kKept = 10;

 private:
  mutable std::mutex mutex_;
  int64_t count_ = 0;
  std::vector<std::string> first_;
};

struct ShardOptions {
  BadLines* skip_bad_lines = nullptr;  // null: the first bad line stops the reader; else bad lines are left out and noted here
  int64_t max_line_bytes = int64_t{256} << 20;
  ByteSourceOptions source = {};
};

/// Reads the documents of a shard in order. Memory: the zstd window, plus twice the longest line (at most max_line_bytes and may_hold() of
/// the file), whatever the size of the shard. Blank lines, CR LF, a byte order mark and a missing last newline are accepted.
/// errors   FileError with file, line, byte and rule for a line that is not strict JSON with a string `text` (see json_line.h);
///          FileError for a damaged container (see byte_source.h), which always stops
class ShardReader {
 public:
  explicit ShardReader(const std::string& path, ShardOptions options = {});
  ~ShardReader();
  ShardReader(ShardReader&&) noexcept;
  ShardReader& operator=(ShardReader&&) noexcept;

  /// The next document, reusing the strings of `document`; false after the last one.
  bool next(Document& document);

  /// Goes on with the first document at or behind `line` (from 1), without parsing the lines before it.
  void skip_to_line(int64_t line);

  const std::string& path() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Files as they are; a folder becomes the *.jsonl.zst and *.jsonl files in it by name or, when it has none, its *.tokens caches.
/// errors   FileError if a path does not exist or a folder has neither
std::vector<std::string> expand_shards(const std::vector<std::string>& paths);

}  // namespace longhand
