// The front door of the room: batches for training, documents for evaluation, from shards or caches, prepared in the background.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/batcher.h"

namespace longhand {

class Tokenizer;

struct DataOptions {
  std::vector<std::string> files;      // shards, token caches, folders of them
  std::string tokenizer = "bytes";     // "bytes" or a tokenizer.json; "" when all files are caches
  std::string arrangement = "packed";  // "packed" | "streams"
  std::string stream_unit = "packed";  // streams: "packed" | "document"
  int64_t rows = 1;                    // rows of the global batch
  int64_t length = 1;                  // tokens in a row
  uint64_t seed = 0;                   // of the order of shards and rows
  bool shuffle = true;                 // false: shards as given, rows in the order of the text
  int64_t shuffle_rows = 0;            // packed: rows shuffled together; 0: see BatcherOptions
  bool pad_tail = false;               // packed: keep an epoch's last, unfilled row, masked behind its text
  int64_t epochs = 0;                  // 0: endless
  int threads = 1;                     // tokenising threads; 0: no background threads at all
  bool skip_bad_lines = false;         // true: leave bad lines out, and count them
};

/// The batches of a run.
/// holds    the batches depend on the options and the data alone: not on threads, not on shards against their cache, and a stream opened at
///          a batch's cursor_after goes on with the next batch of the first run
/// memory   4 batches, one block of rows (packed) or one document a row (streams), and what DocumentSource holds
class BatchStream {
 public:
  /// errors  ConfigError if `resume_at` was made with other settings, data or tokenizer (the first that differs is named)
  BatchStream(const DataOptions& options, std::shared_ptr<const Tokenizer> tokenizer, const std::optional<DataCursor>& resume_at = {});
  /// The batches of another source, which stands at `start`.
  BatchStream(std::unique_ptr<Batcher> batcher, const DataCursor& start, bool in_background);
  ~BatchStream();
  BatchStream(BatchStream&&) noexcept;
  BatchStream& operator=(BatchStream&&) noexcept;

  /// The next batch; false at the end of the last epoch. Errors of the background threads are thrown here.
  bool next(Batch& batch);

  /// Where the batches handed out so far end.
  const DataCursor& cursor() const;
  /// Bad lines left out so far (skip_bad_lines).
  const BadLines& bad_lines() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// The documents of `files` one by one, once, in order, for evaluation: tokens, text bytes (for bits per byte), set name, part and line.
class DocumentTokens {
 public:
  struct Options {
    std::vector<std::string> files;
    int64_t min_tokens = 1;      // shorter documents are passed over, the end-of-text id counted
    int64_t most_documents = 0;  // 0: all
    int threads = 1;
    bool skip_bad_lines = false;
  };
  DocumentTokens(const Options& options, std::shared_ptr<const Tokenizer> tokenizer);

  bool next(TokenDocument& document);
  const std::vector<DataPart>& parts() const { return source_.parts(); }
  const BadLines& bad_lines() const { return *bad_lines_; }

 private:
  Options options_;
  std::unique_ptr<BadLines> bad_lines_;
  DocumentSource source_;
  int64_t handed_out_ = 0;
};

}  // namespace longhand
