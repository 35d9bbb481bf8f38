// `longhand train RECIPE.toml` and `longhand train --resume RUN`: a run folder under runs/.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longhand {

struct TrainCommand {
  std::string recipe;                  // path of the recipe; empty with resume
  std::vector<std::string> overrides;  // "key=value"
  std::string resume;                  // a run's name or folder; empty: a new run
  std::string device;                  // "" : the first GPU if there is one, else the CPU
  std::string init_from;               // stands for init_from of the recipe
  std::string name;                    // stands for name of the recipe
  std::string batch;                   // rows at once, or auto: as many as fit; sets train.grad_accumulation. Empty: the recipe's
  int64_t verify_determinism = 0;      // do so many steps twice and compare, instead of training
  bool nccl = false;                   // join GPUs by NCCL even when there is only one, to see what it costs
  bool help_recipe = false;            // only list the keys of a recipe
};

/// Started by mpirun or srun, the processes train one model together: docs/scale.md.
/// returns  0 when the run has done all its steps; 128 + the signal's number when it was interrupted (a checkpoint is written)
/// errors   ConfigError for what cannot be followed, among it a setting that may not change on resume; those of run_training()
int run_train(const TrainCommand& command);

}  // namespace longhand
