// The table of strategies; see initial_state.h.
#include "train/initial_state/initial_state.h"

#include <cmath>

#include "core/error.h"
#include "core/nearest.h"

namespace longhand {

std::unique_ptr<InitialState> make_zero_state(const InitialStateContext&);
std::unique_ptr<InitialState> make_random_noise(const InitialStateContext&);
std::unique_ptr<InitialState> make_fitted_noise(const InitialStateContext&);
std::unique_ptr<InitialState> make_state_passing(const InitialStateContext&);
std::unique_ptr<InitialState> make_tbtt(const InitialStateContext&);

namespace {

constexpr InitialStateStrategy kStrategies[] = {
    {"zero", "every row starts from the zero state", "", &make_zero_state},
    {"random-noise", "every element of a row's state is drawn from N(0, sigma^2)", " cover probability sigma ", &make_random_noise},
    {"fitted-noise", "the same with the mean and deviation that final states have in each layer and head",
     " cover probability statistics_per statistics_decay ", &make_fitted_noise, "packed",
     "rows of streams may end in padding, whose states would count"},
    {"state-passing", "row b starts from the final state of row b of the batch before, whose text has nothing to do with it",
     " cover probability ", &make_state_passing, "packed",
     "its rows have nothing to do with those of the batch before; along streams it is called tbtt"},
    {"tbtt", "row b goes on with the text and from the state with which row b of the batch before ended", " cover probability ", &make_tbtt,
     "streams", "its rows go on with the text of the batch before"},
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
  if (options.statistics_per != "head" && options.statistics_per != "channel")
    throw ConfigError("initial state: unknown groups of statistics", {{"given", options.statistics_per}, {"known", "head, channel"}});
  if (!(options.probability >= 0 && options.probability <= 1))
    throw ConfigError("initial state: the probability is not between 0 and 1", {{"given", std::to_string(options.probability)}});
  if (!(options.statistics_decay >= 0 && options.statistics_decay <= 1))
    throw ConfigError("initial state: the decay of the statistics is not between 0 and 1",
                      {{"given", std::to_string(options.statistics_decay)}});
  if (!(options.sigma >= 0) || !std::isfinite(options.sigma))
    throw ConfigError("initial state: sigma is not a standard deviation",
                      {{"given", std::to_string(options.sigma)}, {"expected", "a number, at least 0"}});
  std::vector<std::string> names;
  for (const InitialStateStrategy& strategy : kStrategies) {
    if (strategy.name == name) return strategy.make(context);
    names.emplace_back(strategy.name);
  }
  throw ConfigError("initial state: unknown strategy", {{"given", name}, {"nearest", nearest_name(name, names)}});
}

}  // namespace longhand
