// See position_grid.h.
#include "eval/position_grid.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <string_view>

#include "core/error.h"

namespace longhand {
namespace {

std::optional<int64_t> whole_number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::vector<int64_t> in_order(std::vector<int64_t> numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers;
}

}  // namespace

bool is_number_list(const std::string& text) {
  return text.find(':') == std::string::npos;
}

std::vector<int64_t> number_grid(const std::string& text, int64_t last, const char* option) {
  const auto colon = std::min(text.find(':'), text.size());
  const std::string kind = text.substr(0, colon);
  const auto steps = whole_number(std::string_view(text).substr(std::min(colon + 1, text.size())));
  if ((kind != "log" && kind != "even") || !steps || *steps < 1 || *steps > 1'000'000)
    throw ConfigError(fmt::format("eval: {} is not understood", option),
                      {{option, text}, {"expected", "log:N, even:N, or whole numbers joined by commas"}});
  std::vector<int64_t> numbers{last};
  if (kind == "even") {
    const int64_t N = std::min(*steps, last);
    for (int64_t k = 1; k < N; ++k) numbers.push_back(last / N * k + last % N * k / N);
  } else {
    for (int64_t k = 0;; ++k) {
      const double number = std::exp2(static_cast<double>(k) / static_cast<double>(*steps));
      if (number >= static_cast<double>(last)) break;
      numbers.push_back(static_cast<int64_t>(number));
    }
  }
  return in_order(std::move(numbers));
}

std::vector<int64_t> number_list(const std::string& text, int64_t least, int64_t last, const char* option) {
  std::vector<int64_t> numbers;
  for (std::string_view rest = text;;) {
    const auto comma = std::min(rest.find(','), rest.size());
    const auto number = whole_number(rest.substr(0, comma));
    if (!number || *number < least || *number > last)
      throw ConfigError(fmt::format("eval: {} holds what it cannot be", option),
                        {{option, text},
                         {"found", "'" + std::string(rest.substr(0, comma)) + "'"},
                         {"expected", fmt::format("whole numbers from {} to {}, or log:N, or even:N", least, last)}});
    numbers.push_back(*number);
    if (comma == rest.size()) break;
    rest.remove_prefix(comma + 1);
  }
  return in_order(std::move(numbers));
}

std::vector<int64_t> position_grid(const std::string& text, int64_t context, const char* option) {
  return is_number_list(text) ? number_list(text, 1, context, option) : number_grid(text, context, option);
}

std::vector<int64_t> start_grid(const std::string& text, int64_t context, const char* option) {
  if (is_number_list(text)) return number_list(text, 0, context - 1, option);
  std::vector<int64_t> starts = number_grid(text, context, option);
  for (int64_t& start : starts) start = context - start;
  return in_order(std::move(starts));
}

std::string grid_tag(const std::string& text) {
  constexpr std::size_t kLongest = 32;
  std::string tag = text;
  if (!is_number_list(text)) std::erase(tag, ':');
  else if (text.size() > kLongest)
    tag = fmt::format("{}-from-{}-to-{}", std::count(text.begin(), text.end(), ',') + 1, text.substr(0, text.find(',')),
                      text.substr(text.rfind(',') + 1));
  std::replace(tag.begin(), tag.end(), ',', '+');
  return tag;
}

}  // namespace longhand
