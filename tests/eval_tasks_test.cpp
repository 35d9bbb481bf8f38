// The tasks of `longhand eval` as a user meets them: lines, tables, resuming, errors; and training on a task from a recipe.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/files.h"
#include "data/tasks/babilong.h"
#include "tests/support/command_help.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;
using Words = std::vector<std::string>;

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void write_text(const std::string& path, const std::string& text) {
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// A scratch folder with fresh models of bytes and of letters, and small data.
class Bench {
 public:
  Bench() {
    for (const auto& [name, vocabulary, tokenizer] : {std::tuple{"bytes", 257, "bytes"}, std::tuple{"letters", 9, "letters:5"}}) {
      const std::string recipe =
          "[model]\nfamily = \"mamba2\"\nd_model = 16\nn_layer = 2\nd_state = 8\nheaddim = 8\nvocab_size = " + std::to_string(vocabulary) +
          "\n[data]\ntokenizer = \"" + tokenizer + "\"\n";
      write_text(file("model.toml"), recipe);
      const ProcessResult made = run({"init", "model.toml", "--out", std::string("runs/") + name + "/checkpoints/step-7"});
      REQUIRE_MESSAGE(made.code == 0, made.err);
      write_text(file(std::string("runs/") + name + "/config.toml"),
                 std::string("[data]\ntokenizer = \"") + tokenizer + "\"\n[train]\nlength = 32\n");
    }
    write_text(file("lambada.jsonl"),
               "{\"text\": \"It was the end of the day\"}\n{\"text\": \"One two\"}\n{\"text\": \"He said: no more\"}\n");
    write_text(
        file("questions.jsonl"),
        "{\"context\": \"One and one is\", \"choices\": [\"two\", \"three\"], \"label\": 0}\n"
        "{\"context\": \"Say\", \"choices\": [\"a\", \"bb\", \"ccc\"], \"label\": 2}\n\n{\"context\": \"\", \"choices\": [\"x\"]}\n");
    write_text(file("qa1_small_test.txt"),
               "1 Ann went to the garden.\n2 Where is Ann? \tgarden\t1\n3 Bob went to the office.\n4 Where is Bob? \toffice\t3\n");
    write_text(file("more/qa1_x.txt"), "1 Ann ran.\n2 Where is Ann? \tgarden\t1\n");
    std::string book;
    for (int i = 1000; i < 4000; ++i) book += "Sentence " + std::to_string(i) + " of the book. ";
    write_text(file("books.jsonl"), "{\"text\": \"" + book + "\"}\n");
  }
  std::string file(const std::string& name) const { return folder_.file(name); }
  ProcessResult run(Words words) const {
    words.insert(words.begin(), LONGHAND_BINARY);
    return run_process(std::move(words), {.folder = folder_.path(), .input = {}, .environment = {}});
  }
  ProcessResult eval(const std::string& task, const Words& more) const {
    Words words{"eval", task, "--model", task == "copy" ? "runs/letters" : "runs/bytes", "--device", "cpu"};
    words.insert(words.end(), more.begin(), more.end());
    return run(words);
  }

 private:
  ScratchFolder folder_;
};

struct Task {
  std::string name;
  Words words;
  std::size_t samples;
  std::string header;
  Words keys;  // in every line
};

const std::vector<Task>& tasks() {
  static const std::vector<Task> all{
      {"lambada", {"--data", "lambada.jsonl"}, 3, "samples,accuracy,perplexity", {"log_likelihood", "target"}},
      {"passkey",
       {"--lengths", "300,500", "--depths", "0.1,0.9", "--prompts", "2"},
       8,
       "length,depth,samples,accuracy",
       {"length", "depth", "before", "after", "target"}},
      {"copy",
       {"--min-length", "4", "--max-length", "8", "--every", "2", "--samples", "3"},
       9,
       "length,samples,string_accuracy,character_accuracy",
       {"length", "letters", "letters_right", "target"}},
      {"babilong",
       {"--babi", "qa1_small_test.txt", "--books", "books.jsonl", "--lengths", "0k,1k", "--samples", "2"},
       4,
       "task,length,samples,accuracy",
       {"task", "length", "question", "target"}},
      {"choices",
       {"--data", "questions.jsonl"},
       3,
       "questions,labelled,accuracy,accuracy_per_character,accuracy_per_token,greedy",
       {"log_likelihood", "per_character", "per_token", "greedy"}}};
  return all;
}

std::vector<nlohmann::json> lines_of(const std::string& path) {
  std::vector<nlohmann::json> lines;
  for (const std::string& line : split_at(text_of(path), '\n'))
    if (!line.empty()) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

std::vector<nlohmann::json> sorted(std::vector<nlohmann::json> lines) {
  std::sort(lines.begin(), lines.end(), [](const auto& a, const auto& b) { return a.at("sample") < b.at("sample"); });
  return lines;
}

// The values of a table, row by row, without its header.
std::vector<Words> table_of(const std::string& csv) {
  std::vector<Words> rows;
  for (const std::string& line : split_at(csv, '\n'))
    if (!line.empty()) rows.push_back(split_at(line, ','));
  rows.erase(rows.begin());
  return rows;
}

using Lines = std::vector<nlohmann::json>;

// The mean of a value over lines [from, to).
template <class Value>
double mean_of(const Lines& lines, std::size_t from, std::size_t to, const Value& value) {
  double sum = 0;
  for (std::size_t i = from; i < to; ++i) sum += value(lines[i]);
  return sum / static_cast<double>(to - from);
}

double correct(const nlohmann::json& line) {
  return line.at("correct").get<bool>() ? 1 : 0;
}

constexpr double kShown = 0.5001e-4;  // shares are printed with four digits

// Accuracies of cells of equally many samples, and their lengths, against the lines.
void check_cells(const Lines& lines, const std::vector<Words>& rows, std::size_t length_column, std::size_t accuracy_column) {
  const std::size_t per_cell = lines.size() / rows.size();
  for (std::size_t c = 0; c < rows.size(); ++c) {
    for (std::size_t i = c * per_cell; i < (c + 1) * per_cell; ++i) CHECK(lines[i].at("length") == std::stoll(rows[c][length_column]));
    CHECK(std::abs(std::stod(rows[c][accuracy_column]) - mean_of(lines, c * per_cell, (c + 1) * per_cell, correct)) < kShown);
  }
}

// The figures that a task prints follow from its lines, and the lines from the samples.
void check_values(const std::string& task, const Lines& lines, const std::vector<Words>& rows) {
  if (task == "copy") {
    check_cells(lines, rows, 0, 2);
    for (std::size_t i = 0; i < lines.size(); ++i) {
      const auto target = lines[i].at("target").get<std::string>(), output = lines[i].at("output").get<std::string>();
      CHECK(lines[i].at("letters") == lines[i].at("length"));  // the end token does not count
      REQUIRE(target.size() == lines[i].at("letters").get<std::size_t>());
      REQUIRE(output.size() == target.size());
      int right = 0;
      for (std::size_t k = 0; k < target.size(); ++k) right += target[k] == output[k] ? 1 : 0;
      CHECK(lines[i].at("letters_right") == right);
      CHECK(lines[i].at("correct") == (target == output));
    }
    for (std::size_t c = 0; c < rows.size(); ++c)
      CHECK(std::abs(std::stod(rows[c][3]) - mean_of(lines, 3 * c, 3 * c + 3, [](const auto& line) {
                       return line.at("letters_right").template get<double>() / line.at("letters").template get<double>();
                     })) < kShown);
  } else if (task == "passkey") {
    check_cells(lines, rows, 0, 3);
    const std::vector<std::pair<int, double>> cells{{300, 0.1}, {300, 0.9}, {500, 0.1}, {500, 0.9}};
    for (std::size_t i = 0; i < lines.size(); ++i) {
      const auto& [length, depth] = cells[i / 2];
      CHECK(lines[i].at("length") == length);
      CHECK(lines[i].at("depth") == depth);
      CHECK(lines[i].at("tokens") == length);
      const double before = lines[i].at("before"), after = lines[i].at("after");
      CHECK(before == std::round(depth * (before + after)));
      CHECK(std::stod(rows[i / 2][1]) == depth);
    }
  } else if (task == "babilong") {
    check_cells(lines, rows, 1, 3);
    for (std::size_t i = 0; i < lines.size(); ++i) {
      CHECK(lines[i].at("task") == "qa1");
      CHECK(lines[i].at("question") == (i % 2 == 0 ? "Where is Ann?" : "Where is Bob?"));
      CHECK(lines[i].at("target") == (i % 2 == 0 ? "garden" : "office"));
    }
  } else if (task == "lambada") {
    const auto likelihood = [](const auto& line) { return line.at("log_likelihood").template get<double>(); };
    CHECK(std::abs(std::stod(rows[0][1]) - mean_of(lines, 0, lines.size(), correct)) < kShown);
    CHECK(std::stod(rows[0][2]) == doctest::Approx(std::exp(-mean_of(lines, 0, lines.size(), likelihood))).epsilon(1e-5));  // per word
    CHECK(lines[0].at("target") == " day");
    CHECK(lines[1].at("target") == " two");
  } else {
    const std::vector<Words> choices{{"two", "three"}, {"a", "bb", "ccc"}, {"x"}};
    const std::vector<std::size_t> labels{0, 2};
    std::vector<double> right(4);
    for (std::size_t i = 0; i < lines.size(); ++i) {
      const auto sums = lines[i].at("log_likelihood").get<std::vector<double>>();
      const auto by_character = lines[i].at("per_character").get<std::vector<double>>(),
                 by_token = lines[i].at("per_token").get<std::vector<double>>();
      REQUIRE(sums.size() == choices[i].size());
      for (std::size_t c = 0; c < sums.size(); ++c) {
        const auto characters = static_cast<double>(choices[i][c].size());
        CHECK(by_character[c] == doctest::Approx(sums[c] / characters));
        CHECK(by_token[c] == doctest::Approx(sums[c] / (i < 2 ? characters + 1 : characters)));  // the blank; none without a context
      }
      const auto best = [](const std::vector<double>& v) {
        return static_cast<std::size_t>(std::max_element(v.begin(), v.end()) - v.begin());
      };
      CHECK(lines[i].at("output") == best(sums));
      if (i < 2) right[0] += best(sums) == labels[i], right[1] += best(by_character) == labels[i], right[2] += best(by_token) == labels[i];
      if (i < 2) right[3] += lines[i].at("greedy").at(labels[i]).get<bool>();
    }
    CHECK(rows[0][1] == "2");
    for (std::size_t k = 0; k < 4; ++k) CHECK(std::abs(std::stod(rows[0][2 + k]) - right[k] / 2) < kShown);
  }
}

// The same samples with the same results, numbers to the rounding of other batches.
void check_same_lines(const Lines& a, const Lines& b) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (const char* key : {"sample", "settings", "prompt", "target", "output", "correct"})
      CHECK_MESSAGE(a[i].value(key, nlohmann::json()) == b[i].value(key, nlohmann::json()), key);
    if (!a[i].contains("log_likelihood")) continue;
    const auto numbers = [](const nlohmann::json& j) { return j.is_array() ? j.get<std::vector<double>>() : std::vector<double>{j}; };
    const auto x = numbers(a[i].at("log_likelihood")), y = numbers(b[i].at("log_likelihood"));
    REQUIRE(x.size() == y.size());
    for (std::size_t k = 0; k < x.size(); ++k) CHECK(x[k] == doctest::Approx(y[k]).epsilon(1e-4));
  }
}

}  // namespace

