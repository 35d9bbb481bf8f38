// How a product of few rows is cut into the blocks of a GPU: plain C++, so that what is chosen can be looked at without one.
#pragma once
#include <cstdint>

#include "ops/token_step/token_step.h"

namespace longhand {

constexpr int kProductWarpsLog2 = 3, kProductWarps = 1 << kProductWarpsLog2;  // of a block
constexpr int kTileLog2 = 4, kTile = 1 << kTileLog2;                          // rows of weight that a tensor-core instruction takes
constexpr int kPartsOfRow = kTile + 4;  // floats from one row of x to the next in what warps have to add up: lanes meet in no bank
constexpr int kPartialFloats = kProductWarps * static_cast<int>(kTokenStepRows) * kPartsOfRow;

/// Elements between two rows in shared memory: an odd multiple of 64 bytes, so that eight lanes which read two rows meet in no bank.
constexpr int64_t shared_stride(int64_t width, int64_t element_bytes) {
  const int64_t line = 128 / element_bytes;
  return (width + line - 1) / line * line + line / 2;
}

/// out [B, R] = x [B, D] weight [R, D]^T
struct ProductSizes {
  int64_t out_rows, width, batch;  // R, D, B
  int64_t element_bytes;
  int64_t floats_ahead;  // what a kernel keeps in shared memory beside the product
};
struct GpuSizes {
  int64_t shared_memory_per_block;  // the most that a block may have
  int64_t multiprocessors;
};
struct ProductCut {
  int rows_log2;         // of weight in a block
  int64_t shared_bytes;  // of a block
  bool fits;
};

/// The most rows of weight, a power of two, with which half of the multiprocessors have a block; where they cannot all have theirs at once,
/// so many that two blocks share a multiprocessor, and one multiplies while the other's rows are on their way. At least a tile; where
/// shared memory holds no tile, parts of one down to four rows. A product's sums are cut by this alone, so rows beyond a tile do not depend
/// on the batch: the same bits whatever the number of rows.
ProductCut cut_product(const ProductSizes&, const GpuSizes&);

}  // namespace longhand
