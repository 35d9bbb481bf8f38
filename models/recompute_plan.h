// What of each layer's forward is made again in the backward: a level (autograd/recompute.h) for every layer.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "autograd/recompute.h"

namespace longhand {

using RecomputePlan = std::vector<Recompute>;

/// "light": all layers alike. "light:20,projections:28": the first 20 layers and the next 28.
/// errors  ConfigError naming the level that is none, or how many layers the text speaks of and the model has
RecomputePlan parse_recompute_plan(const std::string& text, int64_t layers);

/// As parse_recompute_plan() reads it.
std::string text_of(const RecomputePlan& plan);

/// The plans from the fastest to the smallest: layer after layer, from the first on, goes to the next level.
/// place  0, everything is kept, to recompute_plans(layers) - 1, every layer at the last level
RecomputePlan recompute_plan_at(int64_t place, int64_t layers);
int64_t recompute_plans(int64_t layers);

}  // namespace longhand
