// The longhand program as a user meets it: exit codes, what is printed where, the files that it leaves, and what it says about mistakes.
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>

#include "core/device.h"
#include "core/files.h"
#include "tests/support/command_help.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;

ProcessResult longhand(std::vector<std::string> words, const ProcessOptions& options = {}) {
  words.insert(words.begin(), LONGHAND_BINARY);
  return run_process(std::move(words), options);
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void write_text(const std::string& path, const std::string& text) {
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// --- help and mistakes on the command line ----------------------------------------------------------------------

TEST("command line: every help text exits 0 and says what each option does") {
  const auto help = all_help();
  for (const char* path : {"train", "eval ppl", "generate", "logits", "tokenize", "data check", "data pack", "convert", "init", "inspect",
                           "bench ops", "bench data", "report"})
    CHECK_MESSAGE(help.contains(path), path);
  for (const auto& [path, command] : help) {
    CHECK_MESSAGE(command.takes("--help"), path);
    for (const auto* section : {&command.options, &command.positionals, &command.subcommands})
      for (const HelpEntry& entry : *section) CHECK_MESSAGE(entry.meaning.size() >= 8, path << " " << entry.names.front());
  }
  CHECK(holds(longhand({"--version"}).out, "longhand "));
  CHECK(holds(longhand({"train", "--help"}).out, "Usage: longhand train "));
  CHECK(holds(longhand({"train", "--help-recipe"}).out, "checkpoint_every"));
}

TEST("command line: what it does not know is named, on stderr, with exit code 2") {
  struct Case {
    std::vector<std::string> words;
    std::vector<std::string> message;  // parts of it
  };
  const std::vector<Case> cases{
      {{}, {"longhand: ", "subcommand is required", "longhand --help"}},
      {{"trian"}, {"no such subcommand", "given  trian", "known  train, eval"}},
      {{"data", "pakc", "--out", "x"}, {"longhand data: no such subcommand", "given  pakc", "known  check, pack"}},
      {{"eval"}, {"longhand eval: ", "subcommand is required"}},
      {{"train", "--setp", "a=b"}, {"longhand train: ", "--setp", "longhand train --help"}},
      {{"data", "check", "x", "--no"}, {"longhand data check: ", "--no", "longhand data check --help"}},
      {{"tokenize"}, {"--tokenizer is required"}},
      {{"tokenize", "--tokenizer", "bytes", "shard.jsonl"}, {"--out"}},
      {{"eval", "ppl", "--model", "m", "--data", "d", "--context", "0"}, {"--context: 0 is not a whole number of at least 1"}},
      {{"eval", "ppl", "--model", "m", "--data", "d", "--context", "many"}, {"--context: many is not a whole number"}},
      {{"data", "check", "x", "--threads", "-1"}, {"--threads: -1 is not a whole number of at least 0"}},
  };
  for (const Case& c : cases) {
    std::string line;
    for (const std::string& word : c.words) line += word + " ";
    CAPTURE(line);
    const ProcessResult result = longhand(c.words);
    CHECK(result.code == 2);
    CHECK(result.out.empty());
    CHECK(result.err.starts_with("error: longhand"));
    for (const std::string& part : c.message) CHECK_MESSAGE(holds(result.err, part), part << " in " << result.err);
  }
}

TEST("command line: environment switches that are not known, or not understood, are reported") {
  const ProcessResult unknown = longhand({"inspect", "switches"}, {.folder = {}, .input = {}, .environment = {{"LONGHAND_TRCE", "1"}}});
  CHECK(unknown.code == 0);
  CHECK(holds(unknown.err, "warning: LONGHAND_TRCE is not a switch"));
  CHECK(holds(unknown.out, "LONGHAND_TRACE"));
  const ProcessResult value = longhand({"inspect", "switches"}, {.folder = {}, .input = {}, .environment = {{"LONGHAND_TRACE", "loud"}}});
  CHECK(value.code == 1);
  CHECK(value.out.empty());
  CHECK(holds(value.err, "LONGHAND_TRACE"));
  CHECK(holds(value.err, "expected  a number from 0 to 2"));
}

TEST("command line: --device cuda without a GPU fails and says why") {
  if (cuda_device_count() > 0) SKIP("there is a CUDA device");
  const ScratchFolder scratch;
  write_text(scratch.file("a.toml"), "");
  for (const auto& words :
       std::vector<std::vector<std::string>>{{"train", scratch.file("a.toml"), "--device", "cuda"}, {"bench", "ops", "--device", "cuda"}}) {
    const ProcessResult result = longhand(words, {.folder = scratch.path(), .input = {}, .environment = {}});
    CHECK(result.code == 1);
    CHECK(result.out.empty());
    CHECK(holds(result.err, "error: device: "));
    CHECK(holds(result.err, "CUDA"));
    CHECK(holds(result.err, "--device cpu"));
  }
  CHECK_FALSE(fs::exists(scratch.file("runs")));
  const ProcessResult other = longhand({"train", scratch.file("a.toml"), "--device", "tpu"});
  CHECK(other.code == 1);
  CHECK(holds(other.err, "expected  cpu, cuda or cuda:N"));
}

TEST("command line: bench ops writes a table of numbers as CSV") {
  const ProcessResult result =
      longhand({"bench", "ops", "--op", "swiglu", "--shape", "rows=8,width=16", "--csv", "--repeats", "1", "--device", "cpu"});
  CHECK_MESSAGE(result.code == 0, result.err);
  const std::vector<std::string> lines = split_at(result.out, '\n');
  REQUIRE(lines.size() >= 3);
  CHECK(lines[0] == "op,shape,dtype,direction,ms,floor_ms,bytes,flops,exponentials,peer_ms,target_ms");
  for (std::size_t i = 1; i <= 2; ++i) {
    const auto cells = split_at(lines[i], ',');
    REQUIRE(cells.size() == 11);
    CHECK(cells[0] == "swiglu");
    CHECK(cells[2] == "f32");
    CHECK(cells[3] == (i == 1 ? "fwd" : "fwd+bwd"));
    CHECK(std::stod(cells[4]) > 0);
  }
}

// --- text -------------------------------------------------------------------------------------------------------

TEST("command line: tokenize writes the ids of stdin, and names a bad line") {
  const ProcessResult text = longhand({"tokenize", "--tokenizer", "bytes"}, {.folder = {}, .input = "h\xC3\xA9 \n", .environment = {}});
  CHECK(text.code == 0);
  CHECK(text.out == "[104,195,169,32,10]\n");
  CHECK(text.err.empty());
  const ProcessResult lines =
      longhand({"tokenize", "--tokenizer", "bytes", "--jsonl"},
               {.folder = {}, .input = "{\"text\": \"ab\"}\n\n{\"text\": \"\"}\n{\"meta\": {}, \"text\": \"c\\n\"}", .environment = {}});
  CHECK(lines.code == 0);
  CHECK(lines.out == "[97,98]\n[]\n[99,10]\n");
  const ProcessResult bad = longhand({"tokenize", "--tokenizer", "bytes", "--jsonl"},
                                     {.folder = {}, .input = "{\"text\": \"ab\"}\n{\"text\": 3}\n{\"text\": \"c\"}\n", .environment = {}});
  CHECK(bad.code == 1);
  CHECK(bad.out == "[97,98]\n");
  CHECK(std::regex_search(bad.err, std::regex("line +2\n")));
  CHECK(std::regex_search(bad.err, std::regex("byte offset +24\n")));
  const ProcessResult gone = longhand({"tokenize", "--tokenizer", "gone.json"});
  CHECK(gone.code == 1);
  CHECK(holds(gone.err, "gone.json"));
}

// One line of `data check`.
struct CheckRow {
  std::string documents, text_bytes, characters, tokens, bad_lines, name;
};

std::vector<CheckRow> check_rows(const std::string& out) {
  std::vector<CheckRow> rows;
  for (const std::string& line : split_at(out, '\n')) {
    CheckRow row;
    std::istringstream in(line);
    in >> row.documents >> row.text_bytes >> row.characters >> row.tokens >> row.bad_lines >> std::ws;
    std::getline(in, row.name);
    rows.push_back(row);
  }
  REQUIRE_MESSAGE(rows.size() >= 2, out);  // a heading and a row at least
  rows.erase(rows.begin());
  return rows;
}

TEST("command line: data pack makes a shard of a folder, and data check counts it") {
  const ScratchFolder scratch;
  const ProcessOptions here{.folder = scratch.path(), .input = {}, .environment = {}};
  write_text(scratch.file("texts/a.txt"), "one\ntwo\n");
  write_text(scratch.file("texts/deep er/b.txt"), "h\xC3\xA9!");
  write_text(scratch.file("texts/c.md"), "left out");
  write_text(scratch.file("texts/broken.txt"), "not UTF-8: \xFF");
  const ProcessResult packed = longhand({"data", "pack", "texts", "--out", "s.jsonl.zst", "--include", "*.txt"}, here);
  CHECK(packed.code == 0);
  CHECK(packed.out == "2 documents, 12 bytes of text  s.jsonl.zst\n");
  CHECK(holds(packed.err, "left out: "));
  CHECK(holds(packed.err, "broken.txt"));
  const ProcessResult checked = longhand({"data", "check", "s.jsonl.zst", "--tokenizer", "bytes"}, here);
  CHECK(checked.code == 0);
  CHECK(checked.err.empty());
  const auto rows = check_rows(checked.out);
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].name == "s.jsonl.zst");
  CHECK(rows[1].name == "sum of 1 sound file");
  for (const CheckRow& row : rows) {
    CHECK(row.documents == "2");
    CHECK(row.text_bytes == "12");
    CHECK(row.characters == "11");
    CHECK(row.tokens == "12");
    CHECK(row.bad_lines == "0");
  }
  const ProcessResult cached = longhand({"tokenize", "--tokenizer", "bytes", "--out", "s.tokens", "s.jsonl.zst"}, here);
  CHECK(cached.code == 0);
  CHECK(cached.out.starts_with("1 shards, 2 documents, 12 bytes of text, "));
  CHECK(check_rows(longhand({"data", "check", "s.tokens"}, here).out).front().documents == "2");
  const ProcessResult gone = longhand({"data", "check", "gone.jsonl"}, here);
  CHECK(gone.code == 1);
  CHECK(gone.out.empty());
  CHECK(holds(gone.err, "gone.jsonl"));
  CHECK(longhand({"data", "pack", "gone", "--out", "t.jsonl.zst"}, here).code == 1);
  CHECK_FALSE(fs::exists(scratch.file("t.jsonl.zst")));
}

