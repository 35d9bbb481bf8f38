// Checks of option values whose messages say what is expected.
#pragma once
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>
#include <vector>

#include "core/error.h"

namespace longhand {

/// A whole number that is not below `least`.
inline CLI::Validator at_least(int64_t least) {
  const auto problem = [least](const std::string& text) {
    int64_t value = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error == std::errc() && stop == end && value >= least) return std::string();
    return text + " is not a whole number of at least " + std::to_string(least);
  };
  return CLI::Validator(problem, "");
}

/// errors  ConfigError when a value stands in the list of an option twice: its row of a table would too
template <class Value>
void require_each_once(const char* option, const std::vector<Value>& values) {
  for (auto value = values.begin(); value != values.end(); ++value)
    if (std::find(values.begin(), value, *value) != value)
      throw ConfigError("eval: a list that names a value twice", {{"option", option}, {"twice", fmt::format("{}", *value)}});
}

}  // namespace longhand
