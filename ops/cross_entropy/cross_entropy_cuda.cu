// cross_entropy on a GPU: softmax, loss and gradient of one chunk of logits, in place, between matrix products.
//
// cross_entropy_block_per_row_kernel
// moves   with a gradient: logits in once, gradient out once: 2 * R*V * sizeof(T) bytes; without: logits in once. The target's logit costs
//         2*d more elements a row
// flops   about 12 instructions and two ex2 per logit; 32768 x 50280: 3.3e9 ex2 at 3.7e12/s = 0.9 ms, hidden behind the bytes by the
//         second block of the SM
// floor   32768 x 50280 in bf16: 6.6 GB / 3.35 TB/s = 2.0 ms on an H100 SXM
// split   one block of 512 threads per row. Staged: the row is copied to shared memory with asynchronous 16-byte copies and read from there
//         twice; a thread reads only what it copied, so there is one barrier in all. 100 KB a row in bf16 at V = 50280: two blocks per SM
// needs   rows that begin at multiples of 16 bytes, padded to one; the launcher checks. A row beyond the shared memory of a block is read
//         from global memory twice instead (more than 116000 columns of bf16 or 58000 of f32 on an H100), and so is every row when no
//         gradient is wanted, for then it is needed once only
// agrees  with float64: kCrossEntropyToleranceF32, kCrossEntropyToleranceBf16; ex2.approx is good to 2^-22 relative
// order   fixed reduction trees, no atomics: the same input gives the same bits
#include <cfloat>

#include "core/cuda_context.h"
#include "core/error.h"
#include "ops/common/cuda_math.cuh"
#include "ops/common/matrix_instructions.cuh"
#include "ops/cross_entropy/bad_target.cuh"
#include "ops/cross_entropy/cross_entropy_kernels.h"

namespace longhand {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kGroups = 4;  // of asynchronous copies; the first is worked on while the others are under way
constexpr int kSumThreads = 1024;

/// sum of e^logit over some classes, as sum * 2^top. `top` is finite from the beginning, so that differences are never infinity - infinity;
/// no logit is as low.
struct ExpSum {
  float top = -1e38f, sum = 0;
};

/// Over the 32 lanes, in every lane.
__device__ ExpSum warp_total(const ExpSum& own) {
  float top = own.top;
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, apart));
  return {top, warp_sum(own.sum * exp2_approx(own.top - top))};
}

struct RowStatistics {
  ExpSum others;  // all classes but the target
  float target;   // its logit
};

