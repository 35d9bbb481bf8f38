// See bench_command.h.
#include "tools/bench_command.h"

#include <fmt/core.h>

#include <algorithm>

#include "core/error.h"
#include "ops/common/bench.h"
#include "tools/ceilings.h"

namespace longhand {
namespace {

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
