// Checks of option values whose messages say what is expected.
#pragma once
#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdint>
#include <string>

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

}  // namespace longhand
