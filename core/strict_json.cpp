// nlohmann-json with what it lets pass watched while it parses.
#include "core/strict_json.h"

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "core/error.h"
#include "core/plain_text.h"

namespace longhand {
namespace {

using Json = nlohmann::json;
constexpr int kDeepestNesting = 8;

// Deeper texts end the parse, before a tower of brackets can cost memory or stack.
struct TooDeep {};

}  // namespace

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
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kDeepestNesting) throw TooDeep{};
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second)
      throw refuse("has a key that stands twice", {{"key", printable(parsed.get<std::string>())}});
    return true;
  };
  Json json;
  try {
    json = Json::parse(text.begin(), text.end(), watch);
  } catch (const TooDeep&) {
    throw refuse("is nested deeper than 8 levels");
  } catch (const Json::exception& problem) {
    throw refuse("is not valid JSON", {{"reason", problem.what()}});
  }
  if (!json.is_object()) throw refuse("is not a JSON object");
  return json;
}

}  // namespace longhand
