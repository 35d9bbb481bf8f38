// longhand bench ops: time of every op beside the floor that the machine's own ceilings set.
#pragma once
#include <string>

namespace longhand {

struct BenchOpsOptions {
  std::string device = "auto";  // a GPU if there is one
  std::string dtype = "auto";   // bf16 on a GPU, f32 on a CPU
  std::string op;               // only this op; empty: all
  std::string shape;            // "B=4,T=4096" instead of the cases of the models; only with an op
  bool csv = false;
  int repeats = 20;
};

/// Prints a table (or CSV) to stdout: median ms of forward and of forward + backward; the bytes, flops and exponentials that were counted;
/// the floor, which is the largest of bytes / copy rate, flops / matrix product rate (for ops that are matrix products) and exponentials /
/// their rate, all measured in the same run; its share of what was measured; and the peer's and the target's figures where there are any.
int run_bench_ops(const BenchOpsOptions& options);

}  // namespace longhand
