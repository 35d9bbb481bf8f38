// See state_statistics.h.
#include "eval/state_statistics.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <tuple>

#include "autograd/tape.h"
#include "core/error.h"
#include "eval/csv_table.h"

namespace longhand {
namespace {

constexpr const char* kHistogramHeader = "position,tensor,layer,magnitude_from,magnitude_to,negative,positive";
constexpr const char* kHeader = "position,tensor,layer,head,sequences,mean,std,std_error,norm,max_abs";

// Sums over sequences of a line's values.
struct Sums {
  int64_t sequences = 0;
  double mean = 0, std = 0, std_squares = 0, norm = 0, max_abs = 0;

  void add(double mean_, double std_, double norm_, double max_abs_) {
    ++sequences;
    mean += mean_, std += std_, std_squares += std_ * std_, norm += norm_, max_abs += max_abs_;
  }
  void add(const Moments& m) { add(m.mean, m.std(), m.norm(), m.max_abs); }
};

// Sums and numbers last, so that lines come out in the order of the page: 0, 1, ... mean, all.
int64_t order(int64_t number) {
  return number >= 0 ? number : std::numeric_limits<int64_t>::max() + number;
}

struct LineKey {
  int64_t position;
  std::string tensor;
  int64_t layer, head;
  bool operator<(const LineKey& other) const {
    return std::tuple(position, tensor, order(layer), order(head)) <
           std::tuple(other.position, other.tensor, order(other.layer), order(other.head));
  }
};

class Collector {
 public:
  explicit Collector(const StateCurveOptions& options) : options_(options) {}

  void take(const RecurrentState& state, int64_t position, const TokenRows& rows) {
    const bool statistics = std::binary_search(options_.positions.begin(), options_.positions.end(), position),
               histogram = std::binary_search(options_.histograms.begin(), options_.histograms.end(), position);
    struct OfModel {
      Moments all;
      std::vector<Moments> layers;
    };
    std::map<std::string, std::vector<OfModel>> whole;  // by tensor, by row
    for (std::size_t layer = 0; layer < state.layers().size(); ++layer)
      for (const auto& [name, variable] : state.layers()[layer]) {
        if (is_conv_window(name) && !options_.conv_windows) continue;
        const Tensor& t = variable.value();
        const std::vector<double> values = t.to_vector<double>();
        const auto B = static_cast<std::size_t>(t.dim(0)), heads = t.rank() == 4 ? static_cast<std::size_t>(t.dim(1)) : 1;
        const std::size_t inner = values.size() / (B * heads);
        auto& models = whole[name];
        models.resize(B);
        for (std::size_t b = 0; b < B; ++b) {
          Moments of_layer;
          for (std::size_t h = 0; h < heads; ++h) {
            const Moments of_head = moments_of(values.data() + (b * heads + h) * inner, inner);
            if (!std::isfinite(of_head.squares) || !std::isfinite(of_head.mean))
              throw NumericError("eval: the state is not finite",
                                 {{"tensor", fmt::format("layers.{}.{}, head {}", layer, name, h)},
                                  {"sequence", std::to_string(rows.first_sequence() + static_cast<int64_t>(b))},
                                  {"position", std::to_string(position)},
                                  {"try", "LONGHAND_CHECK=1 to see where it begins"}});
            of_layer.merge(of_head);
            if (statistics && heads > 1) sums_[{position, name, static_cast<int64_t>(layer), static_cast<int64_t>(h)}].add(of_head);
          }
          if (statistics) sums_[{position, name, static_cast<int64_t>(layer), kAllHeads}].add(of_layer);
          models[b].all.merge(of_layer);
          models[b].layers.push_back(of_layer);
        }
        if (!histogram) continue;
        auto &of_layer = histograms_[{position, name, static_cast<int64_t>(layer)}], &of_all = histograms_[{position, name, kAllLayers}];
        for (const double value : values) of_layer.add(value), of_all.add(value);
      }
    if (!statistics) return;
    for (const auto& [name, models] : whole)
      for (const OfModel& model : models) {
        sums_[{position, name, kAllLayers, kAllHeads}].add(model.all);
        double mean = 0, std = 0, norm = 0, max_abs = 0;
        for (const Moments& m : model.layers) mean += m.mean, std += m.std(), norm += m.norm(), max_abs += m.max_abs;
        const auto n = static_cast<double>(model.layers.size());
        sums_[{position, name, kMeanOfLayers, kAllHeads}].add(mean / n, std / n, norm / n, max_abs / n);
      }
  }

