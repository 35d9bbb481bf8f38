// Lays out error messages; see error.h.
#include "core/error.h"

#include <algorithm>
#include <string_view>

namespace longhand {
namespace {

// The path below the source root: "ops/rmsnorm/rmsnorm.cpp:31".
std::string place(const std::source_location& at) {
  std::string_view file = at.file_name();
  for (std::string_view room : {"core/", "autograd/", "ops/", "models/", "data/", "train/", "eval/", "tools/", "tests/"}) {
    std::string needle(1, '/');
    needle += room;
    if (const auto pos = file.rfind(needle); pos != std::string_view::npos) {
      file = file.substr(pos + 1);
      break;
    }
  }
  return std::string(file) + ":" + std::to_string(at.line());
}

std::string lay_out(const std::string& sentence, const std::vector<ErrorRow>& rows, const std::source_location& at) {
  std::size_t width = 2;
  for (const auto& row : rows) width = std::max(width, row.name.size());
  std::string text = sentence;
  auto add = [&](const std::string& name, const std::string& value) {
    text += "\n  " + name + std::string(width - name.size() + 2, ' ') + value;
  };
  for (const auto& row : rows)
    if (row.name != "try") add(row.name, row.value);
  add("at", place(at));
  for (const auto& row : rows)
    if (row.name == "try") add(row.name, row.value);
  return text;
}

}  // namespace

Error::Error(const std::string& sentence, std::vector<ErrorRow> rows, const std::source_location& at)
    : std::runtime_error(lay_out(sentence, rows, at)), rows_(std::move(rows)) {}

}  // namespace longhand
