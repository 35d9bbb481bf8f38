// See box_copies.cuh: how a matrix is described to the copy engine.
#include "core/error.h"
#include "ops/common/box_copies.cuh"

namespace longhand {

CUtensorMap panel_boxes(const Tensor& matrix, int box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) throw DeviceError("cuda: the driver has no cuTensorMapEncodeTiled", {});
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.dim(1)), static_cast<cuuint64_t>(matrix.dim(0))};
  const int64_t row_stride = matrix.dim(0) == 1 ? matrix.dim(1) : matrix.stride(0);
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * sizeof(Bf16)};
  const cuuint32_t box[2] = {kPanelColumns, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix.raw()), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw DeviceError("cuda: the driver refuses to describe a matrix to the copy engine",
                      {{"matrix", matrix.describe()}, {"cuTensorMapEncodeTiled", std::to_string(result)}});
  return map;
}

bool fits_boxes(const Tensor& matrix) {
  return reinterpret_cast<std::uintptr_t>(matrix.raw()) % 16 == 0 && matrix.dim(1) % 8 == 0 && matrix.stride(1) == 1 &&
         (matrix.dim(0) == 1 || matrix.stride(0) % 8 == 0);
}

}  // namespace longhand
