// sum_partials_kernel
// moves   P * n floats in, n floats out
// split   a block owns 32 columns; 32 warps take every 32nd row, then one warp adds their 32 sums in order
// order   fixed by P alone: the same input gives the same bits
#include <algorithm>

#include "core/cuda_context.h"
#include "core/error.h"
#include "ops/common/sum_partials.h"

namespace longhand {
namespace {

constexpr int kColumns = 32, kStripes = 32;

__global__ void __launch_bounds__(kColumns* kStripes)
    sum_partials_kernel(const float* partials, int64_t count, int64_t width, float* destination, float beta) {
  __shared__ float stripe_sums[kStripes][kColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0;
  if (column < width) {
#pragma unroll 8
    for (int64_t p = threadIdx.y; p < count; p += kStripes) sum += partials[p * width + column];
  }
  stripe_sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  float total = 0;
  for (int s = 0; s < kStripes; ++s) total += stripe_sums[s][threadIdx.x];
  destination[column] = beta == 0 ? total : beta * destination[column] + total;
}

}  // namespace

void sum_partials_cuda(const Tensor& partials, const Accumulation& target) {
  const Tensor& destination = target.destination;
  const int64_t width = partials.dim(1);
  if (destination.numel() != width || destination.dtype() != Dtype::f32 || !destination.is_contiguous())
    throw ShapeError("sum_partials: the destination does not fit the partial sums",
                     {{"partials", partials.describe()}, {"destination", destination.describe()}});
  if (width == 0) return;
  const dim3 grid(static_cast<unsigned>((width + kColumns - 1) / kColumns)), block(kColumns, kStripes);
  sum_partials_kernel<<<grid, block, 0, partials.device().cuda_context().stream>>>(
      partials.data<float>(), partials.dim(0), width, destination.data<float>(), static_cast<float>(target.beta));
  launch_check("sum_partials_kernel", grid, block);
}

}  // namespace longhand
