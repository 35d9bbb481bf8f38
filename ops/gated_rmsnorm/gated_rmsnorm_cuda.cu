// Gated RMSNorm kernels; gated_rmsnorm.h has the formulas. A unit of work is one group of one row.
//
// gated_rmsnorm_fwd_kernel
// moves   y and z in, out out: 6 bytes per element in bf16
// flops   about 12 and one exponential and one reciprocal per element: memory bound
// floor   65536 x 1536 bf16: 604 MB / 3.0 TB/s = 0.20 ms on an H100 SXM
// split   a warp per unit up to 1024 columns, a block of up to 512 threads beyond; the unit stays in registers between the sum and
//         the product
// needs   packs of 16 bytes (8 bf16, 4 f32), or 8 bytes (4 bf16), where widths, strides and addresses allow; else element by element
//         with a block per unit. A group has at most 16384 columns
// agrees  with the CPU reference: kGatedRmsnormToleranceF32; bf16 adds one rounding of the output
// order   fixed shuffle tree, no atomics: the same input gives the same bits
//
// gated_rmsnorm_bwd_kernel
// moves   y, z, grad_out in, grad_y, grad_z out: 10 bytes per element in bf16; floor 0.33 ms at the shape above. 2 bytes more where out is
//         left once more
// split   as forward, but for each group (grid.y) a grid that fits the GPU walks over the rows, so that weight gradients stay in registers;
//         each block leaves one partial row and sum_partials adds them. Where a thread has one pack of a row, the next two rows are on
//         their way through shared memory
#include <algorithm>

#include "core/cuda_context.h"
#include "core/error.h"
#include "ops/common/copies_ahead.cuh"
#include "ops/common/row_split.cuh"
#include "ops/common/strided_rows.h"
#include "ops/common/sum_partials.h"
#include "ops/gated_rmsnorm/gated_rmsnorm_kernels.h"

namespace longhand {
namespace {

template <class T>
struct ForwardArgs {
  const T *y, *z;
  const float* weight;  // null in gate_only
  T* out;
  float* rstd;  // null in gate_only
  StridedRows y_rows, z_rows;
  GatedNorm form;
  int groups, group_size;
  float eps;
};

template <class T, class Split>
__global__ void __launch_bounds__(Split::kMaxThreads) gated_rmsnorm_fwd_kernel(const ForwardArgs<T> a) {
  constexpr int vec = Split::kVec, per_thread = Split::kPerThread;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * Split::kRowsPerBlock + Split::row_in_block();
  if (unit >= a.y_rows.count * a.groups) return;  // a whole warp, or a whole block
  const int64_t row = a.groups == 1 ? unit : unit / a.groups;
  const int first = static_cast<int>(unit - row * a.groups) * a.group_size;
  const T* y = a.y + a.y_rows.begin(row) + first;
  const T* z = a.z + a.z_rows.begin(row) + first;
  T* out = a.out + unit * a.group_size;

  Pack<T, vec> y_in[per_thread], z_in[per_thread];
#pragma unroll
  for (int k = 0; k < per_thread; ++k) {
    const int c = Split::column(k);
    if (c >= a.group_size) continue;
    y_in[k] = load_pack<vec>(y + c);
    z_in[k] = load_pack<vec>(z + c);
  }

  float squares = 0;
#pragma unroll
  for (int k = 0; k < per_thread; ++k) {
    if (Split::column(k) >= a.group_size) continue;
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      const float v = a.form == GatedNorm::gate_first ? to_f32(y_in[k].at[i]) * silu(to_f32(z_in[k].at[i])) : to_f32(y_in[k].at[i]);
      squares += v * v;
    }
  }
  float rstd = 1.0f;
  if (a.form != GatedNorm::gate_only) {
    squares = Split::sum(squares, 0);
    rstd = 1.0f / sqrtf(squares / static_cast<float>(a.group_size) + a.eps);
    if (Split::lane() == 0) a.rstd[unit] = rstd;
  }
#pragma unroll
  for (int k = 0; k < per_thread; ++k) {
    const int c = Split::column(k);
    if (c >= a.group_size) continue;
    float o[vec];
#pragma unroll
    for (int i = 0; i < vec; ++i) o[i] = to_f32(y_in[k].at[i]) * silu(to_f32(z_in[k].at[i]));
    if (a.weight != nullptr) {
      const Pack<float, vec> weight = load_pack<vec>(a.weight + first + c);
#pragma unroll
      for (int i = 0; i < vec; ++i) o[i] = weight.at[i] * (rstd * o[i]);
    }
    store_pack(out + c, round_to<T>(o));
  }
}

template <class T>
struct BackwardArgs {
  const T *grad_out, *y, *z;
  const float *weight, *rstd;  // null in gate_only
  T *grad_y, *grad_z;          // may be null: not wanted
  T* out;                      // [rows, groups * group_size]; may be null: not wanted
  float* partials;             // [gridDim.x, groups * group_size]; may be null: not wanted
  StridedRows grad_out_rows, y_rows, z_rows, grad_y_rows, grad_z_rows;
  GatedNorm form;
  int groups, group_size;
  int64_t grad_out_next = 0, y_next = 0, z_next = 0, grad_y_next = 0,
          grad_z_next = 0;  // elements from a row of a warp to its next one: see RowWalk
};

/// Where the rows of a warp begin. steady: there is one step from each to the next one (the heads of a token are the rows of a block);
/// otherwise a row of two strides costs a division.
template <bool steady>
class RowWalk {
 public:
  __device__ RowWalk(const StridedRows& rows, int64_t row, int64_t next) : rows_(rows), next_(next), at_(steady ? rows.begin(row) : 0) {}
  __device__ int64_t begin(int64_t row) const { return steady ? at_ : rows_.begin(row); }
  __device__ void advance() {
    if (steady) at_ += next_;
  }

