// RMSNorm kernels; rmsnorm.h has the formulas.
//
// rmsnorm_fwd_kernel
// moves   add form: x and residual in, their sum and y out: 12 bytes per element with bf16 activations; alone: 4 bytes
// flops   5 per element: memory bound
// floor   65536 x 768, add form: 604 MB / 3.0 TB/s = 0.20 ms on an H100 SXM
// split   a warp per row up to 768 columns, a block of up to 512 threads per row beyond; the row stays in registers between the sum of
//         squares and the product. Packs of 4 elements: 16-byte accesses of the f32 stream, 8-byte ones of bf16, all coalesced
// needs   packs: width, row strides and addresses in multiples of 4 elements; otherwise the same kernel runs element by element with
//         a block per row (vec = 1). Width at most 16384
// agrees  with the CPU reference: kRmsnormToleranceF32; bf16 adds one rounding of the output
// order   fixed shuffle tree, no atomics: the same input gives the same bits
//
// rmsnorm_bwd_kernel
// moves   grad_y, y or the sum (and grad_sum) in, grad_base (and grad_addend) out: in the add form with bf16 activations 10 bytes per
//         element, 14 with grad_sum; 2 more where y is left once more
// split   as forward, but a grid that fits the GPU walks over the rows, so that weight gradients stay in registers; each block leaves one
//         partial row and sum_partials adds them
// agrees  as forward; from y to kRmsnormToleranceFromY, and as forward with the formula for the xhat that y tells
// order   rows are dealt to blocks by the grid's size: fixed for a build and a GPU
#include <algorithm>
#include <type_traits>

#include "core/cuda_context.h"
#include "core/error.h"
#include "ops/common/row_split.cuh"
#include "ops/common/strided_rows.h"
#include "ops/common/sum_partials.h"
#include "ops/rmsnorm/rmsnorm_kernels.h"

namespace longhand {
namespace {

constexpr int kVec = 4;
constexpr int kWarpColumns = 24 * kWarp;  // of wider rows a warp's threads would hold so much that too few of them are there at a time

/// Whether backward tells what was normalised from y: of a stream in f32 with activations in bf16.
template <class Base, class Act>
constexpr bool kFromY = !std::is_same_v<Base, Act>;

template <class Base, class Act>
struct ForwardArgs {
  const Base* base;
  const Act* addend;  // may be null
  const float* weight;
  Base* sum;  // null exactly when addend is
  Act* y;
  float* rstd;
  StridedRows base_rows, addend_rows;
  int width;
  float eps;
};

/// The weight as both directions take it: from y, it must not lose its column.
template <bool from_y>
__device__ __forceinline__ float weight_of(float given) {
  return from_y && fabsf(given) < kRmsnormLeastWeight ? copysignf(kRmsnormLeastWeight, given) : given;
}

template <class Base, class Act, class Split>
__global__ void __launch_bounds__(Split::kMaxThreads) rmsnorm_fwd_kernel(const ForwardArgs<Base, Act> a) {
  constexpr int vec = Split::kVec, per_thread = Split::kPerThread;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Split::kRowsPerBlock + Split::row_in_block();
  if (row >= a.base_rows.count) return;  // a whole warp, or a whole block
  const Base* base = a.base + a.base_rows.begin(row);
  const Act* addend = a.addend + (a.addend != nullptr ? a.addend_rows.begin(row) : 0);

  Pack<Base, vec> base_in[per_thread];
  Pack<Act, vec> addend_in[per_thread];
#pragma unroll
  for (int k = 0; k < per_thread; ++k) {
    const int c = Split::column(k);
    if (c >= a.width) continue;
    base_in[k] = load_pack<vec>(base + c);
    if (a.addend != nullptr) addend_in[k] = load_pack<vec>(addend + c);
  }

  float x[per_thread][vec];
  float squares = 0;
#pragma unroll
  for (int k = 0; k < per_thread; ++k) {
    const int c = Split::column(k);
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      x[k][i] = c < a.width ? to_f32(base_in[k].at[i]) : 0.0f;
      if (a.addend != nullptr && c < a.width) x[k][i] += to_f32(addend_in[k].at[i]);
      squares += x[k][i] * x[k][i];
    }
    if (a.addend != nullptr && c < a.width) store_pack(a.sum + row * a.width + c, round_to<Base>(x[k]));
  }

