// See bench_command.h.
#include "tools/bench_command.h"

#include <fmt/core.h>

#include <algorithm>

#include "core/error.h"
#include "ops/common/bench.h"
#include "tools/ceilings.h"
#include "tools/device_options.h"
#include "tools/peer_figures.h"

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

/// What one direction of a case cannot avoid.
struct Work {
  double bytes, flops, exps;
  bool products;
  double floor_ms(const Ceilings& c) const {
    double seconds = bytes / c.copy_bytes_per_s;
    if (products) seconds = std::max(seconds, flops / c.product_flops_per_s);
    if (c.exps_per_s > 0) seconds = std::max(seconds, exps / c.exps_per_s);
    return 1e3 * seconds;
  }
};

std::string ratio(double peer, double measured) {
  return peer > 0 ? fmt::format("{:.2f}x", peer / measured) : "";
}

struct Timing {
  Work work;
  double floor, ms, peer, target;
};

void print_row(const std::string& op, const std::string& shape, const char* direction, const Timing& t) {
  fmt::print("{:<19}{:<36}{:<9}{:>9.4f}{:>9.4f}{:>7.0f}%{:>10.1f}{:>10.1f}{:>10}{:>9}{:>9}{:>9}  {}\n", op, shape, direction, t.ms, t.floor,
             100 * t.floor / t.ms, t.work.bytes / 1e6, t.work.flops / 1e9, t.work.exps > 0 ? fmt::format("{:.1f}", t.work.exps / 1e6) : "",
             t.peer > 0 ? fmt::format("{:.3f}", t.peer) : "", ratio(t.peer, t.ms), t.target > 0 ? fmt::format("{:.2f}", t.target) : "",
             verdict(t.ms, t.target, true));
}

}  // namespace

int run_bench_ops(const BenchOpsOptions& options) {
  const auto [device, dtype] = choose_device(options.device, options.dtype);
  const BenchSizes sizes(options.shape);
  require_known_op(options.op);
  if (sizes.given() && options.op.empty()) throw ConfigError("bench: --shape is for one op", {{"try", "--op NAME"}});
  const Ceilings ceilings = measure_ceilings(device, dtype, options.repeats);
  if (options.csv) {
    fmt::print("op,shape,dtype,direction,ms,floor_ms,bytes,flops,exponentials,peer_ms,target_ms\n");
  } else {
    fmt::print("device {}\n{}\n\n", device.description(), ceilings.text(dtype));
    fmt::print("{:<19}{:<36}{:<9}{:>9}{:>9}{:>8}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}  {}\n", "op", "shape", "", "ms", "floor", "share", "MB",
               "GFLOP", "Mexp", "peer ms", "faster", "target", "measured / target");
  }
  for (const BenchEntry& entry : bench_table()) {
    if (!options.op.empty() && entry.op != options.op) continue;
    const std::vector<BenchCase> cases = entry.cases(device, dtype, sizes);
    sizes.require_all_known(entry.op);
    for (const BenchCase& c : cases) {
      const OpFigures known = device.is_cuda() && dtype == Dtype::bf16 ? op_figures(entry.op, c.shape) : OpFigures{};
      const Work forward{c.forward_bytes, c.forward_flops, c.forward_exps, c.products},
          backward{c.backward_bytes, c.backward_flops, c.backward_exps, c.products};
      const Work both{forward.bytes + backward.bytes, forward.flops + backward.flops, forward.exps + backward.exps, c.products};
      const double floor = forward.floor_ms(ceilings), floor_both = floor + backward.floor_ms(ceilings);
      auto show = [&](const char* direction, bool with_backward, const Timing& t) {
        Timing timed = t;
        timed.ms = median_ms(device, options.repeats, [&](int i) { c.run(i % c.input_sets, with_backward); });
        if (options.csv)
          fmt::print("{},{},{},{},{:.5f},{:.5f},{:.0f},{:.0f},{:.0f},{},{}\n", entry.op, c.shape, name_of(dtype), direction, timed.ms,
                     timed.floor, timed.work.bytes, timed.work.flops, timed.work.exps, timed.peer, timed.target);
        else print_row(entry.op, c.shape, direction, timed);
        std::fflush(stdout);
      };
      if (!c.backward_is_all) show("fwd", false, {forward, floor, 0, known.peer_forward, known.target_forward});
      show(c.backward_is_all ? "step" : "fwd+bwd", true, {both, floor_both, 0, known.peer_both, known.target_both});
    }
  }
  return 0;
}

}  // namespace longhand
