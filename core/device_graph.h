// What a step queues on a GPU, recorded once and queued again at the price of a single launch.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

#include "core/device.h"

namespace longhand {

/// Recorded work. Memory that tensors took while it was recorded belongs to the graph as long as it lives; whatever else the work reads or
/// writes must stay where it was. Values that change from one replay to the next are therefore read from device memory.
class DeviceGraph {
 public:
  virtual ~DeviceGraph() = default;

  /// Queues the work, behind what is queued already.
  virtual void replay() = 0;

  /// Kernels, copies and fills.
  virtual int64_t size() const = 0;
};

/// Records what `work` queues on `device`, without running any of it; the host's part of `work` does run.
/// errors  DeviceError where a graph is not possible: on a CPU, or when `work` waits for the device or takes something from it that is not
///         ready; MemoryError. Nothing is queued then, and the device can go on being used
std::unique_ptr<DeviceGraph> record_graph(const Device& device, const std::function<void()>& work);

}  // namespace longhand
