// The choice of the device; see device_graph.h.
#include "core/device_graph.h"

#include "core/error.h"

namespace longhand {

std::unique_ptr<DeviceGraph> record_graph_cuda(const Device& device, const std::function<void()>& work);  // device_graph_cuda.cpp

namespace {

std::unique_ptr<DeviceGraph> record_graph_cpu(const Device& device, const std::function<void()>&) {
  throw DeviceError("graph: only a GPU's work can be recorded", {{"device", device.name()}});
}

}  // namespace

std::unique_ptr<DeviceGraph> record_graph(const Device& device, const std::function<void()>& work) {
  return on_device(device, &record_graph_cpu, LONGHAND_CUDA_IMPL(record_graph_cuda))(device, work);
}

}  // namespace longhand
