// The link to the CPU, where there is nothing to overlap; see host_link.h.
#include "train/host_link.h"

#include <chrono>
#include <cstring>
#include <deque>
#include <thread>

#include "core/error.h"

namespace longhand {

std::unique_ptr<HostLink> make_cuda_host_link(const Device& device);  // host_link_cuda.cpp

namespace {

class CpuHostLink final : public HostLink {
 public:
  explicit CpuHostLink(const Device& device) : HostLink(device) {}
  void request(const Tensor& values) override { open_.push_back(values.to_vector<double>()); }
  std::vector<double> receive() override {
    auto values = std::move(open_.front());
    open_.pop_front();
    return values;
  }
  void wait() override {}

 protected:
  void copy_up(const Tensor& to, const void* values, std::size_t bytes) override { std::memcpy(to.raw(), values, bytes); }

 private:
  std::deque<std::vector<double>> open_;
};

std::unique_ptr<HostLink> make_cpu_host_link(const Device& device) {
  return std::make_unique<CpuHostLink>(device);
}

}  // namespace

void HostLink::upload_bytes(Tensor& to, Dtype dtype, const Shape& shape, const void* values) {
  if (!to.defined()) to = Tensor::empty(device_, dtype, shape);
  if (!(to.shape() == shape) || to.dtype() != dtype || !to.is_contiguous() || !(to.device() == device_))
    throw ShapeError("host link: values that do not fit where they go", {{"values", shape.str()}, {"to", to.describe()}});
  if (to.numel() > 0) copy_up(to, values, static_cast<std::size_t>(to.numel() * size_of(dtype)));
}

void HostLink::watch(const std::function<bool()>& done) const {
  constexpr auto kEvery = std::chrono::milliseconds(100);
  constexpr auto kNap = std::chrono::microseconds(100);  // a step is queued already: nothing waits for what is waited for here
  if (!while_waiting_) return;
  for (auto next = std::chrono::steady_clock::now() + kEvery; !done(); std::this_thread::sleep_for(kNap)) {
    if (std::chrono::steady_clock::now() < next) continue;
    while_waiting_();
    next += kEvery;
  }
}

std::unique_ptr<HostLink> make_host_link(const Device& device) {
  return on_device(device, &make_cpu_host_link, LONGHAND_CUDA_IMPL(make_cuda_host_link))(device);
}

}  // namespace longhand