TEST("eval tasks: a line for each sample, a table and a description, beside the run or where --out says") {
  const Bench bench;
  for (const Task& task : tasks()) {
    CAPTURE(task.name);
    Words words = task.words;
    words.insert(words.end(), {"--out", "out/x.jsonl", "--batch", "2", "--chunk", "64"});
    const ProcessResult result = bench.eval(task.name, words);
    REQUIRE_MESSAGE(result.code == 0, result.err);
    CHECK(holds(result.err, "peak memory"));
    CHECK(holds(result.err, std::to_string(task.samples) + " of " + std::to_string(task.samples) + " samples done"));
    const auto lines = sorted(lines_of(bench.file("out/x.jsonl")));
    REQUIRE(lines.size() == task.samples);
    for (std::size_t i = 0; i < lines.size(); ++i) {
      CHECK(lines[i].at("sample") == i);
      Words keys = task.keys;
      keys.insert(keys.end(), {"prompt", "output", "settings"});
      if (task.name != "choices") keys.emplace_back("correct");
      for (const std::string& key : keys) CHECK_MESSAGE(lines[i].contains(key), key);
    }
    CHECK(text_of(bench.file("out/x.csv")).starts_with(task.header + "\n"));
    check_values(task.name, lines, table_of(text_of(bench.file("out/x.csv"))));
    const auto description = nlohmann::json::parse(text_of(bench.file("out/x.json")));
    CHECK(description.at("task") == task.name);
    CHECK(description.at("samples") == task.samples);
    CHECK(description.at("dtype") == "f32");
    fs::remove_all(bench.file("out"));

    const ProcessResult beside = bench.eval(task.name, task.words);
    REQUIRE_MESSAGE(beside.code == 0, beside.err);
    CHECK(holds(beside.err, "/eval/" + task.name + "-"));
    CHECK(beside.out == result.out);
    const auto at = beside.err.find("wrote ") + 6;
    check_same_lines(sorted(lines_of(bench.file(beside.err.substr(at, beside.err.find(",", at) - at)))),
                     lines);  // other batches and chunks
  }
  for (const auto& [run, titles] :
       {std::pair<std::string, Words>{
            "bytes", {"Passkey retrieval: bytes", "BABILong: bytes", "LAMBADA: lambada.jsonl", "Multiple choice: questions.jsonl"}},
        std::pair<std::string, Words>{"letters", {"Synthetic copying by length: letters"}}}) {
    const ProcessResult reported = bench.run({"report", "runs/" + run, "--out", "page.html"});
    REQUIRE_MESSAGE(reported.code == 0, reported.err);
    for (const std::string& title : titles) CHECK_MESSAGE(holds(text_of(bench.file("page.html")), title), title);
  }
}

