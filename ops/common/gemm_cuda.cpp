// gemm on a GPU: cuBLASLt. A row-major matrix is its transpose read column by column, so C = op(A) op(B) is asked for as
// C^T = op(B)^T op(A)^T: the operands change places and keep their transpositions.
// The algorithm for a shape is what cuBLASLt's heuristics name first for it, asked once and kept with the device: no timing decides, so
// every run takes the same one. Split sums, where it chooses them, are added up in f32.
// It may choose them only where the summed index is a multiple of 128: of other lengths cuBLASLt 13.0 can lose the rows behind the last
// multiple (256 x 64 with k = 16897 or 32769 on an H200).
#include <fmt/core.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

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

constexpr int64_t kSplitMultiple = 128;  // of the summed index, where sums may be split

GemmPlan make_plan(const CudaContext& cuda, const GemmKey& key) {
  GemmPlan plan{};
  // CUBLAS_COMPUTE_32F is f32 arithmetic; TF32 would be another compute type.
  cublas_check(cublasLtMatmulDescInit(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit");
  set(&plan.product, CUBLASLT_MATMUL_DESC_TRANSA, key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(&plan.product, CUBLASLT_MATMUL_DESC_TRANSB, key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (key.adds_row) set(&plan.product, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);  // along our columns, which are its rows
  plan.a = layout_of(key.a);
  plan.b = layout_of(key.b);
  plan.c = layout_of(key.c);

  cublasLtMatmulPreferenceOpaque_t preference;
  cublas_check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(cuda.workspace_bytes));
  const int64_t k = key.transpose_a ? key.a.rows : key.a.columns;
  set(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(k % kSplitMultiple == 0 ? CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
                                                    : CUBLASLT_REDUCTION_SCHEME_NONE));
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b.alignment);
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a.alignment);
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c.alignment);
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c.alignment);
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(cuda.blas_lt, &plan.product, &plan.b, &plan.a, &plan.c, &plan.c, &preference, 1, &found, &count);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) cublas_check(status, "cublasLtMatmulAlgoGetHeuristic");
  if (count == 0) {
    auto text = [](const Operand& o) {
      return fmt::format("[{}, {}] {} row stride {}, aligned to {} bytes", o.rows, o.columns, o.type == CUDA_R_32F ? "f32" : "bf16",
                         o.leading, o.alignment);
    };
    throw DeviceError("gemm: cuBLASLt offers no algorithm for this product",
                      {{"a", text(key.a)}, {"b", text(key.b)}, {"c", text(key.c)}, {"try", "widths that are multiples of 8"}});
  }
  plan.algorithm = found.algo;
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
