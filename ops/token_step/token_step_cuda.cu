// The kernels of a token; token_step.h has the formulas.
//
// norm_projection_kernel, gated_projection_kernel
// moves   the weight once: 2*R*D bytes in bf16 (9.0 MB for 4384 x 1024); the rows of activations stay in L2
// flops   1 multiply-add per element of weight and row: memory bound up to some 8 rows
// floor   9.0 MB / 4.3 TB/s = 2.1 us on an H200
// split   a warp owns kRows rows of weight; its first packs of 16 bytes are under way before the kernel in front has ended
// (griddepcontrol),
//         then every block forms the normalised rows in its shared memory and the warps multiply
// order   lane sums, then a fixed tree: the same bits whatever the grid and the number of rows
//
// mamba2_token_kernel
// moves   the state in and out once: 8*H*P*N bytes a row (2.1 MB at H 32, P 64, N 128)
// split   a block owns 16 channels of one head of one row, a warp four of them; lanes share N. The convolution of B and C is computed again
//         by every block. Until the kernel in front has ended, states, windows and filters are loaded
// agrees  all three with the ops that they join: kTokenStepToleranceF32, kTokenStepToleranceBf16
#include <algorithm>

#include "core/cuda_context.h"
#include "core/error.h"
#include "ops/common/cuda_math.cuh"
#include "ops/token_step/token_step.h"

namespace longhand {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Where a kernel may start while the one in front still runs (sm_90 and newer): nothing that others write may be read before
// wait_for_kernel_in_front(), nothing written either.
__device__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Queues a kernel that calls the two functions above.
template <class Args>
void launch_overlapping(void (*kernel)(Args), const char* name, dim3 grid, dim3 block, size_t shared, const CudaContext& cuda,
                        const Args& args) {
  constexpr size_t kWithoutAsking = 40 * 1024;  // beside what the kernels declare themselves
  if (shared > kWithoutAsking)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), "cudaFuncSetAttribute");
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = cuda.stream;
  config.attrs = &overlap;
  config.numAttrs = cuda.major >= 9 ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, args), name);
}

// --- products with a few rows ---------------------------------------------------------------------------------

/// What both projections share: the weight and where the results go.
struct Product {
  const void* weight;
  void* out;
  int64_t out_rows;  // R
  int width;         // D, a multiple of the pack
  int batch;
};

/// The rows of weight of one warp: `rows` of them, `ahead` packs a lane already loaded.
template <class T, int rows, int ahead>
struct WeightRows {
  static constexpr int vec = 16 / static_cast<int>(sizeof(T));
  Pack<T, vec> loaded[rows][ahead];
  const T* base[rows];

  __device__ void start(const Product& p, int64_t first) {
    const int packs = p.width / vec, lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t row = first + r < p.out_rows ? first + r : p.out_rows - 1;
      base[r] = static_cast<const T*>(p.weight) + row * p.width;
#pragma unroll
      for (int s = 0; s < ahead; ++s)
        if (lane + s * kWarp < packs) loaded[r][s] = load_pack<vec>(base[r] + (lane + s * kWarp) * vec);
    }
  }

  /// sums[r][b] += weight row r times x row b, over the lane's packs.
  template <int B>
  __device__ void multiply(const Product& p, const T* x, float (&sums)[rows][B]) const {
    const int packs = p.width / vec, lane = static_cast<int>(threadIdx.x) % kWarp;
    auto add = [&](int r, const Pack<T, vec>& w, int pack) {
#pragma unroll
      for (int b = 0; b < B; ++b) {
        if (b >= p.batch) break;
        const Pack<T, vec> in = load_pack<vec>(x + b * p.width + pack * vec);
#pragma unroll
        for (int j = 0; j < vec; ++j) sums[r][b] = fmaf(to_f32(w.at[j]), to_f32(in.at[j]), sums[r][b]);
      }
    };
#pragma unroll
    for (int s = 0; s < ahead; ++s)
#pragma unroll
      for (int r = 0; r < rows; ++r)
        if (lane + s * kWarp < packs) add(r, loaded[r][s], lane + s * kWarp);
    for (int pack = lane + ahead * kWarp; pack < packs; pack += kWarp)
#pragma unroll
      for (int r = 0; r < rows; ++r) add(r, load_pack<vec>(base[r] + pack * vec), pack);
  }
};