  StateCurve finish() {
    StateCurve curve;
    for (const auto& [key, s] : sums_) {
      const auto n = static_cast<double>(s.sequences);
      const double variance = n < 2 ? std::numeric_limits<double>::quiet_NaN() : std::max(0.0, s.std_squares - s.std * s.std / n) / (n - 1);
      curve.lines.push_back({key.position, key.tensor, key.layer, key.head, s.sequences, s.mean / n, s.std / n, std::sqrt(variance / n),
                             s.norm / n, s.max_abs / n});
    }
    curve.histograms = std::move(histograms_);
    return curve;
  }

 private:
  const StateCurveOptions& options_;
  std::map<LineKey, Sums> sums_;
  std::map<StateHistogramKey, MagnitudeHistogram> histograms_;
};

void require_positions(const std::vector<int64_t>& positions, int64_t context) {
  for (std::size_t i = 0; i < positions.size(); ++i)
    if (positions[i] < 1 || positions[i] > context || (i > 0 && positions[i] <= positions[i - 1]))
      throw ValueError("eval: positions must rise and lie in the context",
                       {{"position", std::to_string(positions[i])}, {"expected", fmt::format("1 to {}", context)}});
}

std::string layer_text(int64_t layer) {
  return layer == kAllLayers ? "all" : layer == kMeanOfLayers ? "mean" : std::to_string(layer);
}
std::string head_text(int64_t head) {
  return head == kAllHeads ? "all" : std::to_string(head);
}

}  // namespace

Moments moments_of(const double* values, std::size_t count) {
  Moments m;
  m.count = static_cast<double>(count);
  if (count == 0) return m;
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += values[i], m.max_abs = std::max(m.max_abs, std::abs(values[i]));
  m.mean = sum / m.count;
  for (std::size_t i = 0; i < count; ++i) m.squares += (values[i] - m.mean) * (values[i] - m.mean);
  return m;
}

void Moments::merge(const Moments& other) {
  if (other.count == 0) return;
  const double all = count + other.count, apart = other.mean - mean;
  squares += other.squares + apart * apart * count * other.count / all;
  mean += apart * other.count / all;
  count = all;
  max_abs = std::max(max_abs, other.max_abs);
}

double Moments::std() const {
  return count == 0 ? 0 : std::sqrt(squares / count);
}
double Moments::norm() const {
  return std::sqrt(squares + count * mean * mean);
}

void MagnitudeHistogram::add(double value) {
  int exponent = 0;
  std::frexp(value, &exponent);  // |value| = m 2^exponent, 1/2 <= m < 1
  const int bin = value == 0 ? 0 : std::clamp(exponent - kLowest, 0, kBins - 1);
  ++(value < 0 ? negative : positive)[static_cast<std::size_t>(bin)];
}
double MagnitudeHistogram::from(int bin) {
  return bin == 0 ? 0 : std::exp2(bin - 1 + kLowest);
}
double MagnitudeHistogram::to(int bin) {
  return bin == kBins - 1 ? std::numeric_limits<double>::infinity() : std::exp2(bin + kLowest);
}

StateCurve state_curve(const LanguageModel& model, const NextSequence& next, const StateCurveOptions& options) {
  require_at_least_one("context", options.context);
  require_at_least_one("chunk", options.chunk);
  require_at_least_one("batch", options.batch);
  require_positions(options.positions, options.context);
  require_positions(options.histograms, options.context);
  std::vector<int64_t> stops;
  std::set_union(options.positions.begin(), options.positions.end(), options.histograms.begin(), options.histograms.end(),
                 std::back_inserter(stops));
  if (stops.empty()) throw ValueError("eval: no position to look at", {{"context", std::to_string(options.context)}});

  const NoGrad no_grad;
  Collector collector(options);
  EvalProgress progress;
  int64_t taken = 0;
  for (;;) {
    const TokenRows rows = TokenRows::take(next, options.batch, options.context, model.config().vocab_size, taken);
    if (rows.empty()) break;
    progress.sequences_running = rows.count();
    RecurrentState state;
    int64_t at = 0;
    for (const int64_t stop : stops) {
      while (at < stop) {
        const int64_t end = std::min(at + options.chunk, stop);
        state = model.forward(rows.block(model.device(), at, end), state).state;
        progress.tokens += rows.count() * (end - at);
        progress.position = at = end;
        if (options.progress) options.progress(progress);
      }
      collector.take(state, stop, rows);
    }
    progress.sequences_done += rows.count();
  }
  StateCurve curve = collector.finish();
  curve.sequences = taken;
  curve.tokens = progress.tokens;
  return curve;
}

std::string state_csv(const StateCurve& curve) {
  std::string text = std::string(kHeader) + "\n";
  for (const StateLine& l : curve.lines)
    fmt::format_to(std::back_inserter(text), "{},{},{},{},{},{:.9g},{:.9g},{:.9g},{:.9g},{:.9g}\n", l.position, l.tensor,
                   layer_text(l.layer), head_text(l.head), l.sequences, l.mean, l.std, l.std_error, l.norm, l.max_abs);
  return text;
}

std::string state_histogram_csv(const StateCurve& curve) {
  std::string text = std::string(kHistogramHeader) + "\n";
  for (const auto& [key, histogram] : curve.histograms)
    for (int bin = 0; bin < MagnitudeHistogram::kBins; ++bin) {
      const auto i = static_cast<std::size_t>(bin);
      if (histogram.negative[i] + histogram.positive[i] == 0) continue;
      fmt::format_to(std::back_inserter(text), "{},{},{},{:.9g},{:.9g},{},{}\n", key.position, key.tensor, layer_text(key.layer),
                     MagnitudeHistogram::from(bin), MagnitudeHistogram::to(bin), histogram.negative[i], histogram.positive[i]);
    }
  return text;
}

std::vector<StateLine> read_state_csv(const std::string& path) {
  std::vector<StateLine> lines;
  read_csv(path, kHeader, [&](const CsvRow& row) {
    const int64_t layer = row.text(2) == "all" ? kAllLayers : row.text(2) == "mean" ? kMeanOfLayers : row.count(2);
    const int64_t head = row.text(3) == "all" ? kAllHeads : row.count(3);
    lines.push_back({row.count(0), std::string(row.text(1)), layer, head, row.count(4), row.finite(5), row.finite(6), row.number(7),
                     row.finite(8), row.finite(9)});
  });
  return lines;
}

std::map<StateHistogramKey, MagnitudeHistogram> read_state_histogram_csv(const std::string& path) {
  std::map<StateHistogramKey, MagnitudeHistogram> histograms;
  read_csv(path, kHistogramHeader, [&](const CsvRow& row) {
    const double from = row.finite(3);
    int bin = 0;
    while (bin < MagnitudeHistogram::kBins && MagnitudeHistogram::from(bin) < from * (1 - 1e-6)) ++bin;  // as written with nine digits
    if (bin == MagnitudeHistogram::kBins || std::abs(MagnitudeHistogram::from(bin) - from) > from * 1e-6)
      row.refuse(fmt::format("{} is not the lower end of an octave", row.text(3)));
    const int64_t layer = row.text(2) == "all" ? kAllLayers : row.count(2);
    MagnitudeHistogram& histogram = histograms[{row.count(0), std::string(row.text(1)), layer}];
    histogram.negative[static_cast<std::size_t>(bin)] = row.count(5);
    histogram.positive[static_cast<std::size_t>(bin)] = row.count(6);
  });
  return histograms;
}

}  // namespace longhand