TEST("eval tasks: tables count the samples whose lines say correct") {
  // Fresh models are right nowhere: lines of a finished log are made right, and the same command makes the table of them.
  const Bench bench;
  struct Case {
    std::string task;
    std::vector<std::size_t> right;  // samples
    std::size_t column;              // of accuracy
    Words accuracy;                  // by row
  };
  for (const Case& c : std::vector<Case>{{"passkey", {0, 2, 3, 7}, 3, {"0.5000", "1.0000", "0.0000", "0.5000"}},
                                         {"babilong", {1, 2, 3}, 3, {"0.5000", "1.0000"}},
                                         {"lambada", {0, 2}, 1, {"0.6667"}},
                                         {"copy", {0, 4, 5}, 2, {"0.3333", "0.6667", "0.0000"}},
                                         {"choices", {}, 5, {"0.5000"}}}) {
    CAPTURE(c.task);
    const Task& task = *std::find_if(tasks().begin(), tasks().end(), [&](const Task& t) { return t.name == c.task; });
    Words words = task.words;
    words.insert(words.end(), {"--out", "x.jsonl"});
    REQUIRE(bench.eval(c.task, words).code == 0);
    auto lines = sorted(lines_of(bench.file("x.jsonl")));
    if (c.task == "choices") {  // the model would have said the right choice of one question, and a wrong one of the other
      lines[0]["greedy"] = {true, false};
      lines[1]["greedy"] = {true, false, false};
    } else {
      for (std::size_t i = 0; i < lines.size(); ++i) lines[i]["correct"] = std::find(c.right.begin(), c.right.end(), i) != c.right.end();
    }
    std::string text;
    for (const auto& line : lines) text += line.dump() + "\n";
    write_text(bench.file("x.jsonl"), text);
    const ProcessResult again = bench.eval(c.task, words);
    REQUIRE_MESSAGE(again.code == 0, again.err);
    const auto rows = table_of(text_of(bench.file("x.csv")));
    REQUIRE(rows.size() == c.accuracy.size());
    for (std::size_t r = 0; r < rows.size(); ++r) CHECK(rows[r][c.column] == c.accuracy[r]);
    fs::remove(bench.file("x.jsonl"));
  }
}

