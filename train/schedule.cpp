// See schedule.h.
#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"
#include "core/nearest.h"

namespace longhand {

int64_t Schedule::warmup_steps() const {
  return std::llround(warmup_fraction * static_cast<double>(steps));
}

double Schedule::at(int64_t step) const {
  const int64_t warmup = warmup_steps();
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const int64_t top = std::max<int64_t>(warmup - 1, 0), last = steps - 1;  // the steps that have the peak and the minimum
  if (last <= top) return peak;
  const double u = static_cast<double>(std::min(step, last) - top) / static_cast<double>(last - top);
  return minimum + (peak - minimum) * (1 + std::cos(std::numbers::pi * u)) / 2;
}

DecaySchedule decay_schedule_from(const std::string& name) {
  if (name == "follow-lr") return DecaySchedule::follow_lr;
  if (name == "constant") return DecaySchedule::constant;
  if (name == "off") return DecaySchedule::off;
  throw ConfigError(
      "schedule: unknown weight-decay schedule",
      {{"given", name}, {"nearest", nearest_name(name, {"follow-lr", "constant", "off"})}, {"known", "follow-lr, constant, off"}});
}

double weight_decay_at(DecaySchedule schedule, double peak, const Schedule& lr, int64_t step) {
  switch (schedule) {
    case DecaySchedule::follow_lr:
      return lr.peak > 0 ? peak * lr.at(step) / lr.peak : 0;
    case DecaySchedule::constant:
      return peak;
    case DecaySchedule::off:
      break;
  }
  return 0;
}

}  // namespace longhand
