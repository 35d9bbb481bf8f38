// The measures of `longhand eval` as a user meets them: tables, names of files, errors, and the page that shows them side by side.
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/files.h"
#include "tests/support/command_help.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void write_text(const std::string& path, const std::string& text) {
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// A scratch folder with a shard of bytes and, for each family, a run folder whose checkpoint holds fresh weights.
class Bench {
 public:
  Bench() {
    std::string shard;
    for (int document = 0; document < 6; ++document) {
      std::string text;
      for (int i = 0; i < 12 + 6 * document; ++i) text += "word " + std::to_string(i * document % 17) + ", ";
      shard += "{\"text\": \"" + text + "\"}\n";
    }
    write_text(file("val.jsonl"), shard);
    write_text(file("bad.jsonl"), shard + "not JSON\n{\"text\": 3}\n");
    for (const std::string family : {"mamba1", "mamba2", "gla"}) {
      const std::string sizes = family == "mamba1" ? "d_state = 4" : family == "mamba2" ? "d_state = 8\nheaddim = 8" : "num_heads = 2";
      write_text(file(family + ".toml"), "[model]\nfamily = \"" + family + "\"\nd_model = 16\nn_layer = 2\nvocab_size = 257\n" + sizes +
                                             "\n[data]\ntokenizer = \"bytes\"\nfiles = [\"val.jsonl\"]\n[train]\nlength = 32\n");
      const ProcessResult made = run({"init", family + ".toml", "--out", "runs/" + family + "/checkpoints/step-7"});
      REQUIRE_MESSAGE(made.code == 0, made.err);
      write_text(file("runs/" + family + "/config.toml"), "[data]\ntokenizer = \"bytes\"\n[train]\nlength = 32\n");
    }
  }
  std::string file(const std::string& name) const { return folder_.file(name); }
  ProcessResult run(std::vector<std::string> words) const {
    words.insert(words.begin(), LONGHAND_BINARY);
    return run_process(std::move(words), {.folder = folder_.path(), .input = {}, .environment = {}});
  }
  // `longhand eval MEASURE` on the run of a family.
  ProcessResult eval(const std::string& measure, const std::string& family, const std::vector<std::string>& more,
                     const std::string& data = "val.jsonl") const {
    std::vector<std::string> words{"eval", measure, "--model", "runs/" + family, "--data", data, "--device", "cpu"};
    words.insert(words.end(), more.begin(), more.end());
    return run(words);
  }
  std::vector<std::string> tables(const std::string& family) const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(file("runs/" + family + "/eval")))
      if (entry.path().extension() == ".csv") names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }

 private:
  ScratchFolder folder_;
};

std::string first_line(const std::string& text) {
  return text.substr(0, text.find('\n'));
}

}  // namespace

TEST("eval: every measure of every family gives its tables beside the run, and the report shows them") {
  const Bench bench;
  for (const std::string family : {"mamba1", "mamba2", "gla"}) {
    CAPTURE(family);
    for (const std::vector<std::string>& words : {std::vector<std::string>{"ppl"},
                                                  {"remember", "--starts", "log:2"},
                                                  {"remember", "--distance", "js"},
                                                  {"state", "--histograms", "32,128"},
                                                  {"forget"}}) {
      std::vector<std::string> more{"--context", "128", "--packed", "--chunk", "48", "--sequences", "2"};
      more.insert(more.end(), words.begin() + 1, words.end());
      const ProcessResult result = bench.eval(words[0], family, more);
      REQUIRE_MESSAGE(result.code == 0, result.err);
      CHECK(holds(result.err, "2 sequences used"));
      CHECK(holds(result.err, "wrote runs/" + family + "/eval/" + words[0] + "-val-packed-128-n2-"));
      CHECK_FALSE(result.out.empty());
    }
    const std::string stem = "-val-packed-128-n2-";
    CHECK(bench.tables(family) == std::vector<std::string>{"forget" + stem + "f32-step-7.csv", "forget" + stem + "f32-step-7.curve.csv",
                                                           "ppl" + stem + "f32-step-7.csv", "ppl" + stem + "f32-step-7.spread.csv",
                                                           "remember" + stem + "js-f32-step-7.csv",
                                                           "remember" + stem + "tv-log2-f32-step-7.csv", "state" + stem + "f32-step-7.csv",
                                                           "state" + stem + "f32-step-7.histogram.csv"});
    const std::string folder = bench.file("runs/" + family + "/eval/");
    CHECK(first_line(text_of(folder + "forget" + stem + "f32-step-7.csv")) ==
          "layer,head,half_life,tenth_life,reach_50,reach_90,retention_at_end");
    CHECK(first_line(text_of(folder + "ppl" + stem + "f32-step-7.spread.csv")) == "first,last,sequences,loss,standard_error");
    CHECK(first_line(text_of(folder + "remember" + stem + "js-f32-step-7.csv")) == "start,lag,sequences,mean,standard_error");
    const auto description = nlohmann::json::parse(text_of(folder + "remember" + stem + "js-f32-step-7.json"));
    CHECK(description.at("distance") == "js");
    CHECK(description.at("train_length") == 32);
    CHECK(description.at("sequences") == 2);
    CHECK(description.at("dtype") == "f32");
    CHECK_FALSE(fs::exists(folder + "forget" + stem + "f32-step-7.curve.json"));
    CHECK(holds(text_of(folder + "state" + stem + "f32-step-7.csv"), "\n32,ssm,0,all,"));  // the training length
  }
  const ProcessResult reported = bench.run({"report", "runs/mamba1", "runs/mamba2", "runs/gla", "--out", "page.html"});
  REQUIRE_MESSAGE(reported.code == 0, reported.err);
  const std::string page = text_of(bench.file("page.html"));
  for (const char* title : {"Perplexity by position", "Effective remembrance", "Size of the recurrent state", "Half-life of the state",
                            "Half-life by layer and head: mamba2", "Growth of the state by layer: gla"})
    CHECK_MESSAGE(holds(page, title), title);
}

