// See remembrance.h.
#include "eval/remembrance.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "autograd/tape.h"
#include "core/error.h"
#include "eval/csv_table.h"

namespace longhand {
namespace {

constexpr Distance kDistances[] = {Distance::total_variation, Distance::jensen_shannon, Distance::cosine};
constexpr const char* kHeader = "start,lag,sequences,mean,standard_error";

double total_variation(std::span<const double> p, std::span<const double> q) {
  double sum = 0;
  for (std::size_t v = 0; v < p.size(); ++v) sum += std::abs(p[v] - q[v]);
  return sum / 2;
}

double jensen_shannon(std::span<const double> p, std::span<const double> q) {
  const auto towards = [](double a, double m) { return a > 0 ? a * std::log2(a / m) : 0.0; };
  double sum = 0;
  for (std::size_t v = 0; v < p.size(); ++v) {
    const double m = (p[v] + q[v]) / 2;
    sum += towards(p[v], m) + towards(q[v], m);
  }
  return std::clamp(sum / 2, 0.0, 1.0);  // rounding may step over the ends
}

double cosine_distance(std::span<const double> p, std::span<const double> q) {
  double pq = 0, pp = 0, qq = 0;
  for (std::size_t v = 0; v < p.size(); ++v) pq += p[v] * q[v], pp += p[v] * p[v], qq += q[v] * q[v];
  return std::clamp(1 - pq / std::sqrt(pp * qq), 0.0, 1.0);
}

// Next-token distributions after token T of the rows of `rows`, once for each start: [starts][rows], each from the zero state at its start.
class SuffixRunner {
 public:
  SuffixRunner(const LanguageModel& model, const RemembranceOptions& options) : model_(model), options_(options) {}

  std::vector<std::vector<double>> run(const TokenRows& rows, std::span<const int64_t> starts, EvalProgress& progress) const {
    const int64_t T = options_.context;
    RecurrentState state;
    Tensor hidden;
    int64_t at = starts.front(), joined = 0;
    while (at < T) {
      if (joined < static_cast<int64_t>(starts.size()) && starts[static_cast<std::size_t>(joined)] == at) {
        const RecurrentState fresh = model_.zero_state(rows.count());
        state = joined == 0 ? fresh : RecurrentState::concatenate({state, fresh});
        ++joined;
      }
      int64_t end = std::min(at + options_.chunk, T);
      if (joined < static_cast<int64_t>(starts.size())) end = std::min(end, starts[static_cast<std::size_t>(joined)]);
      auto out = model_.forward(rows.block(model_.device(), at, end, joined), state);
      if (end == T) hidden = out.hidden.value().slice(1, end - at - 1, end - at).contiguous();
      state = std::move(out.state);
      progress.tokens += joined * rows.count() * (end - at);
      progress.position = at = end;
      if (options_.progress) options_.progress(progress);
    }
    const std::vector<double> logits = model_.logits(hidden).to_vector<double>();
    const std::size_t count = starts.size() * static_cast<std::size_t>(rows.count()), V = logits.size() / count;
    std::vector<std::vector<double>> distributions;
    for (std::size_t i = 0; i < count; ++i) {
      try {
        distributions.push_back(softmax(std::span(logits).subspan(i * V, V)));
      } catch (const NumericError& error) {
        const auto S = static_cast<std::size_t>(rows.count());
        throw NumericError("eval: a logit is not a finite number",
                           {{"sequence", std::to_string(rows.first_sequence() + static_cast<int64_t>(i % S))},
                            {"tokens", fmt::format("{} to {}", starts[i / S], T)},
                            {"try", "LONGHAND_CHECK=1 to see which layer it comes from"}});
      }
    }
    return distributions;
  }

