// Where rows of a wide tensor begin.
#pragma once
#include "core/tensor.h"

namespace longhand {

/// A new tensor whose rows begin at multiples of 128 bytes, a line of a GPU's caches, where that costs a sixteenth of the memory or less:
/// its parts are read row by row, and a row that begins within a line takes one line more of every access. Its last axis may be a slice.
Tensor empty_with_aligned_rows(const Device& device, Dtype dtype, Shape shape);

}  // namespace longhand
