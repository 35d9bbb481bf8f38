// Large random inputs for benchmarks, made quickly.
#pragma once
#include <algorithm>
#include <vector>

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

/// Inputs that want a gradient and gradients of outputs, several sets of them on a GPU, so that L2 holds none.
struct BenchInputs {
  std::vector<Variable> xs;
  std::vector<Tensor> grads;

  BenchInputs(const Device& device, Dtype dtype, const Shape& x, const Shape& grad) {
    for (int i = 0; i < (device.is_cuda() ? 3 : 1); ++i) {
      const auto seed = static_cast<uint64_t>(i) * 10;
      xs.push_back(Variable::leaf(repeated_random_tensor(device, dtype, x, seed + 1)));
      grads.push_back(repeated_random_tensor(device, dtype, grad, seed + 2));
    }
  }
  int sets() const { return static_cast<int>(xs.size()); }
};

}  // namespace longhand
