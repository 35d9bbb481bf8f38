// Reports over made-up run folders.
#include "eval/report.h"

#include <fmt/format.h>

#include <cmath>
#include <filesystem>

#include "core/error.h"
#include "core/files.h"
#include "eval/perplexity.h"
#include "tests/support/check.h"

using namespace longhand;
using longhand::test::ScratchFolder;

namespace {

namespace fs = std::filesystem;

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++n;
  return n;
}

void add_metrics(const std::string& run, int64_t lines, int64_t val_every = 50) {
  fs::create_directories(run);
  std::string text;
  for (int64_t i = 1; i <= lines; ++i) {
    text += fmt::format(
        R"({{"step": {}, "tokens": {}, "loss": {}, "lr": {}, "weight_decay": 0.01, "grad_norm": {}, "tokens_per_s": 50000, "elapsed_s": {})",
        i * 10, i * 5120, 4 + 6 / static_cast<double>(i), 1e-3 / static_cast<double>(i), 1.0, static_cast<double>(i) * 0.1);
    text += i % val_every == 0 ? fmt::format(", \"val_loss\": {}}}\n", 4.1 + 6 / static_cast<double>(i)) : "}\n";
  }
  write_file_atomically(run + "/metrics.jsonl", text);
}

void add_config(const std::string& run, double lr) {
  write_file_atomically(
      run + "/config.toml",
      fmt::format("seed = 0 # the seed\n[train]\nlength = 512\n[optimizer]\nlr = {}\nname = \"a # b\"\n[data]\ntokenizer = \"bytes\"\n",
                  lr));
}

void add_curve(const std::string& run, const std::string& name, int64_t positions, double level, const std::string& json = "") {
  fs::create_directories(run + "/eval");
  PositionLoss loss;
  for (int64_t p = 1; p <= positions; ++p) {
    loss.tokens.push_back(4);
    loss.loss_sum.push_back(4 * (level + 4 / std::sqrt(static_cast<double>(p))));
  }
  write_position_csv(run + "/eval/" + name + ".csv", loss);
  if (!json.empty()) write_file_atomically(run + "/eval/" + name + ".json", json);
}

std::string page_of(const std::vector<std::string>& runs) {
  return report_html(read_runs(runs), "2000-01-01");
}

}  // namespace

TEST("the page of one run has its curves, its tables and nothing from elsewhere") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("base");
  add_metrics(run, 200);
  add_config(run, 0.001);
  add_curve(run, "ppl-val", 4096, 3);
  const std::string page = page_of({run});
  for (const char* part : {"Perplexity by position", "<h2>Loss</h2>", "Learning rate", "Gradient norm", "Speed", "training length 512",
                           "Configuration", "optimizer.lr"})
    CHECK_MESSAGE(page.find(part) != std::string::npos, part);
  CHECK(count(page, "data-points=") == 6);  // perplexity, training and validation loss, learning rate, gradient norm, speed
  CHECK(page.find("http") == std::string::npos);
  CHECK(page.find("src=") == std::string::npos);
  CHECK(page.find("href=") == std::string::npos);
  CHECK(page.find("nan") == std::string::npos);
  CHECK(page.find("Missing or unreadable") == std::string::npos);
  CHECK(page.find("<td>a # b</td>") != std::string::npos);
  CHECK(page.find("<td>0</td>") != std::string::npos);
}

TEST("several runs share one plot with a legend, and settings that differ are shown apart") {
  const ScratchFolder scratch;
  const std::string base = scratch.file("base"), passing = scratch.file("state-passing");
  for (const auto& run : {base, passing}) {
    add_metrics(run, 60);
    add_config(run, run == base ? 0.001 : 0.0003);
    add_curve(run, "ppl-val", 4096, run == base ? 6 : 3,
              R"({"data_name": "val", "context": 4096, "documents": "packed", "sequences": 4, "step": 600})");
  }
  const std::string page = page_of({base, passing});
  CHECK(count(page, "<h2>Perplexity by position") == 1);
  CHECK(count(page, "data-name=\"base\"") == 5);  // perplexity, loss, learning rate, gradient norm, speed
  CHECK(count(page, "data-name=\"state-passing\"") == 5);
  CHECK(count(page, "<h2>Validation loss</h2>") == 0);  // one value each is no curve; the table has it
  CHECK(page.find("<th scope=\"row\">base, validation</th>") != std::string::npos);
  CHECK(page.find("<h1>Comparison of 2 runs</h1>") != std::string::npos);
  for (const auto& run : {base, passing}) add_metrics(run, 60, 10);
  CHECK(count(page_of({base, passing}), "<h2>Validation loss</h2>") == 1);
  CHECK(page.find("Settings in which the runs differ") != std::string::npos);
  CHECK(page.find("Sequences: 4 each.") != std::string::npos);
  CHECK(page.find("http") == std::string::npos);
}

