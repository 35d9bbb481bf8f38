// How fast each layer and head forgets: from the decays of its recurrence on real text.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "eval/token_rows.h"
#include "models/language_model.h"

namespace longhand {

/// Retention by lag: retention[i] belongs to lags[i]; retention of lag 0 is 1. Between two lags its logarithm is taken as a straight line,
/// which is exact for a constant decay.
struct RetentionCurve {
  std::vector<int64_t> lags;  // rising, from 1
  std::vector<double> retention;

  /// The first lag at which retention has fallen to `level`; infinity when it stays above it up to the last lag.
  double life(double level) const;
  /// The smallest k such that the lags before k have `share` of the sum of retention over the lags 0 .. last - 1: how far back that share
  /// of the state's weight reaches, were all inputs equal. Finite always; share * last for a head that never forgets.
  double reach(double share) const;
};

struct ForgettingOptions {
  int64_t context = 2048;
  std::vector<int64_t> lags = {};  // each in [1, context], rising
  int64_t chunk = 2048;
  int64_t batch = 8;
  EvalProgressCall progress = {};
};

struct Forgetting {
  struct Head {
    int64_t layer = 0, head = 0;  // layer or head -1: the mean of the heads of the layer, of the layers of the model
    RetentionCurve curve;
  };
  std::vector<Head> heads;       // layers in order, in each its heads, then (where there are several) their mean; the model's mean last
  std::vector<int64_t> windows;  // by lag: how many windows the mean is over
  int64_t sequences = 0, tokens = 0;
};

/// The share of the state that is left of an input k tokens later, on average. The state is h[t] = sum_s (prod_{s<r<=t} decay[r]) input[s],
/// so
///   retention(k) = mean over windows w and the entries e of a head of  prod_{r in w} decay[r,e]
/// where the windows of lag k are the tokens [m s, m s + k), s = max(k, 16), that lie in the sequence: they do not overlap, and every token
/// is in one where k >= 16. An entry is a key of a head (GLA), a channel and state entry (Mamba-1, whose layer is one head); in Mamba-2 all
/// entries of a head decay alike. Products are f64 sums of logarithms; a log decay below -1e6 A counts as that.
/// next     sequences of at least `context` tokens
/// memory   of the device: one chunk of batch rows and their state; of the host: the rows' tokens, a layer's decays in one chunk, and
///          lags * entries numbers a layer and row, whatever the context
/// holds    chunk and batch do not change the result, but for the rounding of the model
/// errors   ValueError for lags outside [1, context] or not rising, a shorter sequence, a token outside the vocabulary;
///          NumericError naming layer and token for a decay that is no number
Forgetting forgetting(const LanguageModel& model, const NextSequence& next, const ForgettingOptions& options);

/// "layer,head,half_life,tenth_life,reach_50,reach_90,retention_at_end" and one line a head: tokens; inf where the level is not reached
/// within the last lag. layer and head are numbers or "mean".
std::string forgetting_csv(const Forgetting& forgetting);

/// "layer,head,lag,windows,retention".
std::string retention_csv(const Forgetting& forgetting);

struct ForgettingLine {
  int64_t layer = 0, head = 0;  // -1: mean
  double half_life = 0, tenth_life = 0, reach_50 = 0, reach_90 = 0, retention_at_end = 0;
};
/// errors   FileError naming file, line and reason
std::vector<ForgettingLine> read_forgetting_csv(const std::string& path);

}  // namespace longhand
