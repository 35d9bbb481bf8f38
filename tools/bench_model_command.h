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
  std::vector<std::string> batches;  // rows, or auto (train): as many as fit; empty: the recipe's (train), 1 (prefill, decode)
  int64_t steps = 20;                // train: timed steps
  int64_t tokens = 0;                // prefill: of a row; decode: steps; 0: 131,072 and 256
  int64_t chunk = 2048;              // prefill
  bool by_op = false, by_shape = false;
};

void add_bench_model_options(CLI::App& train, CLI::App& prefill, CLI::App& decode, BenchModelOptions& options);

/// ms of a step, tokens/s, MFU, peak memory, the sum of the ops' floors and its share of the step, the peer's figure and whether the
/// targets were met. The floor of an op at one shape is the larger of bytes / copy rate and flops of matrix products / their rate, both
/// measured in the same run; exponentials and what a scan does beside its bytes are not counted. With by_op one more step launch by launch,
/// its milliseconds by op; with by_shape by op and shapes of its inputs.
int run_bench_train(const BenchModelOptions& options);

/// tokens/s over the whole prompt and over its last eighth, and peak memory after the first eighth and after all.
int run_bench_prefill(const BenchModelOptions& options);

/// ms a token, tokens/s of all rows, and the share of the floor: bytes of weights and states / copy rate.
int run_bench_decode(const BenchModelOptions& options);

}  // namespace longhand
