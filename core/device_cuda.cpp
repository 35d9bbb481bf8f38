// The CUDA device: stream, cuBLASLt handle, allocator, checked calls. See device.h and cuda_context.h. (Plain C++: no kernel here.)
#include <fmt/core.h>
#include <omp.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "core/allocator.h"
#include "core/cuda_context.h"
#include "core/device.h"
#include "core/device_factory.h"
#include "core/device_memory_cuda.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "core/show_as_written_cuda.h"
#include "core/switches.h"

namespace longhand {

std::string architecture_of_kernels();  // built_for_cuda.cu

void cuda_check(cudaError_t status, const char* call, const std::source_location& at) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw DeviceError("cuda: a call failed", {{"call", call}, {"reason", cudaGetErrorString(status)}, {"op", current_op_path()}}, at);
}

void cublas_check(cublasStatus_t status, const char* call, const std::source_location& at) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw DeviceError("cuda: a cuBLAS call failed", {{"call", call}, {"reason", cublasLtGetStatusString(status)}, {"op", current_op_path()}},
                    at);
}

void launch_check(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::source_location& at) {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return;
  throw DeviceError("cuda: a kernel could not be launched",
                    {{"kernel", kernel},
                     {"reason", cudaGetErrorString(status)},
                     {"grid", fmt::format("{} x {} x {}", grid.x, grid.y, grid.z)},
                     {"block", fmt::format("{} x {} x {}, {} bytes of shared memory", block.x, block.y, block.z, shared_bytes)},
                     {"op", current_op_path()}},
                    at);
}

void show_as_written(const Tensor& matrix) {
  if (!switches().exact) return;
  const auto element = static_cast<std::size_t>(size_of(matrix.dtype()));
  const auto bytes = static_cast<std::size_t>(matrix.dim(1)) * element, rows = static_cast<std::size_t>(matrix.dim(0));
  const std::size_t pitch = rows == 1 ? bytes : static_cast<std::size_t>(matrix.stride(0)) * element;
  cuda_check(cudaMemset2DAsync(matrix.raw(), pitch, 0xFF, bytes, rows, matrix.device().cuda_context().stream), "cudaMemset2DAsync");
}

namespace {

class CudaAllocator final : public CachingAllocator {
 public:
  CudaAllocator(int index, cudaStream_t stream) : CachingAllocator(make_device_memory(index, stream)), index_(index), stream_(stream) {}

 protected:
  void* system_allocate(std::size_t bytes) override { return device_block(index_, bytes); }
  void system_release(void* block) noexcept override { (void)cudaFree(block); }
  void fill_bytes(void* block, int value, std::size_t bytes) override {
    cuda_check(cudaMemsetAsync(block, value, bytes, stream_), "cudaMemsetAsync");
  }
  std::string description() const override {
    size_t free_bytes = 0, total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    return fmt::format("cuda:{}, {} of {} bytes free", index_, free_bytes, total_bytes);
  }

 private:
  int index_;
  cudaStream_t stream_;
};

// Dense bf16 peaks of the datasheets, for MFU; a GPU that is not listed has no MFU rather than a wrong one.
double bf16_peak(const cudaDeviceProp& properties) {
  const std::string name = properties.name;
  auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (has("MIG")) return 0;  // a slice of a GPU
  if (has("H100 PCIe")) return 756e12;
  if (has("H100 NVL") || has("H200 NVL")) return 835e12;
  if (has("H100") || has("H200")) return 989e12;
  if (has("A100")) return 312e12;
  return 0;
}

Device open_cuda(int index) {
  cuda_check(cudaSetDevice(index), "cudaSetDevice");
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  if (properties.major < 8)
    throw DeviceError("device: longhand needs compute capability 8.0 or newer",
                      {{"device", properties.name}, {"has", fmt::format("{}.{}", properties.major, properties.minor)}});
  auto context = std::make_shared<CudaContext>();
  context->index = index;
  context->sm_count = properties.multiProcessorCount;
  context->major = properties.major;
  context->minor = properties.minor;
  context->shared_memory_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  context->bf16_peak_flops = bf16_peak(properties);
  cuda_check(cudaStreamCreateWithFlags(&context->stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  cublas_check(cublasLtCreate(&context->blas_lt), "cublasLtCreate");
  context->workspace_bytes = size_t{64} << 20;
  cuda_check(cudaMalloc(&context->workspace, context->workspace_bytes), "cudaMalloc");
  if (switches().exact)  // cuBLAS writes parts of sums there by bulk copies: see show_as_written()
    cuda_check(cudaMemsetAsync(context->workspace, 0xFF, context->workspace_bytes, context->stream), "cudaMemsetAsync");
  auto allocator = std::make_shared<CudaAllocator>(index, context->stream);
  return DeviceFactory::make(DeviceKind::cuda, index, std::move(allocator), std::move(context));
}

// One entry per physical device for the whole process: its memory and its stream exist once. Locked while an object of this type lives.
struct OpenDevices {
  static inline std::mutex mutex;
  static inline auto* const all = new std::map<int, Device>;  // never destroyed: the driver may be gone before static objects are
  std::lock_guard<std::mutex> lock{mutex};
  std::map<int, Device>& devices = *all;
};

}  // namespace

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

Device Device::cuda(int index) {
  const OpenDevices open;
  if (const auto found = open.devices.find(index); found != open.devices.end()) return found->second;
  const int count = cuda_device_count();
  if (index < 0 || index >= count)
    throw DeviceError("device: no such GPU", {{"asked", fmt::format("cuda:{}", index)},
                                              {"found", fmt::format("{} CUDA devices", count)},
                                              {"try", "--device cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES"}});
  return open.devices.emplace(index, open_cuda(index)).first->second;
}

std::vector<Device> Device::opened() {
  std::vector<Device> devices{cpu()};
  const OpenDevices open;
  for (const auto& [index, device] : open.devices) devices.push_back(device);
  return devices;
}

CudaContext& Device::cuda_context() const {
  if (context_ == nullptr) throw DeviceError("device: not a CUDA device", {{"device", name()}});
  return *context_;
}

void Device::synchronize() const {
  if (is_cuda()) cuda_check(cudaStreamSynchronize(context_->stream), "cudaStreamSynchronize");
}

std::string Device::description() const {
  if (!is_cuda()) return fmt::format("CPU, {} threads", omp_get_max_threads());
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, index_), "cudaGetDeviceProperties");
  cuda_check(cudaSetDevice(index_), "cudaSetDevice");
  return fmt::format("{}, {} SMs, {:.1f} GiB, kernels of {}", properties.name, context_->sm_count,
                     static_cast<double>(properties.totalGlobalMem) / (1 << 30), architecture_of_kernels());
}

}  // namespace longhand