/// All rows of weight of this warp, one group after the other; `weights` holds the start of the first.
template <class T, class Out, int B, int rows, int ahead>
__device__ void multiply_all(const Product& p, const T* x, WeightRows<T, rows, ahead>& weights, int64_t first) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * rows;
  for (; first < p.out_rows; first += step) {
    float sums[rows][B] = {};
    weights.multiply(p, x, sums);
    if (first + step < p.out_rows) weights.start(p, first + step);
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int b = 0; b < B; ++b) {
        if (b >= p.batch) break;
        const float sum = warp_sum(sums[r][b]);
        if (threadIdx.x % kWarp == 0 && first + r < p.out_rows)
          static_cast<Out*>(p.out)[b * p.out_rows + first + r] = static_cast<Out>(sum);
      }
  }
}

struct NormArgs {
  Product product;
  const float *residual, *norm;
  const void* branch;  // may be null
  float* sum;
  float eps;
};

template <class T, class Out, int B, int rows, int ahead>
__global__ void __launch_bounds__(kThreads, 3) norm_projection_kernel(NormArgs p) {
  let_next_kernel_start();
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ float scratch[2][kWarps];
  T* x = reinterpret_cast<T*>(shared_bytes);  // [batch, D], what is multiplied
  float* wide =
      reinterpret_cast<float*>(shared_bytes + sizeof(T) * p.product.batch * p.product.width);  // [D], a thread reads what it wrote
  const int D = p.product.width;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * rows;
  WeightRows<T, rows, ahead> weights;
  weights.start(p.product, first);
  wait_for_kernel_in_front();
  for (int b = 0; b < p.product.batch; ++b) {
    float squares = 0;
    for (int i = static_cast<int>(threadIdx.x) * 4; i < D; i += kThreads * 4) {
      Pack<float, 4> v = load_pack<4>(p.residual + static_cast<int64_t>(b) * D + i);
      if (p.branch != nullptr) {
        const Pack<T, 4> more = load_pack<4>(static_cast<const T*>(p.branch) + static_cast<int64_t>(b) * D + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) v.at[j] += to_f32(more.at[j]);
      }
      if (blockIdx.x == 0) store_pack(p.sum + static_cast<int64_t>(b) * D + i, v);
#pragma unroll
      for (int j = 0; j < 4; ++j) squares = fmaf(v.at[j], v.at[j], squares);
      store_pack(wide + i, v);
    }
    const float rstd = rsqrtf(block_sum(squares, scratch[b % 2]) / static_cast<float>(D) + p.eps);
    for (int i = static_cast<int>(threadIdx.x) * 4; i < D; i += kThreads * 4) {
      const Pack<float, 4> v = load_pack<4>(wide + i), w = load_pack<4>(p.norm + i);
      float out[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j] = w.at[j] * rstd * v.at[j];
      store_pack(x + b * D + i, round_to<T>(out));
    }
  }
  __syncthreads();
  multiply_all<T, Out, B>(p.product, x, weights, first);
}

struct GateArgs {
  Product product;
  const void *y, *z;
  int64_t z_stride;
  const float* norm;  // null: the gate alone
  float eps;
  int groups;
  bool norm_before_gate;
  void* window;  // null: nothing to move
  const void* now;
  int64_t now_stride;
  int taps, channels;  // W - 1, C
};

template <class T>
__device__ void move_window(T* window, const T* now, int taps, int64_t channels) {
  for (int k = 0; k + 1 < taps; ++k) window[k * channels] = window[(k + 1) * channels];
  window[(taps - 1) * channels] = *now;
}

