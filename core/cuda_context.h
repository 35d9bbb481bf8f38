// What a CUDA device owns, and how calls and launches are checked. Included by .cu files and by code that talks to CUDA itself.
#pragma once
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <memory>
#include <source_location>

namespace longhand {

struct CudaContext {
  int index = 0;
  cudaStream_t stream = nullptr;  // all work of the device, in order
  cublasLtHandle_t blas_lt = nullptr;
  void* workspace = nullptr;  // for cuBLAS; of fixed address, so that captured graphs stay valid
  size_t workspace_bytes = 0;
  int sm_count = 0;
  int major = 0, minor = 0;             // compute capability
  int64_t shared_memory_per_block = 0;  // the opt-in limit
  double bf16_peak_flops = 0;           // dense tensor-core peak of the datasheet, 0 when unknown
  std::shared_ptr<void> gemm_cache;     // the algorithm chosen for each shape of matrix product; ops/common/gemm_cuda.cpp fills it
};

/// Throws DeviceError naming the call and CUDA's reason unless `status` is success.
void cuda_check(cudaError_t status, const char* call, const std::source_location& at = std::source_location::current());
void cublas_check(cublasStatus_t status, const char* call, const std::source_location& at = std::source_location::current());

/// Call right after a launch: reports a launch that was refused, with the kernel's name and launch shape.
void launch_check(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes = 0,
                  const std::source_location& at = std::source_location::current());

}  // namespace longhand
