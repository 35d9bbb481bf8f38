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

struct Target {
  float* to;
  float beta;
  int64_t width;
};

__global__ void __launch_bounds__(kColumns* kStripes)
    sum_partials_kernel(const float* partials, int64_t count, Target first, Target second) {
  const int64_t width = first.width + second.width;
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
  const bool in_first = column < first.width;
  float* const to = in_first ? first.to + column : second.to + (column - first.width);
  const float beta = in_first ? first.beta : second.beta;
  *to = beta == 0 ? total : beta * *to + total;
}

Target target_of(const Accumulation& wanted) {
  const Tensor& t = wanted.destination;
  if (t.dtype() != Dtype::f32 || !t.is_contiguous())
    throw ShapeError("sum_partials: a destination is not contiguous f32", {{"destination", t.describe()}});
  return {t.data<float>(), static_cast<float>(wanted.beta), t.numel()};
}

void run(const Tensor& partials, Target first, Target second) {
  const int64_t width = partials.dim(1);
  if (first.width + second.width != width)
    throw ShapeError("sum_partials: the destinations do not fit the partial sums",
                     {{"partials", partials.describe()}, {"elements", std::to_string(first.width + second.width)}});
  if (width == 0) return;
  const dim3 grid(static_cast<unsigned>((width + kColumns - 1) / kColumns)), block(kColumns, kStripes);
  sum_partials_kernel<<<grid, block, 0, partials.device().cuda_context().stream>>>(partials.data<float>(), partials.dim(0), first, second);
  launch_check("sum_partials_kernel", grid, block);
}

}  // namespace

void sum_partials_cuda(const Tensor& partials, const Accumulation& target) {
  run(partials, target_of(target), {});
}
void sum_partials_cuda(const Tensor& partials, const Accumulation& first, const Accumulation& second) {
  run(partials, target_of(first), target_of(second));
}

}  // namespace longhand