TEST("eval tasks: an evaluation that was stopped goes on, and ends as if it had not") {
  const Bench bench;
  for (const Task& task : tasks()) {
    CAPTURE(task.name);
    Words words = task.words;
    words.insert(words.end(), {"--out", "x.jsonl"});
    const ProcessResult whole = bench.eval(task.name, words);
    REQUIRE(whole.code == 0);
    const std::string text = text_of(bench.file("x.jsonl")), table = text_of(bench.file("x.csv"));
    const auto first_line = text.find('\n') + 1;
    write_text(bench.file("x.jsonl"), text.substr(0, first_line + 5));  // one whole line, and a piece of the next
    const ProcessResult again = bench.eval(task.name, words);
    REQUIRE_MESSAGE(again.code == 0, again.err);
    CHECK(holds(again.err, "1 of them done before"));
    CHECK(again.out == whole.out);
    CHECK(text_of(bench.file("x.csv")) == table);
    write_text(bench.file("whole.jsonl"), text);
    check_same_lines(sorted(lines_of(bench.file("x.jsonl"))), sorted(lines_of(bench.file("whole.jsonl"))));
    CHECK(holds(again.err, "of the " + std::to_string(task.samples - 1) + " samples that were run now"));
    auto measured = nlohmann::json::parse(text_of(bench.file("x.json")));
    CHECK(measured.at("samples_found") == 1);
    CHECK(measured.at("tokens") > 0);
    const ProcessResult all_there = bench.eval(task.name, words);
    CHECK(all_there.out == whole.out);
    CHECK(holds(all_there.err, ", 0 tokens"));
    CHECK(nlohmann::json::parse(text_of(bench.file("x.json"))) == measured);  // nothing was run, nothing measured
    words.insert(words.end(), {"--dtype", "f64"});
    const ProcessResult other = bench.eval(task.name, words);
    CHECK(other.code == 1);
    CHECK(holds(other.err, "written with other settings"));
    words.emplace_back("--fresh");
    CHECK(bench.eval(task.name, words).code == 0);
    fs::remove(bench.file("x.jsonl"));
  }
}

