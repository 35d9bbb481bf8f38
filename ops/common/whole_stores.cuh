// Packs written to global memory in one store.
#pragma once
#include "ops/common/cuda_math.cuh"

namespace longhand {

/// store_pack for global memory. What store_pack leaves to the compiler is a copy of the pack's elements, and where these were formed one
/// by one it becomes stores of two or four bytes, a lane 16 bytes from the next: four to eight times the transactions.
template <int n, class T>
__device__ __forceinline__ void store_whole(T* to, const Pack<T, n>& pack) {
  constexpr int bytes = static_cast<int>(sizeof pack);
  if constexpr (bytes < 8) {
    store_pack(to, pack);
  } else {
    struct Words {
      uint32_t at[bytes / 4];
    };
    const Words words = __builtin_bit_cast(Words, pack);
    const size_t address = __cvta_generic_to_global(to);
    if constexpr (bytes == 8) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words.at[0]), "r"(words.at[1]) : "memory");
    } else {
#pragma unroll
      for (int w = 0; w < bytes / 4; w += 4)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * w), "r"(words.at[w]), "r"(words.at[w + 1]),
                     "r"(words.at[w + 2]), "r"(words.at[w + 3])
                     : "memory");
    }
  }
}

}  // namespace longhand
