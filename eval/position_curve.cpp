// CSV and logarithmic bins; see position_curve.h.
#include "eval/position_curve.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <iterator>
#include <optional>

#include "core/error.h"
#include "core/files.h"
#include "eval/perplexity.h"

namespace longhand {
namespace {

constexpr std::string_view kHeader = "position,tokens,loss,perplexity";

// Joins bins one by one as they come, so that a file of any length can be read in constant memory.
class BinJoiner {
 public:
  BinJoiner(int per_octave, std::vector<int64_t> ends, int64_t first) : per_octave_(per_octave), ends_(std::move(ends)), first_(first) {
    if (per_octave_ < 1) throw ValueError("eval: bins need at least one step an octave", {{"per_octave", std::to_string(per_octave_)}});
    std::sort(ends_.begin(), ends_.end());
  }

  void add(const PositionBin& bin) {
    if (bin.last > end_) {
      close();
      end_ = end_for(bin.last);
    }
    open_.push_back(bin);
    if (open_.size() == 256) open_ = {merge(open_)};
  }

  std::vector<PositionBin> finish() {
    close();
    return std::move(joined_);
  }

 private:
  void close() {
    if (!open_.empty()) joined_.push_back(merge(open_));
    open_.clear();
  }

  // Where the step that holds `position` ends.
  int64_t end_for(int64_t position) const {
    int64_t end = first_;
    for (auto k = static_cast<int64_t>(std::log2(static_cast<double>(position)) * per_octave_); end < position; ++k)
      end = static_cast<int64_t>(std::exp2(static_cast<double>(k) / per_octave_) * (1 + 1e-12));  // exact at powers of two
    const auto cut = std::lower_bound(ends_.begin(), ends_.end(), position);
    return cut == ends_.end() ? end : std::min(end, *cut);
  }

  int per_octave_;
  std::vector<int64_t> ends_;
  int64_t first_, end_ = 0;
  std::vector<PositionBin> open_, joined_;
};

template <class T>
std::optional<T> parse(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::vector<std::string_view> split_at_commas(std::string_view line) {
  std::vector<std::string_view> parts;
  for (std::size_t comma; (comma = line.find(',')) != std::string_view::npos; line.remove_prefix(comma + 1))
    parts.push_back(line.substr(0, comma));
  parts.push_back(line);
  return parts;
}

void append_lines(const PositionLoss& loss, const std::function<void(std::string_view)>& write) {
  std::string text(kHeader);
  text += '\n';
  for (int64_t p = 1; p <= loss.positions(); ++p) {
    fmt::format_to(std::back_inserter(text), "{},{},{:.9g},{:.9g}\n", p, loss.tokens[static_cast<std::size_t>(p - 1)], loss.loss(p),
                   loss.perplexity(p));
    if (text.size() > (1u << 20)) write(text), text.clear();
  }
  write(text);
}

}  // namespace

double PositionBin::perplexity() const {
  return std::exp(loss);
}
double PositionBin::centre() const {
  return std::sqrt(static_cast<double>(first) * static_cast<double>(last));
}

PositionBin merge(const std::vector<PositionBin>& bins) {
  if (bins.empty()) throw ValueError("eval: no bins to put together");
  PositionBin all{bins.front().first, bins.back().last, 0, 0};
  double sum = 0;
  for (const PositionBin& bin : bins) all.tokens += bin.tokens, sum += bin.tokens * bin.loss;
  all.loss = sum / all.tokens;
  return all;
}

std::vector<PositionBin> position_bins(const PositionLoss& loss) {
  std::vector<PositionBin> bins;
  bins.reserve(loss.tokens.size());
  for (int64_t p = 1; p <= loss.positions(); ++p)
    if (const auto tokens = loss.tokens[static_cast<std::size_t>(p - 1)]; tokens > 0)
      bins.push_back({p, p, static_cast<double>(tokens), loss.loss(p)});
  return bins;
}

std::vector<PositionBin> octave_bins(const std::vector<PositionBin>& bins, int per_octave, const std::vector<int64_t>& ends,
                                     int64_t first) {
  BinJoiner joiner(per_octave, ends, first);
  for (const PositionBin& bin : bins) joiner.add(bin);
  return joiner.finish();
}

std::string position_csv(const PositionLoss& loss) {
  std::string text;
  append_lines(loss, [&](std::string_view part) { text += part; });
  return text;
}

void write_position_csv(const std::string& path, const PositionLoss& loss) {
  write_file_atomically(path, [&](OutputFile& file) { append_lines(loss, [&](std::string_view part) { file.write(part); }); });
}

std::vector<PositionBin> read_position_csv(const std::string& path, int per_octave, const std::vector<int64_t>& ends) {
  std::ifstream in(path);
  if (!in) throw FileError("eval: cannot open a table of losses by position", {{"file", path}});
  int64_t number = 1, before = 0;
  const auto refuse = [&](const std::string& reason) {
    throw FileError("eval: not a table of losses by position", {{"file", path}, {"line", std::to_string(number)}, {"reason", reason}});
  };
  std::string line;
  if (!std::getline(in, line) || line != kHeader) refuse(fmt::format("the first line is not \"{}\"", kHeader));
  BinJoiner joiner(per_octave, ends, 1);
  while (std::getline(in, line)) {
    ++number;
    if (line.empty()) continue;
    const auto parts = split_at_commas(line);
    if (parts.size() != 4) refuse(fmt::format("{} values where 4 are expected", parts.size()));
    const auto position = parse<int64_t>(parts[0]), tokens = parse<int64_t>(parts[1]);
    const auto loss = parse<double>(parts[2]);
    if (!position || !tokens || *position < 1 || *tokens < 0) refuse("position or tokens is not a count");
    if (*position <= before) refuse("the positions do not rise");
    before = *position;
    if (*tokens == 0) continue;
    if (!loss || !std::isfinite(*loss)) refuse(fmt::format("the loss is not a finite number: {}", parts[2]));
    joiner.add({*position, *position, static_cast<double>(*tokens), *loss});
  }
  if (in.bad()) refuse("reading failed");
  auto bins = joiner.finish();
  if (bins.empty()) refuse("no position has a token");
  return bins;
}

}  // namespace longhand
