// Token ids as ops meet them: how a position is named in messages, and the check that every id is in range.
#pragma once
#include <string>

#include "core/tensor.h"

namespace longhand {

/// "[3, 17]": the indices of row-major element `flat` of a tensor of this shape.
std::string position_text(const Shape& shape, int64_t flat);

/// Reads all ids on the host (waits for a GPU) and throws unless each is in [0, limit).
/// op       opens the message
/// ids      i32, any shape
/// weights  f32 of as many elements, or undefined; ids where it is 0 may be anything
/// errors   ValueError naming the position and the value of the first bad id
void require_ids(const std::string& op, const Tensor& ids, int64_t limit, const Tensor& weights = {});

}  // namespace longhand
