// Packs on their way through shared memory while their thread works on those that came before. What a thread asks for is for itself alone,
// so that no barrier is needed.
#pragma once
#include "ops/common/cuda_math.cuh"
#include "ops/common/matrix_instructions.cuh"

namespace longhand {

/// Asks for the pack at an address that is a multiple of its size; it has come when copies_arrived_but<>() of its group returns. One of two
/// bytes is copied at once.
template <class T, int n>
__device__ __forceinline__ void copy_pack_async(Pack<T, n>* to_shared, const T* from_global) {
  constexpr int bytes = static_cast<int>(sizeof(Pack<T, n>));
  static_assert(bytes <= 16);
  if constexpr (bytes >= 4) copy_or_zero_async<bytes>(to_shared, from_global, true);
  else *to_shared = load_pack<n>(from_global);
}

}  // namespace longhand
