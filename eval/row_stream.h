// Rows of different lengths through a model together, in chunks and without padding.
#pragma once
#include <functional>
#include <vector>

#include "eval/token_rows.h"
#include "models/language_model.h"

namespace longhand {

/// What the model made of tokens [begin, begin + width) of some rows.
struct RowChunk {
  const std::vector<std::size_t>& rows;  // their indices, ascending by length
  int64_t begin, width;
  const Tensor& hidden;  // [rows, width, d_model]
};

/// Reads every row from the zero state.
///   all rows that have not ended advance together by min(chunk, tokens left to the shortest); a row that has ended leaves
/// rows      may be of any lengths; an empty one is never read
/// on_chunk  may be empty
/// returns   the state behind the last token of each row, in the order of `rows` (zero for an empty one)
/// memory    of the device: one chunk, and one state per row
/// errors    ValueError for a token outside the vocabulary
RecurrentState read_rows(const LanguageModel& model, const std::vector<std::vector<int32_t>>& rows, int64_t chunk,
                         const std::function<void(const RowChunk&)>& on_chunk = {});

}  // namespace longhand