  squares = Split::sum(squares, 0);
  const float rstd = 1.0f / sqrtf(squares / static_cast<float>(a.width) + a.eps);
  if (Split::lane() == 0) a.rstd[row] = rstd;
#pragma unroll
  for (int k = 0; k < per_thread; ++k) {
    const int c = Split::column(k);
    if (c >= a.width) continue;
    const Pack<float, vec> weight = load_pack<vec>(a.weight + c);
    float y[vec];
#pragma unroll
    for (int i = 0; i < vec; ++i) y[i] = weight_of<kFromY<Base, Act>>(weight.at[i]) * (rstd * x[k][i]);
    store_pack(a.y + row * a.width + c, round_to<Act>(y));
  }
}

template <class Base, class Act>
struct BackwardArgs {
  using Kept = std::conditional_t<kFromY<Base, Act>, Act, Base>;
  const Act* grad_y;
  const Base* grad_sum;  // may be null: zero
  const Kept* kept;      // y or what was normalised
  const float* weight;
  const float* rstd;
  Base* grad_base;   // may be null: not wanted
  Act* grad_addend;  // may be null: not wanted
  Act* y_again;      // contiguous; may be null: not wanted; null where y is kept
  float* partials;   // [gridDim.x, width]; may be null: not wanted
  StridedRows grad_y_rows, grad_sum_rows, kept_rows, grad_base_rows, grad_addend_rows;
  int width;
};

template <class Base, class Act, class Split>
__global__ void __launch_bounds__(Split::kMaxThreads) rmsnorm_bwd_kernel(const BackwardArgs<Base, Act> a) {
  constexpr int vec = Split::kVec, per_thread = Split::kPerThread;
  constexpr bool from_y = kFromY<Base, Act>;
  using Kept = typename BackwardArgs<Base, Act>::Kept;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Split::kRowsPerBlock;
  float grad_weight[per_thread][vec] = {};  // from_y: times the weight
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Split::kRowsPerBlock + Split::row_in_block(); row < a.kept_rows.count;
       row += step, ++turn) {
    const Kept* kept = a.kept + a.kept_rows.begin(row);
    const Act* grad_y = a.grad_y + a.grad_y_rows.begin(row);
    const Base* grad_sum = a.grad_sum + (a.grad_sum != nullptr ? a.grad_sum_rows.begin(row) : 0);
    Pack<Kept, vec> kept_in[per_thread];
    Pack<Base, vec> grad_sum_in[per_thread];
    Pack<Act, vec> grad_y_in[per_thread];
#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const int c = Split::column(k);
      if (c >= a.width) continue;
      kept_in[k] = load_pack<vec>(kept + c);
      grad_y_in[k] = load_pack<vec>(grad_y + c);
      if (a.grad_sum != nullptr) grad_sum_in[k] = load_pack<vec>(grad_sum + c);
    }

    const float rstd = a.rstd[row];
    float dot = 0;  // sum_c xhat * u, which is y * grad_y
#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const int c = Split::column(k);
      if (c >= a.width) continue;
      Pack<float, vec> weight;
      if constexpr (!from_y) weight = load_pack<vec>(a.weight + c);
#pragma unroll
      for (int i = 0; i < vec; ++i) {
        const float known = to_f32(kept_in[k].at[i]), scaled = to_f32(grad_y_in[k].at[i]) * (from_y ? known : rstd * known);
        grad_weight[k][i] += scaled;
        dot += from_y ? scaled : weight.at[i] * scaled;
      }
    }
    const float mean = Split::sum(dot, turn) / static_cast<float>(a.width);
#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const int c = Split::column(k);
      if (c >= a.width) continue;
      const Pack<float, vec> weights = load_pack<vec>(a.weight + c);
      float grad[vec], y[vec];
#pragma unroll
      for (int i = 0; i < vec; ++i) {
        const float known = to_f32(kept_in[k].at[i]), weight = weight_of<from_y>(weights.at[i]),
                    xhat = from_y ? known * reciprocal_approx(weight) : rstd * known;
        y[i] = weight * xhat;
        grad[i] = rstd * (weight * to_f32(grad_y_in[k].at[i]) - xhat * mean);
        if (a.grad_sum != nullptr) grad[i] += to_f32(grad_sum_in[k].at[i]);
      }
      if (a.grad_base != nullptr) store_pack(a.grad_base + a.grad_base_rows.begin(row) + c, round_to<Base>(grad));
      if (a.grad_addend != nullptr) store_pack(a.grad_addend + a.grad_addend_rows.begin(row) + c, round_to<Act>(grad));
      if constexpr (!from_y)
        if (a.y_again != nullptr) store_pack(a.y_again + row * a.width + c, round_to<Act>(y));
    }
  }
  if (a.partials == nullptr) return;
  if constexpr (from_y) {
#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const int c = Split::column(k);
      if (c >= a.width) continue;
      const Pack<float, vec> weight = load_pack<vec>(a.weight + c);
#pragma unroll
      for (int i = 0; i < vec; ++i) grad_weight[k][i] /= weight_of<true>(weight.at[i]);
    }
  }
  Split::write_partial(grad_weight, a.width, a.partials + static_cast<int64_t>(blockIdx.x) * a.width);
}