 private:
  const StridedRows& rows_;
  const int64_t& next_;
  int64_t at_;
};

constexpr int kStages = 3;  // rows of a block: one in work, the others on their way through shared memory, each piece for who asks
template <class Split>
constexpr bool kAhead = Split::kPerThread == 1 && Split::kVec > 1;

template <class T, class Split, bool steady>
__global__ void __launch_bounds__(Split::kMaxThreads, kAhead<Split>&& Split::kWarpPerRow ? 6 : 1)
    gated_rmsnorm_bwd_kernel(const BackwardArgs<T> a) {
  constexpr int vec = Split::kVec, per_thread = Split::kPerThread;
  constexpr bool ahead = kAhead<Split>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Split::kRowsPerBlock;
  const int first = static_cast<int>(blockIdx.y) * a.group_size;
  const bool gate_first = a.form != GatedNorm::norm_first;
  float grad_weight[per_thread][vec] = {};
  int turn = 0, stage = 0;
  int64_t row = static_cast<int64_t>(blockIdx.x) * Split::kRowsPerBlock + Split::row_in_block();
  const auto place = [](int at) {  // a thread's pieces lie blockDim.x packs apart, so that neighbours fill one line
    return reinterpret_cast<Pack<T, vec>*>(shared_memory()) + static_cast<int>(threadIdx.x) + at * 3 * static_cast<int>(blockDim.x);
  };
  RowWalk<steady> grad_out_walk(a.grad_out_rows, row, a.grad_out_next), y_walk(a.y_rows, row, a.y_next), z_walk(a.z_rows, row, a.z_next),
      grad_y_walk(a.grad_y_rows, row, a.grad_y_next), grad_z_walk(a.grad_z_rows, row, a.grad_z_next);
  const auto ask = [&](int64_t next, int to) {  // for rows in turn
    if (next < a.y_rows.count) {
      const int c = Split::column(0);
      if (c < a.group_size) {
        Pack<T, vec>* at = place(to);
        copy_pack_async(at, a.grad_out + grad_out_walk.begin(next) + first + c);
        copy_pack_async(at + blockDim.x, a.y + y_walk.begin(next) + first + c);
        copy_pack_async(at + 2 * blockDim.x, a.z + z_walk.begin(next) + first + c);
      }
    }
    close_copies();
    grad_out_walk.advance(), y_walk.advance(), z_walk.advance();
  };
  const auto weights_of = [&](int k) {  // ones where there is no weight
    Pack<float, vec> weight;
#pragma unroll
    for (int i = 0; i < vec; ++i) weight.at[i] = 1.0f;
    if (a.weight != nullptr && Split::column(k) < a.group_size) weight = load_pack<vec>(a.weight + first + Split::column(k));
    return weight;
  };
  const Pack<float, vec> own_weights = weights_of(0);
  if constexpr (ahead) {
#pragma unroll
    for (int s = 0; s + 1 < kStages; ++s) ask(row + s * step, s);
  }
  for (; row < a.y_rows.count; row += step, ++turn) {
    Pack<T, vec> grad_in[per_thread], y_in[per_thread], z_in[per_thread];
    if constexpr (ahead) {
      ask(row + (kStages - 1) * step, stage == 0 ? kStages - 1 : stage - 1);
      copies_arrived_but<kStages - 1>();
      const Pack<T, vec>* at = place(stage);
      grad_in[0] = at[0];
      y_in[0] = at[blockDim.x];
      z_in[0] = at[2 * blockDim.x];
      stage = stage + 1 == kStages ? 0 : stage + 1;
    } else {
      const T* grad_out = a.grad_out + a.grad_out_rows.begin(row) + first;
      const T* y = a.y + a.y_rows.begin(row) + first;
      const T* z = a.z + a.z_rows.begin(row) + first;
#pragma unroll
      for (int k = 0; k < per_thread; ++k) {
        const int c = Split::column(k);
        if (c >= a.group_size) continue;
        grad_in[k] = load_pack<vec>(grad_out + c);
        y_in[k] = load_pack<vec>(y + c);
        z_in[k] = load_pack<vec>(z + c);
      }
    }

    // normed = rstd * y * silu(z) in both forms with a norm, and the mean of weight * grad_out * normed is what a row's gradients share
    const float rstd = a.form != GatedNorm::gate_only ? a.rstd[row * a.groups + blockIdx.y] : 1.0f;
    float s[per_thread][vec], normed[per_thread][vec];  // s = sigmoid(z)
    float dot = 0;
#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const int c = Split::column(k);
      if (c >= a.group_size) continue;
      const Pack<float, vec> weight = ahead ? own_weights : weights_of(k);
#pragma unroll
      for (int i = 0; i < vec; ++i) {
        const float zi = to_f32(z_in[k].at[i]);
        s[k][i] = sigmoid(zi);
        normed[k][i] = to_f32(y_in[k].at[i]) * (zi * s[k][i]) * rstd;
        const float share = to_f32(grad_in[k].at[i]) * normed[k][i];
        grad_weight[k][i] += share;
        dot += weight.at[i] * share;
      }
    }
    float mean = 0.0f;
    if (a.form != GatedNorm::gate_only) mean = Split::sum(dot, turn) / static_cast<float>(a.group_size);
    const float shared = rstd * mean;

#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const int c = Split::column(k);
      if (c >= a.group_size) continue;
      const Pack<float, vec> weight = ahead ? own_weights : weights_of(k);
      float grad_y[vec], grad_z[vec], out[vec];
#pragma unroll
      for (int i = 0; i < vec; ++i) {
        const float yi = to_f32(y_in[k].at[i]), zi = to_f32(z_in[k].at[i]), gate = zi * s[k][i];
        const float slope = s[k][i] + gate * (1.0f - s[k][i]);  // d silu / dz
        out[i] = weight.at[i] * normed[k][i];                   // the products of the forward, in its order
        const float weighted = rstd * (weight.at[i] * to_f32(grad_in[k].at[i]));
        if (gate_first) {  // out = weight * norm(y * gate)
          const float grad_a = weighted - normed[k][i] * shared;
          grad_y[i] = grad_a * gate;
          grad_z[i] = grad_a * yi * slope;
        } else {  // out = weight * norm(y) * gate
          grad_y[i] = weighted * gate - rstd * yi * shared;
          grad_z[i] = weighted * yi * slope;
        }
      }
      if (a.grad_y != nullptr) store_pack(a.grad_y + grad_y_walk.begin(row) + first + c, round_to<T>(grad_y));
      if (a.grad_z != nullptr) store_pack(a.grad_z + grad_z_walk.begin(row) + first + c, round_to<T>(grad_z));
      if (a.out != nullptr) store_pack(a.out + (row * a.groups + blockIdx.y) * a.group_size + c, round_to<T>(out));
    }
    grad_y_walk.advance(), grad_z_walk.advance();
  }
  if (a.partials != nullptr)
    Split::write_partial(grad_weight, a.group_size, a.partials + (static_cast<int64_t>(blockIdx.x) * a.groups + blockIdx.y) * a.group_size);
}

