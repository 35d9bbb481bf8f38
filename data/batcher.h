// Rows of tokens out of tokenised documents, in one of two arrangements. data/README.md draws them.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/cursor.h"
#include "data/document_source.h"

namespace longhand {

/// One step's input, in host memory, row-major [rows, length].
struct Batch {
  int64_t rows = 0, length = 0;
  std::vector<int32_t> tokens;   // [rows, length]
  std::vector<int32_t> targets;  // [rows, length]  targets[b, i] is the token behind tokens[b, i]
  std::vector<uint8_t> mask;     // [rows, length]  1: the target counts in the loss; 0: padding, where both ids are 0
  std::vector<uint8_t> resets;   // [rows]          1: row b begins a new sequence; 0: it goes on where row b of the batch before ended
  std::vector<int64_t> row_ids;  // [rows]          a number for each row of the run, the same at every resume
  DataCursor cursor_after;       // where to go on behind this batch

  std::span<const int32_t> row(int64_t b) const {
    return std::span(tokens).subspan(static_cast<std::size_t>(b * length), static_cast<std::size_t>(length));
  }
};

/// Rows [begin, end) of a batch with their targets, mask, resets and ids: a rank's share of the global batch.
Batch rows_of(const Batch& batch, int64_t begin, int64_t end);

enum class Arrangement {
  packed,   // shuffled rows, each on its own: every row has resets 1
  streams,  // row b goes on where row b of the batch before ended
};
enum class StreamUnit {
  packed,    // a row's stream is its documents one after the other, without end: resets 1 only in the first batch
  document,  // a row's stream is one document; the rest of its last row is padding, then the next document begins with resets 1
};
enum class Tail {
  drop,  // the tokens at the end of an epoch that do not fill a row are left out
  pad,   // they become one more row, filled up with masked zeros
};

Arrangement arrangement_from(const std::string& name);  // "packed" | "streams"        errors  ConfigError for other names
StreamUnit stream_unit_from(const std::string& name);   // "packed" | "document"

struct BatcherOptions {
  Arrangement arrangement = Arrangement::packed;
  int64_t rows = 1;    // B
  int64_t length = 1;  // T
  uint64_t seed = 0;
  // packed
  bool shuffle = true;       // false: rows in the order of the text
  int64_t shuffle_rows = 0;  // rows shuffled together; 0: as many as 4 Mi tokens hold, at most 16384
  Tail tail = Tail::drop;
  // streams
  StreamUnit stream_unit = StreamUnit::packed;
};

/// Cuts a source's documents into batches. The source must have been opened at `start_of(cursor)`.
class Batcher {
 public:
  virtual ~Batcher();
  /// The next batch; false at the end of the last epoch. The last batch may have fewer rows (packed) or masked rows (streams).
  virtual bool next(Batch& batch) = 0;
};

/// Where the source of a batcher has to be opened.
inline DocumentPosition start_of(const DataCursor& cursor) {
  return cursor.next;
}

/// packed   block k of an epoch is `shuffle_rows` rows in a row, row i is tokens [i*T, i*T + T] of the epoch's text (neighbours share one
///          token: the target of one is the input of the other), in an order keyed by (seed, epoch, k); memory is one block
/// streams  row b takes the next unread document whenever it needs tokens, rows in order 0 .. B-1; memory is one document a row
/// errors   ValueError for sizes below 1; FileError if an epoch has fewer tokens than one row, or the cursor names a document that is gone
std::unique_ptr<Batcher> make_batcher(const BatcherOptions& options, DocumentSource source, const DataCursor& cursor);

}  // namespace longhand
