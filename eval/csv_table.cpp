// See csv_table.h.
#include "eval/csv_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>

#include "core/error.h"

namespace longhand {
namespace {

template <class T>
bool parse(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} && end == text.data() + text.size();
}

void split_at_commas(std::string_view line, std::vector<std::string_view>& parts) {
  parts.clear();
  for (std::size_t comma; (comma = line.find(',')) != std::string_view::npos; line.remove_prefix(comma + 1))
    parts.push_back(line.substr(0, comma));
  parts.push_back(line);
}

}  // namespace

void CsvRow::refuse(const std::string& reason) const {
  throw FileError("eval: not a table of this measure", {{"file", *path_}, {"line", std::to_string(line_)}, {"reason", reason}});
}

int64_t CsvRow::count(std::size_t column) const {
  int64_t value = 0;
  if (!parse(values_[column], value) || value < 0) refuse(fmt::format("not a count in column {}: {}", column + 1, values_[column]));
  return value;
}

double CsvRow::number(std::size_t column) const {
  double value = 0;
  if (!parse(values_[column], value)) refuse(fmt::format("not a number in column {}: {}", column + 1, values_[column]));
  return value;
}

double CsvRow::finite(std::size_t column) const {
  const double value = number(column);
  if (!std::isfinite(value)) refuse(fmt::format("not a finite number in column {}: {}", column + 1, values_[column]));
  return value;
}

void read_csv(const std::string& path, const std::vector<std::string>& headers, const std::function<void(const CsvRow&)>& take) {
  std::ifstream in(path);
  if (!in) throw FileError("eval: cannot open a table", {{"file", path}});
  CsvRow row;
  row.path_ = &path;
  std::string line;
  row.line_ = 1;
  std::getline(in, line);
  const auto header = std::find(headers.begin(), headers.end(), line);
  if (header == headers.end()) row.refuse(fmt::format("the first line is not \"{}\"", headers.front()));
  const auto columns = static_cast<std::size_t>(std::count(header->begin(), header->end(), ',')) + 1;
  bool any = false;
  while (std::getline(in, line)) {
    ++row.line_;
    if (line.empty()) continue;
    split_at_commas(line, row.values_);
    if (row.size() != columns) row.refuse(fmt::format("{} values where {} are expected", row.size(), columns));
    take(row);
    any = true;
  }
  if (in.bad()) row.refuse("reading failed");
  if (!any) row.refuse("no line behind the header");
}

}  // namespace longhand
