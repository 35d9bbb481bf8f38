// The link to the CPU, where there is nothing to overlap; see host_link.h.
#include "train/host_link.h"

#include <cstring>
#include <deque>

namespace longhand {

std::unique_ptr<HostLink> make_cuda_host_link(const Device& device);  // host_link_cuda.cpp

namespace {

class CpuHostLink final : public HostLink {
 public:
  explicit CpuHostLink(const Device& device) : device_(device) {}
  void request(const Tensor& values) override { open_.push_back(values.to_vector<double>()); }
  std::vector<double> receive() override {
    auto values = std::move(open_.front());
    open_.pop_front();
    return values;
  }

 protected:
  Tensor upload_bytes(Dtype dtype, const Shape& shape, const void* values) override {
    const Tensor tensor = Tensor::empty(device_, dtype, shape);
    if (tensor.numel() > 0) std::memcpy(tensor.raw(), values, static_cast<std::size_t>(tensor.numel() * size_of(dtype)));
    return tensor;
  }

 private:
  Device device_;
  std::deque<std::vector<double>> open_;
};

std::unique_ptr<HostLink> make_cpu_host_link(const Device& device) {
  return std::make_unique<CpuHostLink>(device);
}

}  // namespace

std::unique_ptr<HostLink> make_host_link(const Device& device) {
  return on_device(device, &make_cpu_host_link, LONGHAND_CUDA_IMPL(make_cuda_host_link))(device);
}

}  // namespace longhand