TEST("eval tasks: where nothing is kept, this is said before the first sample") {
  const Bench bench;
  fs::create_directories(bench.file("plain"));
  fs::copy(bench.file("runs/bytes/checkpoints/step-7"), bench.file("plain"), fs::copy_options::recursive);
  const Words words{"eval", "lambada", "--model", "plain", "--tokenizer", "bytes", "--device", "cpu", "--data", "lambada.jsonl"};
  const ProcessResult plain = bench.run(words);
  REQUIRE_MESSAGE(plain.code == 0, plain.err);
  const auto said = plain.err.find("nothing is kept: plain belongs to no run; --out FILE.jsonl");
  REQUIRE_MESSAGE(said != std::string::npos, plain.err);
  CHECK(said < plain.err.find("samples done"));
  Words kept = words;
  kept.insert(kept.end(), {"--out", "x.jsonl"});
  CHECK_FALSE(holds(bench.run(kept).err, "nothing is kept"));
  CHECK_FALSE(holds(bench.eval("lambada", {"--data", "lambada.jsonl"}).err, "nothing is kept"));
}

TEST("eval tasks: other settings have a file of their own beside the run") {
  const Bench bench;
  const auto files = [&](const char* task, const std::vector<Words>& settings) {
    for (const Words& words : settings) {
      const ProcessResult result = bench.eval(task, words);
      REQUIRE_MESSAGE(result.code == 0, result.err);
    }
    std::size_t n = 0;
    for (const auto& entry :
         fs::directory_iterator(bench.file(std::string("runs/") + (task == std::string("copy") ? "letters" : "bytes") + "/eval")))
      n += entry.path().extension() == ".jsonl" && entry.path().filename().string().starts_with(task) ? 1 : 0;
    return n;
  };
  const Words passkey{"--lengths", "300", "--prompts", "1", "--depths"};
  Words shallow = passkey, deep = passkey;
  shallow.emplace_back("0.1"), deep.emplace_back("0.9");
  CHECK(files("passkey", {shallow, deep, shallow}) == 2);
  CHECK(files("lambada", {{"--data", "lambada.jsonl"}, {"--data", "lambada.jsonl", "--samples", "2"}}) == 2);
  const Words babilong{"--babi", "qa1_small_test.txt", "--books", "books.jsonl", "--lengths", "1k", "--samples", "2"};
  Words early = babilong;
  early.insert(early.end(), {"--facts-to", "0.5"});
  CHECK(files("babilong", {babilong, early}) == 2);
}

