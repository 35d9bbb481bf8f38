// Which rows a strategy treats and which tensors it sets: the part that every strategy but zero shares.
#pragma once
#include <vector>

#include "train/initial_state/initial_state.h"

namespace longhand {

class Treatment {
 public:
  /// strategy  its name, which keys its draws
  Treatment(const InitialStateContext& context, const char* strategy);

  /// For each row a key drawn from (seed, strategy, step, row id), or 0 for the rows that start from zero: those that
  /// initial_state_options.probability passes over. How the rows are cut into micro-batches does not matter.
  std::vector<int64_t> row_keys(const BatchInfo& info) const;

  /// Row keys on the device, behind the work queued there.
  Tensor upload(const std::vector<int64_t>& row_keys) const;

  /// The state without the tensors that initial_state_options.cover leaves out; the model starts those from zeros.
  RecurrentState covered(RecurrentState state) const;

 private:
  uint64_t key_;
  double probability_;
  bool all_;
  HostLink& link_;
};

}  // namespace longhand
