// For tests of tensors with more than 2^31 elements: a small problem in the last row of a batch of zeros.
#pragma once
#include "core/tensor.h"

namespace longhand::test {

/// [rows, ..] in bf16, zeros but for the last row, which is `row` [1, ..].
inline Tensor zeros_with_last_row(const Tensor& row, int64_t rows, const Device& device) {
  Shape shape = row.shape();
  shape[0] = rows;
  const Tensor whole = Tensor::zeros(device, Dtype::bf16, shape);
  copy(whole.slice(0, rows - 1, rows), row.to(Dtype::bf16).to(device));
  return whole;
}

}  // namespace longhand::test