TEST("perplexities carry their standard errors where the sequences were compared over the same positions") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("base");
  add_metrics(run, 5);
  add_config(run, 0.001);
  add_curve(run, "ppl-val", 4096, 3);
  PositionLoss loss;
  loss.spreads = {{2049, 4096, 4, 3, 4 * 3 * 0.01 * 0.01}, {513, 1023, 4, 3, 1}};
  CHECK(loss.spreads[0].standard_error() == doctest::Approx(0.01));
  write_file_atomically(run + "/eval/ppl-val.spread.csv", spread_csv(loss));
  const auto back = read_spread_csv(run + "/eval/ppl-val.spread.csv");
  REQUIRE(back.size() == 2);
  CHECK(back[0].standard_error() == doctest::Approx(0.01));
  const RunData data = read_run(run);
  CHECK(data.curves.size() == 1);
  CHECK(data.problems.empty());
  const std::string page = page_of({run});
  CHECK(count(page, " ± 0.2</td>") == 1);  // exp(3) * 0.01, of 2,049 to 4,096 alone
  CHECK(page.find("standard error over the sequences") != std::string::npos);
  write_file_atomically(run + "/eval/ppl-val.spread.csv", "first,last,sequences,loss,standard_error\n5,4,1,1,1\n");
  CHECK(read_run(run).problems.size() == 1);
}

TEST("a page of pairs has one colour for each, and dashes the run that was started from the other") {
  const ScratchFolder scratch;
  const auto add = [&](const std::string& name, const std::string& from) {
    const std::string run = scratch.file(name);
    add_metrics(run, 5);
    write_file_atomically(run + "/config.toml", "init_from = \"" + from + "\"\n[train]\nlength = 512\n");
    add_curve(run, "ppl-val", 64, 3, R"({"data_name": "val", "context": 64, "step": 10})");
    return run;
  };
  const std::string a = add("a", ""), a_sp = add("a-sp", "runs/a/checkpoints/step-7"), b = add("b", ""), b_sp = add("b-sp", "elsewhere/b");
  const std::string other = add("other", "runs/a/checkpoints/step-7");
  const auto looks = [](const std::vector<std::string>& runs) {
    std::string text;
    for (const RunData& run : read_runs(runs)) text += std::to_string(run.color) + (run.dashed ? "- " : " ");
    return text;
  };
  CHECK(looks({a, b, a_sp, b_sp}) == "0 1 0- 1- ");
  CHECK(looks({a, a_sp}) == "0 1 ");
  CHECK(looks({a, a_sp, b}) == "0 1 2 ");
  CHECK(looks({a, a_sp, other, b, b_sp}) == "0 1 2 3 4 ");
  const std::string page = page_of({a, b, a_sp, b_sp});
  CHECK(count(page, "stroke-dasharray") > count(page_of({a, a_sp, b}), "stroke-dasharray"));
  CHECK(count(page, "data-name=\"b-sp\" data-color=\"1\"") == 6);  // of every figure: perplexity, beside the base, loss, rate, norm, speed
  CHECK(page.find("<h1>2 runs, each with one that was started from it</h1>") != std::string::npos);
  CHECK(page_of({a, a_sp, other}).find("<h1>a and 2 runs started from it</h1>") != std::string::npos);
}

