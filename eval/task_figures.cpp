// See task_figures.h.
#include "eval/task_figures.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "eval/csv_table.h"
#include "eval/plot.h"
#include "eval/sample_log.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Runs = std::vector<RunData>;

constexpr const char *kPasskey = "passkey", *kCopy = "copy", *kBabilong = "babilong", *kLambada = "lambada", *kChoices = "choices";

// What a group of results shares: the settings of its task and its data, without those of the model and of the machine.
constexpr const char* kShared[] = {"tokenizer", "data",     "seed",       "lengths",  "samples_per_length", "unit",  "depths",    "digits",
                                   "prompts",   "variant",  "alphabet",   "ngram",    "answer_length",      "tasks", "questions", "labels",
                                   "books",     "book_set", "facts_from", "facts_to", "delimiter"};

// Settings that are hashes, and what in the description names the files that they are made of.
constexpr std::pair<const char*, const char*> kHashed[] = {
    {"data", "data_file"}, {"books", "book_files"}, {"questions", "babi_files"}, {"prompts", "prompts_file"}};

std::string shared_settings(const Json& description) {
  Json shared;
  for (const char* key : kShared)
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
      const auto text_of = [&](const char* key) {
        const auto found = description.find(key);
        return found != description.end() && found->is_string() ? found->get<std::string>() : std::string();
      };
      result.unit = text_of("unit");
      for (const auto& [key, named] : kHashed) {
        if (!description.contains(named)) continue;
        const Json& value = description.at(named);
        std::string& files = result.files[key];
        for (const Json& file : value.is_array() ? value : Json::array({value}))
          if (file.is_string()) files += (files.empty() ? "" : " ") + fs::path(file.get<std::string>()).filename().string();
      }
      result.data = fs::path(text_of("data_file")).filename().string();
    }
  }
  if (task == kPasskey)
    read_csv(csv.string(), "length,depth,samples,accuracy", [&](const CsvRow& row) {
      result.lines.push_back({fmt::format("depth {}", row.text(1)), row.count(0), row.count(2), row.finite(3)});
    });
  if (task == kBabilong)
    read_csv(csv.string(), "task,length,samples,accuracy", [&](const CsvRow& row) {
      result.lines.push_back({std::string(row.text(0)), row.count(1), row.count(2), row.finite(3)});
    });
  if (task == kCopy)
    read_csv(csv.string(), "length,samples,string_accuracy,character_accuracy", [&](const CsvRow& row) {
      result.lines.push_back({"", row.count(0), row.count(1), row.finite(3), row.finite(2)});
    });
  if (task == kLambada)
    read_csv(csv.string(), "samples,accuracy,perplexity", [&](const CsvRow& row) {
      result.lines.push_back({"", 0, row.count(0), row.finite(1), 0, {row.finite(1), row.number(2)}});
    });
  if (task == kChoices)
    read_csv(csv.string(), "questions,labelled,accuracy,accuracy_per_character,accuracy_per_token,greedy", [&](const CsvRow& row) {
      const auto share = [&](std::size_t column) { return row.count(1) > 0 ? row.finite(column) : row.number(column); };
      result.lines.push_back({"", row.count(0), row.count(1), share(2), 0, {share(2), share(3), share(4), share(5)}});
    });
  return result;
}

struct Member {
  const TaskResult* result;
  std::string name;  // of its run, with the step and the file where these are needed to tell results apart
};

constexpr std::size_t kMostValues = 6;  // of a list in a title
constexpr std::size_t kHashShown = 6;   // digits of a hash in a title

// "2048, 4096" of a list of values, each once, or "40 to 199" where they are many; texts that are not plain words stay in quotes; a hash of
// an object.
std::string value_text(const Json& value) {
  if (value.is_array()) {
    std::vector<std::string> parts;
    for (const Json& part : value)
      if (const std::string text = value_text(part); std::find(parts.begin(), parts.end(), text) == parts.end()) parts.push_back(text);
    if (parts.size() > kMostValues) return parts.front() + " to " + parts.back();
    return fmt::format("{}", fmt::join(parts, ", "));
  }
  if (value.is_object()) return settings_hash(value).substr(0, kHashShown);
  if (!value.is_string()) return value.dump();
  const auto text = value.get<std::string>();
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) { return c > ' ' && c < 0x7f; });
  return plain ? text : value.dump();
}

struct Group {
  std::vector<Member> members;
  std::string differs;  // ", variant copy, seed 2": the settings in which the groups of the task differ, as a title goes on
};

// Says in `differs` what tells the groups apart. The file of `data` stands in the titles anyway: only a hash is added where it does not do.
void name_differences(std::vector<Group>& groups) {
  const auto result_of = [&](std::size_t g) -> const TaskResult& { return *groups[g].members.front().result; };
  for (const std::string key : kShared) {
    std::vector<std::string> texts, values;  // as shown, and as they are
    for (std::size_t g = 0; g < groups.size(); ++g) {
      const Json settings = Json::parse(result_of(g).settings, nullptr, false);
      const bool has = settings.is_object() && settings.contains(key);
      const auto files = result_of(g).files.find(key);
      const bool hashed = has && settings[key].is_string() && files != result_of(g).files.end();
      values.push_back(has ? settings[key].dump() : "");
      texts.push_back(!has ? "" : hashed ? (files->second.empty() ? "none" : files->second) : value_text(settings[key]));
    }
    const std::set<std::string> different(values.begin(), values.end());
    if (different.size() < 2) continue;
    const bool clear = std::set<std::string>(texts.begin(), texts.end()).size() == different.size();
    if (clear && key == "data") continue;
    std::string name = key;
    std::replace(name.begin(), name.end(), '_', ' ');
    for (std::size_t g = 0; g < groups.size(); ++g) {
      if (values[g].empty()) continue;
      const std::string hash = settings_hash(values[g]).substr(0, kHashShown);
      groups[g].differs += fmt::format(", {} {}", name, clear ? texts[g] : key == "data" ? hash : texts[g] + " (" + hash + ")");
    }
  }
}

