// For memory checkers: what a kernel writes without their seeing it.
#pragma once
#include "core/tensor.h"

namespace longhand {

/// With LONGHAND_EXACT=1 writes all of a matrix that the next kernel writes by bulk copies (cuBLAS its products, others their tiles).
/// compute-sanitizer does not see those: to it whoever reads the matrix would read what nobody wrote.
/// matrix  [rows, columns] on a GPU, rows contiguous
void show_as_written(const Tensor& matrix);

}  // namespace longhand
