// Elementwise copy, fill and accumulate on a GPU for any strides; see tensor.h.
// moves   every element once in and once out; contiguous tensors take a path without index arithmetic
// order   elementwise: the same bits always
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/cuda_context.h"
#include "core/error.h"
#include "core/tensor_kernels.h"

namespace longhand {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ float to_float(T v) {
  return static_cast<float>(v);
}
template <class To, class From>
__device__ To convert(From v) {
  if constexpr (std::is_same_v<To, From>) return v;
  else if constexpr (std::is_integral_v<To>) return static_cast<To>(v);
  else return static_cast<To>(to_float(v));
}

struct Layout {
  int64_t size[Shape::kMaxRank], dst[Shape::kMaxRank], src[Shape::kMaxRank];
  int rank;
  bool plain;  // both contiguous
};

Layout layout_of(const Tensor& dst, const Tensor& src) {
  Layout l{};
  l.rank = dst.rank();
  l.plain = dst.is_contiguous() && src.is_contiguous();
  for (int i = 0; i < l.rank; ++i) l.size[i] = dst.dim(i), l.dst[i] = dst.stride(i), l.src[i] = src.stride(i);
  return l;
}

__device__ void offsets(const Layout& l, int64_t i, int64_t& d, int64_t& s) {
  if (l.plain) {
    d = s = i;
    return;
  }
  d = s = 0;
  for (int axis = l.rank - 1; axis >= 0; --axis) {
    const int64_t at = i % l.size[axis];
    i /= l.size[axis];
    d += at * l.dst[axis];
    s += at * l.src[axis];
  }
}

template <class To, class From, class F>
__global__ void elementwise_kernel(To* dst, const From* src, Layout layout, int64_t n, F f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    int64_t d, s;
    offsets(layout, i, d, s);
    f(dst[d], src[s]);
  }
}

template <class To, class From, class F>
void launch(const Tensor& dst, const Tensor& src, F f) {
  const CudaContext& cuda = dst.device().cuda_context();
  const int64_t n = dst.numel();
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((n + kThreads - 1) / kThreads, cuda.sm_count * 32)));
  elementwise_kernel<<<grid, kThreads, 0, cuda.stream>>>(static_cast<To*>(dst.raw()), static_cast<const From*>(src.raw()),
                                                         layout_of(dst, src), n, f);
  launch_check("elementwise_kernel", grid, kThreads);
}

// The elementwise functions; structs because a kernel's template argument must have a name.
struct Assign {
  template <class To, class From>
  __device__ void operator()(To& d, From s) const {
    d = convert<To>(s);
  }
};
struct Fill {
  double value;
  template <class To, class From>
  __device__ void operator()(To& d, From) const {
    d = convert<To>(value);
  }
};
struct AddScaled {
  float scale;
  template <class To, class From>
  __device__ void operator()(To& d, From s) const {
    d = convert<To>(to_float(d) + scale * to_float(s));
  }
};
struct Multiply {
  float scale;
  template <class To, class From>
  __device__ void operator()(To& d, From) const {
    d = convert<To>(to_float(d) * scale);
  }
};

// Runs f for the floating types a GPU tensor can have; the few pairs keep the build short.
template <class F>
void visit_float(const char* op, const Tensor& t, F&& f) {
  if (t.dtype() == Dtype::f32) return f(float{});
  if (t.dtype() == Dtype::bf16) return f(__nv_bfloat16{});
  if (t.dtype() == Dtype::f16) return f(__half{});
  throw DtypeError(std::string(op) + ": takes f32, bf16 or f16 on a GPU", {{"tensor", t.describe()}});
}

template <class F>
void run_pair(const char* op, const Tensor& dst, const Tensor& src, F f) {
  visit_float(op, dst, [&](auto to) { visit_float(op, src, [&](auto from) { launch<decltype(to), decltype(from)>(dst, src, f); }); });
}

template <class F>
void run_one(const char* op, const Tensor& dst, F f) {
  visit_float(op, dst, [&](auto to) { launch<decltype(to), decltype(to)>(dst, dst, f); });
}

}  // namespace

void copy_cuda(const Tensor& dst, const Tensor& src) {
  const CudaContext& cuda = dst.device().cuda_context();
  if (dst.dtype() != src.dtype()) return run_pair("copy", dst, src, Assign{});
  if (dst.is_contiguous() && src.is_contiguous()) {
    const auto bytes = static_cast<size_t>(dst.numel() * size_of(dst.dtype()));
    return cuda_check(cudaMemcpyAsync(dst.raw(), src.raw(), bytes, cudaMemcpyDeviceToDevice, cuda.stream), "cudaMemcpyAsync");
  }
  switch (size_of(dst.dtype())) {  // equal types: only the size matters
    case 8:
      return launch<uint64_t, uint64_t>(dst, src, Assign{});
    case 4:
      return launch<uint32_t, uint32_t>(dst, src, Assign{});
    case 2:
      return launch<uint16_t, uint16_t>(dst, src, Assign{});
    default:
      return launch<uint8_t, uint8_t>(dst, src, Assign{});
  }
}

void fill_cuda(const Tensor& dst, double value) {
  if (value == 0 && dst.is_contiguous()) {
    const auto bytes = static_cast<size_t>(dst.numel() * size_of(dst.dtype()));
    return cuda_check(cudaMemsetAsync(dst.raw(), 0, bytes, dst.device().cuda_context().stream), "cudaMemsetAsync");
  }
  switch (dst.dtype()) {
    case Dtype::i32:
      return launch<int32_t, int32_t>(dst, dst, Fill{value});
    case Dtype::i64:
      return launch<int64_t, int64_t>(dst, dst, Fill{value});
    case Dtype::u8:
      return launch<uint8_t, uint8_t>(dst, dst, Fill{value});
    case Dtype::f64:
      return launch<double, double>(dst, dst, Fill{value});
    default:
      return run_one("fill", dst, Fill{value});
  }
}

void add_scaled_cuda(const Tensor& dst, const Tensor& src, double scale) {
  run_pair("add_scaled", dst, src, AddScaled{static_cast<float>(scale)});
}

void multiply_cuda(const Tensor& dst, double scale) {
  run_one("multiply", dst, Multiply{static_cast<float>(scale)});
}

void transfer_cuda(const Tensor& dst, const Tensor& src) {
  const Tensor& on_gpu = dst.device().is_cuda() ? dst : src;
  const CudaContext& cuda = on_gpu.device().cuda_context();
  if (dst.device().is_cuda() && src.device().is_cuda()) src.device().synchronize();  // two GPUs: src's work is in another stream
  const auto bytes = static_cast<size_t>(dst.numel() * size_of(dst.dtype()));
  cuda_check(cudaMemcpyAsync(dst.raw(), src.raw(), bytes, cudaMemcpyDefault, cuda.stream), "cudaMemcpyAsync");
  // The host side is pageable memory that may go right after this call.
  cuda_check(cudaStreamSynchronize(cuda.stream), "cudaStreamSynchronize");
}

}  // namespace longhand
