// CUDA graphs by stream capture; see device_graph.h.
#include "core/allocator.h"
#include "core/cuda_context.h"
#include "core/device_graph.h"
#include "core/error.h"

namespace longhand {
namespace {

class CudaGraph final : public DeviceGraph {
 public:
  CudaGraph(const Device& device, cudaGraphExec_t executable, int64_t size, ReservedBlocks blocks)
      : device_(device), executable_(executable), size_(size), blocks_(std::move(blocks)) {}
  ~CudaGraph() override {
    (void)cudaStreamSynchronize(device_.cuda_context().stream);  // it may still be running
    (void)cudaGraphExecDestroy(executable_);
    device_.allocator().give_back(blocks_);
  }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  void replay() override { cuda_check(cudaGraphLaunch(executable_, device_.cuda_context().stream), "cudaGraphLaunch"); }
  int64_t size() const override { return size_; }

 private:
  Device device_;
  cudaGraphExec_t executable_;
  int64_t size_;
  ReservedBlocks blocks_;
};

// What is captured until end(), or until an exception passes by.
class Capture {
 public:
  explicit Capture(const Device& device) : device_(device) {
    device_.allocator().begin_reserving();
    // Relaxed: cudaMalloc is allowed on the way, as are other threads' calls.
    const cudaError_t begun = cudaStreamBeginCapture(stream(), cudaStreamCaptureModeRelaxed);
    open_ = begun == cudaSuccess;
    if (open_) return;
    device_.allocator().give_back(device_.allocator().end_reserving());
    cuda_check(begun, "cudaStreamBeginCapture");
  }
  ~Capture() {
    if (!open_) return;
    cudaGraph_t graph = nullptr;
    (void)cudaStreamEndCapture(stream(), &graph);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    device_.allocator().give_back(device_.allocator().end_reserving());
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  std::unique_ptr<DeviceGraph> end() {
    open_ = false;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    size_t nodes = 0;
    cudaError_t status = cudaStreamEndCapture(stream(), &graph);
    if (status == cudaSuccess) status = cudaGraphGetNodes(graph, nullptr, &nodes);
    if (status == cudaSuccess) status = cudaGraphInstantiate(&executable, graph, 0);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    ReservedBlocks blocks = device_.allocator().end_reserving();
    if (status != cudaSuccess) device_.allocator().give_back(blocks);
    cuda_check(status, "cudaStreamEndCapture, cudaGraphInstantiate");
    return std::make_unique<CudaGraph>(device_, executable, static_cast<int64_t>(nodes), std::move(blocks));
  }

 private:
  cudaStream_t stream() const { return device_.cuda_context().stream; }
  Device device_;
  bool open_ = false;
};

}  // namespace

std::unique_ptr<DeviceGraph> record_graph_cuda(const Device& device, const std::function<void()>& work) {
  cuda_check(cudaSetDevice(device.cuda_context().index), "cudaSetDevice");
  Capture capture(device);
  work();
  return capture.end();
}

}  // namespace longhand
