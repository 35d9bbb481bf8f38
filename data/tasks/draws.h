// Whole numbers drawn one after the other from a key: what the generators of tasks make their samples from.
#pragma once
#include <cstdint>

#include "core/philox.h"

namespace longhand {

/// The key of sample `index` of a task: the same whatever was drawn before, and on any number of threads.
inline uint64_t sample_key(uint64_t seed, const char* task, uint64_t index) {
  return philox_key(philox_key(seed, hash_name(task)), index);
}

class Draws {
 public:
  explicit Draws(uint64_t key) : key_(key) {}

  /// Uniform in 0 .. count - 1, but for the remainder's bias, at most count / 2^64.
  int64_t below(int64_t count) { return static_cast<int64_t>(philox_u64(key_, drawn_++, 3) % static_cast<uint64_t>(count)); }
  /// Uniform in low .. high.
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }

 private:
  uint64_t key_, drawn_ = 0;
};

}  // namespace longhand
