// How the kernels of a token overlap: each may start while the one in front still runs (sm_90 and newer), loads what no kernel of this
// token writes, and only then waits. Nothing that others write may be read before wait_for_kernel_in_front(), nothing written either.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "core/cuda_context.h"

namespace longhand {

__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Queues a kernel that calls the two functions above.
template <class... Args>
void launch_overlapping(void (*kernel)(Args...), const char* name, dim3 grid, dim3 block, size_t shared, const CudaContext& cuda,
                        const std::type_identity_t<Args>&... args) {
  constexpr size_t kWithoutAsking = 40 * 1024;  // beside what the kernels declare themselves
  if (shared > kWithoutAsking)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), "cudaFuncSetAttribute");
  // Blocks of two kernels share a multiprocessor only where it divides its memory alike for both.
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
             "cudaFuncSetAttribute");
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = cuda.stream;
  config.attrs = &overlap;
  config.numAttrs = cuda.major >= 9 ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

}  // namespace longhand
