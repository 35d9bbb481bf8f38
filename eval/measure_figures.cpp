// See measure_figures.h.
#include "eval/measure_figures.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "core/error.h"
#include "core/files.h"
#include "eval/plot.h"

namespace longhand {
namespace {

constexpr int64_t kFarBeyond = 16;      // training lengths
constexpr double kFewPercent = 0.5;     // of a state's elements; octaves at the ends of a histogram that hold less are not shown
constexpr std::size_t kFewPoints = 16;  // a longer curve has only the powers of two in its table

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Runs = std::vector<RunData>;

// --- reading ---------------------------------------------------------------------------------------------------

Measurement read_description(const fs::path& csv, RunData& run) {
  Measurement found;
  found.file = csv.filename().string();
  found.data = csv.stem().string();
  const fs::path description = fs::path(csv).replace_extension(".json");
  if (!fs::exists(description)) return found;
  const Json json = Json::parse(read_text_file(description.string()), nullptr, false);
  if (!json.is_object()) {
    run.problems.push_back(
        fmt::format("{} is not a JSON object; the curve beside it is shown without its description", description.string()));
    return found;
  }
  const auto number = [&](const char* key, int64_t otherwise) {
    return json.contains(key) && json[key].is_number_integer() ? json[key].get<int64_t>() : otherwise;
  };
  const auto text = [&](const char* key, const std::string& otherwise) {
    return json.contains(key) && json[key].is_string() ? json[key].get<std::string>() : otherwise;
  };
  found.data = text("data_name", found.data);
  found.documents = text("documents", "");
  found.distance = text("distance", "");
  found.context = number("context", 0);
  found.sequences = number("sequences", 0);
  found.step = number("step", -1);
  if (const int64_t length = number("train_length", 0); length > 0 && !run.train_length) run.train_length = length;
  return found;
}

// Adds every RUN/eval/NAME-*.csv to `list`; read(path, entry) fills in what is particular to the measure.
template <class T, class Read>
void read_all(RunData& run, const std::string& name, std::vector<T>& list, const Read& read) {
  std::vector<fs::path> tables;
  const fs::path folder = fs::path(run.folder) / "eval";
  if (!fs::is_directory(folder)) return;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const fs::path& path = entry.path();
    const std::string second = path.stem().extension().string();  // NAME.histogram.csv and the like belong to NAME.csv
    if (path.extension() == ".csv" && path.filename().string().starts_with(name + "-") && second != ".histogram" && second != ".curve" &&
        second != ".spread")
      tables.push_back(path);
  }
  std::sort(tables.begin(), tables.end());
  for (const fs::path& table : tables) {
    try {
      T entry;
      static_cast<Measurement&>(entry) = read_description(table, run);
      read(table.string(), entry);
      list.push_back(std::move(entry));
    } catch (const Error& error) {
      run.problems.push_back(error_sentence(error));
    }
  }
  std::stable_sort(list.begin(), list.end(), [](const T& a, const T& b) { return a.step < b.step; });
}

// --- curves that share a figure --------------------------------------------------------------------------------

template <class T>
struct Member {
  std::size_t run;
  const T* what;
  std::string name;  // of its curve
  int color;
  bool dashed;
};

// The measurements of all runs in groups of the same data, documents, context and distance, with names that tell them apart.
template <class T>
std::vector<std::vector<Member<T>>> groups_of(const Runs& runs, std::vector<T> RunData::*list) {
  std::map<std::tuple<std::string, std::string, int64_t, std::string>, std::vector<Member<T>>> groups;
  for (std::size_t r = 0; r < runs.size(); ++r)
    for (const T& m : runs[r].*list) groups[{m.data, m.documents, m.context, m.distance}].push_back({r, &m, "", 0, runs[r].dashed});
  std::vector<std::vector<Member<T>>> named;
  for (auto& entry : groups) {
    std::vector<Member<T>>& members = entry.second;
    for (std::size_t i = 0; i < members.size(); ++i) {
      Member<T>& m = members[i];
      const auto like = [&](bool same_step) {
        return std::count_if(members.begin(), members.end(), [&](const Member<T>& other) {
          return other.run == m.run && (!same_step || other.what->step == m.what->step);
        });
      };
      m.name = runs[m.run].name;
      if (like(false) > 1 && m.what->step >= 0) m.name += fmt::format(", step {}", format_count(m.what->step));
      if (like(true) > 1) m.name += ", " + m.what->file;
      m.color = runs.size() > 1 && like(false) == 1 ? runs[m.run].color : static_cast<int>(i);
    }
    named.push_back(std::move(members));
  }
  return named;
}

std::string data_text(const Measurement& m) {
  std::string text = "Measured on " + m.data;
  if (m.context > 0) text += fmt::format(", context {}", format_count(m.context));
  if (!m.documents.empty()) text += fmt::format(", documents: {}", m.documents);
  return text + ".";
}

// " Sequences: 4 each."
template <class T>
std::string counts_text(const std::vector<Member<T>>& members) {
  std::set<int64_t> different;
  std::string counts;
  for (const auto& m : members) {
    different.insert(m.what->sequences);
    if (m.what->sequences > 0) counts += fmt::format("{}{} {}", counts.empty() ? "" : ", ", m.name, format_count(m.what->sequences));
  }
  if (different.size() == 1 && !counts.empty()) counts = format_count(*different.begin()) + (members.size() > 1 ? " each" : "");
  return counts.empty() ? "" : fmt::format(" Sequences: {}.", counts);
}

template <class T>
std::set<int64_t> training_lengths(const Runs& runs, const std::vector<Member<T>>& members) {
  std::set<int64_t> lengths;
  for (const auto& m : members)
    if (runs[m.run].train_length) lengths.insert(*runs[m.run].train_length);
  return lengths;
}

void add_markers(LinePlot& plot, const std::set<int64_t>& lengths) {
  for (const int64_t length : lengths)
    plot.markers.push_back({static_cast<double>(length), fmt::format("training length {}", format_count(length))});
}

// A table with one column a curve; rows by rising number, `heading` of the row in front.
class ColumnTable {
 public:
  ColumnTable(std::string corner, std::size_t columns) : columns_(columns) { table_.header.push_back(std::move(corner)); }

