// Tensor: shape, strides and element type over shared storage on one device. A handle: copies share the storage; views share it too.
// The last axis is always contiguous, so that kernels need one stride per row; strides count elements.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/shape.h"

namespace longhand {

/// The memory of one or more tensors; given back to the device's allocator when the last of them goes.
class Storage {
 public:
  Storage(Device device, std::size_t bytes);
  Storage(Device device, void* borrowed, std::shared_ptr<const void> owner);  // memory that somebody else owns, such as a mapped file
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  void* data() const { return data_; }
  const Device& device() const { return device_; }

 private:
  Device device_;
  void* data_ = nullptr;
  std::shared_ptr<const void> owner_;
};

class Tensor {
 public:
  Tensor() = default;  // undefined: stands for "absent"

  static Tensor empty(const Device&, Dtype, Shape);
  static Tensor zeros(const Device&, Dtype, Shape);
  static Tensor full(const Device&, Dtype, Shape, double value);
  /// Copies host values to the device; their count must be the shape's.
  template <class T>
  static Tensor from(const Device& device, Shape shape, std::span<const T> values) {
    return from_bytes(device, dtype_of<T>(), shape, values.data(), values.size());
  }
  template <class T>
  static Tensor from(const Device& device, Shape shape, const std::vector<T>& values) {
    return from_bytes(device, dtype_of<T>(), shape, values.data(), values.size());
  }
  /// A CPU tensor over memory that `owner` keeps alive (a mapped file).
  static Tensor borrow(Dtype, Shape, const void* data, std::shared_ptr<const void> owner);

  bool defined() const { return storage_ != nullptr; }
  explicit operator bool() const { return defined(); }
  const Shape& shape() const { return shape_; }
  int rank() const { return shape_.rank(); }
  int64_t dim(int axis) const { return shape_[axis]; }  // a negative axis counts from the end
  int64_t stride(int axis) const { return strides_[axis]; }
  int64_t numel() const { return shape_.numel(); }
  Dtype dtype() const { return dtype_; }
  const Device& device() const;
  bool is_contiguous() const;

  void* raw() const {  // address of element 0
    if (!defined()) refuse_undefined();
    return static_cast<char*>(storage_->data()) + offset_ * size_of(dtype_);
  }
  template <class T>
  T* data() const {  // the same, checked against the dtype
    if (dtype_ != dtype_of<T>()) refuse_dtype(dtype_of<T>());
    return static_cast<T*>(raw());
  }

  // Views: no copy, same storage.
  Tensor slice(int axis, int64_t begin, int64_t end) const;  // [.., end - begin, ..]
  Tensor select(int axis, int64_t index) const;              // axis removed; not the last axis
  Tensor reshape(Shape) const;  // also of a strided view, where only axes of uniform stride are joined or split; else ShapeError

  // New storage.
  Tensor clone() const;            // contiguous
  Tensor contiguous() const;       // *this when it already is
  Tensor to(const Device&) const;  // *this when it is there already
  Tensor to(Dtype) const;          // *this when it has that dtype already; rounds to nearest

  /// All elements on the host in row-major order, converted to T; waits for the device.
  template <class T>
  std::vector<T> to_vector() const;
  double item() const;  // the single element of a tensor of one element

  std::string describe() const;  // "[8, 2048, 1024] bf16 cpu"
  bool same_storage(const Tensor& other) const { return storage_ == other.storage_; }
  int64_t offset() const { return offset_; }  // of element 0 in the storage, in elements

 private:
  static Tensor from_bytes(const Device&, Dtype, Shape, const void* values, std::size_t count);
  [[noreturn]] void refuse_dtype(Dtype read_as) const;
  [[noreturn]] void refuse_undefined() const;
  std::shared_ptr<Storage> storage_;
  Shape shape_, strides_;
  int64_t offset_ = 0;
  Dtype dtype_ = Dtype::f32;
};

extern template std::vector<double> Tensor::to_vector<double>() const;
extern template std::vector<float> Tensor::to_vector<float>() const;
extern template std::vector<int32_t> Tensor::to_vector<int32_t>() const;
extern template std::vector<int64_t> Tensor::to_vector<int64_t>() const;
extern template std::vector<uint8_t> Tensor::to_vector<uint8_t>() const;

/// dst[i] = src[i], with conversion of the dtype, between any strides; also between devices (same dtype, then converted).
/// errors  ShapeError when the shapes differ
void copy(const Tensor& dst, const Tensor& src);

/// dst[i] = value
void fill(const Tensor& dst, double value);

/// dst[i] += src[i] * scale, summed in the wider of f32 and dst's dtype; same device and shape, any floating dtypes and strides.
void add_scaled(const Tensor& dst, const Tensor& src, double scale = 1.0);

/// dst[i] *= scale
void multiply(const Tensor& dst, double scale);

/// A tensor seen as rows: all axes but the last joined into one, which must have one stride. What kernels work on.
struct Rows {
  int64_t count;   // product of all axes but the last
  int64_t width;   // the last axis
  int64_t stride;  // elements between the beginnings of two rows
};
/// errors  ShapeError naming `what` when the leading axes cannot be joined (take a contiguous() copy then)
Rows rows_of(const Tensor&, const char* what);

/// The index of the first NaN or infinity in row-major order, or -1. Reads the whole tensor on the host.
int64_t first_non_finite(const Tensor&);

}  // namespace longhand
