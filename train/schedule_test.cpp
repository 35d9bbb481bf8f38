// Schedules at points worked out by hand.
#include "train/schedule.h"

#include <cmath>

#include "core/error.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

const Schedule kExample{.steps = 101, .peak = 1e-3, .minimum = 1e-5, .warmup_fraction = 0.1};  // W = 10: steps 0..9, cosine over 9..100

TEST("schedule: linear warmup over the first tenth") {
  CHECK(kExample.warmup_steps() == 10);
  CHECK(kExample.at(0) == doctest::Approx(1e-4));
  CHECK(kExample.at(4) == doctest::Approx(5e-4));
  CHECK(kExample.at(9) == doctest::Approx(1e-3));
}

TEST("schedule: cosine to the minimum at the last step") {
  const Schedule schedule{.steps = 9, .peak = 2, .minimum = 1, .warmup_fraction = 0};  // u = s / 8
  const double quarter = std::sqrt(0.5);
  CHECK(schedule.at(0) == doctest::Approx(2.0));
  CHECK(schedule.at(2) == doctest::Approx(1.5 + quarter / 2));
  CHECK(schedule.at(4) == doctest::Approx(1.5));
  CHECK(schedule.at(6) == doctest::Approx(1.5 - quarter / 2));
  CHECK(schedule.at(8) == 1.0);
  CHECK(kExample.at(100) == doctest::Approx(1e-5).epsilon(1e-12));
  CHECK(kExample.at(500) == kExample.at(100));
  for (int64_t s = 10; s <= 100; ++s) CHECK(kExample.at(s) < kExample.at(s - 1));
}

TEST("schedule: short runs") {
  CHECK(Schedule{.steps = 1, .peak = 3, .minimum = 1, .warmup_fraction = 0.1}.at(0) == 3);
  CHECK(Schedule{.steps = 4, .peak = 3, .minimum = 1, .warmup_fraction = 1}.at(3) == 3);  // all warmup
  CHECK(Schedule{.steps = 2, .peak = 3, .minimum = 1, .warmup_fraction = 0}.at(1) == 1);
}

TEST("schedule: weight decay follows the learning rate, stays, or is off") {
  for (const int64_t s : {0, 9, 40, 100}) {
    CHECK(weight_decay_at(DecaySchedule::follow_lr, 0.01, kExample, s) == doctest::Approx(10 * kExample.at(s)));
    CHECK(weight_decay_at(DecaySchedule::constant, 0.01, kExample, s) == 0.01);
    CHECK(weight_decay_at(DecaySchedule::off, 0.01, kExample, s) == 0);
  }
  CHECK(decay_schedule_from("constant") == DecaySchedule::constant);
  CHECK_THROWS_WITH_AS(decay_schedule_from("folow-lr"), doctest::Contains("nearest  follow-lr"), ConfigError);
}

}  // namespace
}  // namespace longhand
