// See aligned_rows.h.
#include "autograd/aligned_rows.h"

namespace longhand {

Tensor empty_with_aligned_rows(const Device& device, Dtype dtype, Shape shape) {
  constexpr int64_t kLine = 128;
  const int64_t width = shape[-1], line = kLine / size_of(dtype), padded = (width + line - 1) / line * line;
  if (padded == width || 16 * (padded - width) > width) return Tensor::empty(device, dtype, shape);
  shape[-1] = padded;
  return Tensor::empty(device, dtype, shape).slice(-1, 0, width);
}

}  // namespace longhand