/// Over all threads, in every thread; one barrier.
__device__ RowStatistics block_statistics(ExpSum others, float target) {
  __shared__ float tops[kWarps], sums[kWarps], targets[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  others = warp_total(others);
  target = warp_sum(target);
  if (lane == 0) tops[warp] = others.top, sums[warp] = others.sum, targets[warp] = target;
  __syncthreads();
  const bool one = lane < kWarps;
  return {warp_total(one ? ExpSum{tops[lane], sums[lane]} : ExpSum{}), warp_sum(one ? targets[lane] : 0.0f)};
}

struct LossArgs {
  void* logits;
  const void *x, *weight;
  void* counted_x;  // [rows, width], null: not wanted
  const int32_t* targets;
  const float* mask;  // null: 1 everywhere
  const float* factor;
  float* token_loss;
  int64_t logits_stride, x_stride, weight_stride, first_row;
  int vocab, width;
  bool gradient;
};

/// The logits of one pack in f32; those that are not another class's (the target, the padding) become -infinity.
template <class T, int vec>
__device__ void other_logits(const Pack<T, vec>& pack, int begin, int target, int vocab, float (&l)[vec]) {
#pragma unroll
  for (int j = 0; j < vec; ++j) l[j] = to_f32(pack.at[j]);
  if (begin + vec <= vocab && (target < begin || target >= begin + vec)) return;
#pragma unroll
  for (int j = 0; j < vec; ++j)
    if (begin + j == target || begin + j >= vocab) l[j] = -INFINITY;
}

/// 2^(l log2(e) - top): the product is not rounded, and the rounding of `top` is the same for all classes of a row.
__device__ float exp_beside(float l, float top) {
  return exp2_approx(fmaf(kLog2e, l, -top));
}

template <int vec>
__device__ void add_exponentials(ExpSum& others, const float (&l)[vec]) {
  float most = l[0];
#pragma unroll
  for (int j = 1; j < vec; ++j) most = fmaxf(most, l[j]);
  const float top = fmaxf(others.top, kLog2e * most);
  float even = others.sum * exp2_approx(others.top - top), odd = 0;
#pragma unroll
  for (int j = 0; j < vec; j += 2) {
    even += exp_beside(l[j], top);
    odd += exp_beside(l[j + 1], top);
  }
  others = {top, even + odd};
}

template <class T, class X, bool staged>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_block_per_row_kernel(LossArgs p) {
  constexpr int vec = 16 / static_cast<int>(sizeof(T));
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  T* const stage = reinterpret_cast<T*>(shared_bytes);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  T* logits = static_cast<T*>(p.logits) + row * p.logits_stride;
  const int packs = (p.vocab + vec - 1) / vec;
  const int per_group = (packs + kThreads * kGroups - 1) / (kThreads * kGroups);  // packs of one thread
  if constexpr (staged) {
    int i = thread;
    for (int g = 0; g < kGroups; ++g) {
      for (int k = 0; k < per_group; ++k, i += kThreads)
        if (i < packs) copy_16_async(stage + i * vec, logits + i * vec);
      close_copies();
    }
  }

  const int target = p.targets[row];
  const float weight = p.mask != nullptr ? p.mask[row] : 1.0f;
  const bool known = target >= 0 && target < p.vocab, counts = weight != 0;
  const X* const x = static_cast<const X*>(p.x) + row * p.x_stride;
  if (p.counted_x != nullptr)
    for (int i = thread; i < p.width; i += kThreads) static_cast<X*>(p.counted_x)[row * p.width + i] = counts ? x[i] : X(0.0f);
  float target_part = 0;
  if (known) {
    const X* w = static_cast<const X*>(p.weight) + target * p.weight_stride;
    for (int i = thread; i < p.width; i += kThreads) target_part = fmaf(to_f32(x[i]), to_f32(w[i]), target_part);
  }

  ExpSum others;
  float l[vec];
  if constexpr (staged) {
    int i = thread;
    const auto add_group = [&] {
#pragma unroll 2
      for (int k = 0; k < per_group; ++k, i += kThreads) {
        if (i >= packs) break;
        other_logits(load_pack<vec>(stage + i * vec), i * vec, target, p.vocab, l);
        add_exponentials(others, l);
      }
    };
    copies_arrived_but<3>();
    add_group();
    copies_arrived_but<2>();
    add_group();
    copies_arrived_but<1>();
    add_group();
    copies_arrived_but<0>();
    add_group();
  } else {
#pragma unroll 4
    for (int i = thread; i < packs; i += kThreads) {
      other_logits(load_pack<vec>(logits + static_cast<int64_t>(i) * vec), i * vec, target, p.vocab, l);
      add_exponentials(others, l);
    }
  }

  const RowStatistics all = block_statistics(others, target_part);
  const float top = known ? fmaxf(all.others.top, kLog2e * all.target) : all.others.top;
  const float others_sum = all.others.sum * exp2_approx(all.others.top - top);
  const float target_term = known ? exp_beside(all.target, top) : 0.0f, sum = others_sum + target_term;
  if (thread == 0) {
    float loss = 0;  // of a position that has no target and is not counted
    if (known) {
      const bool likeliest = top == kLog2e * all.target;
      loss = likeliest ? log1pf(others_sum / target_term) : logf(sum) - fmaf(kLog2e, all.target, -top) / kLog2e;
    } else if (counts) {
      loss = bad_target(p.first_row + row, target, p.vocab);
    }
    p.token_loss[row] = loss;
  }
  if (!p.gradient) return;

  // softmax - 1 of the target is -others / sum in f32, rounded once; no 1 is subtracted from a rounded softmax.
  const float scale = known ? *p.factor * weight : NAN;
  const float per_class = scale / sum, at_target = -scale * (others_sum / sum);
#pragma unroll 2
  for (int i = thread; i < packs; i += kThreads) {
    const int begin = i * vec;
    other_logits(load_pack<vec>((staged ? stage : logits) + begin), begin, target, p.vocab, l);
#pragma unroll
    for (int j = 0; j < vec; ++j) l[j] = counts ? per_class * exp_beside(l[j], top) : 0.0f;
    if (counts && target >= begin && target < begin + vec) {
#pragma unroll
      for (int j = 0; j < vec; ++j)
        if (begin + j == target) l[j] = at_target;
    }
    store_pack(logits + begin, round_to<T>(l));
  }
}

template <class T, class X, bool staged>
void launch_rows(const LossArgs& args, int64_t rows, size_t shared_bytes, cudaStream_t stream) {
  const auto kernel = &cross_entropy_block_per_row_kernel<T, X, staged>;
  if (staged) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
               "cudaFuncSetAttribute");
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
               "cudaFuncSetAttribute");
  }
  const dim3 grid(static_cast<unsigned>(rows));
  kernel<<<grid, kThreads, shared_bytes, stream>>>(args);
  launch_check("cross_entropy_block_per_row_kernel", grid, kThreads, shared_bytes);
}

