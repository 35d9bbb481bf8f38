// A page-locked buffer, and an event that says when the copy engine has read it. See upload.h.
#include <cstring>

#include "core/cuda_context.h"
#include "core/error.h"
#include "core/upload.h"

namespace longhand {
namespace {

class CudaUpload final : public Upload {
 public:
  explicit CudaUpload(const Tensor& to)
      : to_(to), cuda_(to.device().cuda_context()), bytes_(static_cast<size_t>(to.numel() * size_of(to.dtype()))) {
    cuda_check(cudaSetDevice(cuda_.index), "cudaSetDevice");
    void* memory = nullptr;
    cuda_check(cudaMallocHost(&memory, bytes_), "cudaMallocHost");
    memory_.reset(memory);
    cuda_check(cudaEventCreateWithFlags(&read_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }
  ~CudaUpload() override {
    (void)cudaEventSynchronize(read_);
    (void)cudaEventDestroy(read_);
  }

  void send(std::span<const std::byte> values) override {
    if (values.size() != bytes_)
      throw ValueError("upload: another number of bytes than the tensor has",
                       {{"bytes", std::to_string(values.size())}, {"to", to_.describe()}});
    cuda_check(cudaEventSynchronize(read_), "cudaEventSynchronize");
    std::memcpy(memory_.get(), values.data(), bytes_);
    cuda_check(cudaMemcpyAsync(to_.raw(), memory_.get(), bytes_, cudaMemcpyHostToDevice, cuda_.stream), "cudaMemcpyAsync");
    cuda_check(cudaEventRecord(read_, cuda_.stream), "cudaEventRecord");
  }

 private:
  struct Free {
    void operator()(void* memory) const { (void)cudaFreeHost(memory); }
  };
  Tensor to_;
  const CudaContext& cuda_;
  size_t bytes_;
  std::unique_ptr<void, Free> memory_;
  cudaEvent_t read_ = nullptr;
};

}  // namespace

std::unique_ptr<Upload> upload_to_cuda(const Tensor& to) {
  return std::make_unique<CudaUpload>(to);
}

}  // namespace longhand
