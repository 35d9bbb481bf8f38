// See carried_state.h.
#include "train/initial_state/carried_state.h"

#include "core/error.h"
#include "train/communicator.h"
#include "train/initial_state/row_kernels.h"

namespace longhand {

CarriedState::CarriedState(const InitialStateContext& context, const char* strategy)
    : context_(context), strategy_(strategy), treatment_(context, strategy) {}

void CarriedState::prepare(const BatchInfo& info) {
  std::vector<int64_t> kept = treatment_.row_keys(info);
  for (std::size_t b = 0; b < info.resets.size(); ++b)
    if (info.resets[b] != 0) kept[b] = 0;
  treatment_.upload(info.micro, kept);
}

RecurrentState CarriedState::begin(const BatchInfo& info) {
  const auto slot = static_cast<std::size_t>(info.micro);
  if (slot >= carried_.size()) carried_.resize(slot + 1);
  RecurrentState& state = carried_[slot];
  if (state.absent()) state = treatment_.covered(context_.zero_state(info.rows));
  if (state.rows() != info.rows)
    throw ShapeError(strategy_ + ": the batch has another number of rows than the one before",
                     {{"rows", std::to_string(info.rows)}, {"before", std::to_string(state.rows())}});
  for (const LayerState& layer : state.layers())
    for (const auto& [name, variable] : layer) clear_rows(variable.value(), treatment_.keys(info.micro, info.rows), info.left_out);
  return state;
}

void CarriedState::end(const BatchInfo& info, const RecurrentState& h_T) {
  RecurrentState& state = carried_.at(static_cast<std::size_t>(info.micro));
  const RecurrentState final = treatment_.covered(h_T.detach());
  for (std::size_t layer = 0; layer < state.layers().size(); ++layer) {
    for (auto& [name, variable] : state.layers()[layer]) {
      const Tensor& value = final.get(layer, name).value();
      if (context_.device.is_cuda()) copy(variable.value(), value);
      else variable = Variable(value.contiguous());
    }
  }
}

void CarriedState::forget() {
  for (const RecurrentState& state : carried_)
    for (const LayerState& layer : state.layers())
      for (const auto& [name, variable] : layer) fill(variable.value(), 0);
}

std::map<std::string, Tensor> CarriedState::save() const {
  if (carried_.empty()) return {};
  std::vector<RecurrentState> slots;  // on the host: a device has no room for them twice
  for (const RecurrentState& state : carried_) slots.push_back(state.to(Device::cpu()));
  if (context_.processes != nullptr && !context_.processes->alone()) {
    for (RecurrentState& slot : slots)
      for (LayerState& layer : slot.layers())
        for (auto& [name, variable] : layer) variable = Variable(context_.processes->gather(variable.value().contiguous()));
    if (!context_.processes->leads()) return {};
  }
  return RecurrentState::concatenate(slots).named_tensors();
}

void CarriedState::load(const std::map<std::string, Tensor>& stored, int64_t micro_batches) {
  carried_.clear();
  if (stored.empty()) return;
  const int64_t rows = stored.begin()->second.dim(0);
  if (rows % micro_batches != 0)
    throw FileError(strategy_ + ": the stored rows cannot be cut into the micro-batches",
                    {{"rows", std::to_string(rows)}, {"micro-batches", std::to_string(micro_batches)}});
  const auto expected = treatment_.covered(context_.zero_state(1)).named_tensors();
  for (const auto& [name, zeros] : expected) {
    const auto found = stored.find(name);
    Shape shape = zeros.shape();
    shape[0] = rows;
    const bool fits = found != stored.end() && found->second.shape() == shape && found->second.dtype() == zeros.dtype();
    if (!fits || stored.size() != expected.size())
      throw FileError(strategy_ + ": the stored state is not this model's",
                      {{"tensor", name},
                       {"found", found == stored.end() ? "(absent)" : found->second.describe()},
                       {"expected", zeros.describe() + " for each of " + std::to_string(rows) + " rows"}});
    if (const int64_t index = first_non_finite(found->second); index >= 0)
      throw FileError(strategy_ + ": the stored state is not finite",
                      {{"tensor", name}, {"index", std::to_string(index)}, {"try", "an older checkpoint, or copy it again"}});
  }
  const int64_t each = rows / micro_batches;
  const Part own = context_.processes != nullptr ? context_.processes->own(each) : Part{0, each};
  for (int64_t m = 0; m < micro_batches; ++m) {
    std::map<std::string, Tensor> part;
    for (const auto& [name, tensor] : stored) part[name] = tensor.slice(0, m * each + own.begin, m * each + own.end);
    carried_.push_back(RecurrentState::from_named_tensors(part, context_.device));
  }
}

}  // namespace longhand