TEST("eval: measurements that differ in type or sequences do not overwrite each other") {
  const Bench bench;
  for (const std::vector<std::string>& more : {std::vector<std::string>{}, {"--sequences", "1"}, {"--dtype", "f64"}, {"--packed"}}) {
    std::vector<std::string> words{"--context", "64"};
    words.insert(words.end(), more.begin(), more.end());
    CHECK(bench.eval("ppl", "mamba2", words).code == 0);
  }
  std::vector<std::string> expected;
  for (const char* which : {"long-first-64-f32", "long-first-64-f64", "long-first-64-n1-f32", "packed-64-f32"})
    for (const char* table : {"", ".spread"}) expected.push_back(std::string("ppl-val-") + which + "-step-7" + table + ".csv");
  CHECK(bench.tables("mamba2") == expected);
}

TEST("eval: --out - gives the table on stdout and nothing else there; --out FILE has its second table beside it") {
  const Bench bench;
  const ProcessResult piped = bench.eval("forget", "mamba2", {"--context", "32", "--out", "-"});
  CHECK(piped.code == 0);
  CHECK(piped.out.starts_with("layer,head,half_life,"));
  CHECK(piped.out == text_of(bench.file("runs/mamba2/eval/forget-val-long-first-32-f32-step-7.csv")));
  CHECK(holds(piped.err, "half left"));
  CHECK(bench.eval("state", "mamba2", {"--context", "32", "--histograms", "32", "--conv", "--out", "a/b.csv"}).code == 0);
  for (const char* name : {"a/b.csv", "a/b.histogram.csv", "a/b.json"}) CHECK_MESSAGE(fs::exists(bench.file(name)), name);
  CHECK(holds(text_of(bench.file("a/b.csv")), ",conv,1,all,"));
  const ProcessResult bins = bench.eval("ppl", "mamba2", {"--context", "64", "--bins", "1", "--out", "-"});
  CHECK(bins.out.starts_with("first,last,tokens,loss,perplexity\n1,1,"));
  CHECK(std::count(bins.out.begin(), bins.out.end(), '\n') == 8);
}

TEST("eval: bad lines are counted once, and named") {
  const Bench bench;
  for (const char* measure : {"ppl", "remember", "state", "forget"}) {
    const ProcessResult stopped = bench.eval(measure, "mamba2", {"--context", "64", "--sequences", "2"}, "bad.jsonl");
    CHECK(stopped.code == 1);
    CHECK(holds(stopped.err, "bad.jsonl"));
    const ProcessResult skipped =
        bench.eval(measure, "mamba2", {"--context", "64", "--sequences", "2", "--skip-bad-lines", "--out", "x.csv"}, "bad.jsonl");
    CHECK(skipped.code == 0);
    CHECK(holds(skipped.err, "2 bad lines left out, the first: "));
    CHECK(nlohmann::json::parse(text_of(bench.file("x.json"))).at("bad_lines") == 2);
  }
}

TEST("eval: what cannot be measured is said, with the way out, and no file is left") {
  const Bench bench;
  struct Case {
    const char* measure;
    std::vector<std::string> words;
    int code;
    const char* message;
  };
  const std::vector<Case> cases{
      {"remember", {"--context", "64", "--starts", "64"}, 1, "whole numbers from 0 to 63"},
      {"remember", {"--context", "64", "--starts", "3,x"}, 1, "'x'"},
      {"remember", {"--context", "64", "--distance", "l2"}, 2, "--distance"},
      {"remember", {"--context", "64", "--documents", "all"}, 2, "--documents"},
      {"remember", {"--context", "100000"}, 1, "no document is long enough"},
      {"state", {"--context", "100000", "--packed"}, 1, "the data are too short"},
      {"state", {"--context", "64", "--positions", "0,1"}, 1, "whole numbers from 1 to 64"},
      {"state", {"--context", "64", "--histograms", "65"}, 1, "--histograms"},
      {"forget", {"--context", "64", "--lags", "log:0"}, 1, "--lags is not understood"},
      {"forget", {"--context", "64", "--out", "x.json"}, 1, "a name that ends in .csv"},
      {"ppl", {"--context", "64", "--bins", "-1"}, 2, "--bins"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.message);
    const ProcessResult result = bench.eval(c.measure, "mamba2", c.words);
    CHECK(result.code == c.code);
    CHECK(result.out.empty());
    CHECK_MESSAGE(holds(result.err, c.message), result.err);
  }
  CHECK_FALSE(fs::exists(bench.file("runs/mamba2/eval")));
}

}  // namespace longhand::test
