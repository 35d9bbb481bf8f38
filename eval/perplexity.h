// Loss by position, for sequences of any length, and the mean loss that a training run watches.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "eval/token_rows.h"
#include "models/language_model.h"

namespace longhand {

/// How much sequences differ over a range of positions: of each sequence that reaches its end, the mean loss over the range.
struct PositionSpread {
  int64_t first = 0, last = 0;  // positions, both included
  int64_t sequences = 0;
  double loss = 0;     // mean over the sequences
  double squares = 0;  // sum of their squared deviations from it

  double standard_error() const;             // of loss, sqrt(squares / (n - 1) / n); NaN for fewer than two sequences
  double perplexity_standard_error() const;  // exp(loss) * standard_error(), to first order
};

/// Sums by position; position p = 1, 2, ... is the prediction of a token from the p tokens before it, and is stored at index p - 1.
struct PositionLoss {
  std::vector<double> loss_sum;  // nats, over the sequences that reach the position
  std::vector<int64_t> tokens;   // how many sequences reach it
  int64_t sequences = 0;
  std::vector<PositionSpread> spreads;  // one for each of spread_ends that a position comes up to

  int64_t positions() const { return static_cast<int64_t>(tokens.size()); }
  double loss(int64_t position) const;        // mean over sequences; NaN where none reaches
  double perplexity(int64_t position) const;  // exp(loss(position))
  int64_t total_tokens() const;
  double mean_loss() const;  // over all tokens
};

/// Sequences dealt out: part p of P takes those numbered p, p + P, ...
struct SequenceParts {
  int64_t part = 0, parts = 1;
  std::function<void(std::vector<double>&)> sum_over_parts = {};  // replaces each number by the sum over all parts
};

struct PositionLossOptions {
  int64_t context = 2048;                 // positions scored of each sequence
  int64_t chunk = 2048;                   // tokens of a row in one forward; the state is carried from chunk to chunk
  int64_t batch = 8;                      // rows at once; a row whose sequence ends takes the next one from the zero state
  std::vector<int64_t> spread_ends = {};  // rising: range i holds the positions behind end i - 1, up to end i
  EvalProgressCall progress = {};
  SequenceParts parts = {};  // of several that each give their own sequences and get the result of all
};

/// Mean loss at each position over sequences that start from the zero state.
///   loss(p) = mean over sequences of -log q(x[p] | x[0..p-1])        perplexity(p) = exp(loss(p))
/// next     sequences; each counts min(its tokens - 1, context) positions
/// returns  sums on the host of losses that are each rounded to 2^-62 nats, added exactly, whatever the order of the sequences, and then
///          rounded to f64
/// memory   of the device: one chunk of batch rows and their state, whatever the context; of the host: the rows' tokens, three numbers a
///          position and five a range, however many sequences there are
/// holds    chunk, batch and the number of parts do not change the result, but for the rounding of the model: the same losses of tokens
///          give the same bits, as long as those of a position, and the squares of the sequences' means over a range, come to less than
///          2^23, a position has at most 2^22 sequences and a range 2^21; beyond that the last bits may depend on them
/// errors   ValueError for a sequence of fewer than 2 tokens, spread_ends that do not rise from 1, or a token outside the vocabulary;
///          NumericError naming sequence and position for a loss that is no number
/// source   Buitrago Ruiz & Gu 2025, arXiv:2507.02782
PositionLoss position_loss(const LanguageModel& model, const NextSequence& next, const PositionLossOptions& options);

struct ValidationLoss {
  double loss = 0;     // nats per token
  int64_t tokens = 0;  // positions whose mask is not 0

  /// loss * tokens / (bytes * ln 2), for the bytes of the text that the tokens encode. errors  ValueError if bytes < 1
  double bits_per_byte(int64_t bytes) const;
};

/// Fills `batch` with rows on the model's device; false when there are none left.
using NextBatch = std::function<bool(TokenBatch& batch)>;

/// What a process does of a validation that several share: some rows of every batch.
struct ValidationPart {
  int64_t first_row = 0, all_rows = 0;                       // its first, and how many all have together; 0: it has all
  std::function<void(std::vector<double>&)> sum_over_parts;  // replaces each number by the sum over all parts; empty: it has all
};

/// Mean loss over the first `max_batches` batches, every row from the zero state, each position weighted by its mask; sums in f64 on the
/// host, first within a row and then over the rows in their order, so that the same losses give the same bits in any number of parts.
/// errors   ValueError when no position counts; NumericError for a loss that is no number
ValidationLoss validation_loss(const LanguageModel& model, const NextBatch& next, int64_t max_batches, const ValidationPart& part = {});

}  // namespace longhand
