// Time marks of a GPU are events on its stream; see time_marks.h.
#include <vector>

#include "core/cuda_context.h"
#include "core/time_marks.h"

namespace longhand {
namespace {

class CudaTimeMarks final : public TimeMarks {
 public:
  explicit CudaTimeMarks(const Device& device) : cuda_(device.cuda_context()) {}
  ~CudaTimeMarks() override {
    for (cudaEvent_t mark : marks_) (void)cudaEventDestroy(mark);
  }
  CudaTimeMarks(const CudaTimeMarks&) = delete;
  CudaTimeMarks& operator=(const CudaTimeMarks&) = delete;

  std::size_t set() override {
    cudaEvent_t mark = nullptr;
    cuda_check(cudaEventCreate(&mark), "cudaEventCreate");
    marks_.push_back(mark);
    cuda_check(cudaEventRecord(mark, cuda_.stream), "cudaEventRecord");
    return marks_.size() - 1;
  }
  double milliseconds(std::size_t from, std::size_t to) const override {
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, marks_.at(from), marks_.at(to)), "cudaEventElapsedTime");
    return static_cast<double>(ms);
  }

 private:
  const CudaContext& cuda_;
  std::vector<cudaEvent_t> marks_;
};

}  // namespace

std::unique_ptr<TimeMarks> make_time_marks_cuda(const Device& device) {
  return std::make_unique<CudaTimeMarks>(device);
}

}  // namespace longhand
