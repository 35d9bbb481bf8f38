// How kernels that take shared memory are launched.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "core/cuda_context.h"
#include "core/error.h"
#include "core/op_scope.h"

namespace longhand {

/// Queues kernel(args...) on the device's stream.
/// shared  bytes of dynamic shared memory of a block
/// errors  ValueError when this GPU has less shared memory than that; DeviceError when the launch is refused for another reason
template <class Kernel, class... Args>
void launch(Kernel kernel, const char* name, dim3 grid, dim3 block, size_t shared, const CudaContext& context, const Args&... args) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (static_cast<int64_t>(shared) > context.shared_memory_per_block)
    throw ValueError("cuda: this GPU has too little shared memory for tensors of this width",
                     {{"kernel", name},
                      {"needs", std::to_string(shared) + " bytes a block"},
                      {"has", std::to_string(context.shared_memory_per_block)},
                      {"op", current_op_path()},
                      {"try", "bf16 instead of f32, a smaller state, or heads of a smaller width"}});
  if (shared > kWithoutAsking)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  kernel<<<grid, block, shared, context.stream>>>(args...);
  launch_check(name, grid, block, shared);
}

}  // namespace longhand
