// See bench_command.h.
#include "tools/bench_command.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "autograd/gradcheck.h"
#include "core/error.h"
#include "core/tensor.h"
#include "ops/common/bench.h"
#include "ops/common/gemm.h"

namespace longhand {
namespace {

using Clock = std::chrono::steady_clock;

// Median milliseconds of `work(i)`, after two warm-up runs. One run is long enough that the wall clock around a synchronised device is
// exact to a few microseconds; short work is repeated inside one measurement.
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

struct Ceilings {
  double copy_bytes_per_s, product_flops_per_s;
};

Ceilings measure_ceilings(const Device& device, Dtype dtype, int repeats) {
  const int64_t elements = device.is_cuda() ? int64_t{1} << 29 : int64_t{1} << 25;
  const Tensor from = Tensor::zeros(device, Dtype::f32, {elements}), to = Tensor::zeros(device, Dtype::f32, {elements});
  const double copy_ms = median_ms(device, repeats, [&](int) { copy(to, from); });
  const int64_t n = device.is_cuda() ? 8192 : 1024;
  const Tensor a = random_tensor(device, dtype, {n, n}, 1), b = random_tensor(device, dtype, {n, n}, 2),
               c = Tensor::empty(device, dtype, {n, n});
  const double product_ms = median_ms(device, repeats, [&](int) { gemm(false, a, true, b, c); });
  const double side = static_cast<double>(n);
  return {static_cast<double>(elements) * 8 / copy_ms * 1e3, 2 * side * side * side / product_ms * 1e3};
}

void require_known_op(const std::string& op) {
  std::string known;
  for (const BenchEntry& entry : bench_table()) {
    if (op.empty() || entry.op == op) return;
    known += (known.empty() ? "" : ", ") + entry.op;
  }
  throw ConfigError("bench: no such op", {{"given", op}, {"known", known}});
}

}  // namespace

int run_bench_ops(const BenchOpsOptions& options) {
  const Device device = Device::parse(options.device);
  const Dtype dtype = options.dtype == "auto" ? (device.is_cuda() ? Dtype::bf16 : Dtype::f32) : parse_dtype(options.dtype);
  require_known_op(options.op);
  const Ceilings ceilings = measure_ceilings(device, dtype, options.repeats);
  if (!options.csv)
    fmt::print(
        "device {}\nceilings measured now: copy {:.1f} GB/s, {} product {:.2f} TFLOP/s\n\n{:<16}{:<34}{:>10}{:>10}{:>8}{:>12}{:>10}{:>8}\n",
        device.description(), ceilings.copy_bytes_per_s / 1e9, name_of(dtype), ceilings.product_flops_per_s / 1e12, "op", "shape", "fwd ms",
        "floor ms", "share", "fwd+bwd ms", "floor ms", "share");
  else fmt::print("op,shape,dtype,forward_ms,forward_floor_ms,forward_backward_ms,forward_backward_floor_ms\n");
  for (const BenchEntry& entry : bench_table()) {
    if (!options.op.empty() && entry.op != options.op) continue;
    for (const BenchCase& c : entry.cases(device, dtype)) {
      auto floor_ms = [&](double bytes, double flops) {
        return 1e3 * std::max(bytes / ceilings.copy_bytes_per_s, flops / ceilings.product_flops_per_s);
      };
      auto time = [&](bool backward) { return median_ms(device, options.repeats, [&](int i) { c.run(i % c.input_sets, backward); }); };
      const double forward = time(false), both = time(true);
      const double floor = floor_ms(c.forward_bytes, c.forward_flops), floor_both = floor + floor_ms(c.backward_bytes, c.backward_flops);
      if (options.csv)
        fmt::print("{},{},{},{:.5f},{:.5f},{:.5f},{:.5f}\n", entry.op, c.shape, name_of(dtype), forward, floor, both, floor_both);
      else
        fmt::print("{:<16}{:<34}{:>10.4f}{:>10.4f}{:>7.0f}%{:>12.4f}{:>10.4f}{:>7.0f}%\n", entry.op, c.shape, forward, floor,
                   100 * floor / forward, both, floor_both, 100 * floor_both / both);
      std::fflush(stdout);
    }
  }
  return 0;
}

}  // namespace longhand
