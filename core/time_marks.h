// Points in time of a device's work.
#pragma once
#include <cstddef>
#include <memory>

#include "core/device.h"

namespace longhand {

class TimeMarks {
 public:
  virtual ~TimeMarks() = default;
  /// Sets a mark behind what is queued; on a CPU: now.
  /// returns  its number
  virtual std::size_t set() = 0;
  /// Between two marks that the device has passed.
  virtual double milliseconds(std::size_t from, std::size_t to) const = 0;
};
std::unique_ptr<TimeMarks> make_time_marks(const Device& device);

}  // namespace longhand
