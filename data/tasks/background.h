// Long texts that the facts of BABILong are hidden in.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longhand {

class Draws;

struct BackgroundOptions {
  std::vector<std::string> files;           // shards
  std::string set_name;                     // only documents with this meta.pile_set_name; "": all
  int64_t min_bytes = 50'000;               // shorter documents are passed over
  int64_t most_bytes = int64_t{256} << 20;  // of text kept in memory: reading stops behind the document that reaches it
};

/// Books in memory. Objects never change once read: any number of threads may share one.
class Background {
 public:
  Background() = default;  // without a book: only for lengths that need none
  /// errors  FileError when no document is long enough, and those of ShardReader
  explicit Background(const BackgroundOptions& options);
  explicit Background(std::vector<std::string> books);

  bool empty() const { return books_.empty(); }
  std::size_t books() const { return books_.size(); }

  /// Tells books apart: their number, and a hash of every byte.
  const std::string& fingerprint() const { return fingerprint_; }

  /// The sentences of a window of `bytes` bytes, from a random place of a random book, its first and last (which may be cut) left out.
  std::vector<std::string> window(Draws& draws, int64_t bytes) const;

 private:
  std::vector<std::string> books_;
  std::string fingerprint_ = "none";
};

}  // namespace longhand
