// longhand bench train | prefill | decode: speed of whole models from recipes, on random tokens that lie on the device.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace longhand {

struct BenchModelOptions {
  std::vector<std::string> recipes;   // their models, fresh weights; train: also their batch and optimizer
  std::vector<std::string> settings;  // --set KEY=VALUE, for all of them
  std::string device = "auto", dtype = "auto";
  std::vector<int64_t> batches;  // rows; empty: the recipe's (train), 1 (prefill, decode)
  int64_t steps = 20;            // train: timed steps
  int64_t tokens = 0;            // prefill: of a row; decode: steps; 0: 131,072 and 256
  int64_t chunk = 2048;          // prefill
  bool by_op = false;
};

void add_bench_model_options(CLI::App& train, CLI::App& prefill, CLI::App& decode, BenchModelOptions& options);

/// ms of a step, tokens/s, MFU, peak memory, and the share of the floor: flops / matrix product rate + bytes of the optimizer / copy rate,
/// both rates measured in the same run. With by_op one more step launch by launch, its milliseconds by op.
int run_bench_train(const BenchModelOptions& options);

/// tokens/s over the whole prompt and over its last eighth, and peak memory after the first eighth and after all.
int run_bench_prefill(const BenchModelOptions& options);

/// ms a token, tokens/s of all rows, and the share of the floor: bytes of weights and states / copy rate.
int run_bench_decode(const BenchModelOptions& options);

}  // namespace longhand
