// Sizes for tests at shapes drawn at random: the same in every run.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <random>

namespace longhand::test {

class Draws {
 public:
  explicit Draws(uint64_t seed) : generator_(seed) {}

  /// One of from, .., to; all alike.
  int64_t between(int64_t from, int64_t to) { return from + static_cast<int64_t>(generator_() % static_cast<uint64_t>(to - from + 1)); }
  /// One of 1, .., most; as often below 16 as between 256 and 4096, so that small sizes and their borders come as well.
  int64_t up_to(int64_t most) {
    const int64_t power = int64_t{1} << between(0, std::bit_width(static_cast<uint64_t>(most)) - 1);
    return std::min(most, between(power, 2 * power - 1));
  }
  bool once_in(int64_t times) { return between(1, times) == 1; }

 private:
  std::mt19937_64 generator_;
};

}  // namespace longhand::test
