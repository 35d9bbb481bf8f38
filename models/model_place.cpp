// See model_place.h.
#include "models/model_place.h"

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "core/error.h"
#include "core/files.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;

// 12 for "step-12", with white space behind it or not.
std::optional<int64_t> step_of(std::string_view name) {
  constexpr std::string_view kPrefix = "step-";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  name.remove_prefix(kPrefix.size());
  name = name.substr(0, name.find_last_not_of(" \t\r\n") + 1);
  int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  return error == std::errc{} && end == name.data() + name.size() ? std::optional(step) : std::nullopt;
}

}  // namespace

std::string checkpoint_folder(const std::string& run, int64_t step) {
  return run + "/checkpoints/step-" + std::to_string(step);
}

std::vector<int64_t> checkpoint_steps(const std::string& run) {
  std::vector<int64_t> steps;
  const fs::path checkpoints = fs::path(run) / "checkpoints";
  if (!fs::is_directory(checkpoints)) return steps;
  for (const auto& entry : fs::directory_iterator(checkpoints))
    if (const auto step = step_of(entry.path().filename().string()); step && entry.is_directory() && !entry.is_symlink())
      steps.push_back(*step);
  std::sort(steps.begin(), steps.end());
  return steps;
}

std::optional<int64_t> latest_checkpoint(const std::string& run) {
  const fs::path latest = fs::path(run) / "checkpoints" / "latest";
  std::optional<int64_t> named;
  if (fs::is_directory(latest)) named = step_of(fs::canonical(latest).filename().string());  // a copy of a run may have a folder here
  if (fs::is_regular_file(latest)) named = step_of(fs::path(read_text_file(latest.string(), 4096)).filename().string());
  if (named && fs::is_directory(checkpoint_folder(run, *named))) return named;
  const auto steps = checkpoint_steps(run);
  if (steps.empty() && fs::is_directory(latest))
    throw FileError("model: a run whose latest checkpoint is a folder, not a link, and no step-N beside it",
                    {{"folder", latest.string()}, {"try", "rename it to step-N, with the step that its training.json names"}});
  return steps.empty() ? std::nullopt : std::optional(steps.back());
}

ModelPlace find_model(const std::string& path) {
  if (!fs::is_directory(path))
    throw FileError("model: there is no such folder",
                    {{"model", path}, {"try", "paths are relative to the current directory, " + fs::current_path().string()}});
  if (fs::exists(fs::path(path) / "config.json")) {
    const fs::path folder = fs::canonical(path), parent = folder.parent_path();
    if (parent.filename() != "checkpoints") return {path, "", -1};
    return {path, parent.parent_path().string(), step_of(folder.filename().string()).value_or(-1)};
  }
  const auto step = latest_checkpoint(path);
  const std::string folder = step ? checkpoint_folder(path, *step) : "";
  if (!step || !fs::exists(fs::path(folder) / "config.json"))
    throw FileError("model: the folder holds neither a model nor a run",
                    {{"model", path},
                     {"expected", "config.json, or checkpoints/step-N/config.json"},
                     {"found", step ? folder + " without a config.json" : "no checkpoints"}});
  return {folder, path, *step};
}

}  // namespace longhand
