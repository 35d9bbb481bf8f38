// Effective remembrance: how much a model's next-token distribution still depends on tokens that are long past.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "eval/token_rows.h"
#include "models/language_model.h"

namespace longhand {

/// How far two distributions over the vocabulary are apart; each is 0 for equal ones and at most 1.
enum class Distance {
  total_variation,  // 1/2 sum_v |p_v - q_v|
  jensen_shannon,   // 1/2 KL(p | m) + 1/2 KL(q | m) in bits, m = (p + q) / 2
  cosine,           // 1 - <p, q> / (|p| |q|)
};

/// "tv", "js" or "cosine". errors  ConfigError naming these
Distance parse_distance(const std::string& text);
const char* name_of(Distance distance);   // as parsed
const char* title_of(Distance distance);  // "total variation"

/// p, q      [V] each sums to 1
/// errors    ShapeError for different sizes
double distance_between(Distance distance, std::span<const double> p, std::span<const double> q);

/// softmax in f64, the largest logit subtracted first. errors  NumericError for a logit that is no finite number
std::vector<double> softmax(std::span<const double> logits);

struct RemembranceOptions {
  int64_t context = 2048;       // T
  std::vector<int64_t> starts;  // t, each in [0, T), rising
  Distance distance = Distance::total_variation;
  int64_t chunk = 2048;  // tokens of a row in one forward
  int64_t batch = 32;    // rows at once: the suffixes of one sequence, and more sequences while they fit
  EvalProgressCall progress = {};
};

struct Remembrance {
  int64_t context = 0;
  std::vector<int64_t> starts;
  std::vector<std::vector<double>> values;  // [starts][sequences]
  int64_t tokens = 0;                       // read by the model

  int64_t sequences() const { return values.empty() ? 0 : static_cast<int64_t>(values.front().size()); }
  double mean(std::size_t i) const;
  /// Standard error of the mean over sequences; NaN for fewer than two.
  double standard_error(std::size_t i) const;
};

/// EffRem_T(t) = distance(q(. | x[0:T]), q(. | x[t:T])): the distribution after the whole context, and after its end from the zero state.
///   q = softmax over the rows of the head, as in the loss;  EffRem_T(0) = 0, and nothing is run for it
/// next     sequences of at least T tokens; the first T count
/// scheme   the suffixes of a sequence are rows that all end at T and so read the same tokens at the same time. The whole context starts;
///          where a start is reached its row joins from the zero state, so that every row reads its own tokens and no others:
///          T + sum over starts > 0 of (T - t) tokens a sequence
/// memory   of the device: one chunk of batch rows and their state, whatever the context
/// holds    chunk and batch do not change the result, but for the rounding of the model
/// errors   ValueError for starts outside [0, T) or not rising, a shorter sequence, a token outside the vocabulary; NumericError for
///          logits that are no finite numbers
/// source   Buitrago Ruiz & Gu 2025, arXiv:2507.02782
Remembrance effective_remembrance(const LanguageModel& model, const NextSequence& next, const RemembranceOptions& options);

/// "start,lag,sequences,mean,standard_error" and one line a start; lag = T - start, the tokens that the suffix holds.
std::string remembrance_csv(const Remembrance& remembrance);

struct RemembrancePoint {
  int64_t start = 0, lag = 0, sequences = 0;
  double mean = 0, standard_error = 0;
};
/// errors   FileError naming file, line and reason
std::vector<RemembrancePoint> read_remembrance_csv(const std::string& path);

}  // namespace longhand
