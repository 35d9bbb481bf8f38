// See run_folder.h.
#include "train/run_folder.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "models/model_place.h"
#include "train/run_lock.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
constexpr const char* kUnfinished = "unfinished-";

void make_folders(const std::string& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error)
    throw FileError("run: the run folder cannot be written to",
                    {{"folder", path}, {"reason", error.message()}, {"try", "another folder or disk, or change its permissions"}});
}

bool is_unfinished(const std::string& file) {
  return file.starts_with(kUnfinished) || file.find(".tmp-") != std::string::npos;
}

// What processes that were killed left half written.
void remove_unfinished(const std::string& folder) {
  std::vector<fs::path> gone;
  for (const auto& entry : fs::directory_iterator(folder))
    if (is_unfinished(entry.path().filename().string())) gone.push_back(entry.path());
  for (const fs::path& path : gone) fs::remove_all(path);
}

// An error's first line as a row, and its rows but for the way out.
std::vector<ErrorRow> cause(const std::exception& error) {
  const std::string text = error.what();
  std::vector<ErrorRow> rows{{"because", text.substr(0, text.find('\n'))}};
  if (const auto* ours = dynamic_cast<const Error*>(&error))
    for (const ErrorRow& row : ours->rows())
      if (row.name != "try") rows.push_back(row);
  return rows;
}

// Whether a folder holds nothing but what a start makes before its config.toml.
bool is_bare(const std::string& path) {
  for (const auto& entry : fs::directory_iterator(path)) {
    const std::string name = entry.path().filename().string();
    if (name != RunLock::kFile && !is_unfinished(name) && !(name == "checkpoints" && entry.is_directory() && fs::is_empty(entry.path())))
      return false;
  }
  return true;
}

}  // namespace

RunFolder::RunFolder(std::string path, std::shared_ptr<const RunLock> lock) : path_(std::move(path)), lock_(std::move(lock)) {}

RunFolder::RunFolder(std::string path) : path_(std::move(path)), lock_(std::make_shared<const RunLock>(path_)) {}

RunFolder RunFolder::beside(const std::string& path) {
  return RunFolder(path, nullptr);
}

RunFolder RunFolder::create(const std::string& runs, const std::string& name) {
  const std::string path = runs + "/" + name;
  const auto require_free = [&] {
    if (fs::exists(path) && !(fs::is_directory(path) && is_bare(path)))
      throw FileError(
          "run: a run of this name exists already",
          {{"folder", path}, {"try", "--resume " + name + " to continue it, --name OTHER to start another, or remove the folder"}});
  };
  require_free();  // before anything is made in somebody's folder
  make_folders(path + "/checkpoints");
  RunFolder run(path);
  require_free();  // another process may have had a whole run here between the look and the lock
  remove_unfinished(path);
  sync_folder(path);
  sync_folder(runs);
  return run;
}

RunFolder RunFolder::open(const std::string& runs, const std::string& path_or_name) {
  for (std::string path : {path_or_name, runs + "/" + path_or_name}) {
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    if (!fs::exists(path + "/config.toml")) continue;
    RunFolder run(path);  // first: what looks unfinished may be another process's work
    make_folders(path + "/checkpoints");
    remove_unfinished(path);
    remove_unfinished(path + "/checkpoints");
    return run;
  }
  throw FileError("run: there is no such run",
                  {{"looked for", path_or_name + "/config.toml, " + runs + "/" + path_or_name + "/config.toml"},
                   {"try", "paths are relative to the current directory, " + fs::current_path().string()}});
}

std::string RunFolder::name() const {
  return fs::weakly_canonical(path_).filename().string();
}

std::string RunFolder::checkpoint(int64_t step) const {
  return checkpoint_folder(path_, step);
}

std::optional<int64_t> RunFolder::latest_step() const {
  return latest_checkpoint(path_);
}