  void name(const std::string& column) { table_.header.push_back(column); }
  void set(std::pair<int64_t, int64_t> row, const std::string& heading, std::size_t column, const std::string& value) {
    auto& cells = rows_[row];
    cells.resize(columns_ + 1, "–");
    cells[0] = heading;
    cells[column + 1] = value;
  }
  Table finish() {
    for (auto& [row, cells] : rows_) table_.rows.push_back(std::move(cells));
    return std::move(table_);
  }

 private:
  std::size_t columns_;
  Table table_;
  std::map<std::pair<int64_t, int64_t>, std::vector<std::string>> rows_;
};

std::string range_text(int64_t first, int64_t last) {
  return first == last ? format_count(last) : fmt::format("{}\u00a0–\u2060\u00a0{}", format_count(first), format_count(last));
}

// " ± 0.4", where the measurement says how much its sequences differ over just these positions.
std::string error_text(const PositionCurve& curve, const PositionBin& bin) {
  for (const PositionSpread& s : curve.spreads)
    if (s.first == bin.first && s.last == bin.last && s.sequences > 1)
      return fmt::format(" ± {}", format_number(std::stod(fmt::format("{:.2g}", s.perplexity_standard_error()))));
  return "";
}

}  // namespace

void read_measurements(RunData& run) {
  read_all(run, "ppl", run.curves, [&](const std::string& path, PositionCurve& curve) {
    curve.bins =
        read_position_csv(path, kCurveBinsPerOctave, run.train_length ? std::vector<int64_t>{*run.train_length} : std::vector<int64_t>{});
    if (const fs::path spread = fs::path(path).replace_extension(".spread.csv"); fs::exists(spread))
      curve.spreads = read_spread_csv(spread.string());
  });
  read_all(run, "remember", run.remembrance,
           [](const std::string& path, RemembranceCurve& curve) { curve.points = read_remembrance_csv(path); });
  read_all(run, "state", run.states, [](const std::string& path, StateMeasurement& state) {
    for (StateLine& line : read_state_csv(path))
      if (line.head == kAllHeads) state.lines.push_back(std::move(line));
    if (const fs::path counts = fs::path(path).replace_extension(".histogram.csv"); fs::exists(counts))
      state.histograms = read_state_histogram_csv(counts.string());
  });
  read_all(run, "forget", run.forgetting,
           [](const std::string& path, ForgettingMeasurement& forgetting) { forgetting.lines = read_forgetting_csv(path); });
}

