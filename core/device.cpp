// The CPU device, and what all devices share; see device.h. The CUDA device is in device_cuda.cpp.
#include "core/device.h"

#include <fmt/core.h>
#include <omp.h>

#include <charconv>
#include <cstdlib>
#include <cstring>

#include "core/allocator.h"
#include "core/device_factory.h"
#include "core/error.h"

namespace longhand {
namespace {

void* host_block(std::size_t bytes) {
  void* block = nullptr;
  return ::posix_memalign(&block, 256, bytes) == 0 ? block : nullptr;
}

class CpuAllocator final : public CachingAllocator {
 public:
  CpuAllocator() : CachingAllocator(std::make_unique<SizeClasses>(host_block, [](void* block) { std::free(block); })) {}
  ~CpuAllocator() override { release_cached(); }

 protected:
  void* system_allocate(std::size_t bytes) override { return host_block(bytes); }
  void system_release(void* block) noexcept override { std::free(block); }
  void fill_bytes(void* block, int value, std::size_t bytes) override { std::memset(block, value, bytes); }
  std::string description() const override { return "cpu"; }
};

}  // namespace

Device Device::cpu() {
  static const Device device = DeviceFactory::make(DeviceKind::cpu, 0, std::make_shared<CpuAllocator>(), nullptr);
  return device;
}

Device Device::parse(std::string_view text) {
  if (text == "cpu") return cpu();
  if (text == "cuda") return cuda(0);
  if (text.starts_with("cuda:")) {
    int index = -1;
    const auto [end, status] = std::from_chars(text.data() + 5, text.data() + text.size(), index);
    if (status == std::errc{} && end == text.data() + text.size() && index >= 0) return cuda(index);
  }
  throw ConfigError("device: unknown name", {{"given", std::string(text)}, {"expected", "cpu, cuda or cuda:N"}});
}

std::string Device::name() const {
  return is_cuda() ? fmt::format("cuda:{}", index_) : "cpu";
}

#if !LONGHAND_WITH_CUDA
struct CudaContext {};
int cuda_device_count() {
  return 0;
}
Device Device::cuda(int) {
  throw DeviceError("device: this build of longhand has no CUDA",
                    {{"try", "--device cpu, or build with the cuda preset on a machine with nvcc"}});
}
std::vector<Device> Device::opened() {
  return {cpu()};
}
CudaContext& Device::cuda_context() const {
  throw DeviceError("device: not a CUDA device", {{"device", name()}});
}
void Device::synchronize() const {}
std::string Device::description() const {
  return fmt::format("CPU, {} threads", omp_get_max_threads());
}
#endif

}  // namespace longhand
