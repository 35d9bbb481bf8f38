// See tensor.h.
#include "core/tensor.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/allocator.h"
#include "core/error.h"
#include "core/tensor_kernels.h"

namespace longhand {
namespace {

constexpr int64_t kRun = 1 << 14;  // elements that one thread takes at a time
constexpr int64_t kParallelFrom = 1 << 18;

Shape contiguous_strides(const Shape& shape) {
  (void)shape.numel();  // refuses sizes whose strides would overflow
  Shape strides = shape;
  int64_t step = 1;
  for (int axis = shape.rank() - 1; axis >= 0; --axis) {
    strides[axis] = step;
    step *= shape[axis];
  }
  return strides;
}

// Calls visit_row(dst_offset, src_offset) for every run of the last axis.
template <class F>
void for_each_row(const Tensor& dst, const Tensor& src, F&& visit_row) {
  const int leading = std::max(dst.rank() - 1, 0);
  int64_t count = 1;
  for (int axis = 0; axis < leading; ++axis) count *= dst.dim(axis);
  for (int64_t row = 0; row < count; ++row) {
    int64_t rest = row, d = 0, s = 0;
    for (int axis = leading - 1; axis >= 0; --axis) {
      const int64_t i = rest % dst.dim(axis);
      rest /= dst.dim(axis);
      d += i * dst.stride(axis);
      s += i * src.stride(axis);
    }
    visit_row(d, s);
  }
}

int64_t last_axis(const Tensor& t) {
  return t.rank() == 0 ? 1 : t.dim(-1);
}

// f16's own conversion without branches, so that loops over it are vectorised. The product moves the exponent's bias from 15 to 127, and is
// exact, for subnormal numbers too.
float widened(f16 value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t full_exponent = magnitude | 0x7f800000u;  // of NaN and infinity
  return std::bit_cast<float>(((value.bits & 0x7c00u) == 0x7c00u ? full_exponent : scaled) | sign);
}

template <class To, class From>
To convert(From value) {
  if constexpr (std::is_same_v<To, From>) return value;
  else if constexpr (std::is_same_v<From, f16>) return convert<To>(widened(value));
  else if constexpr (std::is_same_v<To, bf16> || std::is_same_v<To, f16>) return To(static_cast<float>(value));
  else if constexpr (std::is_same_v<From, bf16>) return static_cast<To>(static_cast<float>(value));
  else return static_cast<To>(value);
}

void require_same_shape(const char* op, const Tensor& dst, const Tensor& src) {
  if (!(dst.shape() == src.shape()))
    throw ShapeError(std::string(op) + ": the shapes differ", {{"to", dst.describe()}, {"from", src.describe()}});
}

}  // namespace

Storage::Storage(Device device, std::size_t bytes) : device_(std::move(device)), data_(device_.allocator().allocate(bytes)) {}
Storage::Storage(Device device, void* borrowed, std::shared_ptr<const void> owner)
    : device_(std::move(device)), data_(borrowed), owner_(std::move(owner)) {}
Storage::~Storage() {
  if (owner_ == nullptr) device_.allocator().release(data_);
}

Tensor Tensor::empty(const Device& device, Dtype dtype, Shape shape) {
  Tensor t;
  const auto bytes = static_cast<std::size_t>(shape.numel()) * static_cast<std::size_t>(size_of(dtype));
  t.storage_ = std::make_shared<Storage>(device, bytes);
  t.shape_ = shape;
  t.strides_ = contiguous_strides(shape);
  t.dtype_ = dtype;
  return t;
}

Tensor Tensor::zeros(const Device& device, Dtype dtype, Shape shape) {
  return full(device, dtype, shape, 0.0);
}

Tensor Tensor::full(const Device& device, Dtype dtype, Shape shape, double value) {
  Tensor t = empty(device, dtype, shape);
  fill(t, value);
  return t;
}

Tensor Tensor::from_bytes(const Device& device, Dtype dtype, Shape shape, const void* values, std::size_t count) {
  if (static_cast<std::size_t>(shape.numel()) != count)
    throw ShapeError("tensor: the number of values is not the shape's", {{"values", std::to_string(count)}, {"shape", shape.str()}});
  Tensor t = empty(Device::cpu(), dtype, shape);
  if (count > 0) std::memcpy(t.raw(), values, count * static_cast<std::size_t>(size_of(dtype)));
  return t.to(device);
}

Tensor Tensor::borrow(Dtype dtype, Shape shape, const void* data, std::shared_ptr<const void> owner) {
  Tensor t;
  t.storage_ = std::make_shared<Storage>(Device::cpu(), const_cast<void*>(data), std::move(owner));
  t.shape_ = shape;
  t.strides_ = contiguous_strides(shape);
  t.dtype_ = dtype;
  return t;
}

const Device& Tensor::device() const {
  if (!defined()) throw ValueError("tensor: an undefined tensor has no device");
  return storage_->device();
}

void Tensor::refuse_undefined() const {
  throw ValueError("tensor: an undefined tensor has no data");
}

void Tensor::refuse_dtype(Dtype read_as) const {
  throw DtypeError("tensor: read as another element type than it has", {{"tensor", describe()}, {"read as", name_of(read_as)}});
}

bool Tensor::is_contiguous() const {
  int64_t step = 1;
  for (int axis = rank() - 1; axis >= 0; --axis) {
    if (dim(axis) != 1 && stride(axis) != step) return false;
    step *= dim(axis);
  }
  return true;
}

Tensor Tensor::slice(int axis, int64_t begin, int64_t end) const {
  if (begin < 0 || end < begin || end > dim(axis))
    throw ShapeError("tensor: slice outside the axis", {{"tensor", describe()},
                                                        {"axis", std::to_string(axis)},
                                                        {"slice", "[" + std::to_string(begin) + ", " + std::to_string(end) + ")"}});
  Tensor t = *this;
  t.shape_[axis] = end - begin;
  t.offset_ += begin * stride(axis);
  return t;
}

Tensor Tensor::select(int axis, int64_t index) const {
  const int removed = axis < 0 ? axis + rank() : axis;
  if (removed < 0) throw ShapeError("tensor: no such axis", {{"axis", std::to_string(axis)}, {"tensor", describe()}});
  if (removed == rank() - 1) throw ShapeError("tensor: select would remove the contiguous last axis", {{"tensor", describe()}});
  Tensor t = slice(removed, index, index + 1);
  Shape shape, strides;
  for (int i = 0; i < rank(); ++i) {
    if (i == removed) continue;
    shape.push_back(dim(i));
    strides.push_back(stride(i));
  }
  t.shape_ = shape;
  t.strides_ = strides;
  return t;
}

Tensor Tensor::reshape(Shape shape) const {
  auto refuse = [&](const char* why) {
    return ShapeError(std::string("tensor: cannot reshape, ") + why, {{"tensor", describe()}, {"to", shape.str()}});
  };
  if (shape.numel() != numel()) throw refuse("the number of elements differs");
  Tensor t = *this;
  t.shape_ = shape;
  if (is_contiguous() || numel() == 0) {
    t.strides_ = contiguous_strides(shape);
    return t;
  }
  // Walk both shapes from the last axis: join old axes whose strides are uniform until they cover the next new axes.
  t.strides_ = shape;
  int old_axis = rank() - 1, new_axis = shape.rank() - 1;
  while (new_axis >= 0) {
    while (old_axis >= 0 && dim(old_axis) == 1) --old_axis;
    if (old_axis < 0) {  // only axes of size 1 are left: as if packed, for kernels that ask the strides whether rows are aligned
      t.strides_[new_axis] = new_axis + 1 < shape.rank() ? t.strides_[new_axis + 1] * shape[new_axis + 1] : 1;
      --new_axis;
      continue;
    }
    int64_t old_size = dim(old_axis);
    const int64_t unit = stride(old_axis);
    int64_t new_size = 1;
    int64_t step = unit;
    while (new_axis >= 0) {
      t.strides_[new_axis] = step;
      new_size *= shape[new_axis];
      step *= shape[new_axis];
      --new_axis;
      while (old_size < new_size) {
        const int64_t joined_stride = stride(old_axis) * dim(old_axis);
        --old_axis;
        while (old_axis >= 0 && dim(old_axis) == 1) --old_axis;
        if (old_axis < 0 || stride(old_axis) != joined_stride) throw refuse("the axes to join have no uniform stride");
        old_size *= dim(old_axis);
      }
      if (old_size == new_size) break;
    }
    --old_axis;
  }
  if (shape.rank() > 0 && shape[-1] > 1 && t.strides_[-1] != 1) throw refuse("the last axis would not be contiguous");
  return t;
}

Tensor Tensor::clone() const {
  Tensor t = empty(device(), dtype_, shape_);
  copy(t, *this);
  return t;
}

Tensor Tensor::contiguous() const {
  return is_contiguous() ? *this : clone();
}

Tensor Tensor::to(const Device& target) const {
  if (device() == target) return *this;
  Tensor t = empty(target, dtype_, shape_);
  copy(t, *this);
  return t;
}

Tensor Tensor::to(Dtype target) const {
  if (dtype_ == target) return *this;
  Tensor t = empty(device(), target, shape_);
  copy(t, *this);
  return t;
}

template <class T>
std::vector<T> Tensor::to_vector() const {
  const Tensor host = to(Device::cpu()).to(dtype_of<T>()).contiguous();
  const T* begin = host.data<T>();
  return std::vector<T>(begin, begin + host.numel());
}
template std::vector<double> Tensor::to_vector<double>() const;
template std::vector<float> Tensor::to_vector<float>() const;
template std::vector<int32_t> Tensor::to_vector<int32_t>() const;
template std::vector<int64_t> Tensor::to_vector<int64_t>() const;
template std::vector<uint8_t> Tensor::to_vector<uint8_t>() const;

double Tensor::item() const {
  if (numel() != 1) throw ShapeError("tensor: item() needs exactly one element", {{"tensor", describe()}});
  return to_vector<double>()[0];
}

std::string Tensor::describe() const {
  if (!defined()) return "undefined";
  return shape_.str() + " " + name_of(dtype_) + " " + device().name();
}

void copy(const Tensor& dst, const Tensor& src) {
  require_same_shape("copy", dst, src);
  if (dst.numel() == 0) return;
  if (!(dst.device() == src.device())) {
    if (dst.is_contiguous() && src.is_contiguous() && dst.dtype() == src.dtype()) {
#if LONGHAND_WITH_CUDA
      transfer_cuda(dst, src);
#endif
      return;
    }
    const Tensor packed = src.contiguous();
    const Tensor landed = Tensor::empty(dst.device(), src.dtype(), src.shape());
    copy(landed, packed);
    copy(dst, landed);
    return;
  }
#if LONGHAND_WITH_CUDA
  if (dst.device().is_cuda()) return copy_cuda(dst, src);
#endif
  const int64_t width = last_axis(dst);
  if (dst.dtype() == src.dtype()) {
    const auto bytes = static_cast<std::size_t>(width * size_of(dst.dtype()));
    char* d = static_cast<char*>(dst.raw());
    const char* s = static_cast<const char*>(src.raw());
    const int64_t element = size_of(dst.dtype());
    for_each_row(dst, src, [&](int64_t to, int64_t from) { std::memmove(d + to * element, s + from * element, bytes); });
    return;
  }
  visit(dst.dtype(), [&](auto to_element) {
    visit(src.dtype(), [&](auto from_element) {
      using To = decltype(to_element);
      using From = decltype(from_element);
      To* d = dst.data<To>();
      const From* s = src.data<From>();
      if (const int64_t n = dst.numel(); n > kParallelFrom && dst.is_contiguous() && src.is_contiguous()) {
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < n; ++i) d[i] = convert<To>(s[i]);
        return;
      }
      for_each_row(dst, src, [&](int64_t to, int64_t from) {
        for (int64_t i = 0; i < width; ++i) d[to + i] = convert<To>(s[from + i]);
      });
    });
  });
}

