// See weight_files.h.
#include "models/weight_files.h"

#include <fmt/core.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/plain_text.h"
#include "core/safetensors.h"
#include "core/strict_json.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
constexpr std::size_t kLargestIndex = 64 << 20;
constexpr const char* kIndexEnding = ".index.json";

bool is_torch_file(const std::string& path) {
  return path.ends_with(".bin") || path.ends_with(".pt") || path.ends_with(".pth");
}

NamedTensors read_one(const std::string& path, Checksums checksums) {
  return is_torch_file(path) ? read_torch_file(path, checksums) : read_safetensors(path);
}

class IndexReader {
 public:
  IndexReader(const std::string& path, Checksums checksums)
      : path_(path), folder_(fs::path(path).parent_path().string()), checksums_(checksums) {}

  WeightFiles read() {
    const std::string text = read_text_file(path_, kLargestIndex);
    const nlohmann::json index = parse_strict_json(text, "index: the file", path_);
    const auto map = index.find("weight_map");
    if (map == index.end() || !map->is_object()) refuse("no object weight_map");
    std::map<std::string, std::set<std::string>> names_of;  // by shard
    for (const auto& [name, shard] : map->items()) {
      if (!shard.is_string()) refuse("a value of weight_map is not a string", {{"tensor", printable(name)}});
      names_of[shard.get<std::string>()].insert(name);
    }
    WeightFiles result;
    result.stored.path = path_;
    for (const auto& [shard, names] : names_of) require_shard(shard, names.size());
    for (const auto& [shard, names] : names_of) add_shard(shard, names, result);
    check_total(index, result);
    return result;
  }

 private:
  [[noreturn]] void refuse(const std::string& rule, std::vector<ErrorRow> rows = {}) const {
    rows.insert(rows.begin(), {"file", path_});
    throw FileError("index: " + rule, std::move(rows));
  }

  std::string path_of(const std::string& shard) const { return (fs::path(folder_) / shard).string(); }

  void require_shard(const std::string& shard, std::size_t tensors) const {
    const bool plain = !shard.empty() && shard.find('/') == std::string::npos && shard.find('\\') == std::string::npos &&
                       shard.find("..") == std::string::npos && printable(shard) == shard;
    if (!plain) refuse("the name of a shard is no plain file name", {{"shard", printable(shard)}});
    if (!shard.ends_with(".safetensors") && !is_torch_file(shard)) refuse("a shard is neither .safetensors nor .bin", {{"shard", shard}});
    if (!fs::exists(path_of(shard)))
      refuse("a shard is missing", {{"shard", shard}, {"tensors", std::to_string(tensors)}, {"try", "fetch every file of the folder"}});
  }

  void add_shard(const std::string& shard, const std::set<std::string>& names, WeightFiles& result) const {
    NamedTensors part = read_one(path_of(shard), checksums_);
    for (const std::string& name : names)
      if (!part.contains(name)) refuse("a tensor is not in its shard", {{"tensor", printable(name)}, {"shard", shard}});
    for (auto& [name, tensor] : part.tensors) {
      if (!names.contains(name)) refuse("a shard has a tensor that the index does not list there", {{"tensor", name}, {"shard", shard}});
      result.stored.tensors.emplace(name, std::move(tensor));
    }
    result.stored.metadata.merge(part.metadata);
    result.stored.files.insert(result.stored.files.end(), part.files.begin(), part.files.end());
    result.paths.push_back(path_of(shard));
  }

  // Libraries count tensors of one storage once or each time.
  void check_total(const nlohmann::json& index, WeightFiles& result) const {
    const auto metadata = index.find("metadata");
    if (metadata == index.end() || metadata->is_null()) return;
    if (!metadata->is_object()) refuse("metadata is not an object");
    const auto total = metadata->find("total_size");
    if (total == metadata->end()) return;
    int64_t each = 0, once = 0;
    std::set<std::pair<const void*, int64_t>> seen;
    for (const auto& [name, tensor] : result.stored.tensors) {
      const int64_t bytes = tensor.numel() * size_of(tensor.dtype());
      each += bytes;
      if (seen.emplace(tensor.raw(), bytes).second) once += bytes;
    }
    if (!total->is_number() || (total->get<double>() != static_cast<double>(each) && total->get<double>() != static_cast<double>(once)))
      result.doubt = fmt::format("{}: metadata.total_size says {}, the tensors have {} bytes", path_, total->dump(), each);
  }

  std::string path_, folder_;
  Checksums checksums_;
};

}  // namespace

int64_t WeightFiles::file_bytes() const {
  int64_t bytes = 0;
  for (const std::string& path : paths) bytes += static_cast<int64_t>(fs::file_size(path));
  return bytes;
}

void WeightFiles::warn() const {
  for (const std::string& other : left_out) fmt::print(stderr, "warning: {} is not read: {} comes first\n", other, stored.path);
  if (!doubt.empty()) fmt::print(stderr, "warning: {}\n", doubt);
}

std::vector<std::string> weight_file_names() {
  return {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"};
}

WeightFiles read_weight_files(const std::string& folder, Checksums checksums) {
  std::vector<std::string> found;
  std::string looked_for;
  for (const std::string& name : weight_file_names()) {
    looked_for += (looked_for.empty() ? "" : ", ") + name;
    if (fs::exists(folder + "/" + name)) found.push_back(folder + "/" + name);
  }
  if (found.empty()) throw FileError("model: no weights", {{"folder", folder}, {"looked for", looked_for}});
  WeightFiles result = read_tensor_file(found.front(), checksums);
  result.left_out.assign(found.begin() + 1, found.end());
  return result;
}

WeightFiles read_tensor_file(const std::string& path, Checksums checksums) {
  if (path.ends_with(kIndexEnding)) return IndexReader(path, checksums).read();
  if (!path.ends_with(".safetensors") && !is_torch_file(path))
    throw FileError("file: not a kind of tensor file that longhand knows",
                    {{"file", path}, {"expected", ".safetensors, .bin, .pt, .pth or .index.json"}});
  WeightFiles result;
  result.stored = read_one(path, checksums);
  result.paths = {path};
  return result;
}

}  // namespace longhand
