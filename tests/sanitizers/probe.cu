// What compute-sanitizer says of kernels that are sound, and of others that are not: how far its reports about this code's kernels can be
// believed. docs/trust.md has the answers.
//   nvcc -gencode arch=compute_90a,code=sm_90a -O3 -lineinfo -o probe tests/sanitizers/probe.cu
//   compute-sanitizer --tool racecheck ./probe handed          NAME is one of those below
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

constexpr int kWarp = 32, kFloats = 256;

__device__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
__device__ void named_barrier(int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// Sound: two warps meet at a named barrier, each in a branch of its own; the third has left. As in ssd_chunk_bwd_warpgroups_kernel.
__global__ void branches_meet(float* out) {
  __shared__ float x[2 * kWarp];
  const int i = static_cast<int>(threadIdx.x), warp = i / kWarp;
  if (warp == 2) return;
  x[i] = static_cast<float>(i);
  if (warp == 0) {
    named_barrier(2 * kWarp);
    out[i] = 2 * x[i + kWarp];
  } else {
    named_barrier(2 * kWarp);
    out[i] = 3 * x[i - kWarp];
  }
}

// One warp writes and arrives at a barrier in shared memory, another waits there and reads. Sound when every lane arrives, and when one
// arrives for all behind a __syncwarp; not sound without that.
template <bool in_step, bool every_lane>
__global__ void hand_over(float* out) {
  __shared__ float x[kWarp];
  __shared__ uint64_t barrier;
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(every_lane ? kWarp : 1) : "memory");
  __syncthreads();
  if (i < kWarp) {
    x[i] = static_cast<float>(i);
    if (in_step) __syncwarp();
    if (every_lane || i == 0)
      asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(&barrier)) : "memory");
  } else {
    asm volatile(
        "{\n .reg .pred done;\n"
        "again:\n mbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n @done bra over;\n bra again;\n"
        "over:\n}" ::"r"(shared_address(&barrier))
        : "memory");
    out[i - kWarp] = x[2 * kWarp - 1 - i];
  }
}

// Sound: global memory written by a bulk copy out of shared memory, as cuBLAS writes its products on sm_90.
__global__ void write_in_bulk(float* to) {
  __shared__ __align__(128) float x[kFloats];
  x[threadIdx.x] = static_cast<float>(threadIdx.x);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0)
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;\n"
        "cp.async.bulk.commit_group;\n"
        "cp.async.bulk.wait_group 0;" ::"l"(to),
        "r"(shared_address(x))
        : "memory");
}
__global__ void write_one_by_one(float* to) {
  to[threadIdx.x] = static_cast<float>(threadIdx.x);
}
__global__ void read(const float* from, float* out) {
  out[threadIdx.x] = from[threadIdx.x] + 1;
}

// Sound: a graph in which one node writes and the next reads.
template <class Write>
void in_a_graph(Write&& write, const float* x, float* y) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
  write(stream);
  read<<<1, kFloats, 0, stream>>>(x, y);
  cudaStreamEndCapture(stream, &graph);
  cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphLaunch(executable, stream);
  cudaStreamSynchronize(stream);
}

// Sound: three left operands of products of a warpgroup (wgmma) in registers, used six times each, every product waited for before the
// next. With 62 registers a thread the compiler lays two of them below R24 (cuobjdump -sass: HGMMA .. R24, R8, ..), with 128 none.
constexpr int kWarpgroup = 128, kOperands = 3, kTimes = 6, kSums = 32;  // a thread's of 64 x 64
template <int registers>
__global__ void __maxnreg__(registers) multiply(const uint32_t* left, float* out) {
  __shared__ __align__(1024) uint16_t right[16 * 64];  // ones, in whatever order
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 16 * 64; i += kWarpgroup) right[i] = 0x3f80;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const uint64_t b = (shared_address(right) >> 4 & 0x3fff) | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
  float acc[kSums] = {};
  uint32_t a[kOperands][4];
