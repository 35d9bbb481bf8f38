// Exponentials as fast as the special-function units give them.
//
// exponentials_kernel
// moves   one number a thread
// flops   kChains independent chains of ex2.approx a thread: 16 a clock and SM on sm_80 and sm_90
#include "core/cuda_context.h"
#include "core/device.h"
#include "core/tensor.h"

namespace longhand {
namespace {

constexpr int kThreads = 256, kChains = 8, kLength = 512, kBlocksPerSm = 16;

__global__ void __launch_bounds__(kThreads) exponentials_kernel(float* out) {
  float x[kChains];
#pragma unroll
  for (int c = 0; c < kChains; ++c) x[c] = -static_cast<float>(threadIdx.x + c) / kThreads;
  for (int i = 0; i < kLength; ++i)
#pragma unroll
    for (int c = 0; c < kChains; ++c) asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(x[c]) : "f"(x[c]));
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kChains; ++c) sum += x[c];
  out[static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x] = sum;
}

}  // namespace

double queue_exponentials_cuda(const Device& device) {
  const CudaContext& cuda = device.cuda_context();
  const int64_t blocks = static_cast<int64_t>(cuda.sm_count) * kBlocksPerSm;
  const Tensor out = Tensor::empty(device, Dtype::f32, {blocks * kThreads});
  exponentials_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, cuda.stream>>>(out.data<float>());
  launch_check("exponentials_kernel", static_cast<unsigned>(blocks), kThreads);
  return static_cast<double>(blocks) * kThreads * kChains * kLength;
}

}  // namespace longhand
