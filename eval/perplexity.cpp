// Streaming evaluation: rows of sequences advance chunk by chunk with their recurrent state; see perplexity.h.
#include "eval/perplexity.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>

#include "autograd/tape.h"
#include "core/error.h"

namespace longhand {

double PositionLoss::loss(int64_t position) const {
  const auto i = static_cast<std::size_t>(position - 1);
  if (position < 1 || i >= tokens.size() || tokens[i] == 0) return std::numeric_limits<double>::quiet_NaN();
  return loss_sum[i] / static_cast<double>(tokens[i]);
}

double PositionLoss::perplexity(int64_t position) const {
  return std::exp(loss(position));
}

int64_t PositionLoss::total_tokens() const {
  return std::accumulate(tokens.begin(), tokens.end(), int64_t{0});
}

double PositionLoss::mean_loss() const {
  return std::accumulate(loss_sum.begin(), loss_sum.end(), 0.0) / static_cast<double>(total_tokens());
}

double PositionSpread::standard_error() const {
  if (sequences < 2) return std::numeric_limits<double>::quiet_NaN();
  const auto n = static_cast<double>(sequences);
  return std::sqrt(squares / (n - 1) / n);
}

double PositionSpread::perplexity_standard_error() const {
  return std::exp(loss) * standard_error();
}

namespace {

// A sum whose order does not matter: of multiples of 2^-30, and of what they leave as multiples of 2^-62. f64 adds either without rounding
// up to 2^53 of them: sums below 2^23, of at most 2^22 numbers, whose rests are 2^-31 at most. Beyond that a sum rounds as any other does.
struct ExactSum {
  double coarse = 0, fine = 0;
  void add(double x) {
    const double whole = std::nearbyint(x * 0x1p30) * 0x1p-30;
    coarse += whole;
    fine += std::nearbyint((x - whole) * 0x1p62) * 0x1p-62;
  }
  double value() const { return coarse + fine; }
};

// Of the sequences that come to the end of a range: their mean losses there. What a square loses to rounding is added too, so that the
// difference of these sums is as exact as they are: two numbers a sequence, so exact up to 2^21 of them.
struct RangeSums {
  ExactSum means, squares;
  double sequences = 0;  // a whole number
  void add(double mean) {
    const double square = mean * mean;
    means.add(mean);
    squares.add(square), squares.add(std::fma(mean, mean, -square));
    ++sequences;
  }
  // Sum of (mean - their mean)^2: squares - means^2 / sequences, of which most cancels. Means that are all the same leave 2^-62 a sequence.
  double squared_deviations() const {
    const double whole = means.coarse * means.coarse, rest = std::fma(means.coarse, means.coarse, -whole);
    const double small = sequences * squares.fine - 2 * means.coarse * means.fine - means.fine * means.fine - rest;
    return std::max(0.0, (std::fma(sequences, squares.coarse, -whole) + small) / sequences);
  }
};

// Everything that is added up.
struct Sums {
  std::vector<ExactSum> loss;  // by position
  std::vector<double> tokens;  // likewise; whole numbers
  std::vector<RangeSums> ranges;
  double sequences = 0;
};

struct Row {
  std::vector<int32_t> tokens;
  int64_t sequence = 0;   // its number among all, from 1
  int64_t positions = 0;  // to score
  int64_t at = 0;         // scored so far
  std::size_t range = 0;  // that it is in, and the sum of its losses there
  double range_sum = 0;
  int64_t left() const { return positions - at; }
};

bool take_next(Row& row, const NextSequence& next, int64_t& taken, const LanguageModel& model, int64_t context,
               const SequenceParts& parts) {
  if (!next(row.tokens)) return false;
  row.sequence = parts.part + parts.parts * taken++ + 1;
  row.at = 0;
  row.range = 0, row.range_sum = 0;
  row.positions = std::min(static_cast<int64_t>(row.tokens.size()) - 1, context);
  if (row.positions < 1)
    throw ValueError("eval: a sequence without a token to predict",
                     {{"sequence", std::to_string(row.sequence)}, {"tokens", std::to_string(row.tokens.size())}});
  require_tokens_of(row.tokens, model.config().vocab_size, row.sequence);
  return true;
}

std::vector<PositionSpread> empty_spreads(const std::vector<int64_t>& ends) {
  std::vector<PositionSpread> spreads;
  int64_t before = 0;
  for (const int64_t end : ends) {
    if (end <= before)
      throw ValueError("eval: ends of ranges that do not rise", {{"end", std::to_string(end)}, {"before", std::to_string(before)}});
    spreads.push_back({before + 1, end, 0, 0, 0});
    before = end;
  }
  return spreads;
}

void add_to_ranges(Row& row, int64_t position, double loss, const std::vector<PositionSpread>& ranges, std::vector<RangeSums>& sums) {
  if (row.range == ranges.size()) return;
  const PositionSpread& range = ranges[row.range];
  row.range_sum += loss;
  if (position < range.last) return;
  sums[row.range].add(row.range_sum / static_cast<double>(range.last - range.first + 1));
  ++row.range, row.range_sum = 0;
}

// The largest number that a part has.
std::size_t largest_of(std::size_t own, const SequenceParts& parts) {
  std::vector<double> all(static_cast<std::size_t>(parts.parts));
  all[static_cast<std::size_t>(parts.part)] = static_cast<double>(own);
  parts.sum_over_parts(all);
  return static_cast<std::size_t>(*std::max_element(all.begin(), all.end()));
}

// Afterwards every part has the sums of all.
void merge(Sums& sums, const SequenceParts& parts) {
  sums.loss.resize(largest_of(sums.loss.size(), parts)), sums.tokens.resize(sums.loss.size());
  std::vector<double*> places{&sums.sequences};
  for (ExactSum& sum : sums.loss) places.insert(places.end(), {&sum.coarse, &sum.fine});
  for (RangeSums& range : sums.ranges)
    places.insert(places.end(), {&range.means.coarse, &range.means.fine, &range.squares.coarse, &range.squares.fine, &range.sequences});
  std::vector<double> numbers;
  for (const double* place : places) numbers.push_back(*place);
  parts.sum_over_parts(numbers);
  parts.sum_over_parts(sums.tokens);
  for (std::size_t i = 0; i < places.size(); ++i) *places[i] = numbers[i];
}

PositionLoss result_of(const Sums& sums, std::vector<PositionSpread> ranges) {
  PositionLoss result;
  for (const ExactSum& sum : sums.loss) result.loss_sum.push_back(sum.value());
  result.tokens.assign(sums.tokens.begin(), sums.tokens.end());
  result.sequences = static_cast<int64_t>(sums.sequences);
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    const RangeSums& of = sums.ranges[i];
    if (of.sequences == 0) continue;
    ranges[i].sequences = static_cast<int64_t>(of.sequences);
    ranges[i].loss = of.means.value() / of.sequences;
    ranges[i].squares = of.squared_deviations();
  }
  result.spreads = std::move(ranges);
  return result;
}

// The next `width` tokens of every row; where a row ends earlier, zeros that the mask leaves out.
TokenBatch make_batch(const std::vector<Row>& rows, int64_t width, const Device& device) {
  const auto B = static_cast<int64_t>(rows.size());
  const auto size = static_cast<std::size_t>(B * width);
  std::vector<int32_t> tokens(size), targets(size);
  std::vector<float> mask(size);
  bool ragged = false;
  for (std::size_t b = 0; b < rows.size(); ++b) {
    const auto count = static_cast<std::size_t>(std::min(width, rows[b].left()));
    const auto from = rows[b].tokens.begin() + rows[b].at;
    const std::size_t to = b * static_cast<std::size_t>(width);
    for (std::size_t t = 0; t < count; ++t) {
      tokens[to + t] = from[static_cast<std::ptrdiff_t>(t)];
      targets[to + t] = from[static_cast<std::ptrdiff_t>(t) + 1];
      mask[to + t] = 1;
    }
    ragged = ragged || rows[b].left() < width;
  }
  TokenBatch batch{Tensor::from(device, {B, width}, tokens), Tensor::from(device, {B, width}, targets), {}};
  if (ragged) batch.mask = Tensor::from(device, {B, width}, mask);
  return batch;
}

}  // namespace

