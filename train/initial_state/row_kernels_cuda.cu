// The strategies' kernels; row_kernels.h has the formulas.
//
// clear_rows_kernel
// moves   the rows that are cleared, once out
// split   a block row per batch row, 4-byte or 2-byte words; one launch a tensor, however many rows are cleared
//
// draw_normals_kernel
// moves   the tensor once out
// flops   a block of Philox (about 100 integer operations), two logarithms, roots, sines and cosines for 4 elements: bound by these
// floor   24 layers x 4 rows x 196,608 elements (Mamba-2 130M): 75 MB / 3.35 TB/s = 23 us; the arithmetic is about three times that
// split   a thread draws 4 neighbouring elements, a block row per batch row
// agrees  with the CPU to kNormalTolerance in units of the standard deviation
//
// row_moments_kernel
// moves   the tensor twice in, the second time from L2
// split   a block per row and group, two passes: the mean, then the squared deviations from it
// order   fixed strides and a fixed tree in f64, no atomics: the same bits always
//
// merge_rows_kernel, refresh_normals_kernel
// split   a thread per group; rows one after the other, so that the bits do not depend on how a batch is cut
#include <cuda_bf16.h>

#include <algorithm>
#include <string>

#include "core/cuda_context.h"
#include "core/error.h"
#include "train/initial_state/noise_rule.h"
#include "train/initial_state/row_kernels.h"

namespace longhand {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int64_t kMostBlocksPerRow = 1024;

unsigned blocks_per_row(int64_t work) {
  return static_cast<unsigned>(std::min((work + kThreads - 1) / kThreads, kMostBlocksPerRow));
}

__device__ float to_f32(float v) {
  return v;
}
__device__ float to_f32(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ void store(float& to, float v) {
  to = v;
}
__device__ void store(__nv_bfloat16& to, float v) {
  to = __float2bfloat16_rn(v);
}

// The launcher's one switch: calls f with a pointer to the elements.
template <class F>
void visit_elements(const char* op, const Tensor& t, F&& f) {
  if (t.dtype() == Dtype::f32) return f(static_cast<float*>(t.raw()));
  if (t.dtype() == Dtype::bf16) return f(static_cast<__nv_bfloat16*>(t.raw()));
  throw DtypeError(std::string(op) + ": takes f32 or bf16 on a GPU", {{"tensor", t.describe()}});
}

// Rows are dealt to gridDim.y, which can be at most 65,535: each block row takes every gridDim.y-th row.
dim3 grid_of(int64_t blocks, int64_t rows) {
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
}

template <class Word>
__global__ void clear_rows_kernel(Word* __restrict__ t, const int64_t* __restrict__ marks, const double* __restrict__ all, int64_t rows,
                                  int64_t width) {
  const bool every = all != nullptr && *all > 0;
  for (int64_t b = blockIdx.y; b < rows; b += gridDim.y) {
    if (!every && marks[b] != 0) continue;
    for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < width; e += static_cast<int64_t>(gridDim.x) * kThreads)
      t[b * width + e] = Word{};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    draw_normals_kernel(T* __restrict__ out, const int64_t* __restrict__ keys, uint64_t tag, const float* __restrict__ normals,
                        StateGroups groups, int64_t rows, int64_t width) {
  for (int64_t b = blockIdx.y; b < rows; b += gridDim.y) {
    const int64_t row_key = keys[b];
    const uint64_t key = philox_key(static_cast<uint64_t>(row_key), tag);
    const int64_t quads = (width + 3) / 4, stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t quad = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; quad < quads; quad += stride) {
      float n[4] = {};
      if (row_key != 0) philox_normals(key, static_cast<uint64_t>(quad), n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t e = 4 * quad + i;
        if (e >= width) break;
        const int64_t g = e / groups.inner % groups.count;
        store(out[b * width + e], row_key != 0 ? normals[2 * g] + normals[2 * g + 1] * n[i] : 0.0f);
      }
    }
  }
}

// The sum over a block of 32 to 256 threads, in every thread.
__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();  // the values of the sum before have been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += warps[w];
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) row_moments_kernel(const T* __restrict__ in, StateGroups groups, double* __restrict__ moments,
                                                               int64_t first, int64_t all, int64_t rows, int64_t width) {
  const int64_t g = blockIdx.x, elements = width / groups.count;
  for (int64_t b = blockIdx.y; b < rows; b += gridDim.y) {
    const T* row = in + b * width;
    auto element = [&](int64_t i) {
      return static_cast<double>(to_f32(row[(i / groups.inner * groups.count + g) * groups.inner + i % groups.inner]));
    };
    double sum = 0, m2 = 0;
    for (int64_t i = threadIdx.x; i < elements; i += blockDim.x) sum += element(i);
    const double mean = block_sum(sum) / static_cast<double>(elements);
    for (int64_t i = threadIdx.x; i < elements; i += blockDim.x) {
      const double apart = element(i) - mean;
      m2 += apart * apart;
    }
    m2 = block_sum(m2);
    if (threadIdx.x != 0) continue;
    const Moments found = counted(static_cast<double>(elements), mean, m2);
    double* out = moments + (b * all + first + g) * 3;
    out[0] = found.count, out[1] = found.mean, out[2] = found.m2;
  }
}

__global__ void merge_rows_kernel(double* __restrict__ running, const double* __restrict__ moments, int64_t rows, int64_t groups) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (g >= groups) return;
  double* sum = running + 3 * g;
  Moments all{sum[0], sum[1], sum[2]};
  for (int64_t b = 0; b < rows; ++b) {
    const double* row = moments + (b * groups + g) * 3;
    all = merged(all, {row[0], row[1], row[2]});
  }
  sum[0] = all.count, sum[1] = all.mean, sum[2] = all.m2;
}