void fill(const Tensor& dst, double value) {
  if (dst.numel() == 0) return;
#if LONGHAND_WITH_CUDA
  if (dst.device().is_cuda()) return fill_cuda(dst, value);
#endif
  const int64_t width = last_axis(dst);
  visit(dst.dtype(), [&](auto element) {
    using T = decltype(element);
    T* d = dst.data<T>();
    const T v = convert<T>(value);
    for_each_row(dst, dst, [&](int64_t to, int64_t) {
      for (int64_t i = 0; i < width; ++i) d[to + i] = v;
    });
  });
}

void add_scaled(const Tensor& dst, const Tensor& src, double scale) {
  require_same_shape("add_scaled", dst, src);
  if (dst.numel() == 0) return;
#if LONGHAND_WITH_CUDA
  if (dst.device().is_cuda()) return add_scaled_cuda(dst, src, scale);
#endif
  const int64_t width = last_axis(dst);
  visit(dst.dtype(), [&](auto to_element) {
    visit(src.dtype(), [&](auto from_element) {
      using To = decltype(to_element);
      using From = decltype(from_element);
      using Sum = std::conditional_t<std::is_same_v<To, double>, double, float>;
      To* d = dst.data<To>();
      const From* s = src.data<From>();
      const Sum factor = static_cast<Sum>(scale);
      for_each_row(dst, src, [&](int64_t to, int64_t from) {
        for (int64_t i = 0; i < width; ++i) d[to + i] = convert<To>(static_cast<Sum>(d[to + i]) + factor * static_cast<Sum>(s[from + i]));
      });
    });
  });
}