TEST("a run stands beside the one it was started from: in a table of what lies inside and beyond the training length, and as a curve") {
  const ScratchFolder scratch;
  const std::string base = scratch.file("base"), cured = scratch.file("cured");
  const std::string json = R"({"data_name": "val", "context": 4096, "documents": "packed", "sequences": 4, "step": 10})";
  for (const auto& run : {base, cured}) {
    add_metrics(run, 5);
    write_file_atomically(run + "/config.toml",
                          fmt::format("initial_state = \"{}\"\ninit_from = \"{}\"\n[train]\nlength = 64\n",
                                      run == base ? "zero" : "state-passing", run == base ? "" : "runs/base/checkpoints/step-50"));
    add_curve(run, "ppl-val", 4096, run == base ? 3 + std::log(2) : 3, json);
    PositionLoss loss;
    const double at_T = run == base ? std::log(20.0) : std::log(19.0), far = run == base ? std::log(50.0) : std::log(18.05);
    loss.spreads = {{1, 32, 4, std::log(30.0), 1}, {33, 64, 4, at_T, 1}, {257, 512, 4, 4, 1}, {2049, 4096, 4, far, 1}};
    write_file_atomically(run + "/eval/ppl-val.spread.csv", spread_csv(loss));
  }
  const std::string page = page_of({base, cured});
  CHECK(page.find("<h1>base and a run started from it</h1>") != std::string::npos);
  CHECK(page.find("<th scope=\"row\">cured</th><td>base</td><td>state-passing</td>") != std::string::npos);
  REQUIRE(count(page, "<h2>Inside and beyond the training length: val</h2>") == 1);
  // 1 to T, at T, at 8 T and 64 T; 64 T / T; beside its base: sqrt(19 / 20) and 19 / 20
  CHECK(page.find("<th scope=\"row\">base</th><td>24.49</td><td>20.00</td><td>54.60</td><td>50.00</td><td>2.500</td><td>–</td>") !=
        std::string::npos);
  CHECK(page.find("<th scope=\"row\">cured</th><td>23.87</td><td>19.00</td><td>54.60</td><td>18.05</td><td>0.950</td><td>0.975</td>"
                  "<td>0.950</td>") != std::string::npos);
  CHECK(count(page, "<h2>Perplexity beside that of the base: val</h2>") == 1);
  CHECK(count(page, "<td>0.500</td>") >= 7);  // of each octave
  CHECK(count(page, "data-name=\"cured\"") == 6);
  CHECK(count(page, "data-name=\"base\"") == 5);
  CHECK(count(page_of({cured}), "beside that of the base") == 0);
  const std::string one_text = R"({"data_name": "val", "context": 4096, "documents": "packed", "sequences": 1, "step": 10})";
  for (const auto& run : {base, cured}) write_file_atomically(run + "/eval/ppl-val.json", one_text);
  CHECK(count(page_of({base, cured}), "Inside and beyond") == 0);
}

TEST("a long table is folded under its figure") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("base");
  add_curve(run, "ppl-val", int64_t{1} << 11, 3);
  CHECK(count(page_of({run}), "<details><summary>Table of") == 0);
  fs::create_directories(run + "/eval");
  StateCurve state;
  for (int octave = -12; octave < 12; ++octave) state.histograms[{512, "ssm", kAllLayers}].add(std::exp2(octave + 0.5));
  state.lines.push_back({512, "ssm", kAllLayers, kAllHeads, 4, 0, 1, 0, 1, 1});
  write_file_atomically(run + "/eval/state-val.csv", state_csv(state));
  write_file_atomically(run + "/eval/state-val.histogram.csv", state_histogram_csv(state));
  CHECK(count(page_of({run}), "<details><summary>Table of 24 rows</summary>") == 1);
}

TEST("a perplexity that goes far beyond training is drawn without its first tokens; the table has them") {
  const ScratchFolder scratch;
  for (const int64_t positions : {8191, 8192}) {  // 16 training lengths
    const std::string run = scratch.file("run" + std::to_string(positions));
    add_metrics(run, 5);
    add_config(run, 0.001);
    add_curve(run, "ppl-val", positions, 3);
    const std::string page = page_of({run});
    const bool far = positions == 8192;
    CHECK((page.find("Drawn from position 64 on.") != std::string::npos) == far);
    CHECK((page.find("data-points=\"1,") != std::string::npos) != far);  // of perplexity: other curves begin at step 10
    CHECK(page.find("<th scope=\"row\">1") != std::string::npos);
  }
}