// A row of a table in the README of the damaged shards: the files of its first cell, and its second cell.
struct CorruptRow {
  std::string section;
  std::vector<std::string> files;
  std::string second;
};

std::vector<CorruptRow> corrupt_rows(const std::string& readme) {
  static const std::regex name("`([^`]+)`");
  std::vector<CorruptRow> rows;
  std::string section;
  for (const std::string& line : split_at(readme, '\n')) {
    if (line.starts_with("## ")) section = line.substr(3);
    if (!line.starts_with("| `")) continue;
    const auto cells = split_at(line, '|');
    CorruptRow row{section, {}, cells.at(2)};
    for (auto it = std::sregex_iterator(cells[1].begin(), cells[1].end(), name); it != std::sregex_iterator(); ++it)
      row.files.push_back((*it)[1]);
    rows.push_back(row);
  }
  return rows;
}

TEST("command line: data check judges every damaged and every unusual shard as their README does") {
  const auto data = folder_from("LONGHAND_DATA");
  if (!data || !fs::exists(*data + "/corrupt/README.md")) SKIP("LONGHAND_DATA/corrupt is not there");
  const std::string folder = *data + "/corrupt/";
  std::size_t seen = 1;  // the README itself
  for (const CorruptRow& row : corrupt_rows(text_of(folder + "README.md"))) {
    const bool unusual = row.section.find("must read") != std::string::npos,
               empty = row.section.find("without documents") != std::string::npos;
    for (std::string file : row.files) {
      ++seen;
      while (file.ends_with("/")) file.pop_back();
      CAPTURE(file);
      REQUIRE(fs::exists(folder + file));
      const ProcessResult result = longhand({"data", "check", folder + file});
      const auto rows = check_rows(result.out);
      REQUIRE(rows.size() == 2);
      CHECK(holds(rows[0].name, folder + file));
      if (unusual || empty || row.second.find("one sound document") != std::string::npos) {
        CHECK(result.code == 0);
        CHECK(result.err.empty());
        if (unusual) CHECK(std::stoi(rows[0].documents) == std::stoi(row.second));
        if (empty) CHECK(rows[0].documents == "0");
      } else {
        CHECK(result.code == 1);
        CHECK(rows[0].documents == "fault");
        CHECK(rows[1].name == "sum of 0 sound files");
        CHECK(holds(result.err, file));
        CHECK(holds(result.err, "1 of 1 files have a fault"));
        const bool lines = row.section.find("bad lines") != std::string::npos;
        const ProcessResult skipping = longhand({"data", "check", "--skip-bad-lines", folder + file});
        CHECK(skipping.code == (lines ? 0 : 1));  // a damaged container is never passed over
        if (lines) CHECK(check_rows(skipping.out).front().bad_lines != "0");
      }
    }
  }
  CHECK(seen == static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator())));
}