// --- figures ---------------------------------------------------------------------------------------------------

namespace {

// The member of the group that holds the base of `m`, if the page has it and it was measured once there; null otherwise.
const Member<PositionCurve>* base_in(const Runs& runs, const std::vector<Member<PositionCurve>>& members, const Member<PositionCurve>& m) {
  const Member<PositionCurve>* found = nullptr;
  for (const auto& other : members) {
    if (runs[m.run].base < 0 || other.run != static_cast<std::size_t>(runs[m.run].base)) continue;
    if (found != nullptr) return nullptr;
    found = &other;
  }
  return found;
}

const PositionSpread* range_to(const PositionCurve& curve, int64_t last) {
  for (const PositionSpread& s : curve.spreads)
    if (s.last == last) return &s;
  return nullptr;
}

// Mean loss of positions 1 .. last; NaN if the ranges do not add up to them.
double loss_up_to(const PositionCurve& curve, int64_t last) {
  double sum = 0;
  int64_t covered = 0;
  for (const PositionSpread& s : curve.spreads)
    if (s.last <= last && s.first == covered + 1) sum += s.loss * static_cast<double>(s.last - s.first + 1), covered = s.last;
  return covered == last ? sum / static_cast<double>(last) : std::numeric_limits<double>::quiet_NaN();
}

// Runs beside the base that they were started from: what the text does to both cancels.
void add_perplexity_beside_base(const Runs& runs, const std::vector<Member<PositionCurve>>& members, const std::set<int64_t>& lengths,
                                int64_t first_drawn, int64_t furthest, int64_t first, std::vector<Figure>& figures) {
  LinePlot plot{
      .id = fmt::format("beside-base-{}", figures.size()),
      .title = "Perplexity beside that of the base: " + members.front().what->data,
      .x = {"position: tokens of context (log scale)", Scale::log2, static_cast<double>(first_drawn), static_cast<double>(furthest)},
      .y = {"beside the base"},
      .series = {},
      .markers = {},
      .height = 300};
  add_markers(plot, lengths);
  ColumnTable table("Positions", members.size());
  std::size_t column = 0;
  const auto each_ratio = [](const std::vector<PositionBin>& bins, const std::vector<PositionBin>& base_bins, const auto& take) {
    std::map<std::pair<int64_t, int64_t>, double> base;
    for (const PositionBin& bin : base_bins) base[{bin.first, bin.last}] = bin.perplexity();
    for (const PositionBin& bin : bins)
      if (const auto found = base.find({bin.first, bin.last}); found != base.end()) take(bin, bin.perplexity() / found->second);
  };
  for (const auto& m : members) {
    const auto* base = base_in(runs, members, m);
    if (base == nullptr) continue;
    Series series{.name = m.name, .points = {}, .color = m.color, .dashed = m.dashed};
    each_ratio(m.what->bins, base->what->bins, [&](const PositionBin& bin, double ratio) {
      if (bin.first >= first_drawn) series.points.emplace_back(bin.centre(), ratio);
    });
    const auto octaves = [&](const PositionCurve& curve) { return octave_bins(curve.bins, 1, {lengths.begin(), lengths.end()}, first); };
    table.name(m.name);
    each_ratio(octaves(*m.what), octaves(*base->what), [&](const PositionBin& bin, double ratio) {
      table.set({bin.last, bin.first}, range_text(bin.first, bin.last), column, fmt::format("{:.3f}", ratio));
    });
    ++column;
    if (!series.points.empty()) plot.series.push_back(std::move(series));
  }
  if (plot.series.empty()) return;
  choose_scale(plot, 8);
  Table finished = table.finish();
  for (auto& row : finished.rows) row.resize(column + 1);
  figures.push_back(
      {plot.title,
       data_text(*members.front().what) +
           " The perplexity of each run divided by that of the run it was started from, on the same tokens: below 1 it is better "
           "there. What makes the curves of the figure above uneven is the text, and is the same for both.",
       legend_html(plot.series), line_plot_svg(plot), std::move(finished)});
}

// One figure for each position at which magnitudes were counted.
void add_magnitude_figures(const std::vector<Member<StateMeasurement>>& members, std::vector<Figure>& figures) {
  std::set<int64_t> positions;
  for (const auto& m : members)
    for (const auto& [key, histogram] : m.what->histograms) positions.insert(key.position);
  for (const int64_t position : positions) {
    LinePlot plot{.id = fmt::format("magnitudes-{}", figures.size()),
                  .title = fmt::format("Magnitudes of the state after {} tokens", format_count(position)),
                  .x = {"|h|, from this value to its double (log scale)", Scale::log10},
                  .y = {"percent of the elements"},
                  .series = {},
                  .markers = {},
                  .height = 300};
    ColumnTable table("|h| from", members.size());
    for (std::size_t i = 0; i < members.size(); ++i) {
      Series series{.name = members[i].name, .points = {}, .color = members[i].color, .dashed = members[i].dashed};
      table.name(members[i].name);
      const auto found = members[i].what->histograms.find({position, "ssm", kAllLayers});
      if (found != members[i].what->histograms.end()) {
        const MagnitudeHistogram& h = found->second;
        const auto count = [&h](int bin) {
          return static_cast<double>(h.negative[static_cast<std::size_t>(bin)] + h.positive[static_cast<std::size_t>(bin)]);
        };
        double all = 0;
        for (int bin = 0; bin < MagnitudeHistogram::kBins; ++bin) all += count(bin);
        int first = 0, last = MagnitudeHistogram::kBins - 1;
        while (first < last && 100 * count(first) < kFewPercent * all) ++first;
        while (last > first && 100 * count(last) < kFewPercent * all) --last;
        for (int bin = first; bin <= last; ++bin) {
          const double percent = 100 * count(bin) / all;
          // The lowest bin begins at 0, which has no place on the axis: it is drawn as one more octave.
          const double from = bin == 0 ? MagnitudeHistogram::from(1) / 2 : MagnitudeHistogram::from(bin);
          series.points.emplace_back(from, percent);
          table.set({bin, 0}, bin == 0 ? "0" : fmt::format("{:.3g}", from), i, fmt::format("{:.2f}", percent));
        }
      }
      plot.series.push_back(std::move(series));
    }
    figures.push_back(
        {plot.title,
         data_text(*members.front().what) +
             fmt::format(" How large the elements of the recurrent state of all layers are, of both signs together, counted in octaves; "
                         "those at the ends with less than {}% are left out. A curve further right than at the training length "
                         "is a state that the model was never trained with.",
                         kFewPercent),
         legend_html(plot.series), line_plot_svg(plot), table.finish()});
  }
}

// A map, and which figure it goes into.
struct MapOf {
  std::size_t figure;
  HeatMap map;
};

// The colours of all maps mean the same, so that one can be compared with the next.
void draw_with_one_scale(std::vector<MapOf> maps, std::vector<Figure>& figures) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const auto& [figure, map] : maps)
    for (const auto& row : map.values)
      for (const double value : row)
        if (std::isfinite(value)) low = std::min(low, value), high = std::max(high, value);
  for (auto& [figure, map] : maps) {
    map.min = low, map.max = high;
    figures[figure].svg = heat_map_svg(map);
  }
}

}  // namespace

