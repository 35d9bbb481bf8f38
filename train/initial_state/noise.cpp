// See noise.h.
#include "train/initial_state/noise.h"

#include "core/philox.h"

namespace longhand {

Noise::Noise(const InitialStateContext& context, const char* strategy)
    : treatment_(context, strategy), one_row_(treatment_.covered(context.zero_state(1))) {
  for (std::size_t layer = 0; layer < one_row_.layers().size(); ++layer) {
    for (const auto& [name, variable] : one_row_.layers()[layer]) {
      const StateGroups groups = state_groups(name, variable.shape(), context.options.statistics_per == "channel");
      parts_.push_back({layer, name, "layers." + std::to_string(layer) + "." + name, groups, groups_});
      groups_ += groups.count;
    }
  }
}

RecurrentState Noise::draw(const BatchInfo& info, const Tensor& normals) const {
  const Tensor& keys = treatment_.keys(info.micro, info.rows);
  std::vector<LayerState> layers(one_row_.layers().size());
  for (const Part& part : parts_) {
    const Tensor zeros = one_row_.get(part.layer, part.name).value();
    Shape shape = zeros.shape();
    shape[0] = info.rows;
    const Tensor drawn = Tensor::empty(zeros.device(), zeros.dtype(), shape);
    draw_normals(drawn, keys, hash_name(part.full_name.c_str()), normals.slice(0, part.first, part.first + part.groups.count), part.groups);
    layers[part.layer][part.name] = Variable(drawn);
  }
  return RecurrentState(std::move(layers));
}

}  // namespace longhand
