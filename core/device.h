// Device: where tensors live. A small handle; all handles of one physical device share its allocator, stream and library handles.
// Ops reach the device through a tensor, never through a global "current device".
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace longhand {

class CachingAllocator;
struct CudaContext;  // core/cuda_context.h: stream, cuBLASLt handle, properties

enum class DeviceKind : uint8_t { cpu, cuda };

class Device {
 public:
  static Device cpu();

  /// errors  DeviceError when this build has no CUDA or the machine has no such GPU
  static Device cuda(int index = 0);

  /// The CPU, and every GPU that this process has opened so far.
  static std::vector<Device> opened();

  /// "cpu", "cuda" or "cuda:1".
  /// errors  ConfigError for another name; DeviceError like cuda()
  static Device parse(std::string_view text);

  DeviceKind kind() const { return kind_; }
  bool is_cuda() const { return kind_ == DeviceKind::cuda; }
  int index() const { return index_; }
  std::string name() const;         // "cpu", "cuda:0"
  std::string description() const;  // "NVIDIA H200, 132 SMs, 139.8 GiB, kernels of sm_90a", "CPU, 2 threads"
  CachingAllocator& allocator() const { return *allocator_; }
  CudaContext& cuda_context() const;  // DeviceError on a CPU
  void synchronize() const;           // waits for all work given to the device; reports what failed in it
  bool operator==(const Device& other) const { return kind_ == other.kind_ && index_ == other.index_; }

 private:
  Device(DeviceKind kind, int index, std::shared_ptr<CachingAllocator> allocator, std::shared_ptr<CudaContext> context)
      : kind_(kind), index_(index), allocator_(std::move(allocator)), context_(std::move(context)) {}
  friend struct DeviceFactory;
  DeviceKind kind_;
  int index_;
  std::shared_ptr<CachingAllocator> allocator_;
  std::shared_ptr<CudaContext> context_;
};

/// How many CUDA devices this build and machine offer; 0 in a build without CUDA.
int cuda_device_count();

/// The implementation of an op for a device: on_device(x.device(), &scan_cpu, LONGHAND_CUDA_IMPL(scan_cuda))(x, ...). In a build without
/// CUDA the second pointer is null and never taken, because no CUDA device can be made there.
template <class F>
F* on_device(const Device& device, F* cpu, std::type_identity_t<F>* cuda) {
  return device.is_cuda() ? cuda : cpu;
}
#if LONGHAND_WITH_CUDA
#define LONGHAND_CUDA_IMPL(function) &function
#else
#define LONGHAND_CUDA_IMPL(function) nullptr
#endif

}  // namespace longhand
