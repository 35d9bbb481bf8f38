// Reading config.json files as other libraries write them: Python's Infinity and NaN, absent keys, keys of the wrong type.
#pragma once
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

namespace longhand {

/// JSON as Python's json module writes it: the bare words Infinity, -Infinity and NaN stand as strings in the result (see ConfigReader).
/// errors  those of parse_strict_json(): a text that is not one object, nested deeper than 8 levels, with a key twice
nlohmann::ordered_json parse_python_json(const std::string& text, const std::string& file);

/// The opposite: indented, the strings "Infinity" and "-Infinity" as bare words.
std::string python_json_text(const nlohmann::ordered_json& json);

/// Typed access to the keys of a configuration that remembers which were asked for.
class ConfigReader {
 public:
  ConfigReader(const nlohmann::ordered_json& object, std::string file) : object_(object), file_(std::move(file)) {}

  bool has(const std::string& key) const { return object_.contains(key) && !object_.at(key).is_null(); }
  double number(const std::string& key, double fallback);     // also "Infinity"
  int64_t integer(const std::string& key, int64_t fallback);  // from -2^31 to 2^31
  bool boolean(const std::string& key, bool fallback);
  std::string text(const std::string& key, const std::string& fallback);
  nlohmann::ordered_json value(const std::string& key);  // null when absent
  void ignore(const std::string& key) { asked_.insert(key); }

  /// Throws ConfigError unless the key is absent or equal to `only`: for options that longhand does not compute otherwise.
  void require(const std::string& key, const nlohmann::ordered_json& only);
  /// Throws ConfigError for the first key that nobody asked for.
  void refuse_unknown() const;
  [[noreturn]] void refuse(const std::string& key, const std::string& expected) const;

 private:
  const nlohmann::ordered_json& object_;
  std::string file_;
  std::set<std::string> asked_;
};

/// A JSON value as a number; the strings "Infinity" and "-Infinity" count, alone or as {"__float__": "Infinity"}. NaN when it is none.
double json_number(const nlohmann::ordered_json& value);

/// `value` in a form that python_json_text writes and json_number reads.
nlohmann::ordered_json json_from_number(double value);

}  // namespace longhand