template <class T, int B, int rows, int ahead>
__global__ void __launch_bounds__(kThreads, 3) gated_projection_kernel(GateArgs p) {
  let_next_kernel_start();
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ float scratch[2][kWarps];
  T* x = reinterpret_cast<T*>(shared_bytes);                                                             // [batch, E]
  float* wide = reinterpret_cast<float*>(shared_bytes + sizeof(T) * p.product.batch * p.product.width);  // [E]
  const int E = p.product.width, group = E / p.groups;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * rows;
  WeightRows<T, rows, ahead> weights;
  weights.start(p.product, first);
  wait_for_kernel_in_front();

  if (p.window != nullptr)
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < static_cast<int64_t>(p.product.batch) * p.channels;
         i += static_cast<int64_t>(gridDim.x) * kThreads) {
      const int64_t b = i / p.channels, c = i - b * p.channels;
      move_window(static_cast<T*>(p.window) + b * p.taps * p.channels + c, static_cast<const T*>(p.now) + b * p.now_stride + c, p.taps,
                  p.channels);
    }

  int turn = 0;
  for (int b = 0; b < p.product.batch; ++b)
    for (int g = 0; g < p.groups; ++g) {
      const T* y = static_cast<const T*>(p.y) + static_cast<int64_t>(b) * E + g * group;
      const T* z = static_cast<const T*>(p.z) + b * p.z_stride + g * group;
      float squares = 0;
      for (int i = static_cast<int>(threadIdx.x); i < group; i += kThreads) {
        const float value = to_f32(y[i]), gated = value * silu(to_f32(z[i])), normed = p.norm_before_gate ? value : gated;
        squares = fmaf(normed, normed, squares);
        wide[i] = gated;
      }
      const float rstd = p.norm != nullptr ? rsqrtf(block_sum(squares, scratch[turn++ % 2]) / static_cast<float>(group) + p.eps) : 1.0f;
      for (int i = static_cast<int>(threadIdx.x); i < group; i += kThreads) {
        const float w = p.norm != nullptr ? p.norm[g * group + i] : 1.0f;
        x[b * E + g * group + i] = static_cast<T>(w * rstd * wide[i]);
      }
    }
  __syncthreads();
  multiply_all<T, T, B>(p.product, x, weights, first);
}

size_t product_shared_bytes(const Product& p, size_t element) {
  return static_cast<size_t>(p.batch) * static_cast<size_t>(p.width) * element + static_cast<size_t>(p.width) * sizeof(float);
}

/// Blocks for R rows of weight: no more than the GPU holds at a time.
dim3 product_grid(const Product& p, int rows, const CudaContext& cuda) {
  const int64_t wanted = (p.out_rows + kWarps * rows - 1) / (kWarps * rows);
  return dim3(static_cast<unsigned>(std::min<int64_t>(wanted, cuda.sm_count * 3)));
}

// Calls f(rows held at once, rows of weight of a warp, packs loaded ahead) as integral constants: eight packs a lane are under way.
template <class F>
void choose_product(const Product& p, int pack, const F& f) {
  const bool wide = p.width / pack > 4 * kWarp;
  auto with_batch = [&](auto b) {
    if (wide) f(b, std::integral_constant<int, 1>(), std::integral_constant<int, 8>());
    else f(b, std::integral_constant<int, 2>(), std::integral_constant<int, 4>());
  };
  if (p.batch == 1) return with_batch(std::integral_constant<int, 1>());
  if (p.batch <= 4) return with_batch(std::integral_constant<int, 4>());
  with_batch(std::integral_constant<int, static_cast<int>(kTokenStepRows)>());
}

template <class T, class Out>
void launch_norm(const NormArgs& args, const CudaContext& cuda) {
  choose_product(args.product, 16 / static_cast<int>(sizeof(T)), [&](auto batch, auto rows, auto ahead) {
    launch_overlapping(&norm_projection_kernel<T, Out, batch(), rows(), ahead()>, "norm_projection_kernel",
                       product_grid(args.product, rows(), cuda), kThreads, product_shared_bytes(args.product, sizeof(T)), cuda, args);
  });
}

template <class T>
void launch_gate(const GateArgs& args, const CudaContext& cuda) {
  choose_product(args.product, 16 / static_cast<int>(sizeof(T)), [&](auto batch, auto rows, auto ahead) {
    launch_overlapping(&gated_projection_kernel<T, batch(), rows(), ahead()>, "gated_projection_kernel",
                       product_grid(args.product, rows(), cuda), kThreads, product_shared_bytes(args.product, sizeof(T)), cuda, args);
  });
}

Product product_of(const Tensor& weight, const Tensor& out) {
  return {weight.raw(), out.raw(), weight.dim(0), static_cast<int>(weight.dim(1)), static_cast<int>(out.dim(0))};
}

// --- the middle of a Mamba-2 layer ------------------------------------------------------------------------------

constexpr int kTokenThreads = 128, kTokenWarps = kTokenThreads / kWarp, kTokenChannels = 16, kChannelsOfWarp = kTokenChannels / kTokenWarps;

struct Mamba2Args {
  const void *projected, *window;
  const float *conv_weight, *conv_bias, *A_log, *D_skip, *dt_bias;
  float* state;
  void* y;
  int64_t projected_stride;
  float dt_min, dt_max;
  int heads, headdim, d_state, groups, width, channels;  // width W, channels C
  bool skip_per_channel;
};

