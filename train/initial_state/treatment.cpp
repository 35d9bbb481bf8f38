// See treatment.h.
#include "train/initial_state/treatment.h"

#include <algorithm>

#include "core/error.h"
#include "core/philox.h"
#include "train/host_link.h"

namespace longhand {

Treatment::Treatment(const InitialStateContext& context, const char* strategy)
    : key_(philox_key(context.seed, hash_name(strategy))),
      probability_(context.options.probability),
      all_(context.options.cover == "all"),
      link_(context.link) {}

std::vector<int64_t> Treatment::row_keys(const BatchInfo& info) const {
  std::vector<int64_t> keys;
  const uint64_t step_key = philox_key(key_, static_cast<uint64_t>(info.step));
  for (const int64_t id : info.row_ids) {
    const auto row = static_cast<uint64_t>(id);
    const bool treated = philox_uniform(step_key, row) < probability_;
    keys.push_back(treated ? static_cast<int64_t>(std::max<uint64_t>(philox_key(step_key, row), 1)) : 0);
  }
  return keys;
}

void Treatment::upload(int64_t micro, const std::vector<int64_t>& row_keys) {
  const auto slot = static_cast<std::size_t>(micro);
  if (slot >= keys_.size()) keys_.resize(slot + 1);
  const Shape shape{static_cast<int64_t>(row_keys.size())};
  if (keys_[slot].defined() && !(keys_[slot].shape() == shape)) keys_[slot] = Tensor();
  link_.upload(keys_[slot], row_keys, shape);
}

const Tensor& Treatment::keys(int64_t micro, int64_t rows) const {
  const auto slot = static_cast<std::size_t>(micro);
  if (slot >= keys_.size() || keys_[slot].numel() != rows)
    throw ValueError("initial state: begin() without prepare()", {{"micro-batch", std::to_string(micro)}, {"rows", std::to_string(rows)}});
  return keys_[slot];
}

RecurrentState Treatment::covered(RecurrentState state) const {
  if (!all_)
    for (LayerState& layer : state.layers()) std::erase_if(layer, [](const auto& entry) { return is_conv_window(entry.first); });
  return state;
}

}  // namespace longhand
