// What an op's benchmark file tells `longhand bench ops`: cases to time, with the bytes and flops that they cannot avoid.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"

namespace longhand {

/// One shape of one op. run(i, backward) computes the op on input set i (several sets, so that caches do not help), and when `backward` is
/// true also the gradients of every input.
struct BenchCase {
  std::string shape;  // "B32 T2048 H24 P64 N128"
  int input_sets = 1;
  std::function<void(int input_set, bool backward)> run;
  double forward_bytes = 0, backward_bytes = 0;  // each input read once, each output written once
  double forward_flops = 0, backward_flops = 0;
};

/// Makes the cases for a device; sizes there may differ between CPU and GPU.
using BenchFactory = std::function<std::vector<BenchCase>(const Device& device, Dtype activations)>;

struct BenchEntry {
  std::string op;
  BenchFactory cases;
};
std::vector<BenchEntry>& bench_table();

/// At namespace scope of <op>_bench.cpp: static const BenchRegistration registration("rmsnorm", cases);
struct BenchRegistration {
  BenchRegistration(std::string op, BenchFactory cases) { bench_table().push_back({std::move(op), std::move(cases)}); }
};

}  // namespace longhand
