// The tasks of `longhand eval` as a user meets them: lines, tables, resuming, errors; and training on a task from a recipe.
#include <algorithm>
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
    const auto description = nlohmann::json::parse(text_of(bench.file("out/x.json")));
    CHECK(description.at("task") == task.name);
    CHECK(description.at("samples") == task.samples);
    CHECK(description.at("dtype") == "f32");
    fs::remove_all(bench.file("out"));

    const ProcessResult beside = bench.eval(task.name, task.words);
    REQUIRE_MESSAGE(beside.code == 0, beside.err);
    CHECK(holds(beside.err, "/eval/" + task.name + "-"));
    CHECK(beside.out == result.out);
  }
  for (const auto& [run, titles] : {std::pair<std::string, Words>{"bytes", {"Passkey retrieval: bytes", "BABILong: bytes"}},
                                    std::pair<std::string, Words>{"letters", {"Synthetic copying by length: letters"}}}) {
    const ProcessResult reported = bench.run({"report", "runs/" + run, "--out", "page.html"});
    REQUIRE_MESSAGE(reported.code == 0, reported.err);
    for (const std::string& title : titles) CHECK_MESSAGE(holds(text_of(bench.file("page.html")), title), title);
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
    CHECK(sorted(lines_of(bench.file("x.jsonl"))).size() == task.samples);
    const ProcessResult all_there = bench.eval(task.name, words);
    CHECK(all_there.out == whole.out);
    CHECK(holds(all_there.err, ", 0 tokens"));
    words.insert(words.end(), {"--dtype", "f64"});
    const ProcessResult other = bench.eval(task.name, words);
    CHECK(other.code == 1);
    CHECK(holds(other.err, "written with other settings"));
    words.emplace_back("--fresh");
    CHECK(bench.eval(task.name, words).code == 0);
    fs::remove(bench.file("x.jsonl"));
  }
}

TEST("eval tasks: what cannot be scored is said, with the way out") {
  const Bench bench;
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
      {"passkey", {"--lengths", "100"}, 1, "leaves no room"},
      {"passkey", {"--lengths", "1x"}, 1, "length that is not understood"},
      {"passkey", {"--depths", "1.5"}, 2, "--depths"},
      {"passkey", {"--depths", "0.5", "--any-depth"}, 2, "--any-depth"},
      {"copy", {"--min-length", "9", "--max-length", "8"}, 1, "least length is above"},
      {"copy", {"--model", "runs/bytes"}, 2, "--model"},
      {"copy", {"--variant", "reverse"}, 2, "--variant"},
      {"babilong", {"--babi", "qa1_small_test.txt", "--lengths", "1k", "--samples", "2"}, 1, "need a background"},
      {"babilong", {"--babi", "qa1_small_test.txt", "--lengths", "0k"}, 1, "too few questions"},
      {"babilong", {"--babi", "books.jsonl", "--lengths", "0k"}, 1, "does not say which task"},
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
}

}  // namespace longhand::test
