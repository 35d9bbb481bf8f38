// What compute-sanitizer says of kernels that are sound, and of others that are not: how far its reports about this code's kernels can be
// believed. docs/trust.md has the answers.
//   nvcc -arch=sm_90a -O3 -lineinfo -o probe tests/sanitizers/probe.cu
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

}  // namespace

int main(int count, char** words) {
  const auto is = [&](const char* name) { return count == 2 && std::strcmp(words[1], name) == 0; };
  float *x = nullptr, *y = nullptr, result[kFloats] = {};
  cudaMalloc(&x, sizeof result);
  cudaMalloc(&y, sizeof result);
  if (is("branches")) branches_meet<<<1, 3 * kWarp>>>(y);
  else if (is("handed")) hand_over<true, false><<<1, 2 * kWarp>>>(y);
  else if (is("handed-by-all")) hand_over<true, true><<<1, 2 * kWarp>>>(y);
  else if (is("handed-unsound")) hand_over<false, false><<<1, 2 * kWarp>>>(y);
  else if (is("bulk")) write_in_bulk<<<1, kFloats>>>(x);
  else if (is("plain")) write_one_by_one<<<1, kFloats>>>(x);
  else if (!is("unwritten"))
    return std::fprintf(stderr, "usage: probe branches|handed|handed-by-all|handed-unsound|bulk|plain|unwritten\n"), 2;
  if (is("bulk") || is("plain") || is("unwritten")) read<<<1, kFloats>>>(x, y);
  const cudaError_t status = cudaMemcpy(result, y, sizeof result, cudaMemcpyDeviceToHost);
  std::printf("%s: %s, %g %g\n", words[1], cudaGetErrorString(status), result[0], result[kWarp - 1]);
  return status == cudaSuccess ? 0 : 1;
}