void multiply(const Tensor& dst, double scale) {
  if (dst.numel() == 0) return;
#if LONGHAND_WITH_CUDA
  if (dst.device().is_cuda()) return multiply_cuda(dst, scale);
#endif
  const int64_t width = last_axis(dst);
  visit(dst.dtype(), [&](auto element) {
    using T = decltype(element);
    using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
    T* d = dst.data<T>();
    for_each_row(dst, dst, [&](int64_t to, int64_t) {
      for (int64_t i = 0; i < width; ++i) d[to + i] = convert<T>(static_cast<Sum>(d[to + i]) * static_cast<Sum>(scale));
    });
  });
}

Rows rows_of(const Tensor& t, const char* what) {
  const int64_t width = last_axis(t);
  if (t.rank() <= 1) return {1, width, width};
  Rows rows{1, width, width};
  bool have_stride = false;
  for (int axis = t.rank() - 2; axis >= 0; --axis) {
    if (t.dim(axis) == 1) continue;
    if (!have_stride) {
      rows.stride = t.stride(axis);
      have_stride = true;
    } else if (t.numel() > 0 && t.stride(axis) != rows.count * rows.stride) {
      throw ShapeError(std::string(what) + ": the leading axes cannot be seen as rows of one stride",
                       {{"tensor", t.describe()}, {"try", "pass a contiguous copy"}});
    }
    rows.count *= t.dim(axis);
  }
  if (t.numel() == 0) rows.count = t.numel() / std::max<int64_t>(width, 1);
  return rows;
}

