// Which of the architectures that this build has kernels for a GPU loaded: of several forms of a kernel it decides which can run.
#include <string>

#include "core/cuda_context.h"

namespace longhand {
namespace {

// Compiled once for each architecture: 10 times its number, and 1 more where the build is for exactly this one (sm_90a).
__device__ int built_for =
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    __CUDA_ARCH__ + 1;
#elif defined(__CUDA_ARCH__)
    __CUDA_ARCH__;
#else
    0;
#endif

}  // namespace

std::string architecture_of_kernels() {
  int number = 0;
  cuda_check(cudaMemcpyFromSymbol(&number, built_for, sizeof number), "cudaMemcpyFromSymbol");
  return "sm_" + std::to_string(number / 10) + (number % 10 == 1 ? "a" : "");
}

}  // namespace longhand