TEST("eval tasks: samples do not depend on threads or batches") {
  const Bench bench;
  for (const Task& task : tasks()) {
    CAPTURE(task.name);
    std::vector<std::vector<nlohmann::json>> lines;
    for (const char* threads : {"1", "3"}) {
      Words words{"/usr/bin/env",
                  std::string("OMP_NUM_THREADS=") + threads,
                  LONGHAND_BINARY,
                  "eval",
                  task.name,
                  "--model",
                  task.name == "copy" ? "runs/letters" : "runs/bytes",
                  "--device",
                  "cpu",
                  "--out",
                  std::string("t") + threads + ".jsonl",
                  "--batch",
                  threads};
      words.insert(words.end(), task.words.begin(), task.words.end());
      const ProcessResult result = run_process(words, {.folder = bench.file(""), .input = {}, .environment = {}});
      REQUIRE_MESSAGE(result.code == 0, result.err);
      lines.push_back(sorted(lines_of(bench.file(std::string("t") + threads + ".jsonl"))));
      fs::remove(bench.file(std::string("t") + threads + ".jsonl"));
    }
    REQUIRE(lines[0].size() == lines[1].size());
    for (std::size_t i = 0; i < lines[0].size(); ++i)
      for (const char* key : {"prompt", "target"})
        CHECK(lines[0][i].value(key, nlohmann::json()) == lines[1][i].value(key, nlohmann::json()));
  }
}

TEST("eval tasks: other facts, another book and a moved border are other settings, whatever their files are called") {
  const Bench bench;
  const auto refused = [&](const std::string& task, const Words& words, const std::string& changed, const std::string& from,
                           const std::string& to) {
    Words all = words;
    all.insert(all.end(), {"--out", "x.jsonl", "--fresh"});
    REQUIRE(bench.eval(task, all).code == 0);
    std::string text = text_of(bench.file(changed));
    const std::string before = text;
    text.replace(text.find(from), from.size(), to);
    write_text(bench.file(changed), text);
    all.pop_back();
    const ProcessResult result = bench.eval(task, all);
    CHECK(result.code == 1);
    CHECK_MESSAGE(holds(result.err, "written with other settings"), result.err);
    write_text(bench.file(changed), before);
    CHECK(bench.eval(task, all).code == 0);
  };
  const Words babilong{"--babi", "qa1_small_test.txt", "--books", "books.jsonl", "--lengths", "0k,1k", "--samples", "2"};
  refused("babilong", babilong, "qa1_small_test.txt", "Ann went to the", "Ann ran to the");
  std::string other;
  for (int i = 5000; i < 8000; ++i) other += "Sentence " + std::to_string(i) + " of the book. ";
  const std::string book = text_of(bench.file("books.jsonl"));
  refused("babilong", babilong, "books.jsonl", book, "{\"text\": \"" + other + "\"}\n");
  refused("choices", {"--data", "questions.jsonl"}, "questions.jsonl", R"("One and one is", "choices": ["two")",
          R"("One and one", "choices": ["is two")");
}

