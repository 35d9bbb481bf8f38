// Page-locked host memory of one copy in flight between host and GPU, guarded by an event that says when the copy engine is done with it.
#pragma once
#include "core/cuda_context.h"

namespace longhand {

class PageLockedSlot {
 public:
  /// `flags` of the event beside cudaEventDisableTiming: cudaEventBlockingSync lets a waiting thread sleep.
  explicit PageLockedSlot(unsigned flags = 0) {
    cuda_check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming | flags), "cudaEventCreateWithFlags");
  }
  ~PageLockedSlot() {
    (void)cudaEventSynchronize(done_);
    (void)cudaEventDestroy(done_);
    (void)cudaFreeHost(memory_);
  }
  PageLockedSlot(const PageLockedSlot&) = delete;
  PageLockedSlot& operator=(const PageLockedSlot&) = delete;

  /// So many bytes at least, when the copy before has ended.
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
  /// The copy has been queued.
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

}  // namespace longhand
