// Reading runs and writing the page; see report.h.
#include "eval/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "eval/measure_figures.h"
#include "eval/plot.h"
#include "eval/report_page.h"
#include "eval/task_figures.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using Runs = std::vector<RunData>;

constexpr std::size_t kMostPoints = 400;  // of a training curve; more are joined

// --- pieces of figures -----------------------------------------------------------------------------------------

// A logged value as a series of at most kMostPoints points: each is the mean of equally many neighbouring logged steps.
Series logged_series(const Metrics& metrics, const std::string& value, const std::string& name, int color) {
  Series series{.name = name, .points = {}, .color = color};
  const auto found = metrics.values.find(value);
  if (found == metrics.values.end()) return series;
  const std::size_t every = (found->second.size() + kMostPoints - 1) / kMostPoints;
  double step_sum = 0, value_sum = 0;
  std::size_t count = 0, left = found->second.size();
  for (const auto& [step, logged] : found->second) {
    step_sum += static_cast<double>(step), value_sum += logged, ++count, --left;
    if (count < every && left > 0) continue;
    series.points.emplace_back(step_sum / static_cast<double>(count), value_sum / static_cast<double>(count));
    step_sum = value_sum = 0, count = 0;
  }
  return series;
}

std::size_t most_logged(const Runs& runs, const std::string& value) {
  std::size_t most = 0;
  for (const RunData& run : runs)
    if (const auto found = run.metrics.values.find(value); found != run.metrics.values.end()) most = std::max(most, found->second.size());
  return most;
}

std::string joined_note(const Runs& runs, const std::string& value) {
  const std::size_t every = (most_logged(runs, value) + kMostPoints - 1) / kMostPoints;
  return every > 1 ? fmt::format(" Each point is the mean of up to {} logged steps.", every) : "";
}

