// longhand bench scale, started by mpirun or srun: what several processes gain over one, and what their exchanges cost.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace longhand {

struct BenchScaleOptions {
  std::vector<std::string> recipes;   // their models with fresh weights, and their optimizer
  std::vector<std::string> settings;  // --set KEY=VALUE, for all of them
  std::string device;                 // cpu, cuda; empty: a GPU each where there are GPUs
  int64_t rows = 8;                   // of a process, where each has as many as one alone
  int64_t steps = 20;                 // timed, of every case
};

void add_bench_scale_options(CLI::App& command, BenchScaleOptions& options);

/// Whole training steps on random tokens: one process, all of them with `rows` each (weak scaling) and with `rows` together (strong
/// scaling), with and without the sharded optimizer; the exchanges by themselves; and what backward hides of those of gradients: what a
/// step takes longer without overlap.
int run_bench_scale(const BenchScaleOptions& options);

}  // namespace longhand
