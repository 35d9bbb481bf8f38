// RunLock: one process at a time works on a run. The kernel holds the lock and drops it with the process, so a crash leaves none behind.
#pragma once
#include <string>

namespace longhand {

class RunLock {
 public:
  /// Takes FOLDER/lock, whose text names the process that has it. Does not wait.
  /// errors  FileError naming that process when another one works on the run; FileError with the system's reason when the file cannot be
  /// made
  explicit RunLock(const std::string& folder);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

  static constexpr const char* kFile = "lock";

 private:
  void take(const std::string& folder, const std::string& path);
  bool is_named(const std::string& path) const;  // whether the file that is held is the one of this name
  int descriptor_ = -1;
};

}  // namespace longhand
