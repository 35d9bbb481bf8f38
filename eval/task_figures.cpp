// See task_figures.h.
#include "eval/task_figures.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "eval/csv_table.h"
#include "eval/plot.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Runs = std::vector<RunData>;

constexpr const char *kPasskey = "passkey", *kCopy = "copy", *kBabilong = "babilong";

// What a group of results shares: the settings of its task, without those of the model and of the machine.
std::string shared_settings(const Json& description) {
  Json shared;
  for (const char* key : {"unit", "lengths", "depths", "digits", "prompts", "seed", "variant", "alphabet", "ngram", "answer_length",
                          "samples_per_length", "tasks", "book_set", "facts_from", "facts_to", "questions"})
    if (description.contains(key)) shared[key] = description[key];
  return shared.dump();
}

TaskResult read_result(const std::string& task, const fs::path& csv) {
  TaskResult result{.task = task, .file = csv.filename().string(), .settings = csv.stem().string(), .lines = {}};
  if (const fs::path path = fs::path(csv).replace_extension(".json"); fs::exists(path)) {
    const Json description = Json::parse(read_text_file(path.string()), nullptr, false);
    if (description.is_object()) {
      result.settings = shared_settings(description);
      if (const auto step = description.find("step"); step != description.end() && step->is_number_integer()) result.step = *step;
    }
  }
  if (task == kPasskey)
    read_csv(csv.string(), "length,depth,samples,accuracy", [&](const CsvRow& row) {
      result.lines.push_back({fmt::format("depth {}", row.text(1)), row.count(0), row.count(2), row.finite(3), 0});
    });
  if (task == kBabilong)
    read_csv(csv.string(), "task,length,samples,accuracy", [&](const CsvRow& row) {
      result.lines.push_back({std::string(row.text(0)), row.count(1), row.count(2), row.finite(3), 0});
    });
  if (task == kCopy)
    read_csv(csv.string(), "length,samples,string_accuracy,character_accuracy", [&](const CsvRow& row) {
      result.lines.push_back({"", row.count(0), row.count(1), row.finite(3), row.finite(2)});
    });
  return result;
}

struct Member {
  const TaskResult* result;
  std::string name;  // of its run, with the step and the file where these are needed to tell results apart
};

// The results of a task in groups of the same settings.
std::vector<std::vector<Member>> groups_of(const Runs& runs, const std::string& task) {
  std::map<std::string, std::vector<Member>> groups;
  for (const RunData& run : runs) {
    std::map<std::pair<std::string, int64_t>, int> of_step;
    std::map<std::string, int> of_run;
    for (const TaskResult& result : run.tasks)
      if (result.task == task) ++of_step[{result.settings, result.step}], ++of_run[result.settings];
    for (const TaskResult& result : run.tasks) {
      if (result.task != task) continue;
      std::string name = run.name;
      if (of_run[result.settings] > 1 && result.step >= 0) name += fmt::format(", step {}", format_count(result.step));
      if (of_step[{result.settings, result.step}] > 1) name += ", " + result.file;
      groups[result.settings].push_back({&result, std::move(name)});
    }
  }
  std::vector<std::vector<Member>> out;
  for (auto& [settings, members] : groups) out.push_back(std::move(members));
  return out;
}

std::string percent(double share) {
  return fmt::format("{:.1f}%", 100 * share);
}

// "100 samples in each cell" or "2 to 100 samples".
std::string samples_text(const std::vector<Member>& members, const char* of_each) {
  std::set<int64_t> counts;
  for (const Member& m : members)
    for (const TaskLine& line : m.result->lines) counts.insert(line.samples);
  return counts.size() == 1 ? fmt::format("{} samples {}", format_count(*counts.begin()), of_each)
                            : fmt::format("{} to {} samples {}", format_count(*counts.begin()), format_count(*counts.rbegin()), of_each);
}

// Lengths as the commands take them: 16k is 16,384 tokens of a passkey prompt, and 16,000 of everything else.
std::string in_binary(int64_t length) {
  return length % 1024 == 0 ? format_length(static_cast<double>(length)) : format_count(length);
}
std::string in_thousands(int64_t length) {
  if (length > 0 && length % 1'000'000 == 0) return fmt::format("{}M", length / 1'000'000);
  return length > 0 && length % 1000 == 0 ? fmt::format("{}k", length / 1000) : format_count(length);
}