void add_generalisation_tables(const Runs& runs, std::vector<Figure>& figures) {
  for (const auto& members : groups_of(runs, &RunData::curves)) {
    const std::set<int64_t> lengths = training_lengths(runs, members);
    // One text says little about positions: it may be hard here and easy there.
    if (lengths.size() != 1 || std::any_of(members.begin(), members.end(), [](const auto& m) { return m.what->sequences == 1; })) continue;
    const int64_t T = *lengths.begin();
    std::set<int64_t> ends;  // of the ranges that all have
    for (const int64_t times : {1, 8, 32, 64, 256, 1024, 4096})
      if (std::all_of(members.begin(), members.end(), [&](const auto& m) { return range_to(*m.what, times * T) != nullptr; }))
        ends.insert(times * T);
    if (ends.size() < 2 || *ends.begin() != T) continue;
    const bool bases = std::any_of(members.begin(), members.end(), [&](const auto& m) { return base_in(runs, members, m) != nullptr; });
    const int64_t far = *ends.rbegin();
    Table table{{"Run", "1\u00a0–\u2060\u00a0" + format_count(T)}, {}};
    for (const int64_t end : ends) {
      const PositionSpread& range = *range_to(*members.front().what, end);
      table.header.push_back(range_text(range.first, range.last) + (end > T ? fmt::format(" ({} T)", format_count(end / T)) : " (T)"));
    }
    table.header.push_back(fmt::format("{} T / T", format_count(far / T)));
    if (bases) table.header.insert(table.header.end(), {"Beside its base, 1\u00a0–\u2060\u00a0" + format_count(T), "Beside its base, T"});
    for (const auto& m : members) {
      const double inside = loss_up_to(*m.what, T), at_T = range_to(*m.what, T)->loss;
      std::vector<std::string> row{m.name, format_aligned(std::exp(inside))};
      for (const int64_t end : ends) row.push_back(format_aligned(std::exp(range_to(*m.what, end)->loss)));
      row.push_back(fmt::format("{:.3f}", std::exp(range_to(*m.what, far)->loss - at_T)));
      if (const auto* base = base_in(runs, members, m)) {
        row.push_back(fmt::format("{:.3f}", std::exp(inside - loss_up_to(*base->what, T))));
        row.push_back(fmt::format("{:.3f}", std::exp(at_T - range_to(*base->what, T)->loss)));
      } else if (bases) {
        row.insert(row.end(), {"–", "–"});
      }
      table.rows.push_back(std::move(row));
    }
    figures.push_back(
        {fmt::format("Inside and beyond the training length: {}", members.front().what->data),
         data_text(*members.front().what) +
             fmt::format(" Perplexities. Training rows have T = {} tokens. {} T / T is 1 or less for a model that generalises",
                         format_count(T), format_count(far / T)) +
             (bases ? "; beside its base, less than 1 is better than the run it was started from." : "."),
         "", "", table});
  }
}

