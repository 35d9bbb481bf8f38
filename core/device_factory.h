// Makes Device handles; for core's own files only.
#pragma once
#include <utility>

#include "core/device.h"

namespace longhand {

struct DeviceFactory {
  static Device make(DeviceKind kind, int index, std::shared_ptr<CachingAllocator> allocator, std::shared_ptr<CudaContext> context) {
    return Device(kind, index, std::move(allocator), std::move(context));
  }
};

}  // namespace longhand
