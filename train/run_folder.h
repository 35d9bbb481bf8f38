// RunFolder: where a run keeps what it makes.
//   config.toml                      the resolved recipe
//   metrics.jsonl                    one JSON object a logged step
//   checkpoints/step-N/              a model folder plus what resuming needs; complete or absent
//   checkpoints/latest               a link to the newest of them; moves last
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace longhand {

class RunFolder {
 public:
  /// Makes RUNS/NAME. errors  FileError when it exists, saying how to resume it
  static RunFolder create(const std::string& runs, const std::string& name);

  /// Opens a run by the path of its folder, or by its name in RUNS, and removes what an interrupted checkpoint left.
  /// errors  FileError when there is no such run
  static RunFolder open(const std::string& runs, const std::string& path_or_name);

  const std::string& path() const { return path_; }
  std::string name() const;
  std::string file(const std::string& name) const { return path_ + "/" + name; }

  /// The newest complete checkpoint, or nothing.
  std::optional<int64_t> latest_step() const;
  std::string checkpoint(int64_t step) const;

  /// `fill` writes all files of a checkpoint into the folder it is given, which then takes its final name; `latest` moves; older
  /// checkpoints beyond `keep_last` are removed (0: none are).
  void write_checkpoint(int64_t step, int64_t keep_last, const std::function<void(const std::string& folder)>& fill) const;

  /// Drops the lines of metrics.jsonl behind `step`, and a last line that was cut off.
  void truncate_metrics(int64_t step) const;

 private:
  explicit RunFolder(std::string path) : path_(std::move(path)) {}
  std::vector<int64_t> steps() const;  // of all complete checkpoints, ascending
  std::string path_;
};

}  // namespace longhand
