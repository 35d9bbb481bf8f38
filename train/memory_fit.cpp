// See memory_fit.h.
#include "train/memory_fit.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>

#include "core/allocator.h"
#include "core/error.h"
#include "core/tensor.h"
#include "models/recompute_plan.h"
#include "train/communicator.h"
#include "train/trainer.h"

namespace longhand {
namespace {

constexpr int64_t kMargin = 64;
constexpr double kGib = 1 << 30;

class MemoryLimit {
 public:
  MemoryLimit(const Device& device, int64_t bytes) : allocator_(device.allocator()), bytes_(bytes) {
    allocator_.set_limit(bytes);
    allocator_.reset_peak();
  }
  ~MemoryLimit() {
    allocator_.set_limit(0);
    allocator_.release_cached();
    allocator_.reset_peak();  // a trial is no part of what is measured later
  }
  // A recorded graph also takes what lies between its tensors, which is known only when it is done.
  bool was_kept() const { return bytes_ == 0 || allocator_.use().peak_bytes <= bytes_; }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;

 private:
  CachingAllocator& allocator_;
  const int64_t bytes_;
};

// Which tokens does not matter: every position counts.
Batch any_batch(const Recipe& recipe) {
  Batch batch;
  batch.rows = recipe.train.batch_size;
  batch.length = recipe.train.length;
  const auto positions = static_cast<std::size_t>(batch.rows * batch.length);
  batch.tokens.assign(positions, 0);
  batch.targets.assign(positions, 0);
  batch.mask.assign(positions, 1);
  batch.resets.assign(static_cast<std::size_t>(batch.rows), 0);
  for (int64_t row = 0; row < batch.rows; ++row) batch.row_ids.push_back(row);
  return batch;
}

std::string limit_text(int64_t bytes) {
  return bytes > 0 ? std::to_string(bytes) + " bytes" : "what the device has";
}

void require_known(const Recipe& recipe, const Device& device) {
  if (device.is_cuda() || recipe.train.memory_gib > 0) return;
  throw ConfigError("train: a CPU's memory is not tried out", {{"device", device.name()}, {"try", "--set train.memory_gib=N"}});
}

// The smallest value in [low, high] that fits, when every larger one does; high itself is looked at first.
template <class Fits>
std::optional<int64_t> smallest_that_fits(int64_t low, int64_t high, Fits&& fits) {
  if (!fits(high)) return std::nullopt;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    fits(middle) ? high = middle : low = middle + 1;
  }
  return high;
}

}  // namespace

int64_t memory_for_training(const Recipe& recipe, const Device& device) {
  if (recipe.train.memory_gib > 0) return static_cast<int64_t>(recipe.train.memory_gib * kGib);
  device.allocator().release_cached();
  const int64_t free = make_host_link(device)->free_memory_bytes();
  return free > 0 ? free + device.allocator().use().live_bytes : 0;
}