// Calls f(split, threads) for groups of the given size, by the widest packs that all tensors allow.
template <class T, bool one_pack = false, class F>
void split_groups(std::initializer_list<const Tensor*> tensors, int64_t group_size, F&& f) {
  const auto fits = [&](int64_t vec) {
    return group_size % vec == 0 && std::all_of(tensors.begin(), tensors.end(), [vec](const Tensor* t) {
             return rows_are_aligned(
                 *t, t->defined() && t->dtype() == Dtype::f32 ? std::min<int64_t>(vec, 4) : vec);  // f32: two accesses for 8
           });
  };
  if constexpr (sizeof(T) == 2) {
    if (fits(8)) return split_row<8, one_pack>(group_size, f);
  }
  fits(4) ? split_row<4>(group_size, f) : split_row<1>(group_size, f);
}

template <class T>
void forward(const GatedRmsnormForward& f) {
  if (f.y.numel() == 0) return;
  const int64_t group_size = f.y.dim(-1) / f.groups;
  const ForwardArgs<T> args{address_of<T>(f.y),         address_of<T>(f.z),           address_of<float>(f.weight), address_of<T>(f.out),
                            address_of<float>(f.rstd),  strided_rows_of(f.y),         strided_rows_of(f.z),        f.form,
                            static_cast<int>(f.groups), static_cast<int>(group_size), static_cast<float>(f.eps)};
  split_groups<T>({&f.y, &f.z, &f.weight, &f.out}, group_size, [&](auto split, unsigned threads) {
    using Split = decltype(split);
    const dim3 grid(static_cast<unsigned>((args.y_rows.count * f.groups + Split::kRowsPerBlock - 1) / Split::kRowsPerBlock)),
        block(threads);
    gated_rmsnorm_fwd_kernel<T, Split><<<grid, block, 0, f.y.device().cuda_context().stream>>>(args);
    launch_check("gated_rmsnorm_fwd_kernel", grid, block);
  });
}

