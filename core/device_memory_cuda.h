// The memory of a GPU, as an allocator takes it.
#pragma once
#include <memory>

#include "core/cuda_context.h"
#include "core/free_memory.h"

namespace longhand {

/// An allocation of its own; null when there is no room.
void* device_block(int index, std::size_t bytes);

/// An arena where the GPU's addresses can be reserved before there is memory behind them; else blocks of few sizes, each an allocation of
/// its own.
std::unique_ptr<FreeMemory> make_device_memory(int index, cudaStream_t stream);

}  // namespace longhand