void add_perplexity_figures(const Runs& runs, std::vector<Figure>& figures) {
  for (const auto& members : groups_of(runs, &RunData::curves)) {
    const std::string& data = members.front().what->data;
    LinePlot plot{.id = fmt::format("perplexity-{}", figures.size()),
                  .title = "Perplexity by position, " + data,
                  .x = {"position: tokens of context (log scale)", Scale::log2, 1},
                  .y = {"perplexity"},
                  .series = {},
                  .markers = {}};
    const std::set<int64_t> lengths = training_lengths(runs, members);
    add_markers(plot, lengths);
    int64_t furthest = 2;
    for (const auto& m : members) furthest = std::max(furthest, m.what->bins.back().last);
    // The first tokens of a text are hard, and would take up the figure: where it goes far beyond training, they are in the table alone.
    const int64_t first_drawn =
        !lengths.empty() && furthest >= kFarBeyond * *lengths.begin() ? std::max<int64_t>(1, *lengths.begin() / 8) : 1;
    plot.x.min = static_cast<double>(first_drawn);
    for (const auto& m : members) {
      Series series{.name = m.name, .points = {}, .color = m.color, .dashed = m.dashed};
      for (const PositionBin& bin : m.what->bins)
        if (bin.first >= first_drawn) series.points.emplace_back(bin.centre(), bin.perplexity());
      plot.series.push_back(std::move(series));
    }
    plot.x.max = static_cast<double>(furthest);
    choose_scale(plot, 4);
    // Rows of about one an octave; the first positions are put together so that the table stays short.
    const int64_t first = std::max<int64_t>(1, int64_t{1} << std::max(0, static_cast<int>(std::log2(static_cast<double>(furthest))) - 11));
    ColumnTable table("Positions", members.size());
    for (std::size_t i = 0; i < members.size(); ++i) {
      table.name(members[i].name);
      for (const PositionBin& bin : octave_bins(members[i].what->bins, 1, {lengths.begin(), lengths.end()}, first))
        table.set({bin.last, bin.first}, range_text(bin.first, bin.last), i,
                  format_aligned(bin.perplexity()) + error_text(*members[i].what, bin));
    }
    figures.push_back(
        {"Perplexity by position: " + data,
         data_text(*members.front().what) + " Perplexity at a position is exp of the mean loss there, starting from the zero state." +
             counts_text(members) +
             fmt::format(" Neighbouring positions are joined ({} bins each time the position doubles, geometric mean).",
                         kCurveBinsPerOctave) +
             (first_drawn > 1 ? fmt::format(" Drawn from position {} on.", first_drawn) : "") +
             (members.front().what->spreads.empty() || members.front().what->sequences == 1 ? ""
                                                                                            : " ±: standard error over the sequences."),
         legend_html(plot.series), line_plot_svg(plot), table.finish()});
    add_perplexity_beside_base(runs, members, lengths, first_drawn, furthest, first, figures);
  }
}

