// See forgetting.h.
#include "eval/forgetting.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "autograd/tape.h"
#include "core/error.h"
#include "eval/csv_table.h"
#include "models/decay.h"

namespace longhand {
namespace {

constexpr int64_t kLeastStride = 16;  // tokens between the beginnings of short windows: each costs an exponential an entry
constexpr double kLargestRate = 1e6;  // stands for infinity, so that differences of sums stay numbers
constexpr const char* kHeader = "layer,head,half_life,tenth_life,reach_50,reach_90,retention_at_end";

// Windows of a lag are the tokens [m stride, m stride + lag).
int64_t stride_of(int64_t lag) {
  return std::max(lag, kLeastStride);
}

// The first multiple of `stride`, moved by `offset`, that is at least `least`.
int64_t first_at_least(int64_t least, int64_t stride, int64_t offset) {
  return least <= offset ? offset : offset + (least - offset + stride - 1) / stride * stride;
}

// One piece of a retention curve: from lag `begin`, where it is `at_begin`, falling by `log_slope` a lag, to lag `end`.
struct Piece {
  double begin, end, at_begin, log_slope;

  // The sum of retention over the lags begin, begin + 1, .. begin + n - 1 (n need not be whole).
  double sum(double n) const {
    return std::abs(log_slope) < 1e-14 ? at_begin * n : at_begin * std::expm1(n * log_slope) / std::expm1(log_slope);
  }
  // The n with sum(n) = s.
  double lags_for(double s) const {
    return std::abs(log_slope) < 1e-14 ? s / at_begin : std::log1p(s / at_begin * std::expm1(log_slope)) / log_slope;
  }
};

std::vector<Piece> pieces_of(const RetentionCurve& curve) {
  constexpr double kLeast = 1e-300;  // stands for 0, whose logarithm is no number
  std::vector<Piece> pieces;
  double begin = 0, at_begin = 1;
  for (std::size_t i = 0; i < curve.lags.size(); ++i) {
    const auto end = static_cast<double>(curve.lags[i]);
    const double at_end = std::max(curve.retention[i], kLeast);
    pieces.push_back({begin, end, at_begin, (std::log(at_end) - std::log(at_begin)) / (end - begin)});
    begin = end, at_begin = at_end;
  }
  return pieces;
}

// The windows of one layer, over all sequences.
class LayerWindows {
 public:
  explicit LayerWindows(const std::vector<int64_t>& lags) : lags_(lags) {}

  // Tokens [at, at + decay.tokens) of every row; at 0 the rows begin.
  void take(const Decay& decay, int64_t at) {
    const std::size_t B = static_cast<std::size_t>(decay.rows), K = lags_.size();
    if (units_ == 0) {
      heads_ = decay.heads, units_ = decay.units, entries_ = decay.entries, A_ = decay.A;
      kept_.assign(K * static_cast<std::size_t>(units_), 0.0);
    }
    if (at == 0) {
      sum_.assign(B * static_cast<std::size_t>(units_), 0.0);
      at_begin_.assign(B * K * static_cast<std::size_t>(units_), 0.0);
    }
#pragma omp parallel
    {
      std::vector<double> sums(static_cast<std::size_t>(decay.tokens + 1) * kBlock);
#pragma omp for schedule(static)
      for (int64_t u = 0; u < units_; u += kBlock)
        for (int64_t b = 0; b < decay.rows; ++b) take_units(decay, at, b, u, std::min(u + kBlock, units_), sums);
    }
  }

  // Retention by lag and head: [heads][lags].
  std::vector<std::vector<double>> finish(const std::vector<int64_t>& windows) const {
    const int64_t per_head = units_ / heads_;
    std::vector<std::vector<double>> retention(static_cast<std::size_t>(heads_), std::vector<double>(lags_.size()));
    for (int64_t u = 0; u < units_; ++u)
      for (std::size_t i = 0; i < lags_.size(); ++i)
        retention[static_cast<std::size_t>(u / per_head)][i] += kept_[i * static_cast<std::size_t>(units_) + static_cast<std::size_t>(u)] /
                                                                static_cast<double>(windows[i] * per_head * entries_);
    return retention;
  }

 private:
  static constexpr int64_t kBlock = 8;  // units side by side: a cache line of rates

