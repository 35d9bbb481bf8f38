// What state-passing and tbtt share: row b of a batch starts from the final state of row b of the batch before. They differ in the order of
// the data alone.
#pragma once
#include "train/initial_state/treatment.h"

namespace longhand {

///   S_0[k, b] = detach(S_T[k-1, b])     zeros in the first batch, in rows that begin a new sequence and in rows that are not treated
/// Each micro-batch slot keeps its own rows, so gradient accumulation does not change which state a row receives.
class CarriedState final : public InitialState {
 public:
  CarriedState(const InitialStateContext& context, const char* strategy);
  void prepare(const BatchInfo& info) override;
  RecurrentState begin(const BatchInfo& info) override;
  void end(const BatchInfo& info, const RecurrentState& h_T) override;
  void forget() override;
  /// One state of all rows of the step, those of all processes, "layers.3.ssm".
  std::map<std::string, Tensor> save() const override;
  bool carries() const override { return true; }
  void load(const std::map<std::string, Tensor>& stored, int64_t micro_batches) override;

 private:
  InitialStateContext context_;
  std::string strategy_;
  Treatment treatment_;
  std::vector<RecurrentState> carried_;  // this process's rows, by micro-batch slot; on a GPU each stays where it is
};

}  // namespace longhand
