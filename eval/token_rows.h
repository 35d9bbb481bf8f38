// Rows of tokens that advance together from the zero state: what every measure streams.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "core/tensor.h"
#include "eval/token_sequences.h"

namespace longhand {

struct EvalProgress {
  int64_t sequences_done = 0, sequences_running = 0;
  int64_t tokens = 0;    // read by the model so far
  int64_t position = 0;  // the furthest position of the rows that run
};
using EvalProgressCall = std::function<void(const EvalProgress&)>;  // after each chunk

/// errors  ValueError naming the sequence (from 1), the index and the vocabulary
void require_tokens_of(std::span<const int32_t> tokens, int64_t vocab_size, int64_t sequence);

/// errors  ValueError naming the option, if it is below 1
void require_at_least_one(const char* option, int64_t value);

/// Sequences of one length.
class TokenRows {
 public:
  /// Takes up to `most` sequences and the first `length` tokens of each; none when `next` has none left.
  /// taken    how many were taken before; counted up
  /// errors   ValueError for a sequence that is shorter, or a token outside the vocabulary
  static TokenRows take(const NextSequence& next, int64_t most, int64_t length, int64_t vocab_size, int64_t& taken);

  bool empty() const { return rows_.empty(); }
  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  int64_t first_sequence() const { return first_sequence_; }  // the number of row 0, from 1

  /// Tokens [begin, end) of every row, the rows `copies` times one after the other: [copies * count, end - begin] i32.
  Tensor block(const Device& device, int64_t begin, int64_t end, int64_t copies = 1) const;

 private:
  std::vector<std::vector<int32_t>> rows_;
  int64_t first_sequence_ = 0;
};

}  // namespace longhand
