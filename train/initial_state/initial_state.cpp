// The table of strategies; see initial_state.h.
#include "train/initial_state/initial_state.h"

#include "core/error.h"
#include "core/nearest.h"

namespace longhand {

std::unique_ptr<InitialState> make_zero_state(const InitialStateContext&);
std::unique_ptr<InitialState> make_state_passing(const InitialStateContext&);

namespace {

constexpr InitialStateStrategy kStrategies[] = {
    {"zero", "every row starts from the zero state", &make_zero_state},
    {"state-passing", "row b starts from the final state of row b of the batch before, without gradient", &make_state_passing},
};

}  // namespace

std::span<const InitialStateStrategy> initial_state_strategies() {
  return kStrategies;
}

void InitialState::load(const std::map<std::string, Tensor>& stored, int64_t) {
  if (!stored.empty())
    throw FileError("initial state: the checkpoint holds a state that this strategy does not keep", {{"tensor", stored.begin()->first}});
}

std::unique_ptr<InitialState> make_initial_state(const std::string& name, const InitialStateContext& context) {
  const InitialStateOptions& options = context.options;
  if (options.cover != "all" && options.cover != "ssm")
    throw ConfigError("initial state: unknown cover", {{"given", options.cover}, {"known", "all, ssm"}});
  if (!(options.probability >= 0 && options.probability <= 1))
    throw ConfigError("initial state: the probability is not between 0 and 1", {{"given", std::to_string(options.probability)}});
  std::vector<std::string> names;
  for (const InitialStateStrategy& strategy : kStrategies) {
    if (strategy.name == name) return strategy.make(context);
    names.emplace_back(strategy.name);
  }
  throw ConfigError("initial state: unknown strategy", {{"given", name}, {"nearest", nearest_name(name, names)}});
}

}  // namespace longhand
