// Large random inputs for benchmarks, made quickly.
#pragma once
#include <algorithm>

#include "autograd/gradcheck.h"

namespace longhand {

/// A tensor of any size from N(mean, scale): a random part of a quarter of a million elements, repeated on the device along the first axis.
inline Tensor repeated_random_tensor(const Device& device, Dtype dtype, Shape shape, uint64_t seed, double scale = 1.0, double mean = 0.0) {
  constexpr int64_t kRandomElements = 1 << 18;
  const Tensor whole = Tensor::empty(device, dtype, shape);
  if (whole.numel() <= kRandomElements) return random_tensor(device, dtype, shape, seed, scale, mean);
  const int64_t width = shape[-1], rows = whole.numel() / width, part_rows = std::max<int64_t>(1, kRandomElements / width);
  const Tensor part = random_tensor(device, dtype, {std::min(rows, part_rows), width}, seed, scale, mean),
               flat = whole.reshape({rows, width});
  for (int64_t row = 0; row < rows; row += part_rows) {
    const int64_t count = std::min(part_rows, rows - row);
    copy(flat.slice(0, row, row + count), part.slice(0, 0, count));
  }
  return whole;
}

}  // namespace longhand