template <class T, class X>
void launch_loss(const LossArgs& args, int64_t rows, const CudaContext& cuda) {
  constexpr int64_t kStaticBytes = 1024;  // block_statistics takes less
  const int64_t row_bytes = (static_cast<int64_t>(args.vocab) * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  if constexpr (std::is_same_v<T, X>)
    if (args.gradient && row_bytes + kStaticBytes <= cuda.shared_memory_per_block)
      return launch_rows<T, X, true>(args, rows, static_cast<size_t>(row_bytes), cuda.stream);
  launch_rows<T, X, false>(args, rows, 0, cuda.stream);
}

// --- small kernels of one number ---------------------------------------------------------------------------------

/// The sum over kSumThreads threads in f64, in thread 0.
__device__ double sum_of_threads(double v) {
  __shared__ double sums[kSumThreads];
  sums[threadIdx.x] = v;
  for (unsigned half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

__global__ void __launch_bounds__(kSumThreads)
    cross_entropy_factor_one_block_kernel(const float* mask, int64_t rows, double scale, float* factor) {
  double sum = 0;
  for (int64_t r = threadIdx.x; r < rows; r += kSumThreads) sum += mask[r];
  sum = sum_of_threads(sum);
  if (threadIdx.x == 0) *factor = sum > 0 ? static_cast<float>(scale / sum) : 0.0f;
}

__global__ void __launch_bounds__(kSumThreads)
    cross_entropy_mean_one_block_kernel(const float* token_loss, const float* mask, int64_t rows, const float* factor, float* loss) {
  double sum = 0;
  for (int64_t r = threadIdx.x; r < rows; r += kSumThreads) {
    const double weight = mask != nullptr ? mask[r] : 1.0f;
    if (weight != 0) sum += weight * token_loss[r];
  }
  sum = sum_of_threads(sum);
  if (threadIdx.x == 0) *loss = static_cast<float>(*factor * sum);
}

// scale_gradient_elementwise_kernel
// moves   the gradient in and out once, the destination in when beta is not 0: 50280 x 768 in f32, beta = 0: 309 MB
// floor   0.09 ms on an H100 SXM
template <class T, int vec>
__global__ void scale_gradient_elementwise_kernel(const T* gradient, const float* upstream, const float* row_factors, int64_t row_packs,
                                                  T* destination, int64_t packs, float beta) {
  const float whole = *upstream;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs; i += step) {
    const Pack<T, vec> from = load_pack<vec>(gradient + i * vec);
    const float scale = row_factors != nullptr ? whole * row_factors[i / row_packs] : whole;
    float values[vec];
#pragma unroll
    for (int j = 0; j < vec; ++j) values[j] = scale * to_f32(from.at[j]);
    if (beta != 0) {
      const Pack<T, vec> before = load_pack<vec>(destination + i * vec);
#pragma unroll
      for (int j = 0; j < vec; ++j) values[j] += beta * to_f32(before.at[j]);
    }
    store_pack(destination + i * vec, round_to<T>(values));
  }
}

template <class T>
void launch_scale(const Tensor& gradient, const Tensor& upstream, const Tensor& row_factors, const Tensor& destination, double beta) {
  constexpr int kBlock = 256, vec = 16 / static_cast<int>(sizeof(T));
  const CudaContext& cuda = gradient.device().cuda_context();
  const int64_t n = gradient.numel();
  auto aligned = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0; };
  const int64_t width = row_factors.defined() ? gradient.dim(-1) : n;
  const bool wide = width % vec == 0 && aligned(gradient) && aligned(destination);
  const int64_t packs = wide ? n / vec : n, row_packs = wide ? width / vec : width;
  const auto kernel = wide ? &scale_gradient_elementwise_kernel<T, vec> : &scale_gradient_elementwise_kernel<T, 1>;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((packs + kBlock - 1) / kBlock, cuda.sm_count * 16)));
  kernel<<<grid, kBlock, 0, cuda.stream>>>(static_cast<const T*>(gradient.raw()), upstream.data<float>(),
                                           row_factors.defined() ? row_factors.data<float>() : nullptr, row_packs,
                                           static_cast<T*>(destination.raw()), packs, static_cast<float>(beta));
  launch_check("scale_gradient_elementwise_kernel", grid, kBlock);
}

}  // namespace

