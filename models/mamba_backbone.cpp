// See mamba_backbone.h.
#include "models/mamba_backbone.h"

#include <algorithm>
#include <cmath>

#include "core/philox.h"

namespace longhand {

Initializer init_fan_in(int64_t fan_in, double scale) {
  const double bound = scale / std::sqrt(static_cast<double>(fan_in));
  return init_uniform(-bound, bound);
}

Initializer init_dt_bias(const ModelConfig& c) {
  const double low = std::log(c.option("dt_min")), high = std::log(c.option("dt_max")), floor = c.option("dt_init_floor");
  return [=](uint64_t key, uint64_t i) {
    const double dt = std::max(std::exp(low + (high - low) * philox_uniform(key, i)), floor);
    return dt + std::log(-std::expm1(-dt));
  };
}

void require_dt_options(const ModelConfig& c) {
  const double low = c.option("dt_min"), high = c.option("dt_max"), floor = c.option("dt_init_floor");
  require_option(c, low > 0, "dt_min must be above 0", "dt_min");
  require_option(c, high >= low && std::isfinite(high), "dt_max must be finite and at least dt_min", "dt_max");
  require_option(c, floor > 0 && std::isfinite(floor), "dt_init_floor must be finite and above 0", "dt_init_floor");
}

Initializer init_mamba_embedding(const ModelConfig&) {
  return init_normal(0.02);
}

Initializer init_mamba_head(const ModelConfig& c) {
  return init_fan_in(c.d_model);
}

}  // namespace longhand
