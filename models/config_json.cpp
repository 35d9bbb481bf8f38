// See config_json.h.
#include "models/config_json.h"

#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/strict_json.h"

namespace longhand {
namespace {

constexpr double kLargestInteger = 0x1p31;  // far above any size: products of two fit in 64 bits

// Puts quotes around Infinity, -Infinity and NaN where they stand outside strings.
std::string quote_bare_words(const std::string& text) {
  std::string out;
  out.reserve(text.size());
  bool in_string = false;
  for (std::size_t i = 0; i < text.size();) {
    if (in_string) {
      if (text[i] == '\\' && i + 1 < text.size()) out += text[i++];
      else if (text[i] == '"') in_string = false;
      out += text[i++];
      continue;
    }
    bool replaced = false;
    for (const char* word : {"-Infinity", "Infinity", "NaN"}) {
      if (text.compare(i, std::string::traits_type::length(word), word) != 0) continue;
      out += '"' + std::string(word) + '"';
      i += std::string::traits_type::length(word);
      replaced = true;
      break;
    }
    if (replaced) continue;
    in_string = text[i] == '"';
    out += text[i++];
  }
  return out;
}

}  // namespace

nlohmann::ordered_json parse_python_json(const std::string& text, const std::string& file) {
  return parse_strict_json<nlohmann::ordered_json>(quote_bare_words(text), "config: the file", file);
}

std::string python_json_text(const nlohmann::ordered_json& json) {
  std::string text = json.dump(2);
  for (const std::string word : {"-Infinity", "Infinity"}) {
    const std::string quoted = '"' + word + '"';
    for (std::size_t at = text.find(quoted); at != std::string::npos; at = text.find(quoted, at)) text.replace(at, quoted.size(), word);
  }
  return text + "\n";
}

nlohmann::ordered_json json_from_number(double value) {
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  return value;
}

double json_number(const nlohmann::ordered_json& value) {
  if (value.is_number()) return value.get<double>();
  // transformers 5 writes {"__float__": "Infinity"} where older versions wrote the bare word.
  const bool wrapped = value.is_object() && value.size() == 1 && value.contains("__float__");
  const nlohmann::ordered_json& word = wrapped ? value.at("__float__") : value;
  if (word == "Infinity") return std::numeric_limits<double>::infinity();
  if (word == "-Infinity") return -std::numeric_limits<double>::infinity();
  return std::numeric_limits<double>::quiet_NaN();
}

void ConfigReader::refuse(const std::string& key, const std::string& expected) const {
  throw ConfigError(
      "config: a value that longhand cannot follow",
      {{"file", file_}, {"key", key}, {"given", object_.contains(key) ? object_.at(key).dump() : "(absent)"}, {"expected", expected}});
}

nlohmann::ordered_json ConfigReader::value(const std::string& key) {
  asked_.insert(key);
  return has(key) ? object_.at(key) : nlohmann::ordered_json();
}

double ConfigReader::number(const std::string& key, double fallback) {
  const auto v = value(key);
  if (v.is_null()) return fallback;
  const double n = json_number(v);
  if (std::isnan(n)) refuse(key, "a number");
  return n;
}

int64_t ConfigReader::integer(const std::string& key, int64_t fallback) {
  const auto v = value(key);
  if (v.is_null()) return fallback;
  const auto n = v.is_number_integer() ? v.get<double>() : std::numeric_limits<double>::infinity();
  if (std::abs(n) > kLargestInteger) refuse(key, "a whole number, not over 2^31");
  return static_cast<int64_t>(n);
}

bool ConfigReader::boolean(const std::string& key, bool fallback) {
  const auto v = value(key);
  if (v.is_null()) return fallback;
  if (!v.is_boolean()) refuse(key, "true or false");
  return v.get<bool>();
}

std::string ConfigReader::text(const std::string& key, const std::string& fallback) {
  const auto v = value(key);
  if (v.is_null()) return fallback;
  if (!v.is_string()) refuse(key, "a string");
  return v.get<std::string>();
}

void ConfigReader::require(const std::string& key, const nlohmann::ordered_json& only) {
  const auto v = value(key);
  if (!v.is_null() && v != only) refuse(key, only.dump());
}

void ConfigReader::refuse_unknown() const {
  for (const auto& [key, v] : object_.items())
    if (!asked_.contains(key)) refuse(key, "no such key");
}

}  // namespace longhand
