// The size of the recurrent state by position: what grows beyond the training length when a model fails there.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "eval/token_rows.h"
#include "models/language_model.h"

namespace longhand {

/// Count, mean, squared deviations and largest magnitude of numbers; two of them merge to that of all numbers, in f64.
struct Moments {
  double count = 0, mean = 0, squares = 0, max_abs = 0;  // squares: sum of (value - mean)^2

  void merge(const Moments& other);
  double std() const;   // population
  double norm() const;  // sqrt(sum of value^2)
};
Moments moments_of(const double* values, std::size_t count);

/// Magnitudes in octaves, the same for every model and position: bin 0 holds |h| < 2^-30, bin i 2^(i-31) <= |h| < 2^(i-30), the last all
/// from 2^30 on; negative values and values from 0 on are counted apart.
struct MagnitudeHistogram {
  static constexpr int kLowest = -30, kHighest = 30, kBins = kHighest - kLowest + 2;
  std::array<int64_t, kBins> negative{}, positive{};

  void add(double value);
  static double from(int bin);  // lower end: 0, 2^-30, 2^-29 ...
  static double to(int bin);    // upper end: ... infinity
};

inline constexpr int64_t kAllLayers = -1, kMeanOfLayers = -2;  // all elements of the model's state as one; the mean of the layers' values
inline constexpr int64_t kAllHeads = -1;

/// Means over sequences of what each sequence's own state has at one position.
struct StateLine {
  int64_t position = 0;
  std::string tensor;  // "ssm", "conv" ...
  int64_t layer = 0;   // or kAllLayers, kMeanOfLayers
  int64_t head = kAllHeads;
  int64_t sequences = 0;
  double mean = 0, std = 0, std_error = 0, norm = 0, max_abs = 0;  // std_error: standard error of std; NaN for fewer than two sequences
};

struct StateHistogramKey {
  int64_t position;
  std::string tensor;
  int64_t layer;  // or kAllLayers
  auto operator<=>(const StateHistogramKey&) const = default;
};

struct StateCurveOptions {
  int64_t context = 2048;
  std::vector<int64_t> positions = {};   // each in [1, context], rising: after so many tokens
  std::vector<int64_t> histograms = {};  // positions of histograms, in the same range, rising
  bool conv_windows = false;             // the convolutions' windows too
  int64_t chunk = 2048;
  int64_t batch = 8;
  EvalProgressCall progress = {};
};

struct StateCurve {
  std::vector<StateLine> lines;  // by position, tensor, layer (the sums over layers last), head (all heads last)
  std::map<StateHistogramKey, MagnitudeHistogram> histograms;  // counts over all sequences
  int64_t sequences = 0, tokens = 0;
};

/// Statistics of h_p, the recurrent state after p tokens from the zero state:
///   mean, std (population), norm = sqrt(sum h^2), max |h| over the elements of one head, of a layer, of all layers together ("all"), in
///   f64
/// and the mean of each over sequences; layer "mean" is the mean over layers of the layers' values. A layer has heads where its state has
/// four axes (Mamba-2, GLA); with one head only, and in Mamba-1, there is the line of the whole layer alone.
/// next     sequences of at least `context` tokens
/// memory   of the device: one chunk of batch rows and their state; of the host: the rows' tokens and one layer's state
/// holds    chunk and batch do not change the result, but for the rounding of the model
/// errors   ValueError for positions outside [1, context] or not rising, a shorter sequence, a token outside the vocabulary;
///          NumericError naming layer and position for a state that is not finite
/// source   Buitrago Ruiz & Gu 2025, arXiv:2507.02782
StateCurve state_curve(const LanguageModel& model, const NextSequence& next, const StateCurveOptions& options);

/// "position,tensor,layer,head,sequences,mean,std,std_error,norm,max_abs"; layer is a number, "all" or "mean", head a number or "all".
std::string state_csv(const StateCurve& curve);

/// "position,tensor,layer,magnitude_from,magnitude_to,negative,positive": counts; empty bins are left out.
std::string state_histogram_csv(const StateCurve& curve);

/// errors   FileError naming file, line and reason
std::vector<StateLine> read_state_csv(const std::string& path);
std::map<StateHistogramKey, MagnitudeHistogram> read_state_histogram_csv(const std::string& path);

}  // namespace longhand
