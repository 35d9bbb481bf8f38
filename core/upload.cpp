// The choice of the device; see upload.h.
#include "core/upload.h"

#include "core/error.h"

namespace longhand {

std::unique_ptr<Upload> upload_to_cuda(const Tensor& to);  // upload_cuda.cpp

namespace {

std::unique_ptr<Upload> upload_to_cpu(const Tensor& to) {
  throw DeviceError("upload: only to a GPU", {{"to", to.describe()}, {"try", "copy()"}});
}

}  // namespace

std::unique_ptr<Upload> upload_to(const Tensor& to) {
  return on_device(to.device(), &upload_to_cpu, LONGHAND_CUDA_IMPL(upload_to_cuda))(to);
}

}  // namespace longhand
