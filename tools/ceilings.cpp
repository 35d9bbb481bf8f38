// See ceilings.h.
#include "tools/ceilings.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "autograd/gradcheck.h"
#include "core/tensor.h"
#include "ops/common/gemm.h"

namespace longhand {

double queue_exponentials_cuda(const Device& device);  // ceilings_cuda.cu; returns how many

namespace {
using Clock = std::chrono::steady_clock;
}

double median_ms(const Device& device, int repeats, const std::function<void(int)>& work) {
  for (int i = 0; i < 2; ++i) work(i);
  device.synchronize();
  const auto probe = Clock::now();
  work(0);
  device.synchronize();
  const double once_ms = std::chrono::duration<double, std::milli>(Clock::now() - probe).count();
  const int inner = std::clamp(static_cast<int>(5.0 / std::max(once_ms, 1e-3)), 1, 50);
  std::vector<double> times;
  int count = 0;
  for (int r = 0; r < repeats; ++r) {
    device.synchronize();
    const auto begin = Clock::now();
    for (int i = 0; i < inner; ++i) work(count++);
    device.synchronize();
    times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - begin).count() / inner);
    if (std::chrono::duration<double>(Clock::now() - probe).count() > 20) break;
  }
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

Ceilings measure_ceilings(const Device& device, Dtype dtype, int repeats) {
  const int64_t elements = device.is_cuda() ? int64_t{1} << 29 : int64_t{1} << 25;
  const Tensor from = Tensor::zeros(device, Dtype::f32, {elements}), to = Tensor::zeros(device, Dtype::f32, {elements});
  const double copy_ms = median_ms(device, repeats, [&](int) { copy(to, from); });
  const int64_t n = device.is_cuda() ? 8192 : 1024;
  const Tensor a = random_tensor(device, dtype, {n, n}, 1), b = random_tensor(device, dtype, {n, n}, 2),
               c = Tensor::empty(device, dtype, {n, n});
  const double product_ms = median_ms(device, repeats, [&](int) { gemm(false, a, true, b, c); });
  const double side = static_cast<double>(n);
  double exps = 0;
  if (device.is_cuda()) {
    const auto compute = on_device<double(const Device&)>(device, nullptr, LONGHAND_CUDA_IMPL(queue_exponentials_cuda));
    double count = 0;
    const double exp_ms = median_ms(device, repeats, [&](int) { count = compute(device); });
    exps = count / exp_ms * 1e3;
  }
  return {static_cast<double>(elements) * 8 / copy_ms * 1e3, 2 * side * side * side / product_ms * 1e3, exps};
}

std::string Ceilings::text(Dtype dtype) const {
  std::string line = fmt::format("ceilings measured now: copy {:.1f} GB/s, {} product {:.2f} TFLOP/s", copy_bytes_per_s / 1e9,
                                 name_of(dtype), product_flops_per_s / 1e12);
  if (exps_per_s > 0) line += fmt::format(", {:.2f} T exponentials/s", exps_per_s / 1e12);
  return line;
}

}  // namespace longhand
