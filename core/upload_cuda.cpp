// Through page-locked memory, which the copy engine reads by itself. See upload.h.
#include <cstring>

#include "core/error.h"
#include "core/page_locked_slot.h"
#include "core/upload.h"

namespace longhand {
namespace {

class CudaUpload final : public Upload {
 public:
  explicit CudaUpload(const Tensor& to)
      : to_(to), cuda_(to.device().cuda_context()), bytes_(static_cast<size_t>(to.numel() * size_of(to.dtype()))) {}

  void send(std::span<const std::byte> values) override {
    if (values.size() != bytes_)
      throw ValueError("upload: another number of bytes than the tensor has",
                       {{"bytes", std::to_string(values.size())}, {"to", to_.describe()}});
    void* const memory = slot_.reserve(bytes_);
    std::memcpy(memory, values.data(), bytes_);
    cuda_check(cudaMemcpyAsync(to_.raw(), memory, bytes_, cudaMemcpyHostToDevice, cuda_.stream), "cudaMemcpyAsync");
    slot_.mark(cuda_.stream);
  }

 private:
  Tensor to_;
  const CudaContext& cuda_;
  size_t bytes_;
  PageLockedSlot slot_;
};

}  // namespace

std::unique_ptr<Upload> upload_to_cuda(const Tensor& to) {
  cuda_check(cudaSetDevice(to.device().cuda_context().index), "cudaSetDevice");  // whose event the slot makes
  return std::make_unique<CudaUpload>(to);
}

}  // namespace longhand
