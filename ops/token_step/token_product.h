// How a product of few rows is cut into the blocks of a GPU: plain C++, so that what is chosen can be looked at without one.
#pragma once
#include <cstdint>

#include "ops/token_step/token_step.h"

namespace longhand {

constexpr int kProductWarpsLog2 = 3, kProductWarps = 1 << kProductWarpsLog2;  // of a block, or twice as many
constexpr int kTileLog2 = 4, kTile = 1 << kTileLog2;                          // rows of weight that a tensor-core instruction takes
constexpr int64_t kRowsOfGroup = 8;                                           // of x that it multiplies them by
constexpr int64_t kRowsOfPass = 2 * kRowsOfGroup;  // of x, formed before, that a block multiplies its rows of weight by at a time
constexpr int kPartsOfRow = kTile + 4;  // floats from one row of x to the next in what warps have to add up: lanes meet in no bank

/// Into how many parts, as a power of two, the columns of a tile are cut in a block of so many rows of weight: one for each of its
/// kProductWarps warps, or for two of twice as many.
constexpr int parts_log2(int rows_log2) {
  return rows_log2 > kTileLog2 ? kProductWarpsLog2 + kTileLog2 - rows_log2 : kProductWarpsLog2;
}

/// Elements between two rows in shared memory: an odd multiple of 64 bytes, so that eight lanes which read two rows meet in no bank.
constexpr int64_t shared_stride(int64_t width, int64_t element_bytes) {
  const int64_t line = 128 / element_bytes;
  return (width + line - 1) / line * line + line / 2;
}

/// out [B, R] = x [B, D] weight [R, D]^T
struct ProductSizes {
  int64_t out_rows, width, batch;  // R, D, B
  int64_t element_bytes;
  int64_t floats_ahead;           // what a kernel keeps in shared memory beside the product
  int64_t rows_of_few_warps = 1;  // of x; more of them are formed and multiplied by twice as many warps
};
struct GpuSizes {
  int64_t shared_memory_per_block;  // the most that a block may have
  int64_t multiprocessors;
};
struct ProductCut {
  int rows_log2;         // of weight in a block
  int warps;             // of a block
  int64_t shared_bytes;  // of a block
  bool fits;
  int64_t blocks;     // of rows of weight
  unsigned resident;  // of them, those that the GPU holds at a time: they take the others in turns
};

/// Blocks of a multiprocessor by their registers: room for those of the next kernels beside those that are at work.
constexpr int blocks_of_registers(int warps) {
  return 32 / warps;
}

/// The most rows of weight, a power of two, with which half of the multiprocessors have a block; where they cannot all have theirs at once,
/// so many that, with a group of rows of x, two blocks share a multiprocessor, and one multiplies while the other's rows are on their way.
/// At least a tile; where shared memory holds no tile, parts of one down to four rows. A product's sums are cut by this alone: several
/// tiles are chosen whatever the batch, so a row has the same bits whatever the number of rows. Nor do the warps change them: two that
/// share a part of the columns have what one sums apart.
ProductCut cut_product(const ProductSizes&, const GpuSizes&);

/// The same where a kernel in front forms x: room for kRowsOfPass rows of it at a time beside the rows of weight. Fits where those are
/// whole tiles and the GPU holds all blocks at once: else the library's product is faster.
ProductCut cut_formed_product(ProductSizes, const GpuSizes&);

}  // namespace longhand