// A checkpoint leaves its name before its files go, so that no folder of that name is ever half there.
void RunFolder::remove_checkpoint(int64_t step) const {
  const std::string unfinished = path_ + "/checkpoints/" + kUnfinished + "removed";
  fs::remove_all(unfinished);
  fs::rename(checkpoint(step), unfinished);
  fs::remove_all(unfinished);
}

// A link, or on a disk without links a file; what a copy of the run made of it gives way.
void RunFolder::move_latest(const std::string& name) const {
  const std::string folder = path_ + "/checkpoints", latest = folder + "/latest", unfinished = folder + "/" + kUnfinished,
                    link = unfinished + "latest", copy = unfinished + "copy";
  if (fs::is_directory(latest) && !fs::is_symlink(latest)) fs::rename(latest, copy);
  fs::remove(link);
  std::error_code no_links;
  fs::create_directory_symlink(name, link, no_links);
  no_links ? write_file_atomically(latest, name + "\n") : fs::rename(link, latest);
  sync_folder(folder);
  fs::remove_all(copy);
}

void RunFolder::write_checkpoint(int64_t step, const KeptCheckpoints& keep, const std::function<void(const std::string&)>& fill) const {
  const std::string folder = path_ + "/checkpoints", name = "step-" + std::to_string(step);
  const std::string unfinished = folder + "/" + kUnfinished + name;
  try {
    fs::remove_all(unfinished);
    fs::create_directories(unfinished);
    fill(unfinished);
    sync_folder(unfinished);
    if (fs::exists(checkpoint(step))) remove_checkpoint(step);  // a step that is written again: it was not the latest
    fs::rename(unfinished, checkpoint(step));
    sync_folder(folder);
    move_latest(name);
  } catch (const std::exception& error) {
    std::error_code ignored;
    fs::remove_all(unfinished, ignored);  // gives the space back
    fs::remove(folder + "/" + kUnfinished + "latest", ignored);
    const auto last = latest_step();
    std::vector<ErrorRow> rows = cause(error);
    rows.push_back({"checkpoint", last ? checkpoint(*last) + " is the latest still" : "none yet"});
    rows.push_back({"try", "mend that (make room, make the folder writable); then longhand train --resume " + path_});
    throw FileError("run: the checkpoint of step " + std::to_string(step) + " cannot be written", rows);
  }
  if (keep.last <= 0) return;
  auto all = checkpoint_steps(path_);
  all.erase(std::remove_if(all.begin(), all.end(), [&](int64_t s) { return s > step; }),
            all.end());  // of a later part of the run that was left behind
  for (std::size_t i = 0; i + static_cast<std::size_t>(keep.last) < all.size(); ++i)
    if (keep.every <= 0 || all[i] % keep.every != 0) remove_checkpoint(all[i]);
}

void RunFolder::truncate_metrics(int64_t step) const {
  const std::string path = file("metrics.jsonl");
  if (!fs::exists(path)) return;
  std::string text = read_text_file(path, std::size_t{4} << 30);
  // Zeros are what a power failure can leave of lines that were not synced; those up to a checkpoint are.
  text.resize(std::min(text.find('\0'), text.size()));
  std::string kept;
  for (std::size_t at = 0; at < text.size();) {
    const auto end = text.find('\n', at);
    if (end == std::string::npos) break;  // the last line was cut off
    const auto line = nlohmann::json::parse(text.begin() + static_cast<std::ptrdiff_t>(at), text.begin() + static_cast<std::ptrdiff_t>(end),
                                            nullptr, false);
    if (!line.is_object() || !line.contains("step") || !line["step"].is_number_integer())
      throw FileError("run: a line of the metrics is not a JSON object with a step", {{"file", path}, {"byte", std::to_string(at)}});
    if (line["step"].get<int64_t>() <= step) kept += text.substr(at, end + 1 - at);
    at = end + 1;
  }
  if (kept.size() != fs::file_size(path)) write_file_atomically(path, kept);
}

}  // namespace longhand
