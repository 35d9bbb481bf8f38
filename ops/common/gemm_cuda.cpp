// gemm on a GPU: cuBLASLt. A row-major matrix is its transpose read column by column, so C = op(A) op(B) is asked for as
// C^T = op(B)^T op(A)^T: the operands change places and keep their transpositions.
// The algorithm for a shape is what cuBLASLt's heuristics name first for it, or by a rule another that they name (choose()), asked once and
// kept with the device: no timing decides, so every run takes the same one. Split sums, where it chooses them, are added up in f32.
// It may choose them only where the summed index is a multiple of 128: of other lengths cuBLASLt 13.1 can lose the rows behind the last
// multiple (256 x 64 with k = 16897 or 32769 on an H200).
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/cuda_context.h"
#include "core/error.h"
#include "core/show_as_written_cuda.h"
#include "ops/common/gemm.h"

namespace longhand {
namespace {

/// A matrix as cuBLASLt sees it: how far apart its rows begin and how its address is aligned. The algorithms differ in what they need.
struct Operand {
  int64_t rows, columns, leading;
  uint32_t alignment;  // bytes, a power of two
  cudaDataType_t type;
  auto operator<=>(const Operand&) const = default;
};

struct GemmKey {
  Operand a, b, c;
  bool transpose_a, transpose_b;
  bool adds_row;
  auto operator<=>(const GemmKey&) const = default;
};

struct GemmPlan {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, c;  // plain values: nothing to destroy
  cublasLtMatmulAlgo_t algorithm;
};

struct GemmCache {
  std::mutex mutex;
  std::map<GemmKey, GemmPlan> plans;
};

Operand operand_of(const Tensor& t) {
  const auto address = reinterpret_cast<std::uintptr_t>(t.raw());
  const auto alignment = static_cast<uint32_t>(std::min<std::uintptr_t>(address & (~address + 1), 256));
  return {t.dim(0), t.dim(1), t.dim(0) == 1 ? t.dim(1) : t.stride(0), alignment, t.dtype() == Dtype::f32 ? CUDA_R_32F : CUDA_R_16BF};
}

cublasLtMatrixLayoutOpaque_t layout_of(const Operand& o) {
  cublasLtMatrixLayoutOpaque_t layout;
  cublas_check(cublasLtMatrixLayoutInit(&layout, o.type, static_cast<uint64_t>(o.columns), static_cast<uint64_t>(o.rows), o.leading),
               "cublasLtMatrixLayoutInit");
  return layout;
}

template <class T>
void set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, T value) {
  cublas_check(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
}
template <class T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, T value) {
  cublas_check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value), "cublasLtMatmulPreferenceSetAttribute");
}

/// The product in cuBLASLt's words; its algorithm is not chosen yet.
GemmPlan describe(const GemmKey& key) {
  GemmPlan plan{};
  // CUBLAS_COMPUTE_32F is f32 arithmetic; TF32 would be another compute type.
  cublas_check(cublasLtMatmulDescInit(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit");
  set(&plan.product, CUBLASLT_MATMUL_DESC_TRANSA, key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(&plan.product, CUBLASLT_MATMUL_DESC_TRANSB, key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (key.adds_row) set(&plan.product, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);  // along our columns, which are its rows
  plan.a = layout_of(key.a);
  plan.b = layout_of(key.b);
  plan.c = layout_of(key.c);
  return plan;
}

/// How many terms each sum has.
int64_t terms_of(const GemmKey& key) {
  return key.transpose_a ? key.a.rows : key.a.columns;
}

constexpr int64_t kSplitMultiple = 128;  // of the terms, where sums may be split

using Named = cublasLtMatmulHeuristicResult_t;
using Candidates = std::vector<Named>;

/// The algorithms that cuBLASLt names for a product, the first the best by its own estimate; it names no more than eight.
Candidates candidates_for(const CudaContext& cuda, const GemmKey& key) {
  GemmPlan plan = describe(key);
  cublasLtMatmulPreferenceOpaque_t preference;
  cublas_check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(cuda.workspace_bytes));
  set(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(terms_of(key) % kSplitMultiple == 0 ? CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
                                                                : CUBLASLT_REDUCTION_SCHEME_NONE));
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b.alignment);
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a.alignment);
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c.alignment);
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c.alignment);
  Candidates found(8);
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(cuda.blas_lt, &plan.product, &plan.b, &plan.a, &plan.c, &plan.c, &preference,
                                                               static_cast<int>(found.size()), found.data(), &count);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) cublas_check(status, "cublasLtMatmulAlgoGetHeuristic");
  found.resize(static_cast<std::size_t>(count));
  return found;
}

