// How the learning rate and the weight decay change over a run: pure functions of the step.
#pragma once
#include <cstdint>
#include <string>

namespace longhand {

/// Linear warmup to a peak, then half a cosine down to a minimum.
///   W       = round(warmup_fraction * steps)
///   s < W   value = peak * (s + 1) / W
///   s >= W  value = minimum + (peak - minimum) * (1 + cos(pi * u)) / 2,   u from 0 at the last step of the warmup to 1 at step steps - 1
struct Schedule {
  int64_t steps = 1;
  double peak = 0;
  double minimum = 0;
  double warmup_fraction = 0.1;

  int64_t warmup_steps() const;
  /// step  0 .. steps - 1; later steps keep the last value
  double at(int64_t step) const;
};

enum class DecaySchedule {
  follow_lr,  // weight_decay * lr / peak lr: the shape of the learning rate
  constant,
  off,
};
DecaySchedule decay_schedule_from(const std::string& name);  // "follow-lr" | "constant" | "off"; ConfigError for other names

/// The weight decay at a step whose learning rate comes from `lr`; `peak` is its value where the learning rate has its own peak.
double weight_decay_at(DecaySchedule schedule, double peak, const Schedule& lr, int64_t step);

}  // namespace longhand