TEST("curves of other data or another context get their own figure; checkpoints of a run are told apart") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("base");
  add_metrics(run, 5);
  add_config(run, 0.001);
  add_curve(run, "ppl-val-step-200", 64, 3, R"({"data_name": "val", "context": 64, "step": 200})");
  add_curve(run, "ppl-val-step-1000", 64, 3, R"({"data_name": "val", "context": 64, "step": 1000})");
  add_curve(run, "ppl-books", 64, 3, R"({"data_name": "books", "context": 64, "step": 10})");
  const std::string page = page_of({run});
  CHECK(count(page, "<h2>Perplexity by position") == 2);
  CHECK(page.find("data-name=\"base, step 200\"") < page.find("data-name=\"base, step 1,000\""));
  CHECK(page.find("data-name=\"base, step 1,000\"") != std::string::npos);
}

TEST("curves that differ in nothing but their file, and runs of the same folder name, are told apart") {
  const ScratchFolder scratch;
  const std::string one = scratch.file("a/run"), two = scratch.file("b/run");
  for (const auto& run : {one, two}) {
    add_metrics(run, 5);
    add_config(run, 0.001);
  }
  add_curve(one, "ppl-x", 64, 3, R"({"data_name": "val", "context": 64, "step": 10})");
  add_curve(one, "ppl-y", 64, 4, R"({"data_name": "val", "context": 64, "step": 10})");
  const std::string page = page_of({one, two});
  for (const char* file : {"ppl-x.csv", "ppl-y.csv"})
    CHECK(page.find(fmt::format("data-name=\"{}, step 10, {}\"", one, file)) != std::string::npos);
  CHECK(page.find(fmt::format("<th scope=\"row\">{}</th>", two)) != std::string::npos);
}

TEST("names, settings and file names are escaped") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("<b>&\"run\"");
  add_metrics(run, 5);
  write_file_atomically(run + "/config.toml", "name = \"<script>alert(1)</script>\"\n");
  add_curve(run, "ppl-<i>", 64, 3);
  const std::string page = page_of({run});
  CHECK(page.find("<b>&\"run") == std::string::npos);
  CHECK(page.find("<script>alert") == std::string::npos);
  CHECK(page.find("ppl-<i>") == std::string::npos);
  CHECK(page.find("&lt;b&gt;&amp;&quot;run&quot;") != std::string::npos);
  CHECK(page.find("&lt;script&gt;alert(1)") != std::string::npos);
}

TEST("a run without evaluation, and one without metrics, still give a page") {
  const ScratchFolder scratch;
  const std::string training = scratch.file("training"), measured = scratch.file("measured");
  add_metrics(training, 20);
  add_curve(measured, "ppl-val", 128, 3);
  const std::string page = page_of({training, measured});
  CHECK(page.find("<h2>Loss</h2>") != std::string::npos);
  CHECK(page.find("Perplexity by position") != std::string::npos);
  CHECK(page.find("the run has no metrics") != std::string::npos);
  CHECK(page.find("the run has no configuration") != std::string::npos);
}

TEST("what cannot be read is named, and the rest is shown") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("base");
  add_metrics(run, 20);
  add_config(run, 0.001);
  std::string text = read_text_file(run + "/metrics.jsonl");
  write_file_atomically(run + "/metrics.jsonl", text + "{\"event\": 1}\n{\"step\": 500, \"lo");
  add_curve(run, "ppl-val", 128, 3, "not JSON");
  write_file_atomically(run + "/eval/ppl-bad.csv", "position,tokens\n");
  const RunData data = read_run(run);
  REQUIRE(data.problems.size() == 4);
  CHECK(data.problems[0].find("metrics.jsonl: 1 line is not JSON and left out, the first is line 22") != std::string::npos);
  CHECK(data.problems[1].find("1 line has no step") != std::string::npos);
  CHECK(data.problems[2].find("ppl-bad.csv") != std::string::npos);
  CHECK(data.problems[3].find("ppl-val.json is not a JSON object") != std::string::npos);
  CHECK(data.curves.size() == 1);
  CHECK(report_html({data}, "").find("ppl-bad.csv") != std::string::npos);
}

