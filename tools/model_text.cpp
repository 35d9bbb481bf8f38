// See model_text.h.
#include "tools/model_text.h"

#include <fmt/core.h>

#include <filesystem>
#include <set>

#include "models/checkpoint.h"

namespace longhand {

std::string grouped(int64_t n) {
  std::string digits = std::to_string(n);
  for (auto i = static_cast<std::ptrdiff_t>(digits.size()) - 3; i > 0; i -= 3) digits.insert(static_cast<std::size_t>(i), ",");
  return digits;
}

std::string dtypes_text(const std::map<std::string, Tensor>& tensors) {
  std::map<std::string, int> counts;
  for (const auto& [name, tensor] : tensors) ++counts[name_of(tensor.dtype())];
  if (counts.size() == 1) return counts.begin()->first;
  std::string text;
  for (const auto& [dtype, count] : counts) text += fmt::format("{}{} {}", text.empty() ? "" : ", ", count, dtype);
  return text;
}

void print_written_model(const std::string& folder) {
  const StoredModel model = open_model(folder);
  fmt::print("wrote {}\n  {:<28}{}\n  {:<28}{}\n  {:<28}{}, {}\n", folder, "family", model.config.family, "layout", model.layout->name,
             "tensors", model.weights.stored.tensors.size(), dtypes_text(model.weights.stored.tensors));
  std::set<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) files.insert(entry.path());
  for (const auto& file : files)
    fmt::print("  {:<28}{} bytes\n", file.filename().string(), grouped(static_cast<int64_t>(std::filesystem::file_size(file))));
}

}  // namespace longhand