void add_remembrance_figures(const Runs& runs, std::vector<Figure>& figures) {
  for (const auto& members : groups_of(runs, &RunData::remembrance)) {
    const RemembranceCurve& any = *members.front().what;
    LinePlot plot{.id = fmt::format("remembrance-{}", figures.size()),
                  .title = "Effective remembrance, " + any.data,
                  .x = {"tokens left: T - t, the last tokens of the context that are kept (log scale)", Scale::log2, 1},
                  .y = {"EffRem(t)"},
                  .series = {},
                  .markers = {}};
    add_markers(plot, training_lengths(runs, members));
    ColumnTable table("Start t (tokens left)", members.size());
    for (std::size_t i = 0; i < members.size(); ++i) {
      Series series{.name = members[i].name,
                    .points = {},
                    .color = members[i].color,
                    .dashed = members[i].dashed,
                    .dots = members[i].what->points.size() <= 60};
      table.name(members[i].name);
      for (const RemembrancePoint& p : members[i].what->points) {
        series.points.emplace_back(static_cast<double>(p.lag), p.mean);
        const bool power = (p.lag & (p.lag - 1)) == 0;
        if (members[i].what->points.size() > kFewPoints && !power && p.start != 0) continue;
        table.set({p.start, 0}, fmt::format("{} ({})", format_count(p.start), format_count(p.lag)), i,
                  fmt::format("{:.3f}", p.mean) + (std::isfinite(p.standard_error) ? fmt::format(" ± {:.3f}", p.standard_error) : ""));
      }
      std::sort(series.points.begin(), series.points.end());
      plot.series.push_back(std::move(series));
    }
    plot.y.min = 0;
    const std::string distance = any.distance.empty() ? "the distance" : title_of(parse_distance(any.distance));
    figures.push_back(
        {"Effective remembrance: " + any.data,
         data_text(any) + " EffRem(t) is " + distance +
             " between the prediction after the whole context and the one after its tokens from t on, read from the zero state: "
             "0 where the tokens before t have no influence any more. The right end keeps the whole context." +
             counts_text(members),
         legend_html(plot.series), line_plot_svg(plot), table.finish()});
  }
}