TEST("a training curve of many steps is drawn as means of neighbouring steps, to its end") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("base");
  add_metrics(run, 801);  // steps 10 .. 8010, joined by three: 267 points
  add_config(run, 0.001);
  const std::string page = page_of({run});
  const auto begin = page.find("data-points=\"", page.find("data-name=\"training\"")) + 13;
  const std::string points = page.substr(begin, page.find('"', begin) - begin);
  CHECK(count(points, ",") == 267);
  CHECK(points.starts_with(fmt::format("20,{:.5g} ", 4 + 6 * (1 + 1.0 / 2 + 1.0 / 3) / 3)));
  CHECK(points.find(" 8000,") != std::string::npos);
}

TEST("a folder that is no run is an error") {
  const ScratchFolder scratch;
  CHECK_THROWS_AS(read_run(scratch.file("nothing")), FileError);
  fs::create_directories(scratch.file("empty"));
  CHECK_THROWS_AS(read_run(scratch.file("empty")), FileError);
}

TEST("steps that were logged again after a resume count once, with their later values") {
  const ScratchFolder scratch;
  write_file_atomically(
      scratch.file("metrics.jsonl"),
      "{\"step\": 1, \"loss\": 5}\n{\"step\": 2, \"loss\": 4}\n{\"step\": 2, \"loss\": 3}\n{\"step\": 3, \"loss\": null}\n");
  const Metrics metrics = read_metrics(scratch.file("metrics.jsonl"));
  CHECK(metrics.values.at("loss") == std::map<int64_t, double>{{1, 5}, {2, 3}});
  CHECK(metrics.problems.empty());
}

TEST("the page of a long run over long curves stays small") {
  const ScratchFolder scratch;
  const std::string a = scratch.file("a"), b = scratch.file("b");
  for (const auto& run : {a, b}) {
    add_metrics(run, 20000);
    add_config(run, 0.001);
    add_curve(run, "ppl-val", 300000, 3);
  }
  const std::string page = page_of({a, b});
  CHECK(page.size() < 400000);
  CHECK(page.find("mean of up to 50 logged steps") != std::string::npos);
}

namespace {

void add_table(const std::string& run, const std::string& name, const std::string& csv, const std::string& json) {
  fs::create_directories(run + "/eval");
  write_file_atomically(run + "/eval/" + name + ".csv", csv);
  write_file_atomically(run + "/eval/" + name + ".json", json);
}

// The measures of a made-up run: remembrance, state and half-lives are `level` times a shape.
void add_measures(const std::string& run, double level) {
  const std::string json = R"({"data_name": "val", "context": 8192, "documents": "packed", "sequences": 4, "step": 600, "distance": "tv"})";
  Remembrance remembrance;
  remembrance.context = 8192;
  for (const int64_t start : {0, 4096, 6144, 8191}) {
    remembrance.starts.push_back(start);
    remembrance.values.push_back({level * 0.01 * static_cast<double>(start) / 8192, level * 0.02 * static_cast<double>(start) / 8192});
  }
  add_table(run, "remember-val", remembrance_csv(remembrance), json);
  StateCurve state;
  for (const int64_t position : {256, 512, 2048, 8192}) {
    const double std = level * std::sqrt(static_cast<double>(position));
    for (const int64_t layer : {int64_t{0}, int64_t{1}, kMeanOfLayers, kAllLayers})
      state.lines.push_back({position, "ssm", layer, kAllHeads, 4, 0, std * (layer == 1 ? static_cast<double>(position) : 1), 0, 1, 1});
    state.lines.push_back({position, "ssm", 0, 0, 4, 0, 7777, 0, 1, 1});
  }
  for (const int64_t position : {512, 8192})
    for (const double value : {0.25, -0.3, 0.6, level}) state.histograms[{position, "ssm", kAllLayers}].add(value);
  add_table(run, "state-val", state_csv(state), json);
  write_file_atomically(run + "/eval/state-val.histogram.csv", state_histogram_csv(state));
  Forgetting forgetting;
  forgetting.windows = {4, 4};
  for (const int64_t layer : {0, 1})
    for (const int64_t head : {0, 1, -1})
      forgetting.heads.push_back(
          {layer, head, {{1, 8192}, {layer == 1 && head == 1 ? 1.0 : 0.9, layer == 1 && head == 1 ? 1.0 : 0.001 * level}}});
  add_table(run, "forget-val", forgetting_csv(forgetting), json);
  write_file_atomically(run + "/eval/forget-val.curve.csv", retention_csv(forgetting));
}

}  // namespace

