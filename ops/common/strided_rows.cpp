// See strided_rows.h.
#include "ops/common/strided_rows.h"

#include "core/error.h"

namespace longhand {

StridedRows strided_rows_of(const Tensor& t, bool& fits) {
  fits = true;
  StridedRows rows;
  if (t.rank() == 0) return rows;
  rows.width = t.dim(-1);
  rows.inner_stride = rows.width;
  for (int axis = 0; axis < t.rank() - 1; ++axis) rows.count *= t.dim(axis);
  if (rows.count == 0) return rows;

  int strides_seen = 0;
  int64_t outer = 1;  // rows of the outer level so far
  for (int axis = t.rank() - 2; axis >= 0; --axis) {
    const int64_t size = t.dim(axis), stride = t.stride(axis);
    if (size == 1) continue;
    if (strides_seen == 0) {
      rows.inner = size;
      rows.inner_stride = stride;
      strides_seen = 1;
    } else if (strides_seen == 1 && stride == rows.inner * rows.inner_stride) {
      rows.inner *= size;
    } else if (strides_seen == 1) {
      outer = size;
      rows.outer_stride = stride;
      strides_seen = 2;
    } else if (stride == outer * rows.outer_stride) {
      outer *= size;
    } else {
      fits = false;
      return rows;
    }
  }
  return rows;
}

Tensor with_strided_rows(const Tensor& t) {
  if (!t.defined()) return t;
  bool fits = false;
  strided_rows_of(t, fits);
  return fits ? t : t.contiguous();
}

Tensor writable_strided_rows(const Tensor& buffer) {
  bool fits = false;
  strided_rows_of(buffer, fits);
  return fits ? buffer : Tensor::empty(buffer.device(), buffer.dtype(), buffer.shape());
}

StridedRows strided_rows_of(const Tensor& t) {
  if (!t.defined()) return {};
  bool fits = false;
  const StridedRows rows = strided_rows_of(t, fits);
  if (!fits) throw ShapeError("strided_rows_of: the leading axes need more than two strides", {{"tensor", t.describe()}});
  return rows;
}

bool rows_are_aligned(const Tensor& t, int64_t elements) {
  if (!t.defined() || t.numel() == 0) return true;
  const StridedRows rows = strided_rows_of(t);
  const auto address = reinterpret_cast<std::uintptr_t>(t.raw());
  return address % static_cast<std::uintptr_t>(elements * size_of(t.dtype())) == 0 && rows.inner_stride % elements == 0 &&
         rows.outer_stride % elements == 0;
}

}  // namespace longhand
