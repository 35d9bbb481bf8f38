// See run_folder.h.
#include "train/run_folder.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
constexpr const char* kUnfinished = "unfinished-";

std::optional<int64_t> step_of(const std::string& folder) {
  constexpr std::string_view kPrefix = "step-";
  int64_t step = 0;
  if (!folder.starts_with(kPrefix)) return std::nullopt;
  const char* end = folder.data() + folder.size();
  const auto parsed = std::from_chars(folder.data() + kPrefix.size(), end, step);
  return parsed.ec == std::errc{} && parsed.ptr == end ? std::optional(step) : std::nullopt;
}

}  // namespace

RunFolder RunFolder::create(const std::string& runs, const std::string& name) {
  const std::string path = runs + "/" + name;
  if (fs::exists(path))
    throw FileError(
        "run: a run of this name exists already",
        {{"folder", path}, {"try", "--resume " + name + " to continue it, --name OTHER to start another, or remove the folder"}});
  fs::create_directories(path + "/checkpoints");
  return RunFolder(path);
}

RunFolder RunFolder::open(const std::string& runs, const std::string& path_or_name) {
  for (std::string path : {path_or_name, runs + "/" + path_or_name}) {
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    if (!fs::exists(path + "/config.toml")) continue;
    fs::create_directories(path + "/checkpoints");
    for (const auto& entry : fs::directory_iterator(path + "/checkpoints"))
      if (entry.path().filename().string().starts_with(kUnfinished)) fs::remove_all(entry.path());
    return RunFolder(path);
  }
  throw FileError("run: there is no such run",
                  {{"looked for", path_or_name + "/config.toml, " + runs + "/" + path_or_name + "/config.toml"},
                   {"try", "paths are relative to the current directory, " + fs::current_path().string()}});
}

std::string RunFolder::name() const {
  return fs::weakly_canonical(path_).filename().string();
}

std::string RunFolder::checkpoint(int64_t step) const {
  return path_ + "/checkpoints/step-" + std::to_string(step);
}

std::vector<int64_t> RunFolder::steps() const {
  std::vector<int64_t> out;
  for (const auto& entry : fs::directory_iterator(path_ + "/checkpoints"))
    if (const auto step = step_of(entry.path().filename().string()); step && !entry.is_symlink()) out.push_back(*step);
  std::sort(out.begin(), out.end());
  return out;
}

std::optional<int64_t> RunFolder::latest_step() const {
  const fs::path latest = fs::path(path_) / "checkpoints" / "latest";
  if (fs::exists(latest)) return step_of(fs::canonical(latest).filename().string());
  const auto all = steps();  // a run that ended between the folder's rename and the link's
  return all.empty() ? std::nullopt : std::optional(all.back());
}

void RunFolder::write_checkpoint(int64_t step, int64_t keep_last, const std::function<void(const std::string&)>& fill) const {
  const std::string folder = path_ + "/checkpoints", name = "step-" + std::to_string(step);
  const std::string unfinished = folder + "/" + kUnfinished + name, complete = folder + "/" + name;
  fs::remove_all(unfinished);
  fs::create_directories(unfinished);
  fill(unfinished);
  sync_folder(unfinished);
  fs::remove_all(complete);  // only a step that is written again, when it was not the latest
  fs::rename(unfinished, complete);
  sync_folder(folder);
  const std::string link = folder + "/" + kUnfinished + "latest";
  fs::remove(link);
  fs::create_directory_symlink(name, link);
  fs::rename(link, folder + "/latest");
  sync_folder(folder);
  if (keep_last <= 0) return;
  auto all = steps();
  all.erase(std::remove_if(all.begin(), all.end(), [&](int64_t s) { return s > step; }),
            all.end());  // of a later part of the run that was left behind
  for (std::size_t i = 0; i + static_cast<std::size_t>(keep_last) < all.size(); ++i) fs::remove_all(checkpoint(all[i]));
}

void RunFolder::truncate_metrics(int64_t step) const {
  const std::string path = file("metrics.jsonl");
  if (!fs::exists(path)) return;
  const std::string text = read_text_file(path, std::size_t{4} << 30);
  std::string kept;
  for (std::size_t at = 0; at < text.size();) {
    const auto end = text.find('\n', at);
    if (end == std::string::npos) break;  // the last line was cut off
    const auto line = nlohmann::json::parse(text.begin() + static_cast<std::ptrdiff_t>(at), text.begin() + static_cast<std::ptrdiff_t>(end),
                                            nullptr, false);
    if (!line.is_object() || !line.contains("step"))
      throw FileError("run: a line of the metrics is not a JSON object with a step", {{"file", path}, {"byte", std::to_string(at)}});
    if (line["step"].get<int64_t>() <= step) kept += text.substr(at, end + 1 - at);
    at = end + 1;
  }
  if (kept.size() != text.size()) write_file_atomically(path, kept);
}

}  // namespace longhand