PositionLoss position_loss(const LanguageModel& model, const NextSequence& next, const PositionLossOptions& options) {
  require_at_least_one("context", options.context);
  require_at_least_one("chunk", options.chunk);
  require_at_least_one("batch", options.batch);
  const NoGrad no_grad;

  Sums sums;
  std::vector<PositionSpread> ranges = empty_spreads(options.spread_ends);
  sums.ranges.resize(ranges.size());
  EvalProgress progress;
  int64_t taken = 0;
  std::vector<Row> rows;
  for (Row row; static_cast<int64_t>(rows.size()) < options.batch && take_next(row, next, taken, model, options.context, options.parts);)
    rows.push_back(std::move(row));

  RecurrentState state;  // absent: every row starts from zeros
  while (!rows.empty()) {
    // A row that goes on after this chunk has at least `chunk` positions left, so only rows that end are padded.
    int64_t width = 0;
    for (const Row& row : rows) width = std::max(width, std::min(options.chunk, row.left()));
    LanguageModel::Loss out = model.loss(make_batch(rows, width, model.device()), state);
    const std::vector<double> token_loss = out.token_loss.to_vector<double>();
    state = std::move(out.state);

    progress.position = 0;
    for (std::size_t b = 0; b < rows.size(); ++b) {
      Row& row = rows[b];
      const int64_t count = std::min(width, row.left());
      const auto reach = static_cast<std::size_t>(row.at + count);
      if (sums.tokens.size() < reach) sums.tokens.resize(reach), sums.loss.resize(reach);
      for (int64_t t = 0; t < count; ++t) {
        const double loss = token_loss[b * static_cast<std::size_t>(width) + static_cast<std::size_t>(t)];
        if (!std::isfinite(loss))
          throw NumericError("eval: the loss is not a finite number", {{"loss", fmt::format("{}", loss)},
                                                                       {"sequence", std::to_string(row.sequence)},
                                                                       {"position", std::to_string(row.at + t + 1)},
                                                                       {"try", "LONGHAND_CHECK=1 to see which layer it comes from"}});
        sums.loss[static_cast<std::size_t>(row.at + t)].add(loss);
        ++sums.tokens[static_cast<std::size_t>(row.at + t)];
        add_to_ranges(row, row.at + t + 1, loss, ranges, sums.ranges);
      }
      row.at += count;
      progress.tokens += count;
      progress.position = std::max(progress.position, row.at);
    }

    // Rows that ended take the next sequence from the zero state; without one they leave the batch.
    std::vector<int64_t> stay;
    std::vector<uint8_t> fresh;
    std::vector<Row> running;
    for (std::size_t b = 0; b < rows.size(); ++b) {
      const bool ended = rows[b].left() == 0;
      if (ended) ++sums.sequences;
      if (ended && !take_next(rows[b], next, taken, model, options.context, options.parts)) continue;
      stay.push_back(static_cast<int64_t>(b));
      fresh.push_back(ended ? 1 : 0);
      running.push_back(std::move(rows[b]));
    }
    const bool all_fresh = std::count(fresh.begin(), fresh.end(), uint8_t{0}) == 0;
    if (all_fresh) {
      state = {};
    } else {
      if (stay.size() < rows.size()) state = state.select_rows(stay);
      if (std::count(fresh.begin(), fresh.end(), uint8_t{1}) > 0) state = state.reset_rows(fresh);
    }
    rows = std::move(running);
    progress.sequences_done = static_cast<int64_t>(sums.sequences);
    progress.sequences_running = static_cast<int64_t>(rows.size());
    if (options.progress) options.progress(progress);
  }
  if (options.parts.sum_over_parts) merge(sums, options.parts);
  return result_of(sums, std::move(ranges));
}

