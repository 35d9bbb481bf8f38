// The arithmetic of AdamW, for CPU and GPU alike: what a step decides once, and what it does to each element.
#pragma once
#include <cmath>

#include "core/host_device.h"

namespace longhand {

struct AdamWRule {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double clip = 1.0;  // largest global norm; 0: no clipping
};

/// Places in the control block: f64 numbers on the device (counts are exact up to 2^53).
enum AdamWControl : int {
  kControlLr,           // set from outside
  kControlWeightDecay,  // set from outside
  kControlLoss,         // of the last step
  kControlGradNorm,     // of the last step, before clipping
  kControlUpdates,      // applied steps
  kControlSkipped,      // steps left out
  kControlSkippedInARow,
  kControlGradScale,  // min(1, clip / grad_norm)
  kControlStepSize,   // lr / (1 - beta1^t)
  kControlRootScale,  // 1 / sqrt(1 - beta2^t)
  kControlDecay,      // lr * weight_decay
  kControlLossSum,    // of the own loss, then of all that share the work
  kControlSquareSum,  // of the own gradients, likewise
  kControlSize,
};

/// What the rest of a step needs, from the two sums.
LONGHAND_HOST_DEVICE inline void decide_adamw_step(const AdamWRule& rule, double* control) {
  const double loss = control[kControlLossSum], norm = sqrt(control[kControlSquareSum]);
  control[kControlLoss] = loss;
  control[kControlGradNorm] = norm;
  if (!(norm - norm == 0 && loss - loss == 0)) {  // NaN or infinite
    control[kControlSkipped] += 1;
    control[kControlSkippedInARow] += 1;
    return;
  }
  control[kControlSkippedInARow] = 0;
  const double t = control[kControlUpdates] += 1;
  control[kControlGradScale] = rule.clip > 0 && norm > rule.clip ? rule.clip / norm : 1;
  control[kControlStepSize] = control[kControlLr] / (1 - pow(rule.beta1, t));
  control[kControlRootScale] = 1 / sqrt(1 - pow(rule.beta2, t));
  control[kControlDecay] = control[kControlLr] * control[kControlWeightDecay];
}

LONGHAND_HOST_DEVICE inline float square_root(float x) {
  return sqrtf(x);
}
LONGHAND_HOST_DEVICE inline double square_root(double x) {
  return sqrt(x);
}

/// The numbers of one step in the type of the masters.
template <class T>
struct AdamWStep {
  T beta1, beta2, rest1, rest2, eps, grad_scale, step_size, root_scale, decay;
  bool apply;

  LONGHAND_HOST_DEVICE AdamWStep(const AdamWRule& rule, const double* control, bool decays)
      : beta1(static_cast<T>(rule.beta1)),
        beta2(static_cast<T>(rule.beta2)),
        rest1(static_cast<T>(1 - rule.beta1)),
        rest2(static_cast<T>(1 - rule.beta2)),
        eps(static_cast<T>(rule.eps)),
        grad_scale(static_cast<T>(control[kControlGradScale])),
        step_size(static_cast<T>(control[kControlStepSize])),
        root_scale(static_cast<T>(control[kControlRootScale])),
        decay(decays ? static_cast<T>(control[kControlDecay]) : T{0}),
        apply(control[kControlSkippedInARow] == 0) {}

  /// Updates one element: w, m and v from the gradient g. The two small terms are added first, so that neither is lost beside w.
  LONGHAND_HOST_DEVICE inline void update(T& w, T& m, T& v, T g) const {
    g *= grad_scale;
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * g * g;
    w -= decay * w + step_size * m / (square_root(v) * root_scale + eps);
  }
};

}  // namespace longhand
