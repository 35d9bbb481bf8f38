// See babi.h.
#include "data/tasks/babi.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <map>

#include "core/error.h"
#include "data/byte_source.h"
#include "data/unicode.h"

namespace longhand {
namespace {

constexpr int64_t kLongestStory = 1000;  // lines, where published ones have some hundreds: each of its questions holds the facts before it
constexpr std::size_t kLargestFile = std::size_t{32} << 20;  // of text: the largest of the published files has 20 MB
constexpr std::size_t kPiece = std::size_t{1} << 16;

std::string read_all(const std::string& path) {
  ByteSource source(path, {.held_whole = true});
  std::string text;
  for (std::size_t got = 1; got > 0;) {
    const std::size_t at = text.size();
    if (at + kPiece > kLargestFile) throw FileError("babi: the file is too large", {{"file", path}, {"limit", "32 MiB of text"}});
    text.resize(at + kPiece);
    got = source.read(text.data() + at, kPiece);
    text.resize(at + got);
  }
  return text;
}

std::string_view stripped(std::string_view text) {
  const auto begin = text.find_first_not_of(" \r\t"), end = text.find_last_not_of(" \r\t");
  return begin == std::string_view::npos ? std::string_view() : text.substr(begin, end - begin + 1);
}

// A whole number at the beginning of `text`, which is taken off; -1 where there is none.
int64_t take_number(std::string_view& text) {
  int64_t number = -1;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc()) return -1;
  text.remove_prefix(static_cast<std::size_t>(stop - text.data()));
  return number;
}

class Reader {
 public:
  Reader(const std::string& path, int64_t most_lines) : path_(path), most_lines_(most_lines) {}

  std::vector<BabiSample> read() {
    const std::string text = read_all(path_);
    if (find_invalid_utf8(text)) throw FileError("babi: the file is not UTF-8", {{"file", path_}});
    for (std::string_view rest = text; !rest.empty();) {
      const auto end = std::min(rest.find('\n'), rest.size());
      ++line_;
      take(rest.substr(0, end));
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
    return std::move(samples_);
  }

 private:
  [[noreturn]] void refuse(const std::string& reason) const {
    throw FileError("babi: a line that is none of a story", {{"file", path_}, {"line", std::to_string(line_)}, {"reason", reason}});
  }

  void take(std::string_view line) {
    if (stripped(line).empty()) return;
    const int64_t number = take_number(line);
    if (number < 1 || (!line.empty() && line.front() != ' ' && line.front() != '\t' && line.front() != '\r'))
      refuse("it does not begin with a number and a blank");
    if (number == 1) facts_.clear(), fact_of_.clear();
    else if (number != last_ + 1) refuse("its number is " + std::to_string(number) + " and the one before is " + std::to_string(last_));
    if (number > kLongestStory) refuse("a story of more than 1,000 lines");
    last_ = number;
    const auto tab = line.find('\t');
    if (tab == std::string_view::npos) {
      fact_of_[number] = std::ssize(facts_);
      facts_.emplace_back(stripped(line));
      if (facts_.back().empty()) refuse("it has no text");
      return;
    }
    const auto second = line.find('\t', tab + 1);
    if (second == std::string_view::npos || line.find('\t', second + 1) != std::string_view::npos) refuse("a question has two tabs");
    BabiSample sample{
        facts_, std::string(stripped(line.substr(0, tab))), std::string(stripped(line.substr(tab + 1, second - tab - 1))), {}};
    if (sample.question.empty() || sample.answer.empty()) refuse("a question or an answer without text");
    for (std::string_view rest = stripped(line.substr(second + 1)); !rest.empty(); rest = stripped(rest)) {
      const auto fact = fact_of_.find(take_number(rest));
      if (fact == fact_of_.end()) refuse("a supporting line that is no fact before the question");
      sample.supporting.push_back(fact->second);
    }
    if (most_lines_ == 0 || std::ssize(facts_) + 1 <= most_lines_) samples_.push_back(std::move(sample));
  }

  const std::string& path_;
  int64_t most_lines_, line_ = 0, last_ = 0;
  std::vector<std::string> facts_;
  std::map<int64_t, int64_t> fact_of_;  // number of a line -> index of its fact
  std::vector<BabiSample> samples_;
};

}  // namespace

std::vector<BabiSample> read_babi(const std::string& path, int64_t most_lines) {
  return Reader(path, most_lines).read();
}

std::string babi_task_of(const std::string& path) {
  const std::string name = std::filesystem::path(path).filename().string();
  const auto end = name.find('_');
  std::string_view digits = std::string_view(name).substr(0, end == std::string::npos ? 0 : end);
  const std::string task(digits);
  if (digits.starts_with("qa")) {
    digits.remove_prefix(2);
    if (take_number(digits) >= 1 && digits.empty()) return task;
  }
  throw ConfigError("babi: the file's name does not say which task it is",
                    {{"file", path}, {"expected", "a name such as qa1_..._test.txt"}});
}

}  // namespace longhand
