// See decay.h.
#include "models/decay.h"

#include <algorithm>
#include <cmath>

namespace longhand {
namespace {

double softplus(double x) {
  return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
}

Decay sized(const Tensor& per_token, int64_t heads) {
  Decay decay;
  decay.rows = per_token.dim(0), decay.tokens = per_token.dim(1), decay.units = per_token.dim(2);
  decay.heads = heads;
  decay.rate = per_token.to_vector<double>();
  return decay;
}

}  // namespace

thread_local DecayScope* DecayScope::innermost_ = nullptr;

DecayScope::DecayScope(std::function<void(const Decay&)> observer) : observer_(std::move(observer)), outer_(innermost_) {
  innermost_ = this;
}

DecayScope::~DecayScope() {
  innermost_ = outer_;
}

Decay decay_of_steps(const Tensor& dt, const Tensor& dt_bias, const Tensor& A_log, int64_t heads, double dt_min, double dt_max) {
  Decay decay = sized(dt, heads);
  const std::vector<double> bias = dt_bias.to_vector<double>();
  for (std::size_t i = 0; i < decay.rate.size(); ++i)
    decay.rate[i] = std::clamp(softplus(decay.rate[i] + bias[i % bias.size()]), dt_min, dt_max);
  decay.A = A_log.to_vector<double>();
  for (double& a : decay.A) a = std::exp(a);
  decay.entries = A_log.numel() / decay.units;
  return decay;
}

Decay decay_of_gates(const Tensor& gate, int64_t heads, double normalizer, double gate_min) {
  Decay decay = sized(gate, heads);
  for (double& rate : decay.rate) rate = std::min(softplus(-rate) / normalizer, -gate_min);
  decay.A.assign(static_cast<std::size_t>(decay.units), 1.0);
  decay.entries = 1;
  return decay;
}

}  // namespace longhand