void add_state_figures(const Runs& runs, std::vector<Figure>& figures) {
  for (const auto& members : groups_of(runs, &RunData::states)) {
    const StateMeasurement& any = *members.front().what;
    LinePlot plot{.id = fmt::format("state-{}", figures.size()),
                  .title = "Standard deviation of the state by position, " + any.data,
                  .x = {"position: tokens of context (log scale)", Scale::log2, 1},
                  .y = {"standard deviation (log scale)", Scale::log10},
                  .series = {},
                  .markers = {}};
    const std::set<int64_t> lengths = training_lengths(runs, members);
    add_markers(plot, lengths);
    ColumnTable table("Position", members.size());
    for (std::size_t i = 0; i < members.size(); ++i) {
      Series series{.name = members[i].name, .points = {}, .color = members[i].color, .dashed = members[i].dashed};
      table.name(members[i].name);
      for (const StateLine& line : members[i].what->lines) {
        if (line.layer != kAllLayers || line.tensor != "ssm") continue;
        series.points.emplace_back(static_cast<double>(line.position), line.std);
        const bool power = (line.position & (line.position - 1)) == 0;
        if (power || lengths.contains(line.position) || line.position == any.context)
          table.set({line.position, 0}, format_count(line.position), i, format_aligned(line.std));
      }
      plot.series.push_back(std::move(series));
    }
    if (std::none_of(plot.series.begin(), plot.series.end(), [](const Series& s) {
          return std::any_of(s.points.begin(), s.points.end(), [](const auto& point) { return point.second > 0; });
        }))
      continue;
    figures.push_back(
        {"Size of the recurrent state: " + any.data,
         data_text(any) +
             " Standard deviation over all elements of the recurrent state of all layers, mean over sequences. A state that goes "
             "on growing behind the training length is one that the model was never trained with." +
             counts_text(members),
         legend_html(plot.series), line_plot_svg(plot), table.finish()});
    add_magnitude_figures(members, figures);

    std::vector<MapOf> growth_maps;
    // Layer by position, each layer relative to what it has at the training length (at the first position where that is unknown).
    for (const auto& m : members) {
      const int64_t reference = runs[m.run].train_length.value_or(0);
      std::map<int64_t, std::map<int64_t, double>> by_layer;  // layer, position
      for (const StateLine& line : m.what->lines)
        if (line.layer >= 0 && line.tensor == "ssm") by_layer[line.layer][line.position] = line.std;
      if (by_layer.empty() || !by_layer.begin()->second.contains(reference) || by_layer.begin()->second.rbegin()->first <= reference)
        continue;
      HeatMap map{.id = fmt::format("state-layers-{}", figures.size()),
                  .title = "Growth of the state by layer, " + m.name,
                  .x_label = "position",
                  .y_label = "layer",
                  .columns = {},
                  .rows = {},
                  .values = {},
                  .scale = Scale::log10};
      Table growth{{"Layer"}, {}};
      const auto in_table = [&](int64_t position) { return (position & (position - 1)) == 0 || position == reference; };
      for (const auto& [position, std] : by_layer.begin()->second) {
        if (position < reference) continue;
        map.columns.push_back(format_length(static_cast<double>(position)));
        if (in_table(position)) growth.header.push_back(format_count(position));
      }
      for (const auto& [layer, curve] : by_layer) {
        map.rows.push_back(std::to_string(layer));
        map.values.emplace_back();
        growth.rows.push_back({std::to_string(layer)});
        for (const auto& [position, std] : curve) {
          if (position < reference) continue;
          const double ratio = std / curve.at(reference);
          map.values.back().push_back(ratio);
          if (in_table(position)) growth.rows.back().push_back(format_aligned(ratio));
        }
      }
      figures.push_back(
          {"Growth of the state by layer: " + m.name,
           fmt::format("{} Standard deviation of each layer's state as a multiple of what it is at the training length, {} tokens.",
                       data_text(*m.what), format_count(reference)),
           "", "", growth});
      growth_maps.push_back({figures.size() - 1, std::move(map)});
    }
    draw_with_one_scale(std::move(growth_maps), figures);
  }
}