double median(const std::map<int64_t, double>& logged) {
  std::vector<double> values;
  for (const auto& [step, value] : logged) values.push_back(value);
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

const std::vector<std::string> kLoggedHeader = {"Curve", "First", "Last", "Median", "Lowest", "at step", "Highest", "at step"};

void add_logged_row(Table& table, const Metrics& metrics, const std::string& value, const std::string& name) {
  const auto found = metrics.values.find(value);
  if (found == metrics.values.end()) return;
  const auto less = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto lowest = std::min_element(found->second.begin(), found->second.end(), less),
             highest = std::max_element(found->second.begin(), found->second.end(), less);
  table.rows.push_back({name, format_aligned(found->second.begin()->second), format_aligned(found->second.rbegin()->second),
                        format_aligned(median(found->second)), format_aligned(lowest->second), format_count(lowest->first),
                        format_aligned(highest->second), format_count(highest->first)});
}

bool drawable(const std::vector<Series>& series) {
  return std::any_of(series.begin(), series.end(), [](const Series& s) { return !s.points.empty(); });
}

// --- figures ---------------------------------------------------------------------------------------------------

// One run: training and validation in one figure. Several: a figure of the training losses, and one of the validation losses where they are
// curves.
void add_loss(const Runs& runs, std::vector<Figure>& figures) {
  const bool one = runs.size() == 1;
  LinePlot plot{.id = "loss", .title = "Loss by training step", .x = {"step"}, .y = {"loss (nats per token)"}, .series = {}, .markers = {}};
  LinePlot val_plot{.id = "val-loss",
                    .title = "Validation loss by training step",
                    .x = {"step"},
                    .y = {"loss (nats per token)"},
                    .series = {},
                    .markers = {},
                    .height = 300};
  Table table{kLoggedHeader, {}};
  bool val_curves = false;
  for (const RunData& run : runs) {
    const std::string train = one ? "training" : run.name, val = one ? "validation" : run.name;
    Series trained = logged_series(run.metrics, "loss", train, run.color),
           validated = logged_series(run.metrics, "val_loss", val, run.color);
    trained.dashed = run.dashed, validated.dashed = one || run.dashed;
    if (one) validated.color = 1;
    validated.dots = validated.points.size() <= 60;
    val_curves = val_curves || validated.points.size() > 1;
    if (!trained.points.empty()) plot.series.push_back(std::move(trained));
    if (!validated.points.empty()) (one ? plot : val_plot).series.push_back(std::move(validated));
    add_logged_row(table, run.metrics, "loss", one ? train : train + ", training");
    add_logged_row(table, run.metrics, "val_loss", one ? val : val + ", validation");
  }
  if (drawable(plot.series))
    figures.push_back({"Loss",
                       std::string(one ? "Cross-entropy of the training batches (solid) and of the validation data (dashed)."
                                       : "Cross-entropy of the training batches; the table has that of the validation data, too.") +
                           joined_note(runs, "loss"),
                       legend_html(plot.series), line_plot_svg(plot), table});
  if (!one && val_curves)
    figures.push_back({"Validation loss",
                       "Cross-entropy of the validation data." + joined_note(runs, "val_loss"),
                       legend_html(val_plot.series),
                       line_plot_svg(val_plot),
                       {}});
}

void add_logged_figure(const Runs& runs, std::vector<Figure>& figures, const std::string& value, const std::string& id,
                       const std::string& title, const std::string& label, const std::string& caption, double log_factor, bool from_zero) {
  LinePlot plot{.id = id, .title = title + " by training step", .x = {"step"}, .y = {label}, .series = {}, .markers = {}, .height = 300};
  Table table{kLoggedHeader, {}};
  for (const RunData& run : runs) {
    Series series = logged_series(run.metrics, value, run.name, run.color);
    series.dashed = run.dashed;
    if (!series.points.empty()) plot.series.push_back(std::move(series));
    add_logged_row(table, run.metrics, value, run.name);
  }
  if (!drawable(plot.series)) return;
  choose_scale(plot, log_factor);
  if (from_zero && plot.y.scale == Scale::linear) plot.y.min = 0;
  figures.push_back(
      {title, caption + joined_note(runs, value), runs.size() > 1 ? legend_html(plot.series) : "", line_plot_svg(plot), table});
}

constexpr double kNeverLog = std::numeric_limits<double>::infinity();

void add_learning_rate(const Runs& runs, std::vector<Figure>& figures) {
  add_logged_figure(runs, figures, "lr", "learning-rate", "Learning rate", "learning rate", "The rate each step was taken with.", kNeverLog,
                    true);
}

void add_grad_norm(const Runs& runs, std::vector<Figure>& figures) {
  add_logged_figure(runs, figures, "grad_norm", "grad-norm", "Gradient norm", "norm before clipping",
                    "Euclidean norm of the whole gradient, before clipping.", 30, true);
}

void add_speed(const Runs& runs, std::vector<Figure>& figures) {
  add_logged_figure(runs, figures, "tokens_per_s", "speed", "Speed", "tokens/s", "Training tokens per second.", kNeverLog, true);
}

// In the order of the page.
constexpr void (*kFigures[])(const Runs&, std::vector<Figure>&) = {add_generalisation_tables,
                                                                   add_perplexity_figures,
                                                                   add_remembrance_figures,
                                                                   add_state_figures,
                                                                   add_forgetting_figures,
                                                                   add_passkey_figures,
                                                                   add_copy_figures,
                                                                   add_babilong_figures,
                                                                   add_lambada_tables,
                                                                   add_choices_tables,
                                                                   add_loss,
                                                                   add_learning_rate,
                                                                   add_grad_norm,
                                                                   add_speed};

// --- the page --------------------------------------------------------------------------------------------------

std::string table_html(const Table& table, const std::string& css_class = "") {
  if (table.rows.empty()) return "";
  std::string html = css_class.empty() ? "<div class=\"scroll\"><table>\n<thead><tr>"
                                       : fmt::format("<div class=\"scroll\"><table class=\"{}\">\n<thead><tr>", css_class);
  for (const std::string& name : table.header) html += fmt::format("<th scope=\"col\">{}</th>", escape_html(name));
  html += "</tr></thead>\n<tbody>\n";
  for (const auto& row : table.rows) {
    html += "<tr>";
    for (std::size_t c = 0; c < row.size(); ++c)
      html += c == 0 ? fmt::format("<th scope=\"row\">{}</th>", escape_html(row[c])) : fmt::format("<td>{}</td>", escape_html(row[c]));
    html += "</tr>\n";
  }
  return html + "</tbody></table></div>\n";
}

// The table of a figure; a long one is folded.
std::string figure_table_html(const Table& table) {
  if (table.rows.size() <= kMostOpenRows) return table_html(table);
  return fmt::format("<details><summary>Table of {} rows</summary>\n{}</details>\n", table.rows.size(), table_html(table));
}

std::string last_logged(const Metrics& metrics, const std::string& value) {
  const auto found = metrics.values.find(value);
  return found == metrics.values.end() ? "–" : format_aligned(found->second.rbegin()->second);
}

std::string duration(double seconds) {
  const auto s = std::llround(seconds);
  if (s >= 86400) return fmt::format("{} d {} h", s / 86400, s % 86400 / 3600);
  if (s >= 3600) return fmt::format("{} h {} min", s / 3600, s % 3600 / 60);
  return s >= 60 ? fmt::format("{} min {} s", s / 60, s % 60) : fmt::format("{} s", s);
}

std::string overview_html(const Runs& runs) {
  const auto any = [&](const auto& has) { return std::any_of(runs.begin(), runs.end(), has); };
  const bool bases = any([](const RunData&run) { return run.base >= 0; }), dashes = any([](const RunData&run) { return run.dashed; });
  Table table{{"Run"}, {}};
  if (bases) table.header.push_back("Started from");
  for (const char* name : {"Initial state", "Training length", "Steps", "Tokens", "Training loss", "Validation loss", "Tokens/s", "Time"})
    table.header.push_back(name);
  for (const RunData& run : runs) {
    const auto& values = run.metrics.values;
    int64_t steps = 0;
    for (const auto& [name, logged] : values) steps = std::max(steps, logged.rbegin()->first);
    const auto speed = values.find("tokens_per_s"), elapsed = values.find("elapsed_s");
    std::vector<std::string> row{run.name};
    if (bases) row.push_back(run.base < 0 ? "–" : runs[static_cast<std::size_t>(run.base)].name);
    for (std::string cell : {run.config.get("initial_state").value_or("–"), run.train_length ? format_count(*run.train_length) : "–",
                             steps > 0 ? format_count(steps) : "–", last_logged(run.metrics, "tokens"), last_logged(run.metrics, "loss"),
                             last_logged(run.metrics, "val_loss"), speed == values.end() ? "–" : format_number(median(speed->second)),
                             elapsed == values.end() ? "–" : duration(elapsed->second.rbegin()->second)})
      row.push_back(std::move(cell));
    table.rows.push_back(std::move(row));
  }
  return std::string(
             "<section>\n<h2>Overview</h2>\n<p class=\"soft\">Losses are those logged last, in nats per token; tokens/s is the median.") +
         (dashes ? " Everywhere below, a dashed curve belongs to a run that was started from the one whose solid curve has its colour."
                 : "") +
         "</p>\n" + table_html(table, bases ? "names" : "") + "</section>\n";
}

// What the page compares, in a line.
std::string heading_of(const Runs& runs) {
  if (runs.size() == 1) return runs[0].name;
  std::set<int> bases;
  std::size_t started = 0;
  for (const RunData& run : runs)
    if (run.base >= 0) bases.insert(run.base), ++started;
  if (bases.size() == 1 && started + 1 == runs.size())
    return fmt::format("{} and {} started from it", runs[static_cast<std::size_t>(*bases.begin())].name,
                       started == 1 ? "a run" : fmt::format("{} runs", started));
  if (bases.size() > 1 && 2 * bases.size() == runs.size() && started == bases.size())
    return fmt::format("{} runs, each with one that was started from it", bases.size());
  return fmt::format("Comparison of {} runs", runs.size());
}

std::string notes_html(const Runs& runs) {
  std::string items;
  for (const RunData& run : runs)
    for (const std::string& problem : run.problems)
      items += fmt::format("<li><b>{}</b>: {}</li>\n", escape_html(run.name), escape_html(problem));
  return items.empty()
             ? ""
             : "<section class=\"note\" aria-label=\"Notes\">\n<b>Missing or unreadable</b>\n<ul>\n" + items + "</ul></section>\n";
}

// Settings in the order of the first run that has them; where runs differ the row is marked.
std::string configuration_html(const Runs& runs) {
  std::vector<std::string> keys;
  std::set<std::string> known;
  for (const RunData& run : runs)
    for (const auto& [key, value] : run.config.values)
      if (known.insert(key).second) keys.push_back(key);
  if (keys.empty()) return "";
  std::string head = "<thead><tr><th scope=\"col\">Setting</th>", differing, common;
  for (const RunData& run : runs) head += fmt::format("<th scope=\"col\">{}</th>", escape_html(run.name));
  head += "</tr></thead>\n";
  for (const std::string& key : keys) {
    std::set<std::string> values;
    std::string cells;
    for (const RunData& run : runs) {
      const std::string value = run.config.get(key).value_or("–");
      values.insert(value);
      cells += fmt::format("<td>{}</td>", escape_html(value));
    }
    (values.size() > 1 ? differing : common) += fmt::format("<tr><th scope=\"row\">{}</th>{}</tr>\n", escape_html(key), cells);
  }
  const auto table = [&](const std::string& rows) {
    return "<div class=\"scroll\"><table class=\"text\">\n" + head + "<tbody>\n" + rows + "</tbody></table></div>\n";
  };
  std::string html = "<section>\n<h2>Configuration</h2>\n";
  if (runs.size() == 1) return html + table(common) + "</section>\n";
  html += differing.empty() ? "<p>The runs have the same settings.</p>\n"
                            : "<p class=\"soft\">Settings in which the runs differ.</p>\n" + table(differing);
  if (!common.empty()) html += "<details><summary>Settings that all runs share</summary>\n" + table(common) + "</details>\n";
  return html + "</section>\n";
}

}  // namespace

