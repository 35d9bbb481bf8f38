// What a layer's recurrence forgets, shown to a measure while a forward pass runs.
#pragma once
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "core/tensor.h"

namespace longhand {

/// At token t every element of the state that belongs to entry n of unit u is multiplied by
///   decay[b,t,u,n] = exp(-rate[b,t,u] * A[u,n])
/// Mamba-1: a unit is a channel with N = d_state entries, rate = dt; Mamba-2: a unit is a head, rate = dt, N = 1; GLA: a unit is a key of a
/// head, rate = -log gate, A = 1, N = 1. On the host in f64, as the model's own inputs of the recurrence give it.
struct Decay {
  int64_t rows = 0, tokens = 0, heads = 0, units = 0, entries = 0;  // B, T, H, U, N; head h has the units [h U / H, (h + 1) U / H)
  std::vector<double> rate;                                         // [B, T, U], at least 0; infinity empties the state
  std::vector<double> A;                                            // [U, N], above 0
};

/// While it lives, `observer` is called in this thread once for each recurrent layer of every forward pass, layers in order.
class DecayScope {
 public:
  explicit DecayScope(std::function<void(const Decay&)> observer);
  ~DecayScope();
  DecayScope(const DecayScope&) = delete;
  DecayScope& operator=(const DecayScope&) = delete;

  /// For mixers: hands make() to the observer, if there is one.
  template <class Make>
  static void observe(Make&& make) {
    if (innermost_ != nullptr) innermost_->observer_(make());
  }

 private:
  static thread_local DecayScope* innermost_;
  std::function<void(const Decay&)> observer_;
  DecayScope* outer_;
};

/// Of Mamba-1 and Mamba-2.   rate = clamp(softplus(dt + dt_bias), dt_min, dt_max)   A = exp(A_log)
/// dt       [B, T, U]
/// dt_bias  [U]
/// A_log    [U, N] or [U]
/// heads    H: 1, or U where every unit is a head
Decay decay_of_steps(const Tensor& dt, const Tensor& dt_bias, const Tensor& A_log, int64_t heads, double dt_min = 0,
                     double dt_max = std::numeric_limits<double>::infinity());

/// Of GLA.   rate = min(softplus(-gate) / normalizer, -gate_min)   A = 1
/// gate     [B, T, H * Dk] logits
Decay decay_of_gates(const Tensor& gate, int64_t heads, double normalizer, double gate_min);

}  // namespace longhand
