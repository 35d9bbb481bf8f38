// Processes with a GPU each, joined by NCCL on the device's own queue, so that its calls are recorded in the graph of a step like any
// kernel. What concerns the host goes to the communicator that joined the processes. See communicator.h.
#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <cstring>

#include "core/cuda_context.h"
#include "core/error.h"
#include "train/communicator.h"

namespace longhand {
namespace {

void check(ncclResult_t status, const char* call) {
  if (status != ncclSuccess)
    throw DeviceError("nccl: a call failed", {{"call", call}, {"reason", ncclGetErrorString(status)}, {"last", ncclGetLastError(nullptr)}});
}

ncclDataType_t sum_type_of(const Tensor& t) {
  if (t.dtype() == Dtype::f32) return ncclFloat32;
  if (t.dtype() == Dtype::f64) return ncclFloat64;
  throw DtypeError("nccl: sums are taken of f32 or f64", {{"tensor", t.describe()}});
}

class NcclProcesses final : public Communicator {
 public:
  NcclProcesses(std::unique_ptr<Communicator> host, const Device& device)
      : Communicator(host->size(), host->rank()), host_(std::move(host)), cuda_(device.cuda_context()) {
    cuda_check(cudaSetDevice(cuda_.index), "cudaSetDevice");
    ncclUniqueId id{};
    if (leads()) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
    const Tensor shared = Tensor::empty(Device::cpu(), Dtype::u8, {static_cast<int64_t>(sizeof id)});
    std::memcpy(shared.raw(), &id, sizeof id);
    host_->broadcast(shared, 0);
    std::memcpy(&id, shared.raw(), sizeof id);
    check(ncclCommInitRank(&nccl_, static_cast<int>(size()), id, static_cast<int>(rank())), "ncclCommInitRank");
  }
  ~NcclProcesses() override {
    if (nccl_ == nullptr) return;
    if (std::uncaught_exceptions() > 0) {
      (void)ncclCommAbort(nccl_);  // the others may be gone
    } else {
      (void)cudaStreamSynchronize(cuda_.stream);
      (void)ncclCommDestroy(nccl_);
    }
  }
  std::string describe() const override {
    int version = 0;
    (void)ncclGetVersion(&version);
    return fmt::format("{} process{}, NCCL {}.{}.{}", size(), size() == 1 ? "" : "es", version / 10000, version / 100 % 100, version % 100);
  }

  void all_reduce_sum(const Tensor& t) override {
    if (!on_gpu(t)) return host_->all_reduce_sum(t);
    check(ncclAllReduce(t.raw(), t.raw(), static_cast<size_t>(t.numel()), sum_type_of(t), ncclSum, nccl_, cuda_.stream), "ncclAllReduce");
  }

  void reduce_scatter_sum(const Tensor& t, int64_t unit) override {
    if (!on_gpu(t)) return host_->reduce_scatter_sum(t, unit);
    const std::vector<int64_t> at = cuts(t.numel(), unit);
    if (equal(at)) {
      check(ncclReduceScatter(t.raw(), place(t, own(t.numel(), unit).begin), static_cast<size_t>(at[1]), sum_type_of(t), ncclSum, nccl_,
                              cuda_.stream),
            "ncclReduceScatter");
      return;
    }
    each_part(at, [&](int root, int64_t begin, int64_t n) {
      check(ncclReduce(place(t, begin), place(t, begin), static_cast<size_t>(n), sum_type_of(t), ncclSum, root, nccl_, cuda_.stream),
            "ncclReduce");
    });
  }

  void all_gather(const Tensor& whole, std::span<const int64_t> at) override {
    if (!on_gpu(whole)) return host_->all_gather(whole, at);
    const int64_t row = whole.numel() / std::max<int64_t>(whole.dim(0), 1);
    if (equal(at)) {
      const int64_t bytes = at[1] * row * size_of(whole.dtype());
      check(ncclAllGather(place(whole, at[static_cast<size_t>(rank())] * row), whole.raw(), static_cast<size_t>(bytes), ncclUint8, nccl_,
                          cuda_.stream),
            "ncclAllGather");
      return;
    }
    each_part(at, [&](int root, int64_t begin, int64_t n) {
      void* part = place(whole, begin * row);
      check(ncclBroadcast(part, part, static_cast<size_t>(n * row * size_of(whole.dtype())), ncclUint8, root, nccl_, cuda_.stream),
            "ncclBroadcast");
    });
  }

  void broadcast(const Tensor& whole, int64_t root) override {
    if (!on_gpu(whole)) return host_->broadcast(whole, root);
    const auto bytes = static_cast<size_t>(whole.numel() * size_of(whole.dtype()));
    check(ncclBroadcast(whole.raw(), whole.raw(), bytes, ncclUint8, static_cast<int>(root), nccl_, cuda_.stream), "ncclBroadcast");
  }

  Tensor gather(const Tensor& part) override { return host_->gather(part); }
  std::vector<std::string> all_texts(const std::string& own_text) override { return host_->all_texts(own_text); }
  int64_t all_reduce_max(int64_t value) override { return host_->all_reduce_max(value); }
  void barrier() override { host_->barrier(); }

 protected:
  void end_all(int code) override { end_all_of(*host_, code); }

 private:
  static bool on_gpu(const Tensor& t) {
    if (t.device().is_cuda() && !t.is_contiguous()) throw ShapeError("nccl: a contiguous tensor is needed", {{"tensor", t.describe()}});
    return t.device().is_cuda();
  }
  static bool equal(std::span<const int64_t> at) {
    for (size_t p = 1; p + 1 < at.size(); ++p)
      if (at[p + 1] - at[p] != at[1]) return false;
    return true;
  }
  static void* place(const Tensor& t, int64_t element) { return static_cast<char*>(t.raw()) + element * size_of(t.dtype()); }

  // Parts of different sizes: one call a part, which NCCL runs together.
  template <class F>
  void each_part(std::span<const int64_t> at, F&& f) {
    check(ncclGroupStart(), "ncclGroupStart");
    for (size_t p = 0; p + 1 < at.size(); ++p)
      if (at[p + 1] > at[p]) f(static_cast<int>(p), at[p], at[p + 1] - at[p]);
    check(ncclGroupEnd(), "ncclGroupEnd");
  }

  std::unique_ptr<Communicator> host_;
  const CudaContext& cuda_;
  ncclComm_t nccl_ = nullptr;
};

}  // namespace

std::unique_ptr<Communicator> nccl_processes(std::unique_ptr<Communicator> host, const Device& device) {
  return std::make_unique<NcclProcesses>(std::move(host), device);
}

}  // namespace longhand