#pragma unroll
  for (int n = 0; n < kOperands; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[n][i] = left[(n * 4 + i) * kWarpgroup + thread];
#pragma unroll
  for (int t = 0; t < kTimes; ++t)
#pragma unroll
    for (int n = 0; n < kOperands; ++n) {
#define FOUR(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
      asm volatile(
          "wgmma.fence.sync.aligned;\n"
          "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;\n"
          "wgmma.commit_group.sync.aligned;\n"
          "wgmma.wait_group.sync.aligned 0;"
          : FOUR(0), FOUR(4), FOUR(8), FOUR(12), FOUR(16), FOUR(20), FOUR(24), FOUR(28)
          : "r"(a[n][0]), "r"(a[n][1]), "r"(a[n][2]), "r"(a[n][3]), "l"(b)
          : "memory");
#undef FOUR
    }
#pragma unroll
  for (int i = 0; i < kSums; ++i) out[i * kWarpgroup + thread] = acc[i];
}
}  // namespace

int main(int count, char** words) {
  const auto is = [&](const char* name) { return count == 2 && std::strcmp(words[1], name) == 0; };
  constexpr int kMost = kSums * kWarpgroup;
  static float result[kMost];
  float *x = nullptr, *y = nullptr;
  cudaMalloc(&x, sizeof result);
  cudaMalloc(&y, sizeof result);
  uint32_t ones[kOperands * 4 * kWarpgroup], *left = nullptr;  // all operands are ones: every sum is 16 of each product
  for (uint32_t& two : ones) two = 0x3f803f80;
  cudaMalloc(&left, sizeof ones);
  cudaMemcpy(left, ones, sizeof ones, cudaMemcpyHostToDevice);
  const bool multiplies = is("operands-low") || is("operands-high");
  if (is("operands-low")) multiply<62><<<1, kWarpgroup>>>(left, y);
  else if (is("operands-high")) multiply<128><<<1, kWarpgroup>>>(left, y);
  else if (is("branches")) branches_meet<<<1, 3 * kWarp>>>(y);
  else if (is("handed")) hand_over<true, false><<<1, 2 * kWarp>>>(y);
  else if (is("handed-by-all")) hand_over<true, true><<<1, 2 * kWarp>>>(y);
  else if (is("handed-unsound")) hand_over<false, false><<<1, 2 * kWarp>>>(y);
  else if (is("bulk")) write_in_bulk<<<1, kFloats>>>(x);
  else if (is("plain")) write_one_by_one<<<1, kFloats>>>(x);
  else if (is("filled")) cudaMemset(x, 0, sizeof result);
  else if (is("graph-plain")) in_a_graph([&](cudaStream_t s) { write_one_by_one<<<1, kFloats, 0, s>>>(x); }, x, y);
  else if (is("graph-filled")) in_a_graph([&](cudaStream_t s) { cudaMemsetAsync(x, 0, sizeof result, s); }, x, y);
  else if (is("graph-filled-rows")) in_a_graph([&](cudaStream_t s) { cudaMemset2DAsync(x, 128, 0, 128, sizeof result / 128, s); }, x, y);
  else if (is("graph-copied"))
    in_a_graph([&](cudaStream_t s) { cudaMemcpyAsync(x, left, sizeof ones, cudaMemcpyDeviceToDevice, s); }, x, y);
  else if (!is("unwritten"))
    return std::fprintf(stderr,
                        "usage: probe branches|handed|handed-by-all|handed-unsound|bulk|plain|filled|unwritten|graph-plain|graph-filled|"
                        "graph-filled-rows|graph-copied|operands-low|operands-high\n"),
           2;
  if (is("bulk") || is("plain") || is("filled") || is("unwritten")) read<<<1, kFloats>>>(x, y);
  const std::size_t count_out = multiplies ? kMost : kFloats;
  const cudaError_t status = cudaMemcpy(result, y, count_out * sizeof(float), cudaMemcpyDeviceToHost);
  std::printf("%s: %s, %g %g\n", words[1], cudaGetErrorString(status), result[0], result[kWarp - 1]);
  int wrong = 0;
  for (float sum : result) wrong += sum != 16.0f * kOperands * kTimes;
  if (multiplies) std::printf("%d of %d sums wrong\n", wrong, kMost);
  return status == cudaSuccess && !(multiplies && wrong > 0) ? 0 : 1;
}
