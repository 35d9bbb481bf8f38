// See carried_state.h.
#include "train/initial_state/carried_state.h"

#include <algorithm>

#include "core/error.h"
#include "train/initial_state/row_kernels.h"

namespace longhand {

CarriedState::CarriedState(const InitialStateContext& context, const char* strategy)
    : context_(context), strategy_(strategy), treatment_(context, strategy) {}

RecurrentState CarriedState::begin(const BatchInfo& info) {
  const auto slot = static_cast<std::size_t>(info.micro);
  if (slot >= carried_.size() || carried_[slot].absent()) return treatment_.covered(context_.zero_state(info.rows));
  const RecurrentState& before = carried_[slot];
  if (before.rows() != info.rows)
    throw ShapeError(strategy_ + ": the batch has another number of rows than the one before",
                     {{"rows", std::to_string(info.rows)}, {"before", std::to_string(before.rows())}});
  std::vector<int64_t> kept = treatment_.row_keys(info);
  for (std::size_t b = 0; b < info.resets.size(); ++b)
    if (info.resets[b] != 0) kept[b] = 0;
  if (std::find(kept.begin(), kept.end(), 0) == kept.end()) return before;
  const Tensor marks = treatment_.upload(kept);
  RecurrentState h0 = before;
  for (LayerState& layer : h0.layers())
    for (auto& [name, variable] : layer) variable = Variable(kept_rows(variable.value(), marks));
  return h0;
}

void CarriedState::end(const BatchInfo& info, const RecurrentState& h_T) {
  const auto slot = static_cast<std::size_t>(info.micro);
  if (carried_.size() <= slot) carried_.resize(slot + 1);
  carried_[slot] = treatment_.covered(h_T.detach());
}

std::map<std::string, Tensor> CarriedState::save() const {
  if (carried_.empty()) return {};
  std::vector<RecurrentState> slots;  // on the host: a device has no room for them twice
  for (const RecurrentState& state : carried_) slots.push_back(state.to(Device::cpu()));
  return RecurrentState::concatenate(slots).named_tensors();
}

void CarriedState::load(const std::map<std::string, Tensor>& stored, int64_t micro_batches) {
  carried_.clear();
  if (stored.empty()) return;
  const int64_t rows = stored.begin()->second.dim(0);
  if (rows % micro_batches != 0)
    throw FileError(strategy_ + ": the stored rows cannot be cut into the micro-batches",
                    {{"rows", std::to_string(rows)}, {"micro-batches", std::to_string(micro_batches)}});
  const auto expected = treatment_.covered(context_.zero_state(rows)).named_tensors();
  for (const auto& [name, zeros] : expected) {
    const auto found = stored.find(name);
    const bool fits = found != stored.end() && found->second.shape() == zeros.shape() && found->second.dtype() == zeros.dtype();
    if (!fits || stored.size() != expected.size())
      throw FileError(
          strategy_ + ": the stored state is not this model's",
          {{"tensor", name}, {"found", found == stored.end() ? "(absent)" : found->second.describe()}, {"expected", zeros.describe()}});
  }
  const int64_t each = rows / micro_batches;
  for (int64_t m = 0; m < micro_batches; ++m) {
    std::map<std::string, Tensor> part;
    for (const auto& [name, tensor] : stored) part[name] = tensor.slice(0, m * each, (m + 1) * each);
    carried_.push_back(RecurrentState::from_named_tensors(part, context_.device));
  }
}

}  // namespace longhand
