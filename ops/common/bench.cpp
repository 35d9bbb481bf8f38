// See bench.h.
#include "ops/common/bench.h"

#include <charconv>

#include "core/error.h"

namespace longhand {

std::vector<BenchEntry>& bench_table() {
  static std::vector<BenchEntry> table;
  return table;
}

BenchSizes::BenchSizes(const std::string& text) {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find(',', at), text.size()), equals = text.find('=', at);
    int64_t value = 0;
    bool whole = equals != std::string::npos && equals < end && equals > at;
    if (whole) {
      const auto [stop, status] = std::from_chars(text.data() + equals + 1, text.data() + end, value);
      whole = status == std::errc{} && stop == text.data() + end && value >= 1;
    }
    if (!whole || !sizes_.emplace(text.substr(at, equals - at), value).second)
      throw ConfigError("bench: a shape is written as names and numbers",
                        {{"given", text}, {"at", text.substr(at, end - at)}, {"expected", "B=4,T=4096: each name once, numbers from 1"}});
    at = end + 1;
  }
}

int64_t BenchSizes::get(const std::string& name, int64_t otherwise) const {
  known_.insert(name);
  const auto found = sizes_.find(name);
  return found == sizes_.end() ? otherwise : found->second;
}

void BenchSizes::require_all_known(const std::string& op) const {
  std::string names;
  for (const std::string& name : known_) names += (names.empty() ? "" : ", ") + name;
  for (const auto& [name, value] : sizes_)
    if (!known_.contains(name)) throw ConfigError("bench: an op has no such size", {{"op", op}, {"given", name}, {"known", names}});
}

std::string shape_text(const std::vector<std::pair<const char*, int64_t>>& sizes) {
  std::string text;
  for (const auto& [name, size] : sizes) text += (text.empty() ? "" : " ") + (name + std::to_string(size));
  return text;
}

}  // namespace longhand