namespace {

// Milliseconds of a step of the recipe, timed over this many of them; none when steps do not fit.
std::optional<double> step_ms(const Recipe& recipe, const Device& device, int64_t bytes, const Communicator* processes, int timed_steps) {
  Recipe tried = recipe;
  // Two micro-batches stand for any number of them.
  const int64_t parts = std::min<int64_t>(recipe.train.grad_accumulation, 2);
  int64_t rows = recipe.train.batch_size / recipe.train.grad_accumulation;
  if (processes != nullptr) rows = processes->own(rows).size();
  tried.train.batch_size = parts * rows;
  tried.train.grad_accumulation = parts;
  const MemoryLimit limit(device, bytes > 0 ? bytes - bytes / kMargin : 0);
  try {
    LanguageModel model(recipe.model, device, parse_dtype(recipe.train.dtype));
    fill(model.parameters().flat_master(), 0);
    model.parameters().refresh_compute();
    Trainer trainer(tried, model);
    const Batch batch = any_batch(tried);
    for (int step = 0; step < 3; ++step) trainer.step(batch);  // the second is recorded, beside what the first has left
    device.synchronize();
    const auto begin = std::chrono::steady_clock::now();
    for (int step = 0; step < timed_steps; ++step) trainer.step(batch);
    device.synchronize();
    if (trainer.graph_lacked_memory() || !limit.was_kept()) return std::nullopt;
    const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - begin;
    return elapsed.count() / std::max(timed_steps, 1) * static_cast<double>(recipe.train.grad_accumulation) / static_cast<double>(parts);
  } catch (const MemoryError&) {
    return std::nullopt;
  }
}

// The first of the plans, from the fastest to the smallest, whose steps fit all processes; recompute_plans() when none does.
int64_t fitting_plan(Recipe recipe, const Device& device, int64_t bytes, Communicator* processes) {
  const int64_t layers = recipe.model.n_layer, plans = recompute_plans(layers);
  const auto place = smallest_that_fits(0, plans - 1, [&](int64_t tried) {
    recipe.train.recompute = text_of(recompute_plan_at(tried, layers));
    return step_fits(recipe, device, bytes, processes);
  });
  const int64_t own = place ? *place : plans;
  return processes != nullptr ? processes->all_reduce_max(own) : own;
}

// Numbers of equal micro-batches, from few to many, that leave a row for each process.
std::vector<int64_t> cuts_of(int64_t rows, const Communicator* processes) {
  const int64_t fewest = processes != nullptr ? processes->size() : 1;
  std::vector<int64_t> cuts;
  for (int64_t parts = 1; parts <= rows / fewest; ++parts)
    if (rows % parts == 0) cuts.push_back(parts);
  return cuts;
}

[[noreturn]] void refuse_all(const Recipe& recipe, int64_t bytes) {
  const bool plan_was_chosen = recipe.train.recompute == kAutomaticRecompute;
  throw MemoryError(
      "train: not even one row at a time fits",
      {{"memory", limit_text(bytes)}, {"try", plan_was_chosen ? "shorter rows" : "--set train.recompute=auto, or shorter rows"}});
}

// A plan for every number of micro-batches, and of these the fastest by the clock. More of them want less made again and fill the GPU less:
// when one is slower than the one before, so are those behind it.
void choose_rows_and_plan(Recipe& recipe, const Device& device, int64_t bytes, Communicator* processes) {
  constexpr int kTimedSteps = 4;
  const int64_t layers = recipe.model.n_layer;
  constexpr double kWorthwhile = 0.98;  // of the time: a difference that the noise of a few steps does not make
  std::optional<int64_t> best_us;
  Recipe best = recipe;
  for (const int64_t parts : cuts_of(recipe.train.batch_size, processes)) {
    Recipe tried = recipe;
    tried.train.grad_accumulation = parts;
    const int64_t place = fitting_plan(tried, device, bytes, processes);
    if (place == recompute_plans(layers)) continue;
    tried.train.recompute = text_of(recompute_plan_at(place, layers));
    constexpr int64_t kNever = std::numeric_limits<int64_t>::max() / 2;
    const auto own_ms = step_ms(tried, device, bytes, processes, kTimedSteps);  // none: somebody else has taken memory since
    int64_t us = own_ms ? static_cast<int64_t>(1e3 * *own_ms) : kNever;
    if (processes != nullptr) us = processes->all_reduce_max(us);
    if (us == kNever) continue;
    if (best_us && static_cast<double>(us) >= kWorthwhile * static_cast<double>(*best_us)) break;
    best_us = us;
    best = tried;
    if (place == 0) break;
  }
  if (!best_us) refuse_all(recipe, bytes);
  recipe = best;
}

}  // namespace

bool step_fits(const Recipe& recipe, const Device& device, int64_t bytes, const Communicator* processes) {
  return step_ms(recipe, device, bytes, processes, 0).has_value();
}

void choose_recompute(Recipe& recipe, const Device& device, Communicator* processes) {
  if (recipe.train.recompute != kAutomaticRecompute) return;
  require_known(recipe, device);
  const int64_t layers = recipe.model.n_layer, bytes = memory_for_training(recipe, device),
                agreed = fitting_plan(recipe, device, bytes, processes);
  if (agreed == recompute_plans(layers))
    throw MemoryError("train: a step does not fit, whatever is made again",
                      {{"memory", limit_text(bytes)},
                       {"rows at once", std::to_string(recipe.train.batch_size / recipe.train.grad_accumulation)},
                       {"try", "a larger train.grad_accumulation, or --batch with fewer rows"}});
  recipe.train.recompute = text_of(recompute_plan_at(agreed, layers));
}

void choose_micro_batches(Recipe& recipe, const Device& device, Communicator* processes) {
  require_known(recipe, device);
  const int64_t bytes = memory_for_training(recipe, device);
  if (recipe.train.recompute == kAutomaticRecompute) return choose_rows_and_plan(recipe, device, bytes, processes);
  const std::vector<int64_t> cuts = cuts_of(recipe.train.batch_size, processes);
  const auto found = smallest_that_fits(0, std::ssize(cuts) - 1, [&](int64_t tried) {
    recipe.train.grad_accumulation = cuts[static_cast<std::size_t>(tried)];
    return step_fits(recipe, device, bytes, processes);
  });
  int64_t agreed = found ? *found : std::ssize(cuts);
  if (processes != nullptr) agreed = processes->all_reduce_max(agreed);
  if (agreed == std::ssize(cuts)) refuse_all(recipe, bytes);
  recipe.train.grad_accumulation = cuts[static_cast<std::size_t>(agreed)];
}

int64_t most_rows(Recipe recipe, const Device& device) {
  require_known(recipe, device);
  constexpr int64_t kMostRows = 4096;
  const int64_t bytes = memory_for_training(recipe, device);
  recipe.train.grad_accumulation = 1;
  const auto fits = [&](int64_t rows) {
    recipe.train.batch_size = rows;
    return step_fits(recipe, device, bytes);
  };
  if (!fits(1)) throw MemoryError("train: not even one row fits", {{"memory", limit_text(bytes)}, {"device", device.description()}});
  int64_t good = 1;
  while (good < kMostRows && fits(2 * good)) good *= 2;
  for (int64_t step = good / 2; step >= std::max<int64_t>(1, good / 8); step /= 2)
    if (fits(good + step)) good += step;
  return good;
}

}  // namespace longhand
