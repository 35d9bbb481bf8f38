// CSV and logarithmic bins; see position_curve.h.
#include "eval/position_curve.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "core/error.h"
#include "core/files.h"
#include "eval/csv_table.h"
#include "eval/perplexity.h"

namespace longhand {
namespace {

constexpr const char *kHeader = "position,tokens,loss,perplexity", *kBinHeader = "first,last,tokens,loss,perplexity";
constexpr const char* kSpreadHeader = "first,last,sequences,loss,standard_error";

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

void append_lines(const PositionLoss& loss, int bins_per_octave, const std::function<void(std::string_view)>& write) {
  std::string text = std::string(bins_per_octave > 0 ? kBinHeader : kHeader) + "\n";
  const auto flush = [&](std::size_t when) {
    if (text.size() > when) write(text), text.clear();
  };
  if (bins_per_octave > 0) {
    for (const PositionBin& bin : octave_bins(position_bins(loss), bins_per_octave)) {
      fmt::format_to(std::back_inserter(text), "{},{},{:.0f},{:.9g},{:.9g}\n", bin.first, bin.last, bin.tokens, bin.loss, bin.perplexity());
      flush(1u << 20);
    }
  } else {
    for (int64_t p = 1; p <= loss.positions(); ++p) {
      fmt::format_to(std::back_inserter(text), "{},{},{:.9g},{:.9g}\n", p, loss.tokens[static_cast<std::size_t>(p - 1)], loss.loss(p),
                     loss.perplexity(p));
      flush(1u << 20);
    }
  }
  flush(0);
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

std::vector<int64_t> octave_ends(int64_t positions, const std::vector<int64_t>& ends) {
  std::vector<int64_t> all{positions};
  for (int64_t end = 1; end < positions; end *= 2) all.push_back(end);
  for (const int64_t end : ends)
    if (end >= 1 && end < positions) all.push_back(end);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

std::string spread_csv(const PositionLoss& loss) {
  std::string text = std::string(kSpreadHeader) + "\n";
  for (const PositionSpread& s : loss.spreads)
    if (s.sequences > 0) text += fmt::format("{},{},{},{:.9g},{:.9g}\n", s.first, s.last, s.sequences, s.loss, s.standard_error());
  return text;
}

std::vector<PositionSpread> read_spread_csv(const std::string& path) {
  std::vector<PositionSpread> spreads;
  read_csv(path, kSpreadHeader, [&](const CsvRow& row) {
    PositionSpread s{row.count(0), row.count(1), row.count(2), row.finite(3), 0};
    const double error = row.number(4);
    const auto n = static_cast<double>(s.sequences);
    if (s.first > s.last || s.sequences < 1 || error < 0) row.refuse("not a range of positions with sequences and an error");
    if (s.sequences > 1) s.squares = error * error * n * (n - 1);
    spreads.push_back(s);
  });
  return spreads;
}

std::string position_csv(const PositionLoss& loss, int bins_per_octave) {
  std::string text;
  append_lines(loss, bins_per_octave, [&](std::string_view part) { text += part; });
  return text;
}

void write_position_csv(const std::string& path, const PositionLoss& loss, int bins_per_octave) {
  write_file_atomically(path,
                        [&](OutputFile& file) { append_lines(loss, bins_per_octave, [&](std::string_view part) { file.write(part); }); });
}

std::vector<PositionBin> read_position_csv(const std::string& path, int per_octave, const std::vector<int64_t>& ends) {
  BinJoiner joiner(per_octave, ends, 1);
  int64_t before = 0;
  read_csv(path, {kHeader, kBinHeader}, [&](const CsvRow& row) {
    const std::size_t at = row.size() == 5 ? 1 : 0;  // of the last position
    const int64_t first = row.count(0), last = row.count(at), tokens = row.count(at + 1);
    if (first <= before || last < first) row.refuse("the positions do not rise");
    before = last;
    if (tokens > 0) joiner.add({first, last, static_cast<double>(tokens), row.finite(at + 2)});
  });
  auto bins = joiner.finish();
  if (bins.empty()) throw FileError("eval: no position has a token", {{"file", path}});
  return bins;
}

}  // namespace longhand