TEST("the measures of several runs stand side by side, each with its table; layers and heads have heat maps") {
  const ScratchFolder scratch;
  const std::string base = scratch.file("base"), passing = scratch.file("state-passing");
  for (const auto& run : {base, passing}) {
    add_metrics(run, 5);
    add_config(run, 0.001);
    add_measures(run, run == base ? 20 : 2);
  }
  const auto runs = read_runs({base, passing});
  for (const RunData& run : runs) CHECK(run.problems.empty());  // the second tables are no measurements of their own
  const std::string page = report_html(runs, "2000-01-01");
  for (const char* title : {"<h2>Effective remembrance: val", "<h2>Size of the recurrent state: val", "<h2>Half-life of the state: val"})
    CHECK_MESSAGE(count(page, title) == 1, title);
  for (const char* title : {"<h2>Magnitudes of the state after 512 tokens", "<h2>Magnitudes of the state after 8,192 tokens"})
    CHECK_MESSAGE(count(page, title) == 1, title);
  CHECK(count(page, "data-points=\"0.25,50 0.5,25 1,0 2,25\"") == 2);  // of state-passing, at both positions
  CHECK(page.find("<th scope=\"row\">0.25</th><td>50.00</td><td>50.00</td>") != std::string::npos);
  for (const char* title : {"<h2>Growth of the state by layer: base", "<h2>Half-life by layer and head: state-passing"})
    CHECK_MESSAGE(count(page, title) == 1, title);
  CHECK(count(page, "data-name=\"base\"") ==
        3 + 2 + 4);                                // the measures, magnitudes at two positions; loss, learning rate, gradient norm, speed
  CHECK(count(page, "training length 512") == 2);  // in remembrance and state
  CHECK(page.find("data-points=\"1,0.29996 2048,0.225 4096,0.15 8192,0\"") != std::string::npos);
  CHECK(page.find("total variation between") != std::string::npos);
  CHECK(page.find("<th scope=\"row\">6,144 (2,048)</th><td>0.225 ± 0.075</td>") != std::string::npos);
  CHECK(page.find("data-points=\"256,320 512,452.55 2048,905.1 8192,1810.2\"") != std::string::npos);
  CHECK(page.find("<title>1, 8k: 64</title>") != std::string::npos);           // layer 1: (8192 / 512)^1.5
  CHECK(page.find("text-anchor=\"middle\">0.2</text>") == std::string::npos);  // there are layers 0 and 1, and none between them
  CHECK(page.find("<th scope=\"row\">0</th><td>1,266 (") !=
        std::string::npos);  // between (1, 0.9) and (8192, 0.02); in parentheses the reach
  const std::string heads = page.substr(page.find("<h2>Half-life by layer and head: state-passing"));
  CHECK(heads.find(">1,266</text>") < heads.find("</svg>"));  // the highest of base is the upper end of the scale that both share
  CHECK(page.find("<title>1, 1: ∞</title>") != std::string::npos);
  CHECK(page.find("<td>∞</td>") != std::string::npos);
  CHECK(page.find("nan") == std::string::npos);
  CHECK(page.find("7,777") == std::string::npos);  // lines of single heads are not read
}

TEST("a run with nothing but a measure gives a page; a damaged table is named") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("base");
  add_measures(run, 1);
  write_file_atomically(run + "/eval/state-bad.csv", "position\n");
  const RunData data = read_run(run);
  CHECK(data.states.size() == 1);
  CHECK(data.remembrance.size() == 1);
  CHECK(data.problems.back().find("state-bad.csv") != std::string::npos);
  CHECK(report_html({data}, "").find("Effective remembrance") != std::string::npos);
}
