// Small values that go from the host to one place in a GPU's memory again and again, while the host goes on.
#pragma once
#include <cstddef>
#include <memory>
#include <span>

#include "core/tensor.h"

namespace longhand {

class Upload {
 public:
  virtual ~Upload() = default;

  /// Queues the copy, behind what is queued already; `values` may go when this returns.
  /// errors  ValueError for another number of bytes than the tensor has
  virtual void send(std::span<const std::byte> values) = 0;
};

/// to      contiguous, on a GPU
/// errors  DeviceError on a CPU
std::unique_ptr<Upload> upload_to(const Tensor& to);

}  // namespace longhand