template <class T, int quads>  // 128 entries of N a warp holds in a quad a lane
__global__ void __launch_bounds__(kTokenThreads) mamba2_token_kernel(Mamba2Args p) {
  let_next_kernel_start();
  constexpr int kMostInputs = (kTokenChannels + 2 * quads * 128 + kTokenThreads - 1) / kTokenThreads;
  __shared__ float inputs[kTokenChannels + 2 * quads * 128];  // after the convolution: x, B, C
  const int h = static_cast<int>(blockIdx.y), part = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.z;
  const int warp = thread / kWarp, lane = thread % kWarp, N = p.d_state, group = h / (p.heads / p.groups), inner = p.heads * p.headdim;
  const int count = kTokenChannels + 2 * N;
  auto channel_of = [&](int i) {  // of the convolution
    if (i < kTokenChannels) return h * p.headdim + part * kTokenChannels + i;
    i -= kTokenChannels;
    return i < N ? inner + group * N + i : inner + p.groups * N + group * N + i - N;
  };

  // What no kernel of this token has written.
  float pre[kMostInputs], last_tap[kMostInputs];
#pragma unroll
  for (int k = 0; k < kMostInputs; ++k) {
    const int i = thread + k * kTokenThreads;
    if (i >= count) break;
    const int c = channel_of(i);
    const float* weight = p.conv_weight + static_cast<int64_t>(c) * p.width;
    const T* window = static_cast<const T*>(p.window) + b * (p.width - 1) * p.channels + c;
    pre[k] = p.conv_bias != nullptr ? p.conv_bias[c] : 0.0f;
    for (int j = 0; j + 1 < p.width; ++j) pre[k] = fmaf(weight[j], to_f32(window[static_cast<int64_t>(j) * p.channels]), pre[k]);
    last_tap[k] = weight[p.width - 1];
  }
  Pack<float, 4> state[kChannelsOfWarp][quads];
  const int first = part * kTokenChannels + warp * kChannelsOfWarp;  // channel of the head
  float* const states = p.state + ((b * p.heads + h) * p.headdim + first) * N;
#pragma unroll
  for (int i = 0; i < kChannelsOfWarp; ++i)
#pragma unroll
    for (int q = 0; q < quads; ++q)
      if (const int n = (q * kWarp + lane) * 4; n < N) state[i][q] = load_pack<4>(states + i * N + n);

  wait_for_kernel_in_front();
  const T* projected = static_cast<const T*>(p.projected) + b * p.projected_stride;
#pragma unroll
  for (int k = 0; k < kMostInputs; ++k) {
    const int i = thread + k * kTokenThreads;
    if (i >= count) break;
    const float out = silu(fmaf(last_tap[k], to_f32(projected[inner + channel_of(i)]), pre[k]));
    inputs[i] = to_f32(static_cast<T>(out));  // rounded where the convolution by itself rounds
  }
  const float dt = fminf(fmaxf(softplus(to_f32(projected[inner + p.channels + h]) + p.dt_bias[h]), p.dt_min), p.dt_max);
  const float decay = expf(-expf(p.A_log[h]) * dt);
  __syncthreads();
  const float *B = inputs + kTokenChannels, *C = B + N;
#pragma unroll
  for (int i = 0; i < kChannelsOfWarp; ++i) {
    const float x = inputs[warp * kChannelsOfWarp + i], added = dt * x;
    float y = 0;
#pragma unroll
    for (int q = 0; q < quads; ++q) {
      const int n = (q * kWarp + lane) * 4;
      if (n >= N) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        state[i][q].at[j] = fmaf(decay, state[i][q].at[j], added * B[n + j]);
        y = fmaf(state[i][q].at[j], C[n + j], y);
      }
      store_pack(states + i * N + n, state[i][q]);
    }
    y = warp_sum(y);
    const int c = h * p.headdim + first + i;
    if (lane == 0) static_cast<T*>(p.y)[b * inner + c] = static_cast<T>(fmaf(p.D_skip[p.skip_per_channel ? c : h], x, y));
  }
}

template <class T>
__global__ void shift_window_kernel(T* window, const T* now, int64_t now_stride, int64_t batch, int taps, int64_t channels) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= batch * channels) return;
  const int64_t b = i / channels, c = i - b * channels;
  move_window(window + b * taps * channels + c, now + b * now_stride + c, taps, channels);
}

}  // namespace

