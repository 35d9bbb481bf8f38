// The link to a GPU: page-locked buffers, each guarded by an event that says when the copy engine is done with it. See host_link.h.
#include <array>
#include <cstring>

#include "core/cuda_context.h"
#include "core/error.h"
#include "train/host_link.h"

namespace longhand {
namespace {

// Page-locked host memory of one copy in flight.
class Slot {
 public:
  Slot() { cuda_check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming | cudaEventBlockingSync), "cudaEventCreateWithFlags"); }
  ~Slot() {
    (void)cudaEventSynchronize(done_);
    (void)cudaEventDestroy(done_);
    (void)cudaFreeHost(memory_);
  }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  void* reserve(size_t bytes) {
    wait();
    if (bytes > bytes_) {
      (void)cudaFreeHost(memory_);
      memory_ = nullptr;
      cuda_check(cudaMallocHost(&memory_, bytes), "cudaMallocHost");
      bytes_ = bytes;
    }
    return memory_;
  }
  void mark(cudaStream_t stream) { cuda_check(cudaEventRecord(done_, stream), "cudaEventRecord"); }
  void wait() { cuda_check(cudaEventSynchronize(done_), "cudaEventSynchronize"); }
  bool done() const {
    const cudaError_t status = cudaEventQuery(done_);
    if (status != cudaErrorNotReady) cuda_check(status, "cudaEventQuery");
    return status == cudaSuccess;
  }
  void* memory() const { return memory_; }

 private:
  cudaEvent_t done_ = nullptr;
  void* memory_ = nullptr;
  size_t bytes_ = 0;
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
