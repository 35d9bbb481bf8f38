// Initial-state strategies: where the recurrent state of a batch comes from. The training loop around them is always
//
//   strategy.prepare(info)                       what the host contributes: never part of a captured step
//   h0          = strategy.begin(info)
//   loss, h_T   = model.loss(batch, h0)          backward(loss)
//   strategy.end(info, h_T)
//
// A strategy is one file that defines its class and a make function, plus one line in the table of initial_state.cpp.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "models/recurrent_state.h"

namespace longhand {

class Communicator;
class HostLink;

/// Settings that strategies share; each uses those that mean something for it.
struct InitialStateOptions {
  std::string cover = "all";            // "all": every state tensor | "ssm": the convolution window starts from zeros
  double probability = 1;               // of a row being treated; the others start from zero
  double sigma = 0.1;                   // random-noise: standard deviation of every element
  std::string statistics_per = "head";  // fitted-noise: "head" | "channel"; see state_groups() in row_kernels.h
  double statistics_decay = 0.99;       // fitted-noise: by which a state's weight falls with every step; 1: never
};

/// What a strategy may know about a micro-batch. With gradient accumulation the rows of a step are cut into micro-batches of equal size;
/// micro-batch m of every step is the same slot, so row b of a step is row b of the next one whatever the accumulation.
struct BatchInfo {
  int64_t step = 0;                  // from 0
  int64_t micro = 0;                 // micro-batch of the step, from 0
  int64_t rows = 0;                  // of this process
  std::span<const uint8_t> resets;   // [rows]  1: the row begins a new sequence; empty when rows never continue each other (packed)
  std::span<const int64_t> row_ids;  // [rows]  a number for each row of the run, independent of how it is cut into batches
  int64_t all_rows = 0;              // of all processes, which share a micro-batch's rows in order; 0: `rows`, this process is alone
  Tensor left_out = {};              // [1] f64 on the device: above 0 where the step before was left out; nothing is carried on from it
};

class InitialState {
 public:
  virtual ~InitialState() = default;

  /// Brings to the device what begin() of this micro-batch takes from the host.
  virtual void prepare(const BatchInfo&) {}

  /// The state before the first token; absent for zeros. On a GPU this and end() queue the same work on the same memory in every step
  /// after the first, so that they can be recorded with it.
  virtual RecurrentState begin(const BatchInfo& info) = 0;

  /// Takes note of the state after the last token.
  virtual void end(const BatchInfo& info, const RecurrentState& h_T) = 0;

  /// Drops what is kept from batch to batch: before save() behind a step that was left out.
  virtual void forget() {}

  /// What a resumed run needs to go on exactly, on any number of processes; becomes carried_state.safetensors. Empty when there is nothing.
  /// All processes call it together; what process 0 gets is the whole.
  virtual std::map<std::string, Tensor> save() const { return {}; }

  /// Whether there is always something to save after a step, so that a checkpoint without it is not whole.
  virtual bool carries() const { return false; }

  /// The counterpart of save(); an empty map means a run that starts.
  /// micro_batches  slots of a step
  /// errors         FileError naming what does not fit
  virtual void load(const std::map<std::string, Tensor>& stored, int64_t micro_batches);
};

/// What strategies are made from.
struct InitialStateContext {
  std::function<RecurrentState(int64_t rows)> zero_state;  // LanguageModel::zero_state
  Device device;
  HostLink& link;  // to that device; outlives the strategy
  uint64_t seed = 0;
  InitialStateOptions options;
  Communicator* processes = nullptr;  // that share the rows; null: this one is alone
};

struct InitialStateStrategy {
  const char* name;
  const char* meaning;
  const char* options;  // those of InitialStateOptions that it looks at, each with a space on both sides
  std::unique_ptr<InitialState> (*make)(const InitialStateContext&);
  const char* arrangement = nullptr;  // of the data that it needs, and why; null: any
  const char* because = nullptr;
};
std::span<const InitialStateStrategy> initial_state_strategies();

/// errors  ConfigError naming the nearest known strategy; an option that is unknown or out of its range
std::unique_ptr<InitialState> make_initial_state(const std::string& name, const InitialStateContext& context);

}  // namespace longhand