// A row for each run and `row` of its lines, a column for each length.
void add_heat_map(const std::vector<Member>& members, const std::string& title, const std::string& caption, const std::string& y_label,
                  std::vector<Figure>& figures, std::string (*length_text)(int64_t)) {
  std::set<int64_t> lengths;
  for (const Member& m : members)
    for (const TaskLine& line : m.result->lines) lengths.insert(line.length);
  HeatMap map{.id = fmt::format("task-{}", figures.size()),
              .title = title,
              .x_label = "length",
              .y_label = y_label,
              .columns = {},
              .rows = {},
              .values = {},
              .min = 0,
              .max = 1};
  Table table{{y_label}, {}};
  for (const int64_t length : lengths) {
    map.columns.push_back(length_text(length));
    table.header.push_back(format_count(length));
  }
  for (const Member& m : members) {
    std::vector<std::string> names;  // in the order of the file
    std::map<std::pair<std::string, int64_t>, double> accuracy;
    for (const TaskLine& line : m.result->lines) {
      if (std::find(names.begin(), names.end(), line.row) == names.end()) names.push_back(line.row);
      accuracy[{line.row, line.length}] = line.accuracy;
    }
    for (const std::string& name : names) {
      map.rows.push_back(members.size() > 1 ? m.name + ", " + name : name);
      map.values.emplace_back();
      table.rows.push_back({map.rows.back()});
      for (const int64_t length : lengths) {
        const auto found = accuracy.find({name, length});
        map.values.back().push_back(found == accuracy.end() ? std::numeric_limits<double>::quiet_NaN() : found->second);
        table.rows.back().push_back(found == accuracy.end() ? "–" : percent(found->second));
      }
    }
  }
  figures.push_back({title, caption, "", heat_map_svg(map), table});
}

}  // namespace

void read_task_results(RunData& run) {
  const fs::path folder = fs::path(run.folder) / "eval";
  if (!fs::is_directory(folder)) return;
  std::vector<fs::path> tables;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".csv") tables.push_back(entry.path());
  std::sort(tables.begin(), tables.end());
  for (const fs::path& table : tables)
    for (const char* task : {kPasskey, kCopy, kBabilong}) {
      if (!table.filename().string().starts_with(std::string(task) + "-")) continue;
      try {
        run.tasks.push_back(read_result(task, table));
      } catch (const Error& error) {
        run.problems.push_back(error_sentence(error));
      }
    }
  std::stable_sort(run.tasks.begin(), run.tasks.end(), [](const TaskResult& a, const TaskResult& b) { return a.step < b.step; });
}

void add_passkey_figures(const Runs& runs, std::vector<Figure>& figures) {
  for (const auto& members : groups_of(runs, kPasskey))
    add_heat_map(members, "Passkey retrieval" + (members.size() == 1 ? ": " + members.front().name : std::string()),
                 "Share of prompts whose number was said, by length of the text and depth of the number (0: at its beginning), " +
                     samples_text(members, "in each cell") + ".",
                 "depth", figures,
                 members.front().result->settings.find("\"unit\":\"characters\"") != std::string::npos ? in_thousands : in_binary);
}

void add_babilong_figures(const Runs& runs, std::vector<Figure>& figures) {
  for (const auto& members : groups_of(runs, kBabilong))
    add_heat_map(members, "BABILong" + (members.size() == 1 ? ": " + members.front().name : std::string()),
                 "Share of right answers, by length of the text that the facts are scattered over (0: the facts alone), " +
                     samples_text(members, "in each cell") + ".",
                 "task", figures, in_thousands);
}

void add_copy_figures(const Runs& runs, std::vector<Figure>& figures) {
  for (const auto& members : groups_of(runs, kCopy)) {
    LinePlot plot{.id = fmt::format("task-{}", figures.size()),
                  .title = "Synthetic copying by length",
                  .x = {"letters of the word"},
                  .y = {.label = "accuracy", .min = 0, .max = 1},
                  .series = {},
                  .markers = {},
                  .height = 300};
    Table table{{"Length"}, {}};
    std::map<int64_t, std::vector<std::string>> rows;
    for (std::size_t i = 0; i < members.size(); ++i) {
      const Member& m = members[i];
      const bool dots = m.result->lines.size() <= 40;
      Series characters{.name = m.name + ": characters", .points = {}, .color = static_cast<int>(i), .dots = dots};
      Series strings{.name = m.name + ": whole strings", .points = {}, .color = static_cast<int>(i), .dashed = true, .dots = dots};
      table.header.push_back(characters.name);
      table.header.push_back(strings.name);
      for (const TaskLine& line : m.result->lines) {
        const auto length = static_cast<double>(line.length);
        characters.points.emplace_back(length, line.accuracy);
        strings.points.emplace_back(length, line.string_accuracy);
        auto& row = rows[line.length];
        row.resize(2 * members.size() + 1, "–");
        row[0] = format_count(line.length);
        row[2 * i + 1] = percent(line.accuracy);
        row[2 * i + 2] = percent(line.string_accuracy);
      }
      for (Series* series : {&characters, &strings}) {
        std::sort(series->points.begin(), series->points.end());
        plot.series.push_back(std::move(*series));
      }
    }
    for (auto& [length, row] : rows) table.rows.push_back(std::move(row));
    figures.push_back(
        {"Synthetic copying by length" + (members.size() == 1 ? ": " + members.front().name : std::string()),
         "Share of letters that are right (solid) and of words without a mistake (dashed), with the right letters before each "
         "given, " +
             samples_text(members, "at each length") + ".",
         legend_html(plot.series), line_plot_svg(plot), table});
  }
}

}  // namespace longhand
