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

void PositionSpread::add(double sequence_loss) {
  const double before = sequence_loss - loss;
  loss += before / static_cast<double>(++sequences);
  squares += before * (sequence_loss - loss);
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
// up to 2^53 of them: sums below 2^23, of at most 2^22 numbers, whose rests are 2^-31 at most.
struct ExactSum {
  double coarse = 0, fine = 0;
  void add(double x) {
    const double whole = std::nearbyint(x * 0x1p30) * 0x1p-30;
    coarse += whole;
    fine += std::nearbyint((x - whole) * 0x1p62) * 0x1p-62;
  }
};

// Everything that is added up. The end of a sequence's range is kept until the sequences can be taken in their order.
struct Sums {
  struct RangeEnd {
    std::size_t range;
    int64_t sequence;
    double loss;  // mean over the range
  };
  std::vector<ExactSum> loss;  // by position
  std::vector<double> tokens;  // likewise; whole numbers
  std::vector<RangeEnd> ends;
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

void add_to_ranges(Row& row, int64_t position, double loss, const std::vector<PositionSpread>& ranges, std::vector<Sums::RangeEnd>& ends) {
  if (row.range == ranges.size()) return;
  const PositionSpread& range = ranges[row.range];
  row.range_sum += loss;
  if (position < range.last) return;
  ends.push_back({row.range, row.sequence, row.range_sum / static_cast<double>(range.last - range.first + 1)});
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
void merge(Sums& sums, std::size_t ranges, const SequenceParts& parts) {
  sums.loss.resize(largest_of(sums.loss.size(), parts)), sums.tokens.resize(sums.loss.size());
  std::vector<double> numbers{sums.sequences};
  for (const ExactSum& sum : sums.loss) numbers.insert(numbers.end(), {sum.coarse, sum.fine});
  parts.sum_over_parts(numbers);
  parts.sum_over_parts(sums.tokens);
  sums.sequences = numbers[0];
  for (std::size_t i = 0; i < sums.loss.size(); ++i) sums.loss[i] = {numbers[2 * i + 1], numbers[2 * i + 2]};

  // Of every range and sequence, whether it came to the end and with which mean: zeros but for the part that had it.
  int64_t last = 0;
  for (const Sums::RangeEnd& end : sums.ends) last = std::max(last, end.sequence);
  const std::size_t most = largest_of(static_cast<std::size_t>(last), parts);
  std::vector<double> there(ranges * most), means(ranges * most);
  for (const Sums::RangeEnd& end : sums.ends) {
    const std::size_t place = end.range * most + static_cast<std::size_t>(end.sequence - 1);
    there[place] = 1, means[place] = end.loss;
  }
  parts.sum_over_parts(there);
  parts.sum_over_parts(means);
  sums.ends.clear();
  for (std::size_t place = 0; place < there.size(); ++place)
    if (there[place] > 0) sums.ends.push_back({place / most, static_cast<int64_t>(place % most) + 1, means[place]});
}

PositionLoss result_of(Sums sums, std::vector<PositionSpread> ranges) {
  PositionLoss result;
  for (const ExactSum& sum : sums.loss) result.loss_sum.push_back(sum.coarse + sum.fine);
  result.tokens.assign(sums.tokens.begin(), sums.tokens.end());
  result.sequences = static_cast<int64_t>(sums.sequences);
  result.spreads = std::move(ranges);
  std::sort(sums.ends.begin(), sums.ends.end(), [](const Sums::RangeEnd& a, const Sums::RangeEnd& b) {
    return a.range != b.range ? a.range < b.range : a.sequence < b.sequence;
  });
  for (const Sums::RangeEnd& end : sums.ends) result.spreads[end.range].add(end.loss);
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
        add_to_ranges(row, row.at + t + 1, loss, ranges, sums.ends);
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
  if (options.parts.sum_over_parts) merge(sums, ranges.size(), options.parts);
  return result_of(std::move(sums), std::move(ranges));
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