TEST("eval tasks: what cannot be scored is said, with the way out") {
  const Bench bench;
  write_text(bench.file("empty.jsonl"), "");
  std::string stories = "1 Ann ran.\n2 Where is Ann? \tgarden\t1\n";
  for (int line = 1; line <= 87; ++line) stories += std::to_string(line) + " Bob ate.\n";  // 88 lines with the question; 87 fit at 1k
  write_text(bench.file("qa1_long_test.txt"), stories + "88 Where is Bob? \toffice\t1\n");
  const Words long_story{"--babi", "qa1_long_test.txt", "--books", "books.jsonl", "--samples", "2", "--lengths"};
  Words at_0k = long_story, at_1k = long_story, at_2k = long_story;
  at_0k.emplace_back("0k"), at_1k.emplace_back("1k"), at_2k.emplace_back("2k");
  CHECK(bench.eval("babilong", at_0k).code == 0);
  CHECK(bench.eval("babilong", at_2k).code == 0);
  write_text(bench.file("bad.jsonl"), "{\"context\": \"a\", \"choices\": [\"b\"], \"label\": 1}\n");
  struct Case {
    const char* task;
    Words words;
    int code;
    const char* message;
  };
  const std::vector<Case> cases{
      {"lambada", {}, 2, "--data"},
      {"lambada", {"--data", "lambada.jsonl", "--tokenizer", "letters:5"}, 1, "a character that has no id"},
      {"lambada", {"--data", "lambada.jsonl", "--out", "x.csv"}, 1, "ends in .jsonl"},
      {"lambada", {"--data", "questions.jsonl"}, 1, "questions.jsonl"},
      {"lambada", {"--data", "empty.jsonl"}, 1, "a file without a passage"},
      {"choices", {"--data", "empty.jsonl"}, 1, "a file without questions"},
      {"passkey", {"--lengths", "100"}, 1, "leaves no room"},
      {"passkey", {"--lengths", "1x"}, 1, "length that is not understood"},
      {"passkey", {"--lengths", "2kk"}, 1, "length that is not understood"},
      {"passkey", {"--lengths", "1Mk", "--unit", "characters"}, 1, "length that is not understood"},
      {"passkey", {"--depths", "1.5"}, 2, "--depths"},
      {"passkey", {"--lengths", "300", "--depths", "0.5,0.1,0.50"}, 1, "names a value twice"},
      {"passkey", {"--lengths", "1k,500,1024"}, 1, "names a value twice"},
      {"passkey", {"--depths", "0.5", "--any-depth"}, 2, "--any-depth"},
      {"copy", {"--min-length", "9", "--max-length", "8"}, 1, "least length is above"},
      {"copy", {"--model", "runs/bytes"}, 2, "--model"},
      {"copy", {"--variant", "reverse"}, 2, "--variant"},
      {"copy", {"--ngram", "2"}, 1, "has no n-grams"},
      {"babilong", {"--babi", "qa1_small_test.txt", "--lengths", "1k", "--samples", "2"}, 1, "need a background"},
      {"babilong", {"--babi", "qa1_small_test.txt", "--lengths", "0k"}, 1, "too few questions"},
      {"babilong",
       {"--babi", "qa1_small_test.txt", "--books", "books.jsonl", "--lengths", "1k,1000", "--samples", "2"},
       1,
       "names a value twice"},
      {"babilong", {"--babi", "qa1_small_test.txt", "--lengths", "0k", "--book-set", "x"}, 2, "--book-set"},
      {"babilong",
       {"--babi", "qa1_small_test.txt", "--books", "books.jsonl", "--book-set", "x", "--lengths", "1k", "--samples", "2"},
       1,
       "no document can be a background"},
      {"babilong", {"--babi", "qa1_small_test.txt", "--lengths", "0k", "--samples", "2", "--facts-to", "0.5"}, 1, "no part for them"},
      {"babilong", at_1k, 1, "questions that fit  1"},
      {"babilong", {"--babi", "books.jsonl", "--lengths", "0k"}, 1, "does not say which task"},
      {"babilong",
       {"--babi", "qa1_small_test.txt", "more/qa1_x.txt", "--lengths", "0k", "--samples", "2"},
       1,
       "two bAbI files of one task"},
      {"choices", {"--data", "bad.jsonl"}, 1, "label is not the number of a choice"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.message);
    const ProcessResult result = bench.eval(c.task, c.words);
    CHECK(result.code == c.code);
    CHECK_MESSAGE(holds(result.err, c.message), result.err);
  }
}

