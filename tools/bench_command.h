// longhand bench ops: time of every op beside the floor that the machine's own ceilings set.
#pragma once
#include <string>

namespace longhand {

struct BenchOpsOptions {
  std::string device = "cpu";
  std::string dtype = "auto";  // bf16 on a GPU, f32 on a CPU
  std::string op;              // only this op; empty: all
  bool csv = false;
  int repeats = 20;
};

/// Prints a table (or CSV) to stdout: median ms of forward and of forward + backward, GB/s, TFLOP/s, share of the floor. The floor is the
/// larger of bytes / copy rate and flops / matrix product rate, both measured in the same run.
int run_bench_ops(const BenchOpsOptions& options);

}  // namespace longhand