std::string error_sentence(const Error& error) {
  const std::string whole = error.what();
  std::string text = whole.substr(0, whole.find('\n'));
  for (const ErrorRow& row : error.rows())
    if (row.name != "try" && row.name != "at") text += fmt::format("; {} {}", row.name, row.value);
  return text;
}

void choose_scale(LinePlot& plot, double factor) {
  double low = std::numeric_limits<double>::infinity(), high = 0;
  for (const Series& s : plot.series)
    for (const auto& [x, y] : s.points)
      if (std::isfinite(y)) low = std::min(low, y), high = std::max(high, y);
  if (!(low > 0 && high > factor * low)) return;
  plot.y.scale = Scale::log10;
  plot.y.label += " (log scale)";
}

RunData read_run(const std::string& folder) {
  if (!fs::is_directory(folder)) throw FileError("report: there is no such run folder", {{"run", folder}});
  RunData run;
  run.name = folder_name(folder);
  run.folder = folder;
  const fs::path root(folder);
  try {
    run.metrics = read_metrics((root / "metrics.jsonl").string());
    run.problems = run.metrics.problems;
    if (run.metrics.values.empty()) run.problems.push_back((root / "metrics.jsonl").string() + " holds no logged step");
  } catch (const Error& error) {
    run.problems.push_back(error_sentence(error));
  }
  if (fs::exists(root / "config.toml")) {
    run.config = parse_flat_config(read_text_file((root / "config.toml").string()));
    if (run.config.lines_left_out > 0)
      run.problems.push_back(
          fmt::format("{}: {} lines are no \"key = value\" and are not shown", (root / "config.toml").string(), run.config.lines_left_out));
  } else {
    run.problems.push_back("the run has no configuration; file " + (root / "config.toml").string());
  }
  try {
    run.train_length = read_run_record({"", folder, -1}).train_length;
  } catch (const Error& error) {
    run.problems.push_back(error_sentence(error));
  }
  read_measurements(run);
  read_task_results(run);
  if (run.metrics.values.empty() && run.curves.empty() && run.remembrance.empty() && run.states.empty() && run.forgetting.empty() &&
      run.tasks.empty()) {
    std::vector<ErrorRow> rows{{"run", folder}};
    for (const std::string& problem : run.problems) rows.push_back({"found", problem});
    throw FileError("report: the run has neither metrics nor evaluations that can be read", rows);
  }
  return run;
}

