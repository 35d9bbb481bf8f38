// One line of JSON for each sample of an evaluation, written as it is done, so that an interrupted evaluation can go on.
#pragma once
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace longhand {

/// FNV-1a of 64 bits over tokens, as 16 hexadecimal digits: tells prompts apart in a log.
std::string prompt_hash(const std::vector<int32_t>& tokens);

/// The same of settings: what stands in every line.
std::string settings_hash(const nlohmann::ordered_json& settings);

class SampleLog {
 public:
  /// Opens `path`; "": nothing is written. The lines of an earlier evaluation with the same settings are kept, a last line that was cut off
  /// is taken away. The file is locked as long as it is open.
  /// settings  everything that decides the samples' results; its hash stands in every line as "settings"
  /// samples   how many there are: "sample" is 0 .. samples - 1
  /// fresh     what the file holds is removed first
  /// errors    FileError for a line that cannot be read, or that was written with other settings, and where another process has the file
  SampleLog(const std::string& path, const nlohmann::ordered_json& settings, int64_t samples, bool fresh = false);
  ~SampleLog();
  SampleLog(const SampleLog&) = delete;
  SampleLog& operator=(const SampleLog&) = delete;

  bool done(int64_t sample) const { return !results_[static_cast<std::size_t>(sample)].is_null(); }
  int64_t count() const { return count_; }
  int64_t found() const { return found_; }  // done already when the log was opened

  /// Keeps the result of a sample, which gets "sample" and "settings" in front, and writes its line out. It has an "output", and "correct"
  /// where it has a "target".
  /// errors  FileError when it cannot be written
  void add(int64_t sample, const nlohmann::ordered_json& result);
  /// What was added or found for a sample; null where it is not done.
  const nlohmann::ordered_json& result(int64_t sample) const { return results_[static_cast<std::size_t>(sample)]; }

 private:
  void read();

  std::string path_, settings_;
  std::vector<nlohmann::ordered_json> results_;
  int64_t count_ = 0, found_ = 0;
  std::FILE* file_ = nullptr;
};

}  // namespace longhand