// --- runs -------------------------------------------------------------------------------------------------------

// A scratch folder with a packed corpus and a recipe of a tiny model; commands run inside it.
class Workshop {
 public:
  explicit Workshop(const std::string& settings = "") {
    for (int file = 0; file < 24; ++file) {
      std::string text;
      for (int i = 0; i < 40; ++i) text += "line " + std::to_string(i * file % 17) + " of text " + std::to_string(file) + "\n";
      write_text(folder_.file("texts/" + std::to_string(file) + ".txt"), text);
    }
    REQUIRE(run({"data", "pack", "texts", "--out", "train.jsonl.zst", "--split-val", "0.25", "--val-out", "val.jsonl.zst"}).code == 0);
    write_text(file("tiny.toml"),
               "seed = 5\ninitial_state = \"state-passing\"\n[model]\nd_model = 16\nn_layer = 2\nd_state = 8\nheaddim = 8\n"
               "[data]\nfiles = [\"train.jsonl.zst\"]\nval_files = [\"val.jsonl.zst\"]\nshuffle_rows = 16\n"
               "[optimizer]\nlr = 3e-3\n[train]\nbatch_size = 2\nlength = 16\nlog_every = 1\nval_batches = 2\n" +
                   settings);
  }
  std::string file(const std::string& name) const { return folder_.file(name); }
  ProcessOptions here() const { return {.folder = folder_.path(), .input = {}, .environment = {}}; }
  ProcessResult run(std::vector<std::string> words) const { return longhand(std::move(words), here()); }
  Process start(std::vector<std::string> words) const {
    words.insert(words.begin(), LONGHAND_BINARY);
    return Process(std::move(words), here());
  }