// The results of a task in groups of the same settings.
std::vector<Group> groups_of(const Runs& runs, const std::string& task) {
  std::map<std::string, std::vector<Member>> by_settings;
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
      by_settings[result.settings].push_back({&result, std::move(name)});
    }
  }
  std::vector<Group> groups;
  for (auto& [settings, members] : by_settings) groups.push_back({std::move(members), ""});
  name_differences(groups);
  return groups;
}

// "BABILong, seed 2: run-1": what was measured, the settings that tell its groups apart, and the run where it is one.
std::string title_of(const std::string& what, const Group& group) {
  return what + group.differs + (group.members.size() == 1 ? ": " + group.members.front().name : "");
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
                  const std::string& unit, std::vector<Figure>& figures, std::string (*length_text)(int64_t)) {
  std::set<int64_t> lengths;
  for (const Member& m : members)
    for (const TaskLine& line : m.result->lines) lengths.insert(line.length);
  HeatMap map{.id = fmt::format("task-{}", figures.size()),
              .title = title,
              .x_label = unit.empty() ? "length" : "length in " + unit,
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
    for (const char* task : {kPasskey, kCopy, kBabilong, kLambada, kChoices}) {
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
  for (const Group& group : groups_of(runs, kPasskey)) {
    const std::vector<Member>& members = group.members;
    const std::string& unit = members.front().result->unit;
    const std::string of = unit.empty() ? "length of the text" : unit == "characters" ? "characters of the filler" : "tokens of the prompt";
    add_heat_map(members, title_of("Passkey retrieval", group),
                 "Share of prompts whose number was said, by " + of + " and depth of the number (0: at its beginning), " +
                     samples_text(members, "in each cell") + ".",
                 "depth", unit, figures, unit == "characters" ? in_thousands : in_binary);
  }
}

void add_babilong_figures(const Runs& runs, std::vector<Figure>& figures) {
  for (const Group& group : groups_of(runs, kBabilong))
    add_heat_map(group.members, title_of("BABILong", group),
                 "Share of right answers, by length in tokens of the text that the facts are scattered over (0: the facts alone), " +
                     samples_text(group.members, "in each cell") + ".",
                 "task", "tokens", figures, in_thousands);
}

namespace {

// A row for each result. `rest` are the columns behind the run's name, `cells` their texts.
void add_score_table(const Runs& runs, const char* task, const std::string& title, const std::string& caption,
                     const std::vector<std::string>& rest, std::vector<std::string> (*cells)(const TaskLine&),
                     std::vector<Figure>& figures) {
  for (const Group& group : groups_of(runs, task)) {
    const std::string& data = group.members.front().result->data;
    Table table{{"Run"}, {}};
    table.header.insert(table.header.end(), rest.begin(), rest.end());
    for (const Member& m : group.members)
      for (const TaskLine& line : m.result->lines) {
        table.rows.push_back({m.name});
        for (std::string& cell : cells(line)) table.rows.back().push_back(std::move(cell));
      }
    figures.push_back({(data.empty() ? title : title + ": " + data) + group.differs, caption, "", "", table});
  }
}

}  // namespace

void add_lambada_tables(const Runs& runs, std::vector<Figure>& figures) {
  add_score_table(
      runs, kLambada, "LAMBADA", "The last word of passages: the share of them where it was the most likely one, and perplexity per word.",
      {"Passages", "Accuracy", "Perplexity"},
      [](const TaskLine& line) {
        return std::vector<std::string>{format_count(line.samples), fmt::format("{:.2f}%", 100 * line.scores[0]),
                                        format_number(line.scores[1])};
      },
      figures);
}

void add_choices_tables(const Runs& runs, std::vector<Figure>& figures) {
  add_score_table(
      runs, kChoices, "Multiple choice",
      "The share of questions whose right choice has the largest log-likelihood: as a sum, by its characters, by its tokens; and the share "
      "whose right choice is what the model would have said itself.",
      {"Questions", "With a label", "Accuracy", "per character", "per token", "Said itself"},
      [](const TaskLine& line) {
        std::vector<std::string> out{format_count(line.length), format_count(line.samples)};
        for (const double score : line.scores) out.push_back(std::isfinite(score) ? percent(score) : "–");
        return out;
      },
      figures);
}

void add_copy_figures(const Runs& runs, std::vector<Figure>& figures) {
  for (const Group& group : groups_of(runs, kCopy)) {
    const std::vector<Member>& members = group.members;
    LinePlot plot{.id = fmt::format("task-{}", figures.size()),
                  .title = title_of("Synthetic copying by length", group),
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
        {title_of("Synthetic copying by length", group),
         "Share of letters that are right (solid) and of words without a mistake (dashed), with the right letters before each "
         "given, " +
             samples_text(members, "at each length") + ".",
         legend_html(plot.series), line_plot_svg(plot), table});
  }
}

}  // namespace longhand