void add_forgetting_figures(const Runs& runs, std::vector<Figure>& figures) {
  for (const auto& members : groups_of(runs, &RunData::forgetting)) {
    const ForgettingMeasurement& any = *members.front().what;
    LinePlot plot{.id = fmt::format("half-life-{}", figures.size()),
                  .title = "Half-life by layer, " + any.data,
                  .x = {.label = "layer", .whole = true},
                  .y = {"half-life in tokens (log scale)", Scale::log2},
                  .series = {},
                  .markers = {},
                  .height = 300};
    ColumnTable table("Layer", members.size());
    bool any_finite = false;
    for (std::size_t i = 0; i < members.size(); ++i) {
      Series series{.name = members[i].name, .points = {}, .color = members[i].color, .dashed = members[i].dashed, .dots = true};
      table.name(members[i].name);
      // The line of a layer is the mean of its heads, or its only head.
      std::map<int64_t, const ForgettingLine*> layers;
      for (const ForgettingLine& line : members[i].what->lines)
        if (line.layer >= 0 && (line.head < 0 || !layers.contains(line.layer))) layers[line.layer] = &line;
      for (const auto& [layer, line] : layers) {
        series.points.emplace_back(static_cast<double>(layer), line->half_life);
        any_finite = any_finite || std::isfinite(line->half_life);
        table.set({layer, 0}, std::to_string(layer), i, format_aligned(line->half_life) + " (" + format_aligned(line->reach_90) + ")");
      }
      plot.series.push_back(std::move(series));
    }
    if (any_finite)
      figures.push_back(
          {"Half-life of the state: " + any.data,
           data_text(any) +
               " After how many tokens half is left of an input, mean over the heads of a layer; ∞ and a gap where more is left at "
               "the end of the context. In the table, too: the last tokens that hold 90% of the state's weight (in parentheses)." +
               counts_text(members),
           legend_html(plot.series), line_plot_svg(plot), table.finish()});
    std::vector<MapOf> head_maps;
    for (const auto& m : members) {
      std::map<int64_t, std::map<int64_t, double>> by_layer;
      std::set<int64_t> heads;
      bool finite = false;
      for (const ForgettingLine& line : m.what->lines)
        if (line.layer >= 0 && line.head >= 0) {
          by_layer[line.layer][line.head] = line.half_life;
          heads.insert(line.head);
          finite = finite || std::isfinite(line.half_life);
        }
      if (heads.size() < 2 || !finite) continue;
      HeatMap map{.id = fmt::format("half-life-heads-{}", figures.size()),
                  .title = "Half-life by layer and head, " + m.name,
                  .x_label = "head",
                  .y_label = "layer",
                  .columns = {},
                  .rows = {},
                  .values = {},
                  .scale = Scale::log10};
      for (const int64_t head : heads) map.columns.push_back(std::to_string(head));
      Table values{{"Layer"}, {}};
      values.header.insert(values.header.end(), map.columns.begin(), map.columns.end());
      for (const auto& [layer, by_head] : by_layer) {
        map.rows.push_back(std::to_string(layer));
        map.values.emplace_back();
        values.rows.push_back({std::to_string(layer)});
        for (const int64_t head : heads) {
          const auto found = by_head.find(head);
          map.values.back().push_back(found == by_head.end() ? std::numeric_limits<double>::quiet_NaN() : found->second);
          values.rows.back().push_back(format_aligned(map.values.back().back()));
        }
      }
      figures.push_back({"Half-life by layer and head: " + m.name,
                         data_text(*m.what) +
                             " Tokens after which half of an input is left in the head's state; ∞: more than half is left at the "
                             "end of the context.",
                         "", "", values});
      head_maps.push_back({figures.size() - 1, std::move(map)});
    }
    draw_with_one_scale(std::move(head_maps), figures);
  }
}

}  // namespace longhand
