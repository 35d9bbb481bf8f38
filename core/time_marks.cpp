// Time marks of the CPU; see time_marks.h.
#include "core/time_marks.h"

#include <chrono>
#include <vector>

namespace longhand {

std::unique_ptr<TimeMarks> make_time_marks_cuda(const Device& device);  // time_marks_cuda.cpp

namespace {

class CpuTimeMarks final : public TimeMarks {
 public:
  std::size_t set() override {
    marks_.push_back(std::chrono::steady_clock::now());
    return marks_.size() - 1;
  }
  double milliseconds(std::size_t from, std::size_t to) const override {
    return std::chrono::duration<double, std::milli>(marks_.at(to) - marks_.at(from)).count();
  }

 private:
  std::vector<std::chrono::steady_clock::time_point> marks_;
};

std::unique_ptr<TimeMarks> make_time_marks_cpu(const Device&) {
  return std::make_unique<CpuTimeMarks>();
}

}  // namespace

std::unique_ptr<TimeMarks> make_time_marks(const Device& device) {
  return on_device(device, &make_time_marks_cpu, LONGHAND_CUDA_IMPL(make_time_marks_cuda))(device);
}

}  // namespace longhand