namespace {

// The index of the run on the page that `run` was started from; -1: none of them.
int base_of(const RunData& run, const Runs& runs) {
  const std::string from = run.config.get("init_from").value_or("");
  if (from.empty()) return -1;
  const std::string folder = folder_name(from.substr(0, from.find("/checkpoints/")));
  for (std::size_t r = 0; r < runs.size(); ++r)
    if (&runs[r] != &run && folder_name(runs[r].folder) == folder) return static_cast<int>(r);
  return -1;
}

void choose_colors(Runs& runs) {
  std::map<int, int> started;  // from a base
  for (RunData& run : runs)
    if (run.base = base_of(run, runs); run.base >= 0) ++started[run.base];
  const bool pairs =
      started.size() >= 2 && 2 * started.size() == runs.size() &&
      std::none_of(started.begin(), started.end(), [&](const auto& s) { return runs[static_cast<std::size_t>(s.first)].base >= 0; });
  int next = 0;
  for (RunData& run : runs)
    if (!pairs || run.base < 0) run.color = next++;
  for (RunData& run : runs)
    if (pairs && run.base >= 0) run.color = runs[static_cast<std::size_t>(run.base)].color, run.dashed = true;
}

}  // namespace

std::vector<RunData> read_runs(const std::vector<std::string>& folders) {
  std::vector<RunData> runs;
  std::map<std::string, int> names;
  for (const std::string& folder : folders) runs.push_back(read_run(folder));
  for (const RunData& run : runs) ++names[run.name];
  for (RunData& run : runs)
    if (names[run.name] > 1) run.name = run.folder;
  choose_colors(runs);
  return runs;
}

