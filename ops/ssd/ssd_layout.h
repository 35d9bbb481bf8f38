// The sizes of ssd, read from its tensors.
#pragma once
#include "ops/common/token_strides.h"

namespace longhand {

struct SsdSizes {
  int64_t B, T, H, P, G, N;
  int64_t heads_per_group() const { return H / G; }
};
inline SsdSizes ssd_sizes(const Tensor& x, const Tensor& B_t) {
  return {x.dim(0), x.dim(1), x.dim(2), x.dim(3), B_t.dim(2), B_t.dim(3)};
}

}  // namespace longhand
