// What a GPU does about a counted position whose target is no class.
#pragma once
#include <cstdint>
#include <cstdio>

namespace longhand {

/// Says so, and gives the number that the loss and the gradients of the row become.
__device__ inline float bad_target(int64_t position, int target, int vocab) {
  printf("longhand: cross_entropy: flat position %lld has target %d, outside [0, %d), and is counted; the loss becomes NaN\n",
         static_cast<long long>(position), target, vocab);
  return __int_as_float(0x7fffffff);
}

}  // namespace longhand