 private:
  const LanguageModel& model_;
  const RemembranceOptions& options_;
};

void require_options(const RemembranceOptions& o) {
  require_at_least_one("context", o.context);
  require_at_least_one("chunk", o.chunk);
  require_at_least_one("batch", o.batch);
  if (o.starts.empty()) throw ValueError("eval: no start to compare with the whole context", {{"context", std::to_string(o.context)}});
  for (std::size_t i = 0; i < o.starts.size(); ++i)
    if (o.starts[i] < 0 || o.starts[i] >= o.context || (i > 0 && o.starts[i] <= o.starts[i - 1]))
      throw ValueError("eval: starts must rise and lie before the end of the context",
                       {{"start", std::to_string(o.starts[i])}, {"context", std::to_string(o.context)}});
}

}  // namespace

Distance parse_distance(const std::string& text) {
  for (const Distance distance : kDistances)
    if (text == name_of(distance)) return distance;
  throw ConfigError("eval: unknown distance", {{"distance", text}, {"expected", "tv, js or cosine"}});
}

const char* name_of(Distance distance) {
  return distance == Distance::total_variation ? "tv" : distance == Distance::jensen_shannon ? "js" : "cosine";
}

const char* title_of(Distance distance) {
  return distance == Distance::total_variation  ? "total variation"
         : distance == Distance::jensen_shannon ? "Jensen-Shannon divergence in bits"
                                                : "cosine distance";
}

double distance_between(Distance distance, std::span<const double> p, std::span<const double> q) {
  if (p.size() != q.size())
    throw ShapeError("eval: distributions over different vocabularies", {{"p", std::to_string(p.size())}, {"q", std::to_string(q.size())}});
  switch (distance) {
    case Distance::total_variation:
      return total_variation(p, q);
    case Distance::jensen_shannon:
      return jensen_shannon(p, q);
    case Distance::cosine:
      break;
  }
  return cosine_distance(p, q);
}

std::vector<double> softmax(std::span<const double> logits) {
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const double logit : logits) {
    if (!std::isfinite(logit)) throw NumericError("eval: a logit is not a finite number", {{"logit", fmt::format("{}", logit)}});
    largest = std::max(largest, logit);
  }
  std::vector<double> p(logits.size());
  for (std::size_t v = 0; v < p.size(); ++v) sum += p[v] = std::exp(logits[v] - largest);
  for (double& value : p) value /= sum;
  return p;
}

double Remembrance::mean(std::size_t i) const {
  double sum = 0;
  for (const double value : values[i]) sum += value;
  return sum / static_cast<double>(values[i].size());
}

double Remembrance::standard_error(std::size_t i) const {
  const auto n = static_cast<double>(values[i].size());
  if (n < 2) return std::numeric_limits<double>::quiet_NaN();
  const double middle = mean(i);
  double squares = 0;
  for (const double value : values[i]) squares += (value - middle) * (value - middle);
  return std::sqrt(squares / (n - 1) / n);
}

Remembrance effective_remembrance(const LanguageModel& model, const NextSequence& next, const RemembranceOptions& options) {
  require_options(options);
  const NoGrad no_grad;
  Remembrance result{options.context, options.starts, std::vector<std::vector<double>>(options.starts.size()), 0};
  std::vector<int64_t> starts = options.starts;
  if (starts.front() > 0) starts.insert(starts.begin(), 0);  // the whole context, which all are compared with
  const std::size_t first_measured = starts.size() - options.starts.size();

  // Where all suffixes of a sequence fit, several sequences run at once; else one sequence, its suffixes in groups of neighbours.
  const auto all = static_cast<int64_t>(starts.size());
  const int64_t at_once = std::max<int64_t>(1, options.batch / all);
  const SuffixRunner runner(model, options);
  EvalProgress progress;
  int64_t taken = 0;
  for (;;) {
    const TokenRows rows = TokenRows::take(next, at_once, options.context, model.config().vocab_size, taken);
    if (rows.empty()) break;
    progress.sequences_running = rows.count();
    const auto S = static_cast<std::size_t>(rows.count());
    std::vector<std::vector<double>> whole;  // [S] after the whole context
    for (std::size_t begin = 0; begin < starts.size();) {
      const std::size_t count = std::min(starts.size() - begin, static_cast<std::size_t>(options.batch));
      auto q = runner.run(rows, std::span(starts).subspan(begin, count), progress);
      if (begin == 0) whole.assign(q.begin(), q.begin() + static_cast<std::ptrdiff_t>(S));
      for (std::size_t i = begin; i < begin + count; ++i)
        for (std::size_t s = 0; s < S && i >= first_measured; ++s)
          result.values[i - first_measured].push_back(
              starts[i] == 0 ? 0.0 : distance_between(options.distance, whole[s], q[(i - begin) * S + s]));
      begin += count;
    }
    progress.sequences_done += rows.count();
    progress.sequences_running = 0;
  }
  result.tokens = progress.tokens;
  return result;
}

std::string remembrance_csv(const Remembrance& r) {
  std::string text = std::string(kHeader) + "\n";
  for (std::size_t i = 0; i < r.starts.size(); ++i)
    fmt::format_to(std::back_inserter(text), "{},{},{},{:.9g},{:.9g}\n", r.starts[i], r.context - r.starts[i], r.sequences(), r.mean(i),
                   r.standard_error(i));
  return text;
}

std::vector<RemembrancePoint> read_remembrance_csv(const std::string& path) {
  std::vector<RemembrancePoint> points;
  read_csv(path, kHeader, [&](const CsvRow& row) {
    RemembrancePoint point{row.count(0), row.count(1), row.count(2), row.finite(3), row.number(4)};
    if (!points.empty() && point.start <= points.back().start) row.refuse("the starts do not rise");
    points.push_back(point);
  });
  return points;
}

}  // namespace longhand