// On Hopper two warpgroups either share a tile of results, or they take tiles of these sizes in turn: while one writes its tile, the other
// multiplies. With few terms a sum, writing is a good part of a product. Taking turns then saves cycles, and less of it time where the card
// is at its limit of power, for it clocks down: on an H200 3 to 12% with 768 to 1,536 terms, nothing with 2,048 and more
// (docs/bench/2026-11-30-end-to-end.md). The order of every sum stays, and so did all bits. The heuristics do not name such an algorithm
// first, and for many widths not at all.
constexpr std::array<uint32_t, 5> kTilesInTurn{CUBLASLT_MATMUL_TILE_128x128, CUBLASLT_MATMUL_TILE_128x160, CUBLASLT_MATMUL_TILE_160x128,
                                               CUBLASLT_MATMUL_TILE_168x128, CUBLASLT_MATMUL_TILE_176x128};
constexpr int64_t kFewTerms = 256, kManyTerms = 2048;  // from, and below; with 16 to 80 terms memory is what a product waits for
constexpr float kWavesInTurn = 4;                      // tiles of every multiprocessor: most of them are written beside another
constexpr int64_t kNamedWidths = 512;                  // for multiples of so many columns the eight had tiles in turn wherever looked at

// Gradients of weights have many terms in few tiles. Of algorithms whose last round of tiles is about as full, those with tiles of 256 x 96
// and 256 x 128 took 2 to 4% less than the first at the card's limit of power, in all of five such products
// (docs/bench/2026-12-01-one-card.md). Their bits are the same too.
constexpr std::array<uint32_t, 2> kTallTiles{CUBLASLT_MATMUL_TILE_256x96, CUBLASLT_MATMUL_TILE_256x128};
constexpr float kAboutAsFull = 1.03f;

uint32_t setting(const Named& named, cublasLtMatmulAlgoConfigAttributes_t attribute) {
  uint32_t value = 0;
  cublas_check(cublasLtMatmulAlgoConfigGetAttribute(&named.algo, attribute, &value, sizeof value, nullptr),
               "cublasLtMatmulAlgoConfigGetAttribute");
  return value;
}
bool splits_sums(const Named& named) {
  return setting(named, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) > 1;
}
template <std::size_t count>
bool has_tile(const Named& named, const std::array<uint32_t, count>& tiles) {
  return std::find(tiles.begin(), tiles.end(), setting(named, CUBLASLT_ALGO_CONFIG_TILE_ID)) != tiles.end();
}

/// Of the algorithms named for a product or a narrower one, those that form this product by tiles in turn.
Candidates in_turn(const CudaContext& cuda, GemmPlan plan, const Candidates& named) {
  Candidates fitting;
  for (const auto& candidate : named) {
    if (splits_sums(candidate) || !has_tile(candidate, kTilesInTurn)) continue;
    Named here{};
    const bool runs = cublasLtMatmulAlgoCheck(cuda.blas_lt, &plan.product, &plan.b, &plan.a, &plan.c, &plan.c, &candidate.algo, &here) ==
                      CUBLAS_STATUS_SUCCESS;
    here.algo = candidate.algo;
    if (runs && here.workspaceSize <= cuda.workspace_bytes && here.wavesCount >= kWavesInTurn) fitting.push_back(here);
  }
  return fitting;
}

/// With few terms in many tiles, of the algorithms that take tiles in turn the one with the fewest waves, if there are any.
cublasLtMatmulAlgo_t choose_for_few_terms(const CudaContext& cuda, const GemmKey& key, const Candidates& named) {
  const GemmPlan plan = describe(key);
  Candidates fitting = in_turn(cuda, plan, named);
  GemmKey narrower = key;
  narrower.c.columns = key.c.columns / kNamedWidths * kNamedWidths;
  (key.transpose_b ? narrower.b.rows : narrower.b.columns) = narrower.c.columns;
  if (fitting.empty() && narrower.c.columns > 0) fitting = in_turn(cuda, plan, candidates_for(cuda, narrower));
  const auto fewest =
      std::min_element(fitting.begin(), fitting.end(), [](const auto& x, const auto& y) { return x.wavesCount < y.wavesCount; });
  return fewest == fitting.end() ? named.front().algo : fewest->algo;
}

