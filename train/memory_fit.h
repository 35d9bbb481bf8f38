// What of a step has to be made again, and how many rows go at once, so that training fits into the memory there is. Steps are tried out,
// on the weights of a model of their own, as they will be queued: what fits is known, not estimated.
#pragma once
#include "train/recipe.h"

namespace longhand {

class Communicator;

/// What training may use of a device: train.memory_gib; without it all that is free there, 0 where that is not known (a CPU).
int64_t memory_for_training(const Recipe& recipe, const Device& device);

/// Whether steps of a resolved recipe, of its rows and its plan of recomputation, stay within `bytes`; 0: within what the device has. A
/// sixty-fourth is left over.
/// processes  that share the rows; null: this one is alone
bool step_fits(const Recipe& recipe, const Device& device, int64_t bytes, const Communicator* processes = nullptr);

/// Sets train.recompute of a recipe that says "auto" to the fastest plan (models/recompute_plan.h) whose steps fit memory_for_training();
/// leaves another recipe as it is. Processes agree on the one that fits all of them.
/// errors  MemoryError when none fits; ConfigError on a CPU without train.memory_gib
void choose_recompute(Recipe& recipe, const Device& device, Communicator* processes = nullptr);

/// Sets train.grad_accumulation to the smallest that cuts train.batch_size into micro-batches that fit memory_for_training(). Where
/// train.recompute is "auto" that is set too: of the fastest plans that fit for each number of micro-batches, the one whose steps take the
/// least time here and now. Which one that is does not change what a step computes, but for the order of sums over its rows.
/// errors  as choose_recompute()
void choose_micro_batches(Recipe& recipe, const Device& device, Communicator* processes = nullptr);

/// The most rows at once, up to 4,096, that fit, found to an eighth; for measurements.
/// errors  as choose_micro_batches()
int64_t most_rows(Recipe recipe, const Device& device);

}  // namespace longhand
