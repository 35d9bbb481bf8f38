// embedding on a GPU: a gather forward; backward sums the rows of equal ids without atomics.
//
// embedding_fwd_warp_per_row_kernel
// moves   the looked-up rows in once, y out once: B*T*d * (sizeof(W) + sizeof(Y)) bytes (rows met again come from L2), ids 4 bytes each
// floor   B*T = 32768, d = 768, bf16 table, f32 y: 151 MB / 3.35 TB/s = 45 us on an H100 SXM
// split   one warp per row, 8 rows a block; 8 columns per lane and step where widths and addresses allow, else 1
// needs   contiguous weight and y; an id outside the table reads nothing, gives a row of NaN and prints itself
//
// backward: sort the positions by id (stable, so positions of one id stay in order), then two kernels over pieces of kPiece sorted
// positions
//   embedding_bwd_runs_kernel   sums each run of equal ids inside a piece; a run that lies within the piece goes straight to its row of
//                               grad_weight, one that crosses a border leaves a partial row
//   embedding_bwd_joins_kernel  adds up the partial rows of each crossing run, first piece to last
// moves   grad_y in once, the touched rows of grad_weight once (in and out when accumulating), 2/kPiece of grad_y as partial rows, out and
// in;
//         with beta = 0 also V*d * 4 bytes of zeros
// floor   B*T = 32768, d = 768, f32, beta = 1, 10000 distinct ids: 101 + 61 + 13 MB / 3.35 TB/s = 52 us, the sort not counted
// split   one block per piece and tile of columns; a frequent token is spread over as many blocks as it has pieces
// agrees  forward: exact, but for one rounding to y's dtype; backward: f32 sums in order of position inside a piece, then of pieces
// order   fixed by the ids alone: the same input gives the same bits
#include <cstdio>
#include <limits>

#include <cub/device/device_radix_sort.cuh>

#include "core/cuda_context.h"
#include "core/error.h"
#include "ops/common/cuda_math.cuh"
#include "ops/embedding/embedding_kernels.h"

namespace longhand {
namespace {

constexpr int kRowsPerBlock = 8;
constexpr int kPiece = 32;      // sorted positions that one block sums
constexpr int kLoadsAhead = 8;  // rows read before the first is added
constexpr int kMaxColumnThreads = 256;
constexpr uint32_t kNoId = 0xffffffffu;

// --- forward ----------------------------------------------------------------------------------------------------

template <class W, class Y, int vec>
__global__ void embedding_fwd_warp_per_row_kernel(const int32_t* ids, const W* weight, Y* y, int64_t rows, int64_t width, int64_t vocab) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int32_t id = ids[row];
  Y* to = y + row * width;
  if (id < 0 || id >= vocab) {
    if (lane == 0)
      printf("longhand: embedding: flat position %lld holds id %d, outside [0, %lld); its row becomes NaN\n", static_cast<long long>(row),
             id, static_cast<long long>(vocab));
    for (int64_t i = lane; i < width; i += kWarp) to[i] = static_cast<Y>(__int_as_float(0x7fffffff));
    return;
  }
  const W* from = weight + id * width;
  for (int64_t i = lane * vec; i < width; i += kWarp * vec) {
    const Pack<W, vec> pack = load_pack<vec>(from + i);
    float values[vec];
#pragma unroll
    for (int j = 0; j < vec; ++j) values[j] = to_f32(pack.at[j]);
    store_pack(to + i, round_to<Y>(values));
  }
}

bool aligned_to(const Tensor& t, int64_t stride, int64_t elements) {
  const auto bytes = static_cast<std::uintptr_t>(std::min<int64_t>(elements * size_of(t.dtype()), 16));
  return stride % elements == 0 && reinterpret_cast<std::uintptr_t>(t.raw()) % bytes == 0;
}

template <class W, class Y>
void launch_fwd(const Tensor& ids, const Tensor& weight, const Tensor& y) {
  const int64_t rows = y.dim(0), width = y.dim(1);
  const dim3 grid(static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock)), block(kRowsPerBlock * kWarp);
  const bool wide = aligned_to(weight, width, 8) && aligned_to(y, width, 8);
  const auto kernel = wide ? &embedding_fwd_warp_per_row_kernel<W, Y, 8> : &embedding_fwd_warp_per_row_kernel<W, Y, 1>;
  kernel<<<grid, block, 0, y.device().cuda_context().stream>>>(ids.data<int32_t>(), static_cast<const W*>(weight.raw()),
                                                               static_cast<Y*>(y.raw()), rows, width, weight.dim(0));
  launch_check("embedding_fwd_warp_per_row_kernel", grid, block);
}

// --- backward ---------------------------------------------------------------------------------------------------

