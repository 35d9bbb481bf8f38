// See recompute_plan.h.
#include "models/recompute_plan.h"

#include <charconv>

#include "core/error.h"

namespace longhand {
namespace {

constexpr Recompute kLevels[] = {Recompute::none, Recompute::light, Recompute::projections, Recompute::full};
constexpr int64_t kSteps = std::size(kLevels) - 1;  // of a layer, from level to level

[[noreturn]] void refuse(const std::string& sentence, const std::string& text, int64_t layers) {
  throw ConfigError("recompute: " + sentence, {{"given", text},
                                               {"layers", std::to_string(layers)},
                                               {"expected", "a level, or levels with how many layers each: light:1,full:" +
                                                                std::to_string(std::max<int64_t>(layers - 1, 1))}});
}

}  // namespace

RecomputePlan parse_recompute_plan(const std::string& text, int64_t layers) {
  if (text.find(':') == std::string::npos) return RecomputePlan(static_cast<std::size_t>(layers), parse_recompute(text));
  RecomputePlan plan;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    const std::string part = text.substr(at, end - at);
    const std::size_t colon = std::min(part.find(':'), part.size());
    int64_t count = 0;
    const char* const last = part.data() + part.size();
    const auto [stopped, status] = std::from_chars(part.data() + std::min(colon + 1, part.size()), last, count);
    if (status != std::errc{} || stopped != last || count < 1 || count > layers) refuse("not a number of layers: " + part, text, layers);
    plan.insert(plan.end(), static_cast<std::size_t>(count), parse_recompute(part.substr(0, colon)));
    at = end + 1;
  }
  if (std::ssize(plan) != layers) refuse("the levels are of " + std::to_string(plan.size()) + " layers", text, layers);
  return plan;
}

std::string text_of(const RecomputePlan& plan) {
  std::string text;
  for (std::size_t begin = 0; begin < plan.size();) {
    std::size_t end = begin;
    while (end < plan.size() && plan[end] == plan[begin]) ++end;
    if (begin == 0 && end == plan.size()) return name_of(plan[0]);
    text += (text.empty() ? "" : ",") + std::string(name_of(plan[begin])) + ":" + std::to_string(end - begin);
    begin = end;
  }
  return text;
}

RecomputePlan recompute_plan_at(int64_t place, int64_t layers) {
  RecomputePlan plan;
  for (int64_t layer = 0; layer < layers; ++layer) plan.push_back(kLevels[static_cast<std::size_t>((place - layer + layers - 1) / layers)]);
  return plan;
}

int64_t recompute_plans(int64_t layers) {
  return kSteps * layers + 1;
}

}  // namespace longhand