 private:
  ScratchFolder folder_;
};

std::vector<nlohmann::json> metrics_of(const std::string& run) {
  std::vector<nlohmann::json> out;
  for (const std::string& line : split_at(text_of(run + "/metrics.jsonl"), '\n')) out.push_back(nlohmann::json::parse(line));
  return out;
}

TEST("command line: train, inspect, eval ppl and report, from a folder of texts to a page") {
  const Workshop shop("steps = 6\nval_every = 3\ncheckpoint_every = 4\n");
  const ProcessResult trained = shop.run({"train", "tiny.toml", "--device", "cpu"});
  REQUIRE_MESSAGE(trained.code == 0, trained.err);
  CHECK(trained.out.empty());
  for (const char* part : {"run         runs/tiny", "step 6/6", "val_loss", "peak memory  ", "model       runs/tiny/checkpoints/step-6"})
    CHECK_MESSAGE(holds(trained.err, part), part << " in " << trained.err);
  for (const char* name :
       {"config.toml", "metrics.jsonl", "checkpoints/latest", "checkpoints/step-4/training.json", "checkpoints/step-6/config.json",
        "checkpoints/step-6/model.safetensors", "checkpoints/step-6/optimizer.safetensors", "checkpoints/step-6/carried_state.safetensors",
        "checkpoints/step-6/training.json"})
    CHECK_MESSAGE(fs::exists(shop.file("runs/tiny/") + name), name);
  const auto metrics = metrics_of(shop.file("runs/tiny"));
  REQUIRE(metrics.size() == 6);
  for (std::size_t i = 0; i < metrics.size(); ++i) {
    CHECK(metrics[i].at("step") == i + 1);
    CHECK(metrics[i].at("tokens") == (i + 1) * 32);
    CHECK(metrics[i].at("loss").get<double>() > 0);
    CHECK(metrics[i].at("peak_memory_bytes").get<int64_t>() > 100'000);
    CHECK(metrics[i].contains("val_loss") == (i == 2 || i == 5));
  }

  const ProcessResult again = shop.run({"train", "tiny.toml", "--device", "cpu"});
  CHECK(again.code == 1);
  CHECK(holds(again.err, "--resume tiny"));
  const ProcessResult finished = shop.run({"train", "--resume", "tiny", "--device", "cpu"});
  CHECK(finished.code == 0);
  CHECK(holds(finished.err, "has done its 6 steps"));
  const ProcessResult changed = shop.run({"train", "--resume", "tiny", "--device", "cpu", "--set", "model.d_model=32"});
  CHECK(changed.code == 1);
  CHECK(holds(changed.err, "model.d_model"));
  const ProcessResult from =
      shop.run({"train", "tiny.toml", "--device", "cpu", "--name", "post", "--init-from", "runs/tiny", "--set", "train.steps=1"});
  CHECK(from.code == 0);
  CHECK(metrics_of(shop.file("runs/post")).size() == 1);
  const std::string record = shop.file("runs/post/checkpoints/step-1/training.json");
  std::string text = read_text_file(record);
  text.replace(text.find("\"tokenizer_fingerprint\": \"") + 26, 1, "another-");
  write_text(record, text);
  const ProcessResult other_ids =
      shop.run({"train", "tiny.toml", "--device", "cpu", "--name", "other", "--init-from", "runs/post", "--set", "train.steps=1"});
  CHECK(other_ids.code == 1);
  CHECK(holds(other_ids.err, "trained with another tokenizer"));

  const ProcessResult inspected = shop.run({"inspect", "runs/tiny"});
  CHECK(inspected.code == 0);
  CHECK(std::regex_search(inspected.out, std::regex("d_model +16\n")));
  CHECK(holds(inspected.out, "step-6"));
  const ProcessResult tensors = shop.run({"inspect", "runs/tiny/checkpoints/step-6/model.safetensors"});
  CHECK(tensors.code == 0);
  CHECK(holds(tensors.out, "A_log"));

  const std::vector<std::string> ppl{"eval",      "ppl", "--model",  "runs/tiny", "--data", "val.jsonl.zst",
                                     "--context", "40",  "--device", "cpu",       "--out"};
  auto words = ppl;
  words.push_back("ppl.csv");
  const ProcessResult measured = shop.run(words);
  REQUIRE_MESSAGE(measured.code == 0, measured.err);
  CHECK(holds(measured.out, "<- end of the training length"));
  const auto lines = split_at(text_of(shop.file("ppl.csv")), '\n');
  REQUIRE(lines.size() == 41);
  CHECK(lines[0] == "position,tokens,loss,perplexity");
  for (std::size_t i = 1; i < lines.size(); ++i) CHECK(lines[i].starts_with(std::to_string(i) + ","));
  CHECK(nlohmann::json::parse(text_of(shop.file("ppl.json"))).at("context") == 40);
  words.back() = "-";
  const ProcessResult piped = shop.run(words);
  CHECK(piped.code == 0);
  CHECK(piped.out == text_of(shop.file("ppl.csv")));

  const ProcessResult reported = shop.run({"report", "runs/tiny", "runs/post", "--out", "page.html"});
  CHECK(reported.code == 0);
  CHECK(reported.out == "page.html\n");
  const std::string page = text_of(shop.file("page.html"));
  CHECK(page.starts_with("<!"));
  CHECK(holds(page, "</html>"));
  CHECK(holds(page, "tiny"));
  CHECK(holds(page, "post"));
  CHECK_FALSE(std::regex_search(page, std::regex("https?:|src=|@import|url\\([^#]")));  // one file, nothing fetched
}

// The same run uninterrupted beside one that was ended and resumed.
void check_same_run(const Workshop& shop, const std::string& whole, const std::string& parts, int64_t steps) {
  const auto expected = metrics_of(shop.file("runs/" + whole)), actual = metrics_of(shop.file("runs/" + parts));
  REQUIRE(actual.size() == static_cast<std::size_t>(steps));
  REQUIRE(expected.size() == actual.size());
  for (std::size_t i = 0; i < actual.size(); ++i)
    for (const char* key : {"step", "tokens", "loss", "grad_norm", "lr"})
      CHECK_MESSAGE(actual[i].at(key) == expected[i].at(key), key << " of step " << i + 1);
  const std::string last = "/checkpoints/step-" + std::to_string(steps) + "/";
  for (const char* file : {"model.safetensors", "optimizer.safetensors", "carried_state.safetensors"})
    CHECK_MESSAGE(text_of(shop.file("runs/" + parts + last + file)) == text_of(shop.file("runs/" + whole + last + file)), file);
}

constexpr int64_t kLongSteps = 1000;  // half a second; long beside the time until a signal is sent
constexpr const char* kLong = "steps = 1000\ncheckpoint_every = 40\nkeep_last = 1\n";

TEST("command line: a run ended by Ctrl-C exits with 130, and resumed it equals an uninterrupted one byte for byte") {
  const Workshop shop(kLong);
  REQUIRE(shop.run({"train", "tiny.toml", "--device", "cpu", "--name", "whole"}).code == 0);
  Process process = shop.start({"train", "tiny.toml", "--device", "cpu", "--name", "parts"});
  REQUIRE(process.wait_for_message("step 1/"));
  process.send(SIGINT);
  const ProcessResult interrupted = process.finish();
  CHECK(interrupted.code == 128 + SIGINT);
  CHECK(holds(interrupted.err, "continue with: longhand train --resume runs/parts"));
  const int64_t step = metrics_of(shop.file("runs/parts")).back().at("step").get<int64_t>();
  CHECK(step < kLongSteps);
  CHECK(fs::exists(shop.file("runs/parts/checkpoints/step-" + std::to_string(step))));
  const ProcessResult resumed = shop.run({"train", "--resume", "runs/parts", "--device", "cpu"});
  CHECK(resumed.code == 0);
  CHECK(holds(resumed.err, "resumed after step " + std::to_string(step)));
  check_same_run(shop, "whole", "parts", kLongSteps);
}

TEST("command line: a run that was killed goes on from its last checkpoint, and equals an uninterrupted one byte for byte") {
  const Workshop shop(kLong);
  REQUIRE(shop.run({"train", "tiny.toml", "--device", "cpu", "--name", "whole"}).code == 0);
  Process process = shop.start({"train", "tiny.toml", "--device", "cpu", "--name", "parts"});
  REQUIRE(process.wait_until([&] { return fs::exists(shop.file("runs/parts/checkpoints/latest/training.json")); }));
  process.send(SIGKILL);
  CHECK(process.finish().code == 128 + SIGKILL);
  const ProcessResult resumed = shop.run({"train", "--resume", "parts", "--device", "cpu"});
  CHECK(resumed.code == 0);
  CHECK(holds(resumed.err, "resumed after step "));
  check_same_run(shop, "whole", "parts", kLongSteps);
}

TEST("command line: a mistake in a recipe is named with its line, and leaves no run behind") {
  const Workshop shop("stesp = 6\n");
  const ProcessResult wrong = shop.run({"train", "tiny.toml", "--device", "cpu"});
  CHECK(wrong.code == 1);
  CHECK(wrong.out.empty());
  CHECK(holds(wrong.err, "train.stesp"));
  CHECK(holds(wrong.err, "tiny.toml:19:1\n"));
  CHECK(std::regex_search(wrong.err, std::regex("nearest +train\\.steps\n")));
  const ProcessResult setting = shop.run({"train", "tiny.toml", "--device", "cpu", "--set", "optimizer.lrr=1"});
  CHECK(setting.code == 1);
  write_text(shop.file("none.toml"), "[data]\nfiles = [\"gone.jsonl\"]\n");
  const ProcessResult gone = shop.run({"train", "none.toml", "--device", "cpu"});
  CHECK(gone.code == 1);
  CHECK(holds(gone.err, "data.files"));
  CHECK(holds(gone.err, "gone.jsonl"));
  CHECK(shop.run({"train", "missing.toml", "--device", "cpu"}).code == 1);
  CHECK(shop.run({"train", "--device", "cpu"}).code == 1);
  CHECK(shop.run({"train", "--resume", "never", "--device", "cpu"}).code == 1);
  CHECK(shop.run({"train", "tiny.toml", "--resume", "never", "--device", "cpu"}).code == 1);
  CHECK_FALSE(fs::exists(shop.file("runs/tiny")));
  CHECK_FALSE(fs::exists(shop.file("runs/none")));
}

TEST("command line: a recipe for a GPU on the CPU is told which key to change, and leaves no run behind") {
  const Workshop shop("dtype = \"bf16\"\n");
  const ProcessResult refused = shop.run({"train", "tiny.toml", "--device", "cpu"});
  CHECK(refused.code == 1);
  CHECK(std::regex_search(refused.err, std::regex("asked +bf16\n")));
  CHECK(holds(refused.err, "train.dtype of a recipe"));
  CHECK_FALSE(fs::exists(shop.file("runs/tiny")));
}

TEST("command line: inspect reads recipes and switches, and says what is missing") {
  const std::string recipes = std::string(LONGHAND_SOURCE_DIR) + "/tools/recipes/";
  for (const char* name : {"mamba2-45m.toml", "mamba2-small-cpu.toml", "quickstart-base.toml"}) {
    const ProcessResult result = longhand({"inspect", recipes + name});
    CHECK_MESSAGE(result.code == 0, result.err);
    CHECK(result.err.empty());
    for (const char* part : {"d_model", "parameters", "GFLOP/token", "recurrent state"}) CHECK_MESSAGE(holds(result.out, part), part);
  }
  const ProcessResult wide = longhand({"inspect", recipes + "quickstart-base.toml", "--set", "model.d_model=192", "--all"});
  CHECK(wide.code == 0);
  CHECK(std::regex_search(wide.out, std::regex("d_model +192\n")));
  CHECK(holds(wide.out, "layers.1."));
  const ProcessResult switches = longhand({"inspect", "switches"});
  CHECK(switches.code == 0);
  for (const char* name : {"LONGHAND_TRACE", "LONGHAND_MEMORY", "LONGHAND_CHECK"}) CHECK(holds(switches.out, name));
  const ProcessResult set = longhand({"inspect", "switches", "--set", "model.d_model=192"});
  CHECK(set.code == 1);
  CHECK(holds(set.err, "only a recipe"));

  const ScratchFolder scratch;
  for (const char* name : {"gone", "gone.toml", "gone.safetensors"}) {
    const ProcessResult gone = longhand({"inspect", scratch.file(name)});
    CHECK(gone.code == 1);
    CHECK(gone.out.empty());
    CHECK(holds(gone.err, scratch.file(name)));
  }
  write_text(scratch.file("far.toml"), "[data]\ntokenizer = \"far/tokenizer.json\"\n");
  const ProcessResult far = longhand({"inspect", scratch.file("far.toml")});
  CHECK(far.code == 1);
  CHECK(holds(far.err, "far/tokenizer.json"));
  CHECK(holds(far.err, "--set model.vocab_size=N"));
  CHECK(longhand({"report", scratch.file("gone")}).code == 1);
}

}  // namespace
}  // namespace longhand::test