void loss_chunk_cuda(const LossChunk& chunk) {
  const int64_t rows = chunk.logits.dim(0), vocab = chunk.logits.dim(1), stride = chunk.logits.stride(0);
  const int64_t vec = 16 / size_of(chunk.logits.dtype());
  if (stride % vec != 0 || stride < (vocab + vec - 1) / vec * vec || reinterpret_cast<std::uintptr_t>(chunk.logits.raw()) % 16 != 0 ||
      vocab > INT32_MAX - 16)
    throw ShapeError("cross_entropy: rows of logits must begin at multiples of 16 bytes and be padded to one",
                     {{"logits", chunk.logits.describe()}, {"row stride", std::to_string(stride)}});
  const LossArgs args{chunk.logits.raw(),
                      chunk.x.raw(),
                      chunk.weight.raw(),
                      chunk.counted_x.defined() ? chunk.counted_x.raw() : nullptr,
                      chunk.targets.data<int32_t>(),
                      chunk.mask.defined() ? chunk.mask.data<float>() : nullptr,
                      chunk.factor.data<float>(),
                      chunk.token_loss.data<float>(),
                      stride,
                      chunk.x.stride(0),
                      chunk.weight.stride(0),
                      chunk.first_row,
                      static_cast<int>(vocab),
                      static_cast<int>(chunk.x.dim(1)),
                      chunk.gradient};
  const CudaContext& cuda = chunk.logits.device().cuda_context();
  if (chunk.logits.dtype() == Dtype::bf16) launch_loss<__nv_bfloat16, __nv_bfloat16>(args, rows, cuda);
  else if (chunk.x.dtype() == Dtype::bf16) launch_loss<float, __nv_bfloat16>(args, rows, cuda);
  else launch_loss<float, float>(args, rows, cuda);
}

void loss_factor_cuda(const Tensor& mask, double scale, const Tensor& factor) {
  const cudaStream_t stream = mask.device().cuda_context().stream;
  cross_entropy_factor_one_block_kernel<<<1, kSumThreads, 0, stream>>>(mask.data<float>(), mask.numel(), scale, factor.data<float>());
  launch_check("cross_entropy_factor_one_block_kernel", 1, kSumThreads);
}

void mean_loss_cuda(const Tensor& token_loss, const Tensor& mask, const Tensor& factor, const Tensor& loss) {
  const cudaStream_t stream = loss.device().cuda_context().stream;
  cross_entropy_mean_one_block_kernel<<<1, kSumThreads, 0, stream>>>(token_loss.data<float>(),
                                                                     mask.defined() ? mask.data<float>() : nullptr, token_loss.numel(),
                                                                     factor.data<float>(), loss.data<float>());
  launch_check("cross_entropy_mean_one_block_kernel", 1, kSumThreads);
}

void scale_gradient_cuda(const Tensor& gradient, const Tensor& upstream, const Tensor& row_factors, const Tensor& destination,
                         double beta) {
  if (gradient.numel() == 0) return;
  if (gradient.dtype() == Dtype::bf16) launch_scale<__nv_bfloat16>(gradient, upstream, row_factors, destination, beta);
  else launch_scale<float>(gradient, upstream, row_factors, destination, beta);
}

}  // namespace longhand
