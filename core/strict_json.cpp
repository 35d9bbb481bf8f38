// nlohmann-json with what it lets pass watched while it parses.
#include "core/strict_json.h"

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "core/error.h"
#include "core/plain_text.h"

namespace longhand {
namespace {

constexpr int kDeepestNesting = 8;

// Deeper texts end the parse, before a tower of brackets can cost memory or stack.
struct TooDeep {};

}  // namespace

template <class Json>
Json parse_strict_json(std::string_view text, const std::string& what, const std::string& file) {
  const auto refuse = [&](const std::string& rule, std::vector<ErrorRow> rows = {}) {
    rows.insert(rows.begin(), {"file", file});
    return FileError(what + " " + rule, std::move(rows));
  };
  // A NUL ends nlohmann's input early, and it skips a byte order mark.
  if (text.find('\0') != std::string_view::npos) throw refuse("has a NUL byte");
  const auto first = text.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos || (text[first] != '{' && text[first] != '[')) throw refuse("does not begin with {");
  std::vector<std::set<std::string>> keys;
  using Event = typename Json::parse_event_t;
  const auto watch = [&](int depth, Event event, Json& parsed) {
    if (depth > kDeepestNesting) throw TooDeep{};
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event != Event::key) return true;
    const auto key = parsed.template get<std::string>();
    if (!keys.back().insert(key).second) throw refuse("has a key that stands twice", {{"key", printable(key)}});
    return true;
  };
  Json json;
  try {
    json = Json::parse(text.begin(), text.end(), watch);
  } catch (const TooDeep&) {
    throw refuse("is nested deeper than 8 levels");
  } catch (const typename Json::exception& problem) {
    throw refuse("is not valid JSON", {{"reason", problem.what()}});
  }
  if (!json.is_object()) throw refuse("is not a JSON object");
  return json;
}

template nlohmann::json parse_strict_json(std::string_view, const std::string&, const std::string&);
template nlohmann::ordered_json parse_strict_json(std::string_view, const std::string&, const std::string&);

}  // namespace longhand