__global__ void refresh_normals_kernel(double* __restrict__ running, float* __restrict__ normals, double decay, int64_t groups) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (g >= groups) return;
  double* sum = running + 3 * g;
  normal_of({sum[0], sum[1], sum[2]}, normals[2 * g], normals[2 * g + 1]);
  sum[0] *= decay, sum[2] *= decay;
}

}  // namespace

void clear_rows_cuda(const Tensor& t, const Tensor& marks, const Tensor& all) {
  const cudaStream_t stream = t.device().cuda_context().stream;
  const int64_t rows = t.dim(0), width = t.numel() / rows;
  const dim3 grid = grid_of(blocks_per_row(width), rows);
  auto launch = [&](auto word) {
    using Word = decltype(word);
    clear_rows_kernel<<<grid, kThreads, 0, stream>>>(static_cast<Word*>(t.raw()), marks.data<int64_t>(),
                                                     all.defined() ? all.data<double>() : nullptr, rows, width);
    launch_check("clear_rows_kernel", grid, kThreads);
  };
  if (size_of(t.dtype()) == 4) return launch(uint32_t{});
  if (size_of(t.dtype()) == 2) return launch(uint16_t{});
  throw DtypeError("clear_rows: takes elements of 4 or 2 bytes on a GPU", {{"tensor", t.describe()}});
}

void draw_normals_cuda(const Tensor& t, const Tensor& keys, uint64_t tag, const Tensor& normals, const StateGroups& groups) {
  const int64_t rows = t.dim(0), width = t.numel() / rows;
  const dim3 grid = grid_of(blocks_per_row((width + 3) / 4), rows);
  visit_elements("draw_normals", t, [&](auto* out) {
    draw_normals_kernel<<<grid, kThreads, 0, t.device().cuda_context().stream>>>(out, keys.data<int64_t>(), tag, normals.data<float>(),
                                                                                 groups, rows, width);
    launch_check("draw_normals_kernel", grid, kThreads);
  });
}

void row_moments_cuda(const Tensor& t, const StateGroups& groups, const Tensor& moments, int64_t first) {
  const int64_t rows = t.dim(0), width = t.numel() / rows, elements = width / groups.count;
  const dim3 grid = grid_of(groups.count, rows);
  const int threads = static_cast<int>(std::clamp<int64_t>((elements + kWarp - 1) / kWarp * kWarp, kWarp, kThreads));
  visit_elements("row_moments", t, [&](const auto* in) {
    row_moments_kernel<<<grid, threads, 0, t.device().cuda_context().stream>>>(in, groups, moments.data<double>(), first, moments.dim(1),
                                                                               rows, width);
    launch_check("row_moments_kernel", grid, threads);
  });
}

void merge_rows_cuda(const Tensor& running, const Tensor& moments) {
  const int64_t groups = moments.dim(1);
  const dim3 grid(static_cast<unsigned>((groups + kThreads - 1) / kThreads));
  merge_rows_kernel<<<grid, kThreads, 0, running.device().cuda_context().stream>>>(running.data<double>(), moments.data<double>(),
                                                                                   moments.dim(0), groups);
  launch_check("merge_rows_kernel", grid, kThreads);
}

void refresh_normals_cuda(const Tensor& running, const Tensor& normals, double decay) {
  const int64_t groups = running.dim(0);
  const dim3 grid(static_cast<unsigned>((groups + kThreads - 1) / kThreads));
  refresh_normals_kernel<<<grid, kThreads, 0, running.device().cuda_context().stream>>>(running.data<double>(), normals.data<float>(),
                                                                                        decay, groups);
  launch_check("refresh_normals_kernel", grid, kThreads);
}

}  // namespace longhand