template <class T>
void backward(const GatedRmsnormBackward& b) {
  const CudaContext& cuda = b.y.device().cuda_context();
  const int64_t width = b.y.dim(-1), group_size = width / b.groups;
  if (b.y.numel() == 0) {
    if (b.grad_weight) sum_partials_cuda(Tensor::empty(b.y.device(), Dtype::f32, {0, width}), *b.grad_weight);
    return;
  }
  BackwardArgs<T> args{address_of<T>(b.grad_out),   address_of<T>(b.y),          address_of<T>(b.z),
                       address_of<float>(b.weight), address_of<float>(b.rstd),   address_of<T>(b.grad_y),
                       address_of<T>(b.grad_z),     address_of<T>(b.out),        nullptr,
                       strided_rows_of(b.grad_out), strided_rows_of(b.y),        strided_rows_of(b.z),
                       strided_rows_of(b.grad_y),   strided_rows_of(b.grad_z),   b.form,
                       static_cast<int>(b.groups),  static_cast<int>(group_size)};
  split_groups<T, true>({&b.grad_out, &b.y, &b.z, &b.weight, &b.grad_y, &b.grad_z, &b.out}, group_size, [&](auto split, unsigned threads) {
    using Split = decltype(split);
    const std::size_t shared = kAhead<Split> ? kStages * 3 * threads * sizeof(Pack<T, Split::kVec>) : 0;
    auto kernel = &gated_rmsnorm_bwd_kernel<T, Split, false>;
    int resident = 0;  // blocks that one SM holds at a time
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, static_cast<int>(threads), shared),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    const int64_t needed = (args.y_rows.count + Split::kRowsPerBlock - 1) / Split::kRowsPerBlock;
    const int64_t fitting = std::max<int64_t>(static_cast<int64_t>(resident) * cuda.sm_count / b.groups, 1);
    const dim3 grid(static_cast<unsigned>(std::min(needed, fitting)), static_cast<unsigned>(b.groups)), block(threads);
    const int64_t step = static_cast<int64_t>(grid.x) * Split::kRowsPerBlock;
    constexpr bool can_be_steady = kAhead<Split> && Split::kWarpPerRow;
    bool steady = can_be_steady;
    const auto next = [&](const StridedRows& rows) {
      if (rows.inner >= rows.count) return step * rows.inner_stride;
      steady = steady && step % rows.inner == 0;
      return step / rows.inner * rows.outer_stride;
    };
    args.grad_out_next = next(args.grad_out_rows);
    args.y_next = next(args.y_rows);
    args.z_next = next(args.z_rows);
    args.grad_y_next = next(args.grad_y_rows);
    args.grad_z_next = next(args.grad_z_rows);
    Tensor partials;
    if (b.grad_weight) {
      partials = Tensor::empty(b.y.device(), Dtype::f32, {grid.x, width});
      args.partials = partials.data<float>();
    }
    if (steady) kernel = &gated_rmsnorm_bwd_kernel<T, Split, can_be_steady>;
    kernel<<<grid, block, shared, cuda.stream>>>(args);
    launch_check("gated_rmsnorm_bwd_kernel", grid, block, shared);
    if (b.grad_weight) sum_partials_cuda(partials, *b.grad_weight);
  });
}

}  // namespace

void gated_rmsnorm_fwd_cuda(const GatedRmsnormForward& f) {
  f.y.dtype() == Dtype::bf16 ? forward<__nv_bfloat16>(f) : forward<float>(f);
}
void gated_rmsnorm_bwd_cuda(const GatedRmsnormBackward& b) {
  b.y.dtype() == Dtype::bf16 ? backward<__nv_bfloat16>(b) : backward<float>(b);
}

}  // namespace longhand