/// Where the first splits no sum and needs more than one round: the first with tall tiles whose last round is about as full, if there is
/// one.
cublasLtMatmulAlgo_t choose_for_weight_gradient(const Candidates& named) {
  const auto& first = named.front();
  if (splits_sums(first) || first.wavesCount <= 1) return first.algo;
  const auto rounds = [](const Named& n) { return std::ceil(n.wavesCount) / n.wavesCount; };  // for one full one
  const auto tall = std::find_if(named.begin(), named.end(), [&](const Named& n) {
    return n.state == CUBLAS_STATUS_SUCCESS && !splits_sums(n) && has_tile(n, kTallTiles) && rounds(n) <= kAboutAsFull * rounds(first);
  });
  return tall == named.end() ? first.algo : tall->algo;
}

/// The first of the algorithms named, but for two kinds of products of bf16 on Hopper.
cublasLtMatmulAlgo_t choose(const CudaContext& cuda, const GemmKey& key, const Candidates& named) {
  const int64_t terms = terms_of(key);
  if (cuda.major != 9 || key.a.type != CUDA_R_16BF) return named.front().algo;
  if (terms >= kFewTerms && terms < kManyTerms) return choose_for_few_terms(cuda, key, named);
  if (terms >= kManyTerms && key.transpose_a && key.c.type == CUDA_R_32F) return choose_for_weight_gradient(named);
  return named.front().algo;
}

GemmPlan make_plan(const CudaContext& cuda, const GemmKey& key) {
  const Candidates named = candidates_for(cuda, key);
  if (named.empty()) {
    auto text = [](const Operand& o) {
      return fmt::format("[{}, {}] {} row stride {}, aligned to {} bytes", o.rows, o.columns, o.type == CUDA_R_32F ? "f32" : "bf16",
                         o.leading, o.alignment);
    };
    throw DeviceError("gemm: cuBLASLt offers no algorithm for this product",
                      {{"a", text(key.a)}, {"b", text(key.b)}, {"c", text(key.c)}, {"try", "widths that are multiples of 8"}});
  }
  GemmPlan plan = describe(key);
  plan.algorithm = choose(cuda, key, named);
  return plan;
}

const GemmPlan& plan_for(CudaContext& cuda, const GemmKey& key) {
  static std::mutex creation;
  GemmCache* cache = nullptr;
  {
    const std::lock_guard lock(creation);
    if (cuda.gemm_cache == nullptr) cuda.gemm_cache = std::make_shared<GemmCache>();
    cache = static_cast<GemmCache*>(cuda.gemm_cache.get());
  }
  const std::lock_guard lock(cache->mutex);
  const auto found = cache->plans.find(key);
  if (found != cache->plans.end()) return found->second;  // map entries never move
  return cache->plans.emplace(key, make_plan(cuda, key)).first->second;
}

}  // namespace

void gemm_cuda(const GemmShape&, bool transpose_a, const Tensor& a, bool transpose_b, const Tensor& b, const Tensor& c, double alpha,
               double beta, const Tensor& row) {
  CudaContext& cuda = a.device().cuda_context();
  const GemmPlan& plan = plan_for(cuda, {operand_of(a), operand_of(b), operand_of(c), transpose_a, transpose_b, row.defined()});
  const auto scale = static_cast<float>(alpha), keep = static_cast<float>(beta);
  cublasLtMatmulDescOpaque_t product = plan.product;
  if (row) set(&product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(row.raw()));
  if (beta == 0) show_as_written(c);
  // The opaque structs are only read; the API takes them without const.
  auto* layout_a = const_cast<cublasLtMatrixLayoutOpaque_t*>(&plan.a);
  auto* layout_b = const_cast<cublasLtMatrixLayoutOpaque_t*>(&plan.b);
  auto* layout_c = const_cast<cublasLtMatrixLayoutOpaque_t*>(&plan.c);
  cublas_check(cublasLtMatmul(cuda.blas_lt, &product, &scale, b.raw(), layout_b, a.raw(), layout_a, &keep, c.raw(), layout_c, c.raw(),
                              layout_c, &plan.algorithm, cuda.workspace, cuda.workspace_bytes, cuda.stream),
               "cublasLtMatmul");
}

}  // namespace longhand
