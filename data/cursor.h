// The place in the data where a run stands: part of every checkpoint.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/document_source.h"

namespace longhand {

/// One row of the `streams` arrangement: the document it is in the middle of, if any.
struct StreamPosition {
  bool started = false;      // false: its next row is the first of all
  bool in_document = false;  // true: it goes on at `at`
  DocumentPosition at;
  bool operator==(const StreamPosition&) const = default;
};

/// Everything that is needed to go on with exactly the batches that an unbroken run would have seen, whatever the number of threads and
/// whether the data come from shards or from their cache. The same on every rank: it describes the global batch.
struct DataCursor {
  /// The settings that decide the batches, by name. Resuming with others is refused by the name of the first that differs.
  std::vector<std::pair<std::string, std::string>> made_with;
  int64_t batches = 0;    // handed out so far
  DocumentPosition next;  // packed: the first token of the current block; streams: the next unread document

  // packed
  int64_t block = 0;      // number of the current block in its epoch
  int64_t first_row = 0;  // number of the block's first row, over all epochs
  int64_t used_rows = 0;  // rows of the block handed out

  // streams
  std::vector<StreamPosition> streams;  // one for each row

  bool operator==(const DataCursor&) const = default;

  std::string to_json() const;
  /// errors  FileError if the text is not a cursor
  static DataCursor from_json(std::string_view text);
};

/// errors  ConfigError naming the first of the settings `now` that the cursor was made with otherwise
void require_made_with(const DataCursor& cursor, const std::vector<std::pair<std::string, std::string>>& now);

}  // namespace longhand
