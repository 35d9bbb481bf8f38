// Writing shards in the Pile's form, and packing a folder of text files into one.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace longhand {

class OutputFile;

/// Writes {"text": ..., "meta": {"pile_set_name": ...}} lines into one zstd frame with a checksum.
class ShardWriter {
 public:
  ShardWriter(OutputFile& file, int zstd_level);
  ~ShardWriter();
  ShardWriter(const ShardWriter&) = delete;
  ShardWriter& operator=(const ShardWriter&) = delete;

  /// errors  ValueError if the text is not valid UTF-8; nothing is written then
  void add(std::string_view text, std::string_view set_name);
  void finish();

  int64_t documents() const;
  int64_t text_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Writes the shard `path` (*.jsonl.zst), which appears under its name only when whole.
void write_shard(const std::string& path, const std::function<void(ShardWriter&)>& write, int zstd_level = 9);

struct PackOptions {
  std::string folder;                    // searched with its subfolders; names that begin with a dot are left out
  std::string out;                       // *.jsonl.zst
  std::string set_name = "Local";        // meta.pile_set_name
  std::vector<std::string> include;      // shell patterns on the name or the path below `folder`, such as "*.txt"; none: every file
  std::vector<std::string> exclude;      // the same, stronger than include
  std::optional<uint64_t> shuffle_seed;  // absent: in the order of the paths
  double val_fraction = 0;               // this share of the documents, drawn by seed, goes to val_out instead
  std::string val_out;
  int zstd_level = 9;
};

struct PackReport {
  int64_t documents = 0, text_bytes = 0, val_documents = 0, val_text_bytes = 0;
  std::vector<std::pair<std::string, std::string>> left_out;  // path and reason: binary, not UTF-8, empty, too large
};

/// One document a file. Files that are not text are left out and listed in the report.
/// errors  FileError if there is no text file; ValueError for a val_fraction outside [0, 1) or without val_out
PackReport pack_folder(const PackOptions& options);

}  // namespace longhand
