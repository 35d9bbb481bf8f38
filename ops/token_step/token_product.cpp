#include "ops/token_step/token_product.h"

#include <algorithm>

namespace longhand {
namespace {

constexpr int64_t kOfTheSystem = 1024;  // of each block
constexpr int64_t kStatic = 2048;       // at most, of what the kernels declare themselves
constexpr int kFewestRowsLog2 = 2;

int64_t shared_bytes(const ProductSizes& p, int64_t rows, int64_t batch, int64_t floats_ahead, int warps) {
  constexpr auto kFloat = static_cast<int64_t>(sizeof(float));
  const int64_t partial = warps * (batch > kRowsOfGroup ? kRowsOfPass : kRowsOfGroup) * kPartsOfRow;
  return (rows + batch) * shared_stride(p.width, p.element_bytes) * p.element_bytes + (floats_ahead + partial) * kFloat;
}

int64_t blocks_of(const ProductSizes& p, int rows_log2) {
  return ((p.out_rows - 1) >> rows_log2) + 1;
}

// Of weight in a block, at least a tile
int most_rows_log2(const ProductSizes& p, const GpuSizes& gpu) {
  int rows_log2 = kTileLog2 + kProductWarpsLog2;
  const auto blocks = [&] { return blocks_of(p, rows_log2); };
  const auto room = [&] {
    const int64_t whole = gpu.shared_memory_per_block - kStatic;
    return blocks() <= gpu.multiprocessors ? whole : (whole - kStatic - kOfTheSystem) / 2;
  };
  while (rows_log2 > kTileLog2 && (shared_bytes(p, int64_t{1} << rows_log2, kRowsOfGroup, p.width, 2 * kProductWarps) > room() ||
                                   blocks() < gpu.multiprocessors / 2))
    --rows_log2;
  return rows_log2;
}

}  // namespace

ProductCut cut_product(const ProductSizes& p, const GpuSizes& gpu) {
  int rows_log2 = most_rows_log2(p, gpu);
  const auto bytes = [&](int warps) { return shared_bytes(p, int64_t{1} << rows_log2, p.batch, p.floats_ahead, warps); };
  const auto fits = [&] { return bytes(2 * kProductWarps) + kStatic <= gpu.shared_memory_per_block; };
  while (rows_log2 > kFewestRowsLog2 && rows_log2 <= kTileLog2 && !fits()) --rows_log2;
  const int warps = p.batch > p.rows_of_few_warps ? 2 * kProductWarps : kProductWarps;
  const int64_t of_one = std::clamp<int64_t>(gpu.shared_memory_per_block / (bytes(warps) + kOfTheSystem), 1, blocks_of_registers(warps));
  const int64_t blocks = blocks_of(p, rows_log2);
  return {rows_log2, warps, bytes(warps), fits(), blocks, static_cast<unsigned>(std::min(blocks, gpu.multiprocessors * of_one))};
}

ProductCut cut_formed_product(ProductSizes p, const GpuSizes& gpu) {
  p.batch = kRowsOfPass;
  p.floats_ahead = p.rows_of_few_warps = 0;
  ProductCut cut = cut_product(p, gpu);
  cut.fits = cut.fits && cut.rows_log2 >= kTileLog2 && cut.blocks == cut.resident;
  return cut;
}

}  // namespace longhand
