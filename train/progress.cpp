// See progress.h.
#include "train/progress.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"

namespace longhand {

std::string to_json(const LoggedStep& s) {
  nlohmann::ordered_json line{{"step", s.step},
                              {"tokens", s.tokens},
                              {"loss", s.loss},
                              {"lr", s.lr},
                              {"weight_decay", s.weight_decay},
                              {"grad_norm", s.grad_norm},
                              {"tokens_per_s", std::round(s.tokens_per_s * 10) / 10},
                              {"elapsed_s", std::round(s.elapsed_s * 1000) / 1000},
                              {"peak_memory_bytes", s.peak_memory_bytes}};
  if (s.mfu > 0) line["mfu"] = s.mfu;
  if (s.val_loss) line["val_loss"] = *s.val_loss;
  if (s.skipped > 0) line["skipped"] = s.skipped;
  if (!s.first_non_finite.empty()) line["first_non_finite"] = s.first_non_finite;
  line["device"] = s.device;
  return line.dump();
}

MetricsFile::MetricsFile(const std::string& path) : path_(path), file_(nullptr) {
  // Not through a link: a run folder that somebody else made must not lead to a file outside it.
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
  if (descriptor >= 0 && (file_ = ::fdopen(descriptor, "a")) == nullptr) ::close(descriptor);
  if (file_ == nullptr) throw FileError("metrics: cannot open", {{"file", path}, {"reason", std::strerror(errno)}});
  sync_folder(std::filesystem::path(path).parent_path().string());
}
MetricsFile::~MetricsFile() {
  std::fclose(file_);
}

void MetricsFile::write(const LoggedStep& step) {
  const std::string line = to_json(step) + "\n";
  if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fflush(file_) != 0)
    throw FileError("metrics: cannot write",
                    {{"file", path_}, {"reason", std::strerror(errno)}, {"try", "make room, then resume the run"}});
}

void MetricsFile::sync() {
  if (::fsync(::fileno(file_)) != 0)
    throw FileError("metrics: cannot sync", {{"file", path_}, {"reason", std::strerror(errno)}, {"try", "make room, then resume the run"}});
}

std::string duration_text(double seconds) {
  const auto s = static_cast<int64_t>(std::max(seconds, 0.0) + 0.5);
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m {:02}s", s / 60, s % 60);
  if (s < 48 * 3600) return fmt::format("{}h {:02}m", s / 3600, s / 60 % 60);
  return fmt::format("{}d {:02}h", s / 86400, s / 3600 % 24);
}

std::string bytes_text(int64_t bytes) {
  if (bytes < 1024) return fmt::format("{} bytes", bytes);
  auto value = static_cast<double>(bytes) / 1024;
  const char* unit = "KiB";
  for (const char* larger : {"MiB", "GiB"}) {
    if (value < 1024) break;
    value /= 1024, unit = larger;
  }
  return fmt::format("{:.1f} {}", value, unit);
}

ProgressLine::ProgressLine(std::FILE* out) : out_(out), terminal_(out != nullptr && ::isatty(::fileno(out)) != 0) {}

ProgressLine::~ProgressLine() {
  if (shown_ > 0) std::fputc('\n', out_);
}

void ProgressLine::show(const LoggedStep& s, int64_t steps, double seconds_left) {
  if (out_ == nullptr) return;
  std::string text = fmt::format("step {}/{}  loss {:.4f}  lr {:.2e}  grad_norm {:.3f}  {:.0f} tokens/s", s.step, steps, s.loss, s.lr,
                                 s.grad_norm, s.tokens_per_s);
  if (s.mfu > 0) text += fmt::format("  MFU {:.1f}%", 100 * s.mfu);
  if (s.val_loss) text += fmt::format("  val_loss {:.4f}", *s.val_loss);
  if (s.skipped > 0) text += fmt::format("  skipped {}", s.skipped);
  text += s.step < steps ? fmt::format("  {} left", duration_text(seconds_left)) : fmt::format("  took {}", duration_text(s.elapsed_s));
  if (!terminal_ || s.val_loss) {
    say(text);
    return;
  }
  const std::size_t length = text.size();
  if (length < shown_) text.append(shown_ - length, ' ');
  fmt::print(out_, "\r{}", text);
  std::fflush(out_);
  shown_ = length;
}

void ProgressLine::say(const std::string& text) {
  if (out_ == nullptr) return;
  clear();
  fmt::print(out_, "{}\n", text);
  std::fflush(out_);
}

void ProgressLine::clear() {
  if (shown_ == 0) return;
  fmt::print(out_, "\r{}\r", std::string(shown_, ' '));
  shown_ = 0;
}

}  // namespace longhand
