// RunFolder: where a run keeps what it makes.
//   config.toml                      the resolved recipe
//   metrics.jsonl                    one JSON object a logged step
//   checkpoints/step-N/              a model folder plus what resuming needs; complete or absent
//   checkpoints/latest               a link to the newest of them, or a file that names it where the disk has no links; moves last
//   lock                             held by the process that works on the run; see run_lock.h
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace longhand {

class RunLock;

/// Which checkpoints stay when a new one is written: the newest `last` (0: all), and those of steps that are multiples of `every` (0:
/// none).
struct KeptCheckpoints {
  int64_t last = 0, every = 0;
};

/// A run folder that this process alone works on, as long as the object or a copy of it lives.
class RunFolder {
 public:
  /// Makes RUNS/NAME; what a start left that was killed before its config.toml stood is taken over.
  /// errors  FileError when it exists, saying how to resume it; when it cannot be made; those of RunLock
  static RunFolder create(const std::string& runs, const std::string& name);

  /// Opens a run by the path of its folder, or by its name in RUNS, and removes what an interrupted checkpoint left.
  /// errors  FileError when there is no such run; those of RunLock
  static RunFolder open(const std::string& runs, const std::string& path_or_name);

  /// The folder as the other processes of a run see it that one of them works on; it is not locked, and only read.
  static RunFolder beside(const std::string& path);

  const std::string& path() const { return path_; }
  std::string name() const;
  std::string file(const std::string& name) const { return path_ + "/" + name; }

  /// The latest checkpoint, or nothing: models/model_place.h.
  std::optional<int64_t> latest_step() const;
  std::string checkpoint(int64_t step) const;

  /// `fill` writes all files of a checkpoint into the folder it is given, which then takes its final name; `latest` moves; older
  /// checkpoints that are not to be kept are removed. Ended at any instant, it leaves the checkpoint before or this one as the latest.
  /// errors  FileError with the reason when it cannot be written (a full disk); nothing half written stays, and the one before is the
  ///         latest still
  void write_checkpoint(int64_t step, const KeptCheckpoints& keep, const std::function<void(const std::string& folder)>& fill) const;

  /// Drops the lines of metrics.jsonl behind `step`, and a last line that was cut off.
  void truncate_metrics(int64_t step) const;

 private:
  RunFolder(std::string path, std::shared_ptr<const RunLock> lock);
  explicit RunFolder(std::string path);  // locks it
  void move_latest(const std::string& name) const;
  void remove_checkpoint(int64_t step) const;
  std::string path_;
  std::shared_ptr<const RunLock> lock_;
};

}  // namespace longhand
