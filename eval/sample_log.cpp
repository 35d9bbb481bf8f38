// See sample_log.h.
#include "eval/sample_log.h"

#include <fmt/format.h>
#include <sys/file.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string_view>

#include "core/error.h"
#include "core/files.h"
#include "core/strict_json.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;

class Fnv {
 public:
  void add(uint8_t byte) { hash_ = (hash_ ^ byte) * 0x100000001b3u; }
  std::string text() const { return fmt::format("{:016x}", hash_); }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

}  // namespace

std::string settings_hash(const nlohmann::ordered_json& settings) {
  Fnv hash;
  for (const char c : settings.dump()) hash.add(static_cast<uint8_t>(c));
  return hash.text();
}

std::string prompt_hash(const std::vector<int32_t>& tokens) {
  Fnv hash;
  for (const int32_t token : tokens)
    for (int shift = 0; shift < 32; shift += 8) hash.add(static_cast<uint8_t>(static_cast<uint32_t>(token) >> shift));
  return hash.text();
}

SampleLog::SampleLog(const std::string& path, const nlohmann::ordered_json& settings, int64_t samples, bool fresh)
    : path_(path), settings_(settings_hash(settings)), results_(static_cast<std::size_t>(samples)) {
  if (path_.empty()) return;
  if (const fs::path folder = fs::path(path_).parent_path(); !folder.empty()) fs::create_directories(folder);
  file_ = std::fopen(path_.c_str(), "ab");
  if (file_ == nullptr) throw FileError("eval: the file of samples cannot be written", {{"file", path_}, {"reason", std::strerror(errno)}});
  try {
    const int failure = ::flock(::fileno(file_), LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
    if (failure != 0 && failure != EWOULDBLOCK)
      fmt::print(stderr, "warning: {} cannot be locked ({}): see to it yourself that only one process writes it\n", path_,
                 std::strerror(failure));
    if (failure == EWOULDBLOCK)
      throw FileError("eval: another process writes the file of samples", {{"file", path_}, {"try", "wait for its end, or another --out"}});
    if (fresh) fs::resize_file(path_, 0);
    read();
  } catch (...) {
    std::fclose(file_);
    throw;
  }
}

SampleLog::~SampleLog() {
  if (file_ != nullptr) std::fclose(file_);
}

void SampleLog::read() {
  std::string text = read_text_file(path_);
  if (const auto end = text.rfind('\n'); end == std::string::npos || end + 1 < text.size()) {
    text.resize(end == std::string::npos ? 0 : end + 1);  // a last line that was being written when the program ended
    fs::resize_file(path_, text.size());
  }
  int64_t line = 0;
  for (std::string_view rest = text; !rest.empty();) {
    const auto end = rest.find('\n');
    ++line;
    const auto refuse = [&](const std::string& reason) {
      throw FileError("eval: a line of the file of samples cannot be used", {{"file", path_},
                                                                             {"line", std::to_string(line)},
                                                                             {"reason", reason},
                                                                             {"try", "--fresh, which writes it anew, or another --out"}});
    };
    auto result = parse_strict_json<nlohmann::ordered_json>(rest.substr(0, end), fmt::format("eval: line {} of the samples", line), path_);
    rest.remove_prefix(end + 1);
    const auto sample = result.find("sample"), settings = result.find("settings");
    if (sample == result.end() || !sample->is_number_integer() || settings == result.end() || !settings->is_string())
      refuse("it has no sample or no settings");
    const auto target = result.find("target"), correct = result.find("correct");
    if (!result.contains("output") || (target == result.end()) != (correct == result.end()) ||
        (correct != result.end() && !correct->is_boolean()))
      refuse("it has no result");
    if (settings->get<std::string>() != settings_) refuse("it was written with other settings, another model or other data");
    const auto number = sample->get<int64_t>();
    if (number < 0 || number >= std::ssize(results_)) refuse("there is no such sample");
    auto& kept = results_[static_cast<std::size_t>(number)];
    if (!kept.is_null()) refuse("the sample stands there twice");
    kept = std::move(result);
    ++count_;
  }
  found_ = count_;
}

void SampleLog::add(int64_t sample, const nlohmann::ordered_json& result) {
  nlohmann::ordered_json line{{"sample", sample}, {"settings", settings_}};
  line.update(result);
  if (file_ != nullptr) {
    // Texts of models may end within a character, which JSON cannot hold.
    const std::string text = line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
    if (std::fwrite(text.data(), 1, text.size(), file_) != text.size() || std::fflush(file_) != 0)
      throw FileError("eval: the file of samples cannot be written", {{"file", path_}});
  }
  results_[static_cast<std::size_t>(sample)] = std::move(line);
  ++count_;
}

}  // namespace longhand
