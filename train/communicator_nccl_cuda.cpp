// Processes with a GPU each, joined by NCCL. Its calls run on a queue of their own beside the device's, tied to it by events, so that
// reductions overlap with backward; recorded, the two become branches of one graph. What concerns the host goes to the communicator that
// joined the processes. See communicator.h.
#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <cstdio>
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
  NcclProcesses(Communicator& host, const Device& device)
      : Communicator(host.size(), host.rank()), host_(&host), cuda_(device.cuda_context()) {
    try {
      connect();
    } catch (...) {
      release(true);
      throw;
    }
  }
  ~NcclProcesses() override { release(std::uncaught_exceptions() > 0); }
  void keep(std::unique_ptr<Communicator> host) { owned_ = std::move(host); }

  std::string describe() const override {
    int version = 0;
    (void)ncclGetVersion(&version);
    return fmt::format("{} process{}, NCCL {}.{}.{}", size(), size() == 1 ? "" : "es", version / 10000, version / 100 % 100, version % 100);
  }

  void begin_overlap() override { overlap_ = true; }
  void end_overlap() override { overlap_ = false; }
  void join() override {
    cuda_check(cudaEventRecord(after_, queue_), "cudaEventRecord");
    cuda_check(cudaStreamWaitEvent(cuda_.stream, after_, 0), "cudaStreamWaitEvent");
  }

  void all_reduce_sum(const Tensor& t) override {
    if (!on_gpu(t)) return host_->all_reduce_sum(t);
    queued([&] {
      check(ncclAllReduce(t.raw(), t.raw(), static_cast<size_t>(t.numel()), sum_type_of(t), ncclSum, nccl_, queue_), "ncclAllReduce");
    });
  }

  void reduce_scatter_sum(const Tensor& t, int64_t unit) override {
    if (!on_gpu(t)) return host_->reduce_scatter_sum(t, unit);
    const std::vector<int64_t> at = cuts(t.numel(), unit);
    queued([&] {
      if (equal(at)) {
        check(ncclReduceScatter(t.raw(), place(t, own(t.numel(), unit).begin), static_cast<size_t>(at[1]), sum_type_of(t), ncclSum, nccl_,
                                queue_),
              "ncclReduceScatter");
        return;
      }
      grouped([&] {
        each_part(at, [&](int root, int64_t begin, int64_t n) {
          check(ncclReduce(place(t, begin), place(t, begin), static_cast<size_t>(n), sum_type_of(t), ncclSum, root, nccl_, queue_),
                "ncclReduce");
        });
      });
    });
  }

  void all_gather(const Tensor& whole, std::span<const int64_t> at) override {
    if (!on_gpu(whole)) return host_->all_gather(whole, at);
    queued([&] { grouped([&] { gather_one(whole, at); }); });
  }

  void as_one(const std::function<void()>& calls) override {
    queued([&] {
      as_one_ = true;
      const auto after = std::unique_ptr<bool, void (*)(bool*)>(&as_one_, [](bool* flag) { *flag = false; });
      grouped(calls);
    });
  }

  void broadcast(const Tensor& whole, int64_t root) override {
    if (!on_gpu(whole)) return host_->broadcast(whole, root);
    const auto bytes = static_cast<size_t>(whole.numel() * size_of(whole.dtype()));
    queued(
        [&] { check(ncclBroadcast(whole.raw(), whole.raw(), bytes, ncclUint8, static_cast<int>(root), nccl_, queue_), "ncclBroadcast"); });
  }

  Tensor gather(const Tensor& part) override { return host_->gather(part); }
  std::vector<std::string> all_texts(const std::string& own_text) override { return host_->all_texts(own_text); }
  int64_t all_reduce_max(int64_t value) override { return host_->all_reduce_max(value); }
  void barrier() override { host_->barrier(); }

  void require_links() override {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(nccl_, &state);
    if (asked != ncclSuccess) state = asked;
    if (state == ncclSuccess || state == ncclInProgress) return;
    fmt::print(stderr,
               "error: nccl: the link to another process is broken\n  reason  {}\n  last    {}\n  try     look for the process that ended "
               "first; longhand train --resume goes on from the last checkpoint\nprocess {} of {} ends the run\n",
               ncclGetErrorString(state), ncclGetLastError(nccl_), rank(), size());
    std::fflush(nullptr);
    abort(1);
  }

 protected:
  void end_all(int code) override { end_all_of(*host_, code); }

 private:
  void connect() {
    cuda_check(cudaSetDevice(cuda_.index), "cudaSetDevice");
    ncclUniqueId id{};
    if (leads()) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
    const Tensor shared = Tensor::empty(Device::cpu(), Dtype::u8, {static_cast<int64_t>(sizeof id)});
    std::memcpy(shared.raw(), &id, sizeof id);
    host_->broadcast(shared, 0);
    std::memcpy(&id, shared.raw(), sizeof id);
    check(ncclCommInitRank(&nccl_, static_cast<int>(size()), id, static_cast<int>(rank())), "ncclCommInitRank");
    int least = 0, greatest = 0;  // reductions go first: the kernels beside them are many, and fill what is left
    cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    cuda_check(cudaStreamCreateWithPriority(&queue_, cudaStreamNonBlocking, greatest), "cudaStreamCreateWithPriority");
    for (cudaEvent_t* event : {&before_, &after_})
      cuda_check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }

  // abort  the others may be gone
  void release(bool abort) {
    if (!abort) (void)cudaStreamSynchronize(cuda_.stream);
    if (nccl_ != nullptr) (void)(abort ? ncclCommAbort(nccl_) : ncclCommDestroy(nccl_));
    if (queue_ != nullptr) (void)cudaStreamDestroy(queue_);
    for (const cudaEvent_t event : {before_, after_})
      if (event != nullptr) (void)cudaEventDestroy(event);
  }

  // Calls that NCCL runs together. An exception inside leaves no group open, into which everything later would fall.
  template <class F>
  static void grouped(F&& f) {
    check(ncclGroupStart(), "ncclGroupStart");
    try {
      f();
    } catch (...) {
      (void)ncclGroupEnd();
      throw;
    }
    check(ncclGroupEnd(), "ncclGroupEnd");
  }

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

  // f queues calls on queue_, behind what the device's queue holds now.
  template <class F>
  void queued(F&& f) {
    if (as_one_) return f();
    cuda_check(cudaEventRecord(before_, cuda_.stream), "cudaEventRecord");
    cuda_check(cudaStreamWaitEvent(queue_, before_, 0), "cudaStreamWaitEvent");
    f();
    if (!overlap_) join();
  }

  void gather_one(const Tensor& whole, std::span<const int64_t> at) {
    const int64_t row = whole.numel() / std::max<int64_t>(whole.dim(0), 1), bytes = row * size_of(whole.dtype());
    if (equal(at)) {
      check(ncclAllGather(place(whole, at[static_cast<size_t>(rank())] * row), whole.raw(), static_cast<size_t>(at[1] * bytes), ncclUint8,
                          nccl_, queue_),
            "ncclAllGather");
      return;
    }
    each_part(at, [&](int root, int64_t begin, int64_t n) {
      void* part = place(whole, begin * row);
      check(ncclBroadcast(part, part, static_cast<size_t>(n * bytes), ncclUint8, root, nccl_, queue_), "ncclBroadcast");
    });
  }

  // Parts of different sizes: one call a part, inside a group that NCCL runs together.
  template <class F>
  static void each_part(std::span<const int64_t> at, F&& f) {
    for (size_t p = 0; p + 1 < at.size(); ++p)
      if (at[p + 1] > at[p]) f(static_cast<int>(p), at[p], at[p + 1] - at[p]);
  }

  Communicator* host_;
  std::unique_ptr<Communicator> owned_;  // host_, once this stands
  const CudaContext& cuda_;
  ncclComm_t nccl_ = nullptr;
  cudaStream_t queue_ = nullptr;
  cudaEvent_t before_ = nullptr, after_ = nullptr;
  bool overlap_ = false, as_one_ = false;
};

}  // namespace

std::unique_ptr<Communicator> nccl_processes(std::unique_ptr<Communicator>& host, const Device& device) {
  auto processes = std::make_unique<NcclProcesses>(*host, device);
  processes->keep(std::move(host));
  return processes;
}

std::string nccl_gpu_identity(int index) {
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  std::string text = "GPU-";
  for (const char byte : properties.uuid.bytes) text += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  return text;
}

}  // namespace longhand