struct Runs {
  const uint32_t* ids;       // [n] sorted; `vocab` stands for an id outside the table
  const int32_t* positions;  // [n] the row of grad_y that belongs to it
  float* partials;           // [pieces, 2, width]: of the run that enters from the left, of the run that leaves to the right
  float* grad_weight;        // [vocab, width]
  int64_t n, width, grad_y_stride;
  uint32_t vocab;
  bool add;  // to what grad_weight holds
};

__global__ void embedding_keys_kernel(const int32_t* ids, uint32_t* keys, int32_t* positions, int64_t n, uint32_t vocab) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const auto id = static_cast<uint32_t>(ids[i]);  // a negative id becomes a large one
  keys[i] = id < vocab ? id : vocab;
  positions[i] = static_cast<int32_t>(i);
}

template <int vec>
__device__ void write_sum(float* to, const float (&sum)[vec], bool add) {
  Pack<float, vec> pack;
  if (add) pack = load_pack<vec>(to);
#pragma unroll
  for (int j = 0; j < vec; ++j) pack.at[j] = add ? pack.at[j] + sum[j] : sum[j];
  store_pack(to, pack);
}

template <class T, int vec>
__global__ void __launch_bounds__(kMaxColumnThreads) embedding_bwd_runs_kernel(Runs r, const T* grad_y) {
  __shared__ uint32_t id[kPiece + 2];  // with a neighbour on each side
  __shared__ int32_t position[kPiece];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPiece;
  const int count = static_cast<int>(min(static_cast<int64_t>(kPiece), r.n - begin));
  for (int i = static_cast<int>(threadIdx.x); i < count + 2; i += static_cast<int>(blockDim.x)) {
    const int64_t at = begin + i - 1;
    id[i] = at >= 0 && at < r.n ? r.ids[at] : kNoId;
    if (i < count) position[i] = r.positions[begin + i];
  }
  __syncthreads();
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * vec;
  if (column >= r.width) return;

  float sum[vec] = {};
  int run_begin = 0;
  for (int base = 0; base < count; base += kLoadsAhead) {
    Pack<T, vec> ahead[kLoadsAhead];
#pragma unroll
    for (int k = 0; k < kLoadsAhead; ++k)
      if (base + k < count) ahead[k] = load_pack<vec>(grad_y + position[base + k] * r.grad_y_stride + column);
#pragma unroll
    for (int k = 0; k < kLoadsAhead; ++k) {
      const int i = base + k;
      if (i >= count) break;
#pragma unroll
      for (int j = 0; j < vec; ++j) sum[j] += to_f32(ahead[k].at[j]);
      const uint32_t here = id[i + 1];
      const bool same_next = id[i + 2] == here;
      if (same_next && i + 1 < count) continue;
      const bool enters = run_begin == 0 && id[0] == here, leaves = same_next;
      float* partial = r.partials + (static_cast<int64_t>(blockIdx.x) * 2 + (enters ? 0 : 1)) * r.width + column;
      if (here == r.vocab) {  // ids outside the table have no row
      } else if (enters || leaves) {
        write_sum(partial, sum, false);
      } else {
        write_sum(r.grad_weight + here * r.width + column, sum, r.add);
      }
      run_begin = i + 1;
#pragma unroll
      for (int j = 0; j < vec; ++j) sum[j] = 0;
    }
  }
}

template <int vec>
__global__ void __launch_bounds__(kMaxColumnThreads) embedding_bwd_joins_kernel(Runs r) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPiece, end = begin + kPiece;
  if (end >= r.n) return;  // nothing leaves the last piece
  const uint32_t id = r.ids[end];
  const bool leaves = r.ids[end - 1] == id;
  const bool enters = begin > 0 && r.ids[begin - 1] == id;  // then an earlier piece adds this run up
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * vec;
  if (!leaves || enters || id == r.vocab || column >= r.width) return;
  const int64_t piece_rows = 2 * r.width;
  const float* partial = r.partials + static_cast<int64_t>(blockIdx.x) * piece_rows + r.width + column;
  float sum[vec];
  Pack<float, vec> pack = load_pack<vec>(partial);
#pragma unroll
  for (int j = 0; j < vec; ++j) sum[j] = pack.at[j];
  partial = r.partials + static_cast<int64_t>(blockIdx.x + 1) * piece_rows + column;
  for (int64_t next = end; next < r.n && r.ids[next] == id; next += kPiece, partial += piece_rows) {
    pack = load_pack<vec>(partial);
#pragma unroll
    for (int j = 0; j < vec; ++j) sum[j] += pack.at[j];
  }
  write_sum(r.grad_weight + id * r.width + column, sum, r.add);
}

