// What a run says while it runs: a line of metrics.jsonl, and a line for the person watching.
#pragma once
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

namespace longhand {

/// One logged step. Steps are counted from 1: the numbers after `step` optimizer steps, with the rates of the last of them.
struct LoggedStep {
  int64_t step = 0;
  int64_t tokens = 0;  // trained on so far
  double loss = 0;     // nats per token, of this step's batch
  double lr = 0, weight_decay = 0;
  double grad_norm = 0;            // before clipping
  int64_t skipped = 0;             // steps left out so far because loss or grad_norm was not finite
  double tokens_per_s = 0;         // since the logged step before
  double mfu = 0;                  // model flops / bf16 peak of the device; 0 when the peak is unknown
  double elapsed_s = 0;            // of the whole run, resumed parts added
  int64_t peak_memory_bytes = 0;   // most bytes of tensors alive at once on the device, since the program started
  std::optional<double> val_loss;  // nats per token
  std::string device;
  std::string first_non_finite;  // of a step that was left out: op, layer and index, as far as they are known
};

/// As one JSON object without a line break; numbers that are not finite become null.
std::string to_json(const LoggedStep& step);

/// Appends lines to metrics.jsonl, each handed to the system at once.
class MetricsFile {
 public:
  /// errors  FileError when it cannot be opened or a line cannot be written
  explicit MetricsFile(const std::string& path);
  ~MetricsFile();
  MetricsFile(const MetricsFile&) = delete;
  MetricsFile& operator=(const MetricsFile&) = delete;
  void write(const LoggedStep& step);
  /// Returns when the lines written so far are on the disk.
  void sync();

 private:
  std::string path_;
  std::FILE* file_;
};

/// "1m 05s", "2h 03m", "3d 04h".
std::string duration_text(double seconds);

/// "512 bytes", "1.5 KiB", "1.2 GiB".
std::string bytes_text(int64_t bytes);

/// On a terminal one line that renews itself; elsewhere a plain line each time.
class ProgressLine {
 public:
  /// out  null: silent
  explicit ProgressLine(std::FILE* out);
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void show(const LoggedStep& step, int64_t steps, double seconds_left);
  /// A line of its own that stays.
  void say(const std::string& text);

 private:
  void clear();
  std::FILE* out_;
  bool terminal_;
  std::size_t shown_ = 0;  // characters of the renewing line
};

}  // namespace longhand
