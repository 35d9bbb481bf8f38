// What --device and --dtype mean.
#pragma once
#include <string>

#include "core/device.h"
#include "core/dtype.h"

namespace longhand {

struct DeviceChoice {
  Device device;
  Dtype dtype;  // of the computation
  Dtype master_dtype() const { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
};

/// device   cpu, cuda, cuda:N; auto: a GPU where there is one
/// dtype    f32, bf16, f64; auto: bf16 on a GPU, f32 on a CPU
/// errors   ConfigError for another name; DeviceError when the device is not there
inline DeviceChoice choose_device(const std::string& device, const std::string& dtype) {
  const Device chosen = device != "auto" ? Device::parse(device) : cuda_device_count() > 0 ? Device::cuda() : Device::cpu();
  return {chosen, dtype != "auto" ? parse_dtype(dtype) : chosen.is_cuda() ? Dtype::bf16 : Dtype::f32};
}

}  // namespace longhand
