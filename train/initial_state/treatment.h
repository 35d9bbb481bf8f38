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

  /// Takes the row keys of micro-batch `micro` to the device, where keys() has them at the same place in every step.
  void upload(int64_t micro, const std::vector<int64_t>& row_keys);
  /// errors  ValueError when there are none for `rows` rows
  const Tensor& keys(int64_t micro, int64_t rows) const;

  /// The state without the tensors that initial_state_options.cover leaves out; the model starts those from zeros.
  RecurrentState covered(RecurrentState state) const;

 private:
  uint64_t key_;
  double probability_;
  bool all_;
  HostLink& link_;
  std::vector<Tensor> keys_;  // [rows] i64 by micro-batch
};

}  // namespace longhand