template <class T, int vec>
void launch_bwd(const Runs& runs, const Tensor& grad_y) {
  const cudaStream_t stream = grad_y.device().cuda_context().stream;
  const int64_t packs = (runs.width + vec - 1) / vec;
  const int64_t threads = std::min<int64_t>((packs + kWarp - 1) / kWarp * kWarp, kMaxColumnThreads);
  const dim3 grid(static_cast<unsigned>((runs.n + kPiece - 1) / kPiece), static_cast<unsigned>((packs + threads - 1) / threads));
  const dim3 block(static_cast<unsigned>(threads));
  embedding_bwd_runs_kernel<T, vec><<<grid, block, 0, stream>>>(runs, static_cast<const T*>(grad_y.raw()));
  launch_check("embedding_bwd_runs_kernel", grid, block);
  embedding_bwd_joins_kernel<vec><<<grid, block, 0, stream>>>(runs);
  launch_check("embedding_bwd_joins_kernel", grid, block);
}

struct Sorted {
  Tensor ids, positions;  // [n] i32 (the ids' bits are unsigned)
};

Sorted sort_by_id(const Tensor& ids, uint32_t vocab) {
  const Device& device = ids.device();
  const cudaStream_t stream = device.cuda_context().stream;
  const int64_t n = ids.numel();
  auto fresh = [&] { return Tensor::empty(device, Dtype::i32, {n}); };
  const Tensor keys = fresh(), positions = fresh();
  Sorted sorted{fresh(), fresh()};
  auto unsigned_of = [](const Tensor& t) { return static_cast<uint32_t*>(t.raw()); };
  constexpr int kThreads = 256;
  const dim3 grid(static_cast<unsigned>((n + kThreads - 1) / kThreads));
  embedding_keys_kernel<<<grid, kThreads, 0, stream>>>(ids.data<int32_t>(), unsigned_of(keys), positions.data<int32_t>(), n, vocab);
  launch_check("embedding_keys_kernel", grid, kThreads);

  int bits = 1;
  while (bits < 32 && (vocab >> bits) != 0) ++bits;
  size_t bytes = 0;
  auto sort = [&](void* scratch) {
    cuda_check(cub::DeviceRadixSort::SortPairs(scratch, bytes, unsigned_of(keys), unsigned_of(sorted.ids), positions.data<int32_t>(),
                                               sorted.positions.data<int32_t>(), static_cast<int>(n), 0, bits, stream),
               "cub::DeviceRadixSort::SortPairs");
  };
  sort(nullptr);  // asks for the size
  const Tensor scratch = Tensor::empty(device, Dtype::u8, {static_cast<int64_t>(std::max<size_t>(bytes, 1))});
  sort(scratch.raw());
  return sorted;
}

}  // namespace

void embedding_fwd_cuda(const Tensor& ids, const Tensor& weight, const Tensor& y) {
  const bool from_bf16 = weight.dtype() == Dtype::bf16, to_bf16 = y.dtype() == Dtype::bf16;
  if (from_bf16 && to_bf16) launch_fwd<__nv_bfloat16, __nv_bfloat16>(ids, weight, y);
  else if (from_bf16) launch_fwd<__nv_bfloat16, float>(ids, weight, y);
  else if (to_bf16) launch_fwd<float, __nv_bfloat16>(ids, weight, y);
  else launch_fwd<float, float>(ids, weight, y);
}

void embedding_bwd_cuda(const Tensor& ids, const Tensor& grad_y, const Tensor& grad_weight, double beta) {
  const Rows rows = rows_of(grad_y, "embedding: grad_y");
  if (rows.count > std::numeric_limits<int32_t>::max())
    throw ShapeError("embedding: more positions than the sort can index", {{"grad_y", grad_y.describe()}, {"limit", "2^31 - 1 positions"}});
  if (beta == 0) fill(grad_weight, 0);
  const auto vocab = static_cast<uint32_t>(grad_weight.dim(0));
  const Sorted sorted = sort_by_id(ids, vocab);
  const int64_t pieces = (rows.count + kPiece - 1) / kPiece;
  const Tensor partials = Tensor::empty(grad_y.device(), Dtype::f32, {pieces, 2, rows.width});
  const Runs runs{static_cast<const uint32_t*>(sorted.ids.raw()),
                  sorted.positions.data<int32_t>(),
                  partials.data<float>(),
                  grad_weight.data<float>(),
                  rows.count,
                  rows.width,
                  rows.stride,
                  vocab,
                  beta != 0};
  const bool wide = aligned_to(grad_y, rows.stride, 4) && aligned_to(grad_weight, rows.width, 4);
  if (grad_y.dtype() == Dtype::bf16) wide ? launch_bwd<__nv_bfloat16, 4>(runs, grad_y) : launch_bwd<__nv_bfloat16, 1>(runs, grad_y);
  else wide ? launch_bwd<float, 4>(runs, grad_y) : launch_bwd<float, 1>(runs, grad_y);
}

}  // namespace longhand
