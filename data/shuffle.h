// Permutations that depend on nothing but their key: the same on every machine, at every resume.
#pragma once
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "core/philox.h"

namespace longhand {

/// The numbers 0 .. size-1 in an order drawn by Fisher-Yates from Philox keyed by `key`; every order is equally likely but for the
/// remainder's bias, at most size / 2^64.
inline std::vector<int64_t> keyed_permutation(int64_t size, uint64_t key) {
  std::vector<int64_t> order(static_cast<std::size_t>(size));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (auto i = static_cast<uint64_t>(size); i > 1; --i) {
    const uint64_t j = philox_u64(key, i) % i;
    std::swap(order[i - 1], order[j]);
  }
  return order;
}

}  // namespace longhand
