// See treatment.h.
#include "train/initial_state/treatment.h"

#include <algorithm>

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

Tensor Treatment::upload(const std::vector<int64_t>& row_keys) const {
  return link_.upload(std::span<const int64_t>(row_keys), {static_cast<int64_t>(row_keys.size())});
}

RecurrentState Treatment::covered(RecurrentState state) const {
  if (!all_)
    for (LayerState& layer : state.layers()) std::erase_if(layer, [](const auto& entry) { return is_conv_window(entry.first); });
  return state;
}

}  // namespace longhand