  // One row and the units [begin, end); `sums` is scratch for the sums of rates before each token, and behind the last.
  void take_units(const Decay& decay, int64_t at, int64_t b, int64_t begin, int64_t end, std::vector<double>& sums) {
    const auto width = static_cast<std::size_t>(end - begin), U = static_cast<std::size_t>(units_), first = static_cast<std::size_t>(begin);
    double* const sum = sum_.data() + static_cast<std::size_t>(b) * U + first;
    const double* rate = decay.rate.data() + static_cast<std::size_t>(b * decay.tokens) * U + first;
    for (int64_t t = 0; t <= decay.tokens; ++t, rate += U) {
      std::copy(sum, sum + width, sums.begin() + t * kBlock);
      for (std::size_t j = 0; j < width && t < decay.tokens; ++j) sum[j] += std::min(rate[j], kLargestRate);
    }
    const int64_t last = at + decay.tokens;
    for (std::size_t i = 0; i < lags_.size(); ++i) {
      const int64_t lag = lags_[i], stride = stride_of(lag);
      double* const opened = at_begin_.data() + (static_cast<std::size_t>(b) * lags_.size() + i) * U + first;
      double* const kept = kept_.data() + i * U + first;
      // Windows open in [at, last) and close in (at, last], one after the other.
      int64_t open = first_at_least(at, stride, 0), close = first_at_least(at + 1, stride, lag);
      while (open < last || close <= last) {
        if (open < last && open < close) {
          std::copy_n(sums.begin() + (open - at) * kBlock, width, opened);
          open += stride;
          continue;
        }
        for (std::size_t j = 0; j < width; ++j)
          kept[j] += kept_of(sums[static_cast<std::size_t>(close - at) * kBlock + j] - opened[j], first + j);
        close += stride;
      }
    }
  }

  // What is left after rates of this sum, summed over the unit's entries.
  double kept_of(double rates, std::size_t unit) const {
    double sum = 0;
    for (std::size_t n = 0; n < static_cast<std::size_t>(entries_); ++n)
      sum += std::exp(-rates * A_[unit * static_cast<std::size_t>(entries_) + n]);
    return sum;
  }

