// What Mamba-1 and Mamba-2 share around their mixers: the names of the backbone, its layers, initial values.
//   source  state-spaces/mamba: modules/mamba_simple.py, modules/mamba2.py, models/mixer_seq_simple.py
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "models/model_family.h"

namespace longhand {

constexpr const char* kMambaEmbedding = "backbone.embeddings.weight";
constexpr const char* kMambaFinalNorm = "backbone.norm_f.weight";

/// A layer: one norm and one mixer, made by MixerType(config, prefix of its parameters, parameters).
template <class MixerType>
std::vector<Sublayer> make_mamba_layer(const ModelConfig& config, int64_t layer, ParameterSet& parameters) {
  const std::string name = "layers." + std::to_string(layer), prefix = "backbone." + name + ".";
  Parameter* norm = parameters.declare(prefix + "norm.weight", {config.d_model}, small_parameter(init_constant(1)));
  std::vector<Sublayer> sublayers;
  sublayers.push_back({name + ".mixer", norm, std::make_unique<MixerType>(config, prefix + "mixer.", parameters)});
  return sublayers;
}

/// U(-1/sqrt(fan_in), 1/sqrt(fan_in)) * scale
Initializer init_fan_in(int64_t fan_in, double scale = 1);

/// The bias b with softplus(b) = dt0, for dt0 = max(exp(u), dt_init_floor) and u ~ U(ln dt_min, ln dt_max): steps spread evenly over the
/// orders of magnitude between dt_min and dt_max (options of the family).
Initializer init_dt_bias(const ModelConfig& config);
/// errors  ConfigError naming the option, unless 0 < dt_min <= dt_max < inf and 0 < dt_init_floor < inf
void require_dt_options(const ModelConfig& config);

Initializer init_mamba_embedding(const ModelConfig& config);  // N(0, 0.02)
Initializer init_mamba_head(const ModelConfig& config);       // of fan-in d_model

}  // namespace longhand
