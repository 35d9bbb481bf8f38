// Values between host and device without making either wait for the other: batches go up and the numbers of a finished step come down while
// the next step is already queued.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/tensor.h"

namespace longhand {

class HostLink {
 public:
  virtual ~HostLink() = default;

  /// Copies host values to the device, behind the work queued there; the host memory may change right after the call.
  /// to  contiguous, of as many values; made with this shape where it is undefined, so that it stays where it is from step to step
  void upload(Tensor& to, std::span<const int32_t> values, const Shape& shape) { upload_bytes(to, Dtype::i32, shape, values.data()); }
  void upload(Tensor& to, std::span<const int64_t> values, const Shape& shape) { upload_bytes(to, Dtype::i64, shape, values.data()); }
  void upload(Tensor& to, std::span<const float> values, const Shape& shape) { upload_bytes(to, Dtype::f32, shape, values.data()); }

  /// Asks for the present values of a small f64 tensor, behind the work queued so far. At most two requests may be open.
  virtual void request(const Tensor& values) = 0;
  /// The values of the oldest open request; waits until the device has come to it.
  virtual std::vector<double> receive() = 0;

  /// Waits until the device has done all that was queued; reports what failed in it.
  virtual void wait() = 0;

  /// Called every tenth of a second while any of these waits for the device: uploads do for one of the eight before them.
  void while_waiting(std::function<void()> f) { while_waiting_ = std::move(f); }

  /// Peak of dense bf16 products of the device, for MFU; 0 when unknown.
  virtual double bf16_peak_flops() const { return 0; }
  /// Memory of the device that no program has taken; 0 when unknown.
  virtual int64_t free_memory_bytes() const { return 0; }

 protected:
  explicit HostLink(const Device& device) : device_(device) {}
  virtual void copy_up(const Tensor& to, const void* values, std::size_t bytes) = 0;
  const Device& device() const { return device_; }
  /// Returns when done() does not say false any more, or at once where nothing was to be called meanwhile.
  void watch(const std::function<bool()>& done) const;

 private:
  void upload_bytes(Tensor& to, Dtype dtype, const Shape& shape, const void* values);
  Device device_;
  std::function<void()> while_waiting_;
};

std::unique_ptr<HostLink> make_host_link(const Device& device);

}  // namespace longhand