TEST("babilong: the prompts that longhand comes with") {
  const auto prompts = read_babilong_prompts(std::string(LONGHAND_SOURCE_DIR) + "/data/tasks/babilong_prompts.json");
  for (int task = 1; task <= 5; ++task) {
    const BabilongPrompt& p = prompts.at("qa" + std::to_string(task));
    CHECK_FALSE(p.instruction.empty());
    CHECK_FALSE(p.post_prompt.empty());
    CHECK(split_at(p.examples, '<').size() - 1 == 2U * (task == 5 ? 3 : 2));  // <example> and </example>
    CHECK(holds(p.examples, "Answer: "));
  }
}

TEST("train: on samples of a task, from a recipe, scored afterwards") {
  const Bench bench;
  write_text(bench.file("copy.toml"),
             "[model]\nfamily = \"mamba2\"\nd_model = 16\nn_layer = 2\nd_state = 8\nheaddim = 8\n[data]\ntask = \"copy\"\ntokenizer = "
             "\"letters:5\"\n"
             "[task]\nmin_length = 2\nmax_length = 6\n[train]\nsteps = 3\nbatch_size = 4\nlength = 40\n");
  const ProcessResult trained = bench.run({"train", "copy.toml", "--device", "cpu"});
  REQUIRE_MESSAGE(trained.code == 0, trained.err);
  CHECK(holds(trained.err, "samples of copy"));
  CHECK(holds(text_of(bench.file("runs/copy/metrics.jsonl")), "val_loss"));
  const ProcessResult scored =
      bench.run({"eval", "copy", "--model", "runs/copy", "--min-length", "4", "--max-length", "5", "--samples", "4", "--device", "cpu"});
  REQUIRE_MESSAGE(scored.code == 0, scored.err);
  CHECK(holds(scored.out, "character_accuracy"));
  write_text(bench.file("babilong.toml"),
             "[model]\nfamily = \"mamba2\"\nd_model = 16\nn_layer = 2\nd_state = 8\nheaddim = 8\n[data]\ntask = \"babilong\"\nfiles = "
             "[\"books.jsonl\"]\n[task]\nbabi = [\"qa1_small_test.txt\"]\nlengths = [\"0k\", \"1k\"]\n[train]\nsteps = 2\nbatch_size = "
             "2\nlength = 1024\n");
  const ProcessResult babilong = bench.run({"train", "babilong.toml", "--device", "cpu", "--set", "initial_state=state-passing"});
  REQUIRE_MESSAGE(babilong.code == 0, babilong.err);
  CHECK(holds(babilong.err, "qa1_small_test.txt has fewer than 20 different stories: none is held out"));
}

}  // namespace longhand::test