std::string report_html(const std::vector<RunData>& runs, const std::string& date) {
  std::string names;
  for (const RunData& run : runs) names += (names.empty() ? "" : ", ") + run.name;
  const std::string heading = heading_of(runs);
  std::vector<Figure> figures;
  for (const auto add : kFigures) add(runs, figures);

  std::string html =
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, "
      "initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n";
  html +=
      fmt::format("<title>{} – longhand report</title>\n<style>{}</style>\n</head>\n<body>\n<main>\n", escape_html(names), kReportStyle);
  html +=
      fmt::format("<header>\n<h1>{}</h1>\n<p class=\"soft\">longhand report, {}</p>\n</header>\n", escape_html(heading), escape_html(date));
  html += notes_html(runs) + overview_html(runs);
  for (const Figure& figure : figures) {
    const std::string drawn =
        figure.svg.empty() ? "" : fmt::format("<div class=\"scroll\"><div class=\"box\">{}</div></div>\n", figure.svg);
    html += fmt::format("<section>\n<figure>\n<figcaption><h2>{}</h2>\n<p>{}</p></figcaption>\n{}{}</figure>\n{}</section>\n",
                        escape_html(figure.title), escape_html(figure.caption), figure.legend, drawn, figure_table_html(figure.table));
  }
  html += configuration_html(runs);
  return html + "</main>\n<script>" + kReportScript + "</script>\n</body>\n</html>\n";
}

}  // namespace longhand