// Calls f(split, threads) for rows of the tensors' width, by packs where all of them allow it.
template <class F>
void split_rows(std::initializer_list<const Tensor*> tensors, int64_t width, F&& f) {
  const bool packs =
      width % kVec == 0 && std::all_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return rows_are_aligned(*t, kVec); });
  packs ? split_row<kVec, true, kWarpColumns>(width, f) : split_row<1>(width, f);
}

template <class Base, class Act>
void forward(const RmsnormForward& f) {
  const ForwardArgs<Base, Act> args{address_of<Base>(f.base), address_of<Act>(f.addend), address_of<float>(f.weight),
                                    address_of<Base>(f.sum),  address_of<Act>(f.y),      address_of<float>(f.rstd),
                                    strided_rows_of(f.base),  strided_rows_of(f.addend), static_cast<int>(f.base.dim(-1)),
                                    static_cast<float>(f.eps)};
  if (f.base.numel() == 0) return;
  split_rows({&f.base, &f.addend, &f.weight, &f.sum, &f.y}, f.base.dim(-1), [&](auto split, unsigned threads) {
    using Split = decltype(split);
    const dim3 grid(static_cast<unsigned>((args.base_rows.count + Split::kRowsPerBlock - 1) / Split::kRowsPerBlock)), block(threads);
    rmsnorm_fwd_kernel<Base, Act, Split><<<grid, block, 0, f.base.device().cuda_context().stream>>>(args);
    launch_check("rmsnorm_fwd_kernel", grid, block);
  });
}

template <class Base, class Act>
void backward(const RmsnormBackward& b) {
  const Tensor& kept = kFromY<Base, Act> ? b.y : b.sum;
  BackwardArgs<Base, Act> args{
      address_of<Act>(b.grad_y),      address_of<Base>(b.grad_sum),   address_of<typename BackwardArgs<Base, Act>::Kept>(kept),
      address_of<float>(b.weight),    address_of<float>(b.rstd),      address_of<Base>(b.grad_base),
      address_of<Act>(b.grad_addend), address_of<Act>(b.y_again),     nullptr,
      strided_rows_of(b.grad_y),      strided_rows_of(b.grad_sum),    strided_rows_of(kept),
      strided_rows_of(b.grad_base),   strided_rows_of(b.grad_addend), static_cast<int>(kept.dim(-1))};
  const CudaContext& cuda = kept.device().cuda_context();
  const int64_t width = kept.dim(-1);
  if (kept.numel() == 0) {
    if (b.grad_weight) sum_partials_cuda(Tensor::empty(kept.device(), Dtype::f32, {0, width}), *b.grad_weight);
    return;
  }
  split_rows(
      {&b.grad_y, &b.grad_sum, &kept, &b.weight, &b.grad_base, &b.grad_addend, &b.y_again}, width, [&](auto split, unsigned threads) {
        using Split = decltype(split);
        const auto kernel = &rmsnorm_bwd_kernel<Base, Act, Split>;
        int resident = 0;  // blocks that one SM holds at a time
        cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, static_cast<int>(threads), 0),
                   "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        const int64_t blocks = (args.kept_rows.count + Split::kRowsPerBlock - 1) / Split::kRowsPerBlock;
        const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, static_cast<int64_t>(resident) * cuda.sm_count))), block(threads);
        Tensor partials;
        if (b.grad_weight) {
          partials = Tensor::empty(kept.device(), Dtype::f32, {grid.x, width});
          args.partials = partials.data<float>();
        }
        kernel<<<grid, block, 0, cuda.stream>>>(args);
        launch_check("rmsnorm_bwd_kernel", grid, block);
        if (b.grad_weight) sum_partials_cuda(partials, *b.grad_weight);
      });
}

}  // namespace

// The stream and the activations may differ: f32 with f32, f32 with bf16, and bf16 alone (rmsnorm of a bf16 tensor).
void rmsnorm_fwd_cuda(const RmsnormForward& f) {
  if (f.base.dtype() == Dtype::bf16) return forward<__nv_bfloat16, __nv_bfloat16>(f);
  if (f.y.dtype() == Dtype::bf16) return forward<float, __nv_bfloat16>(f);
  return forward<float, float>(f);
}
void rmsnorm_bwd_cuda(const RmsnormBackward& b) {
  if (b.y.defined()) return backward<float, __nv_bfloat16>(b);
  if (b.sum.dtype() == Dtype::bf16) return backward<__nv_bfloat16, __nv_bfloat16>(b);
  return backward<float, float>(b);
}

}  // namespace longhand