void norm_projection_cuda(const NormProjection& p) {
  if (p.out.numel() == 0) return;
  const CudaContext& cuda = p.weight.device().cuda_context();
  const NormArgs args{product_of(p.weight, p.out),         p.residual.data<float>(), p.norm.data<float>(),
                      p.branch ? p.branch.raw() : nullptr, p.sum.data<float>(),      static_cast<float>(p.eps)};
  const bool wide_out = p.out.dtype() == Dtype::f32;
  if (p.weight.dtype() == Dtype::f32) launch_norm<float, float>(args, cuda);
  else if (wide_out) launch_norm<__nv_bfloat16, float>(args, cuda);
  else launch_norm<__nv_bfloat16, __nv_bfloat16>(args, cuda);
}

void gated_projection_cuda(const GatedProjection& p) {
  if (p.out.numel() == 0) return;
  const CudaContext& cuda = p.weight.device().cuda_context();
  const bool moves = p.window && p.window.dim(1) > 0;
  const GateArgs args{product_of(p.weight, p.out),
                      p.y.raw(),
                      p.z.raw(),
                      p.z.stride(0),
                      p.norm ? p.norm.data<float>() : nullptr,
                      static_cast<float>(p.eps),
                      static_cast<int>(p.norm ? p.groups : 1),
                      p.norm_before_gate,
                      moves ? p.window.raw() : nullptr,
                      moves ? p.now.raw() : nullptr,
                      moves ? p.now.stride(0) : 0,
                      moves ? static_cast<int>(p.window.dim(1)) : 0,
                      moves ? static_cast<int>(p.window.dim(2)) : 0};
  if (p.weight.dtype() == Dtype::f32) launch_gate<float>(args, cuda);
  else launch_gate<__nv_bfloat16>(args, cuda);
}

void mamba2_token_cuda(const Mamba2Token& p) {
  if (p.state.numel() == 0) return;
  const CudaContext& cuda = p.state.device().cuda_context();
  const auto B = static_cast<unsigned>(p.state.dim(0)), H = static_cast<unsigned>(p.state.dim(1));
  const int headdim = static_cast<int>(p.state.dim(2)), d_state = static_cast<int>(p.state.dim(3));
  const Mamba2Args args{p.projected.raw(),
                        p.window.raw(),
                        p.conv_weight.data<float>(),
                        p.conv_bias ? p.conv_bias.data<float>() : nullptr,
                        p.A_log.data<float>(),
                        p.D_skip.data<float>(),
                        p.dt_bias.data<float>(),
                        p.state.data<float>(),
                        p.y.raw(),
                        p.projected.stride(0),
                        static_cast<float>(p.dt_min),
                        static_cast<float>(p.dt_max),
                        static_cast<int>(H),
                        headdim,
                        d_state,
                        static_cast<int>(p.groups),
                        static_cast<int>(p.conv_weight.dim(2)),
                        static_cast<int>(p.conv_weight.dim(0)),
                        p.D_skip.rank() == 2};
  const dim3 grid(static_cast<unsigned>(headdim / kTokenChannels), H, B);
  const auto start = [&](auto kernel) { launch_overlapping(kernel, "mamba2_token_kernel", grid, kTokenThreads, 0, cuda, args); };
  const bool narrow = d_state <= 128;
  if (p.projected.dtype() == Dtype::f32) narrow ? start(&mamba2_token_kernel<float, 1>) : start(&mamba2_token_kernel<float, 2>);
  else narrow ? start(&mamba2_token_kernel<__nv_bfloat16, 1>) : start(&mamba2_token_kernel<__nv_bfloat16, 2>);
}

void shift_window_cuda(const Tensor& window, const Tensor& now) {
  if (window.numel() == 0) return;
  const CudaContext& cuda = window.device().cuda_context();
  const int64_t batch = window.dim(0), channels = window.dim(2);
  const dim3 grid(static_cast<unsigned>((batch * channels + kThreads - 1) / kThreads));
  const auto start = [&](auto element) {
    using T = decltype(element);
    shift_window_kernel<T><<<grid, kThreads, 0, cuda.stream>>>(static_cast<T*>(window.raw()), static_cast<const T*>(now.raw()),
                                                               now.stride(0), batch, static_cast<int>(window.dim(1)), channels);
  };
  window.dtype() == Dtype::f32 ? start(0.0f) : start(__nv_bfloat16());
  launch_check("shift_window_kernel", grid, kThreads);
}

}  // namespace longhand