namespace {

// NaN and infinity are the values whose exponent bits are all ones.
template <class Bits>
int64_t first_with_full_exponent(const void* data, int64_t n, Bits exponent) {
  const auto* values = static_cast<const Bits*>(data);
  int64_t first = n;
#pragma omp parallel for schedule(static) reduction(min : first) if (n > kParallelFrom)
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = std::min(n, begin + kRun);
    int found = 0;  // searched without branches, so that the loop is vectorised
    for (int64_t i = begin; i < end; ++i) found |= (values[i] & exponent) == exponent ? 1 : 0;
    if (found != 0)
      for (int64_t i = end; i-- > begin;)
        if ((values[i] & exponent) == exponent) first = std::min(first, i);
  }
  return first == n ? -1 : first;
}

}  // namespace

int64_t first_non_finite(const Tensor& t) {
  if (!is_floating(t.dtype()) || t.numel() == 0) return -1;
  const Tensor host = t.to(Device::cpu()).contiguous();
  const int64_t n = host.numel();
  switch (t.dtype()) {
    case Dtype::f64:
      return first_with_full_exponent<uint64_t>(host.raw(), n, 0x7ff0000000000000u);
    case Dtype::f32:
      return first_with_full_exponent<uint32_t>(host.raw(), n, 0x7f800000u);
    case Dtype::f16:
      return first_with_full_exponent<uint16_t>(host.raw(), n, 0x7c00u);
    case Dtype::bf16:
      return first_with_full_exponent<uint16_t>(host.raw(), n, 0x7f80u);
    default:
      return -1;
  }
}

}  // namespace longhand