  const std::vector<int64_t>& lags_;
  int64_t heads_ = 0, units_ = 0, entries_ = 0;
  std::vector<double> A_;
  std::vector<double> kept_;      // [lags, units] sums over windows and entries
  std::vector<double> sum_;       // [rows, units] of rates since the row's first token
  std::vector<double> at_begin_;  // [rows, lags, units] that sum where the open window began
};

void require_numbers(const Decay& decay, std::size_t layer, int64_t at) {
  for (std::size_t i = 0; i < decay.rate.size(); ++i)
    if (!(decay.rate[i] >= 0))
      throw NumericError("eval: a decay is no number",
                         {{"layer", std::to_string(layer)},
                          {"token", std::to_string(at + static_cast<int64_t>(i) / decay.units % decay.tokens)},
                          {"try", "LONGHAND_CHECK=1 to see where it comes from"}});
}

void require_lags(const ForgettingOptions& o) {
  require_at_least_one("context", o.context);
  require_at_least_one("chunk", o.chunk);
  require_at_least_one("batch", o.batch);
  if (o.lags.empty()) throw ValueError("eval: no lag to look at", {{"context", std::to_string(o.context)}});
  for (std::size_t i = 0; i < o.lags.size(); ++i)
    if (o.lags[i] < 1 || o.lags[i] > o.context || (i > 0 && o.lags[i] <= o.lags[i - 1]))
      throw ValueError("eval: lags must rise and lie in the context",
                       {{"lag", std::to_string(o.lags[i])}, {"expected", fmt::format("1 to {}", o.context)}});
}

std::vector<double> mean_of(const std::vector<std::vector<double>>& curves) {
  std::vector<double> mean(curves.front().size());
  for (const auto& curve : curves)
    for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += curve[i] / static_cast<double>(curves.size());
  return mean;
}

std::string number_or_mean(int64_t number) {
  return number < 0 ? "mean" : std::to_string(number);
}

}  // namespace

double RetentionCurve::life(double level) const {
  for (const Piece& piece : pieces_of(*this)) {
    const double at_end = piece.at_begin * std::exp((piece.end - piece.begin) * piece.log_slope);
    if (at_end <= level * (1 + 1e-12)) return piece.begin + std::log(level / piece.at_begin) / piece.log_slope;
  }
  return std::numeric_limits<double>::infinity();
}

double RetentionCurve::reach(double share) const {
  const std::vector<Piece> pieces = pieces_of(*this);
  double total = 0, before = 0;
  for (const Piece& piece : pieces) total += piece.sum(piece.end - piece.begin);
  for (const Piece& piece : pieces) {
    const double sum = piece.sum(piece.end - piece.begin);
    if (before + sum >= share * total) return std::min(piece.begin + piece.lags_for(share * total - before), piece.end);
    before += sum;
  }
  return pieces.empty() ? 0 : pieces.back().end;
}

Forgetting forgetting(const LanguageModel& model, const NextSequence& next, const ForgettingOptions& options) {
  require_lags(options);
  const NoGrad no_grad;
  std::vector<LayerWindows> layers;
  std::size_t layer = 0;
  int64_t at = 0;
  const DecayScope scope([&](const Decay& decay) {
    require_numbers(decay, layer, at);
    if (layers.size() == layer) layers.emplace_back(options.lags);
    layers[layer++].take(decay, at);
  });
  Forgetting result;
  EvalProgress progress;
  for (;;) {
    const TokenRows rows = TokenRows::take(next, options.batch, options.context, model.config().vocab_size, result.sequences);
    if (rows.empty()) break;
    progress.sequences_running = rows.count();
    RecurrentState state;
    for (at = 0; at < options.context;) {
      const int64_t end = std::min(at + options.chunk, options.context);
      layer = 0;
      state = model.forward(rows.block(model.device(), at, end), state).state;
      progress.tokens += rows.count() * (end - at);
      progress.position = at = end;
      if (options.progress) options.progress(progress);
    }
    progress.sequences_done += rows.count();
  }
  result.tokens = progress.tokens;
  for (const int64_t lag : options.lags) result.windows.push_back(result.sequences * ((options.context - lag) / stride_of(lag) + 1));
  std::vector<std::vector<double>> layer_means;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const auto heads = layers[i].finish(result.windows);
    for (std::size_t h = 0; h < heads.size(); ++h)
      result.heads.push_back({static_cast<int64_t>(i), static_cast<int64_t>(h), {options.lags, heads[h]}});
    layer_means.push_back(mean_of(heads));
    if (heads.size() > 1) result.heads.push_back({static_cast<int64_t>(i), -1, {options.lags, layer_means.back()}});
  }
  if (!layer_means.empty()) result.heads.push_back({-1, -1, {options.lags, mean_of(layer_means)}});
  return result;
}

std::string forgetting_csv(const Forgetting& forgetting) {
  std::string text = std::string(kHeader) + "\n";
  for (const auto& [layer, head, curve] : forgetting.heads)
    fmt::format_to(std::back_inserter(text), "{},{},{:.6g},{:.6g},{:.6g},{:.6g},{:.9g}\n", number_or_mean(layer), number_or_mean(head),
                   curve.life(0.5), curve.life(0.1), curve.reach(0.5), curve.reach(0.9), curve.retention.back());
  return text;
}

std::string retention_csv(const Forgetting& forgetting) {
  std::string text = "layer,head,lag,windows,retention\n";
  for (const auto& [layer, head, curve] : forgetting.heads)
    for (std::size_t i = 0; i < curve.lags.size(); ++i)
      fmt::format_to(std::back_inserter(text), "{},{},{},{},{:.9g}\n", number_or_mean(layer), number_or_mean(head), curve.lags[i],
                     forgetting.windows[i], curve.retention[i]);
  return text;
}

std::vector<ForgettingLine> read_forgetting_csv(const std::string& path) {
  std::vector<ForgettingLine> lines;
  read_csv(path, kHeader, [&](const CsvRow& row) {
    const auto number = [&](std::size_t column) { return row.text(column) == "mean" ? int64_t{-1} : row.count(column); };
    lines.push_back({number(0), number(1), row.number(2), row.number(3), row.finite(4), row.finite(5), row.finite(6)});
  });
  return lines;
}

}  // namespace longhand
