// The link to a GPU: page-locked buffers for copies up and down, several of each in flight. See host_link.h.
#include <array>
#include <cstring>

#include "core/cuda_context.h"
#include "core/error.h"
#include "core/page_locked_slot.h"
#include "train/host_link.h"

namespace longhand {
namespace {

// The trainer's thread sleeps while it waits.
struct Slot : PageLockedSlot {
  Slot() : PageLockedSlot(cudaEventBlockingSync) {}
};

class CudaHostLink final : public HostLink {
 public:
  explicit CudaHostLink(const Device& device) : HostLink(device), cuda_(device.cuda_context()) {
    cuda_check(cudaSetDevice(cuda_.index), "cudaSetDevice");
    for (auto& slot : up_) slot = std::make_unique<Slot>();
    for (auto& slot : down_) slot = std::make_unique<Slot>();
    all_ = std::make_unique<Slot>();
  }

  void request(const Tensor& values) override {
    if (requested_ - received_ >= down_.size() || values.dtype() != Dtype::f64 || !values.is_contiguous())
      throw ValueError("host link: a request that cannot be taken",
                       {{"open", std::to_string(requested_ - received_)}, {"values", values.describe()}});
    count_ = static_cast<size_t>(values.numel());
    Slot& slot = *down_[requested_++ % down_.size()];
    void* memory = free_memory_of(slot, count_ * sizeof(double));
    cuda_check(cudaMemcpyAsync(memory, values.raw(), count_ * sizeof(double), cudaMemcpyDeviceToHost, cuda_.stream), "cudaMemcpyAsync");
    slot.mark(cuda_.stream);
  }

  std::vector<double> receive() override {
    if (received_ == requested_) throw ValueError("host link: nothing was requested");
    Slot& slot = *down_[received_++ % down_.size()];
    watch([&] { return slot.done(); });
    slot.wait();
    const auto* begin = static_cast<const double*>(slot.memory());
    return {begin, begin + count_};
  }

  void wait() override {
    all_->mark(cuda_.stream);
    watch([&] { return all_->done(); });
    device().synchronize();
  }

  double bf16_peak_flops() const override { return cuda_.bf16_peak_flops; }
  int64_t free_memory_bytes() const override {
    size_t free = 0, total = 0;
    cuda_check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return static_cast<int64_t>(free);
  }

 protected:
  void copy_up(const Tensor& to, const void* values, std::size_t bytes) override {
    Slot& slot = *up_[uploads_++ % up_.size()];
    void* memory = free_memory_of(slot, bytes);
    std::memcpy(memory, values, bytes);
    cuda_check(cudaMemcpyAsync(to.raw(), memory, bytes, cudaMemcpyHostToDevice, cuda_.stream), "cudaMemcpyAsync");
    slot.mark(cuda_.stream);
  }

 private:
  // What reserve() would wait for is watched before.
  void* free_memory_of(Slot& slot, size_t bytes) const {
    watch([&] { return slot.done(); });
    return slot.reserve(bytes);
  }

  const CudaContext& cuda_;
  std::array<std::unique_ptr<Slot>, 8> up_;
  std::array<std::unique_ptr<Slot>, 2> down_;
  std::unique_ptr<Slot> all_;  // no copy: the end of all work that was queued
  size_t uploads_ = 0, requested_ = 0, received_ = 0, count_ = 0;
};

}  // namespace

std::unique_ptr<HostLink> make_cuda_host_link(const Device& device) {
  return std::make_unique<CudaHostLink>(device);
}

}  // namespace longhand