double ValidationLoss::bits_per_byte(int64_t bytes) const {
  if (bytes < 1) throw ValueError("eval: bits per byte need the number of bytes", {{"bytes", std::to_string(bytes)}});
  return loss * static_cast<double>(tokens) / (static_cast<double>(bytes) * std::numbers::ln2);
}

ValidationLoss validation_loss(const LanguageModel& model, const NextBatch& next, int64_t max_batches, const ValidationPart& part) {
  const NoGrad no_grad;
  std::vector<double> sums;  // of each row of each batch: loss, weight and positions
  TokenBatch batch;
  for (int64_t i = 0; i < max_batches && next(batch); ++i) {
    const int64_t rows = batch.tokens.dim(0), length = batch.tokens.dim(1), all_rows = part.all_rows > 0 ? part.all_rows : rows;
    const auto begin = static_cast<std::size_t>(3 * part.first_row) + sums.size();
    sums.resize(sums.size() + static_cast<std::size_t>(3 * all_rows));
    if (rows == 0) continue;  // the last batch has none for this process
    const std::vector<double> loss = model.loss(batch).token_loss.to_vector<double>();
    const std::vector<double> mask = batch.mask.defined() ? batch.mask.to_vector<double>() : std::vector<double>(loss.size(), 1.0);
    for (std::size_t j = 0; j < loss.size(); ++j) {
      if (mask[j] == 0) continue;
      if (!std::isfinite(loss[j]))
        throw NumericError("eval: the validation loss is not a finite number",
                           {{"loss", fmt::format("{}", loss[j])}, {"batch", std::to_string(i)}, {"element", std::to_string(j)}});
      double* const sum = &sums[begin + 3 * (j / static_cast<std::size_t>(length))];
      sum[0] += mask[j] * loss[j], sum[1] += mask[j], sum[2] += 1;
    }
  }
  if (part.sum_over_parts) part.sum_over_parts(sums);
  ValidationLoss result;
  double loss = 0, weight = 0;
  for (std::size_t i = 0; i < sums.size(); i += 3) {
    loss += sums[i], weight += sums[i + 1];
    result.tokens += static_cast<int64_t>(sums[i + 2]);
  }
  if (result.tokens == 0)
    throw ValueError("eval: no token to compute the validation loss from", {{"batches", std::to_string(max_batches)}});
  result.loss = loss / weight;
  return result;
}

}  // namespace longhand
