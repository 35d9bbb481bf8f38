// Reading run folders; see run_folder.h.
#include "eval/run_folder.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"
#include "core/files.h"
#include "core/strict_json.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::optional<int64_t> whole_number(const std::string& text) {
  int64_t value = 0;
  std::string digits = text;
  std::erase(digits, '_');  // TOML allows 2_048
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc{} || end != digits.data() + digits.size()) return std::nullopt;
  return value;
}

std::string trim(std::string_view text) {
  const auto begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos) return "";
  return std::string(text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1));
}

// A line up to its comment; a # inside a string is no comment.
std::string without_comment(const std::string& line) {
  char quote = 0;
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (quote == '"' && line[i] == '\\') {
      ++i;
    } else if (quote != 0) {
      if (line[i] == quote) quote = 0;
    } else if (line[i] == '"' || line[i] == '\'') {
      quote = line[i];
    } else if (line[i] == '#') {
      return trim(line.substr(0, i));
    }
  }
  return trim(line);
}

std::string without_quotes(const std::string& value) {
  if (value.size() < 2 || (value.front() != '"' && value.front() != '\'') || value.back() != value.front()) return value;
  if (value.front() == '\'') return value.substr(1, value.size() - 2);
  const Json text = Json::parse(value, nullptr, false);  // a TOML basic string is a JSON string for the escapes that paths need
  return text.is_string() ? text.get<std::string>() : value.substr(1, value.size() - 2);
}

}  // namespace

std::string folder_name(const std::string& path) {
  const fs::path whole = fs::absolute(path).lexically_normal();
  return (whole.has_filename() ? whole.filename() : whole.parent_path().filename()).string();
}

FlatConfig parse_flat_config(const std::string& text) {
  FlatConfig config;
  std::string section, line;
  std::istringstream in(text);
  while (std::getline(in, line)) {
    line = without_comment(line);
    if (line.empty()) continue;
    if (line.front() == '[' && line.back() == ']') {
      section = trim(std::string_view(line).substr(1, line.size() - 2));
      continue;
    }
    const auto equals = line.find('=');
    if (equals == std::string::npos || equals == 0) {
      ++config.lines_left_out;
      continue;
    }
    const std::string key = without_quotes(trim(std::string_view(line).substr(0, equals)));
    config.values.emplace_back(section.empty() ? key : section + "." + key,
                               without_quotes(trim(std::string_view(line).substr(equals + 1))));
  }
  return config;
}

std::optional<std::string> FlatConfig::get(const std::string& key) const {
  for (const auto& [name, value] : values)
    if (name == key) return value;
  return std::nullopt;
}

RunRecord read_run_record(const ModelPlace& place) {
  RunRecord record;
  if (const fs::path file = fs::path(place.model_folder) / "training.json"; fs::exists(file)) {
    const Json json = parse_strict_json(read_text_file(file.string()), "model: training.json", file.string());
    const auto text = [&](const Json& object, const char* key) -> std::optional<std::string> {
      if (!object.is_object() || !object.contains(key) || !object[key].is_string()) return std::nullopt;
      return object[key].get<std::string>();
    };
    if (json.contains("tokenizer") && json["tokenizer"].is_object()) {
      record.tokenizer = text(json["tokenizer"], "path");
      if (!record.tokenizer) record.tokenizer = text(json["tokenizer"], "name");
      record.fingerprint = text(json["tokenizer"], "fingerprint");
    } else {
      record.tokenizer = text(json, "tokenizer");
      record.fingerprint = text(json, "tokenizer_fingerprint");
    }
  }
  if (place.run_folder.empty()) return record;
  if (const fs::path file = fs::path(place.run_folder) / "config.toml"; fs::exists(file)) {
    const FlatConfig config = parse_flat_config(read_text_file(file.string()));
    if (const auto tokenizer = config.get("data.tokenizer"); tokenizer && !tokenizer->empty()) record.tokenizer = tokenizer;
    for (const char* key : {"train.length", "data.length", "length"})
      if (const auto length = config.get(key); length && !record.train_length) record.train_length = whole_number(*length);
  }
  return record;
}

Metrics read_metrics(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw FileError("report: the run has no metrics", {{"file", path}});
  Metrics metrics;
  int64_t bad = 0, stepless = 0, first_bad = 0;
  for (std::string line; std::getline(in, line);) {
    ++metrics.lines;
    if (trim(line).empty()) continue;
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object()) {
      if (bad++ == 0) first_bad = metrics.lines;
      continue;
    }
    if (!json.contains("step") || !json["step"].is_number_integer()) {
      ++stepless;
      continue;
    }
    const int64_t step = json["step"].get<int64_t>();
    for (const auto& [name, value] : json.items())
      if (name != "step" && value.is_number() && std::isfinite(value.get<double>())) metrics.values[name][step] = value.get<double>();
  }
  if (bad > 0)
    metrics.problems.push_back(
        fmt::format("{}: {} line{} not JSON and left out, the first is line {}", path, bad, bad == 1 ? " is" : "s are", first_bad));
  if (stepless > 0)
    metrics.problems.push_back(fmt::format("{}: {} line{} no step and left out", path, stepless, stepless == 1 ? " has" : "s have"));
  return metrics;
}

}  // namespace longhand
