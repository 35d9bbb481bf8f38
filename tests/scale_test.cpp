// Several processes train what one does: the same losses, whatever the family and the initial states; runs that end on another number of
// processes than they began on; processes that die, disagree or are too many. docs/scale.md says how it works.
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/safetensors.h"
#include "tests/support/command_help.h"
#include "tests/support/process.h"
#include "tests/support/tiny_training.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;

// Sums over the rows of a batch are taken in another order: a rounding of f32 in every sum, which 50 steps of AdamW carry on.
constexpr double kSameLoss = 1e-6;
constexpr int kSteps = 50;

const std::vector<std::string> kFamilies{"mamba1", "mamba2", "gla"};

class Site {
 public:
  Site() {
    write_shard(file("shard.jsonl"));
    for (const std::string& family : kFamilies) std::ofstream(file(family + ".toml")) << tiny_text(family);
  }
  std::string file(const std::string& name) const { return folder_.file(name); }

  // Starts that many processes; they share the machine's cores with whatever runs there.
  Process start(int processes, std::vector<std::string> words) const { return Process(with_mpirun(processes, std::move(words)), here()); }
  ProcessResult run(int processes, std::vector<std::string> words) const { return start(processes, std::move(words)).finish(); }
  ProcessResult run_alone(std::vector<std::string> words) const { return run_process(std::move(words), here()); }

  static std::vector<std::string> with_mpirun(int processes, std::vector<std::string> words) {
    std::vector<std::string> all{MPIRUN, "--oversubscribe",        "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1",
                                 "-n",   std::to_string(processes)};
    all.insert(all.end(), words.begin(), words.end());
    return all;
  }
  ProcessOptions here() const {
    return {.folder = folder_.path(),
            .input = {},
            .environment = {{"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}},
            .patience = std::chrono::seconds(300)};
  }

 private:
  ScratchFolder folder_;
};

std::vector<std::string> train_words(const std::string& name, const std::vector<std::string>& settings,
                                     const std::string& family = "mamba2") {
  std::vector<std::string> words{LONGHAND_BINARY, "train", family + ".toml", "--device", "cpu", "--name", name};
  for (const std::string& setting : settings) words.insert(words.end(), {"--set", setting});
  return words;
}
const std::vector<std::string> kData{"data.files=shard.jsonl", "train.batch_size=6", "train.log_every=1"};
std::vector<std::string> with_data(std::vector<std::string> settings) {
  settings.insert(settings.end(), kData.begin(), kData.end());
  return settings;
}

std::vector<nlohmann::json> metrics_of(const std::string& run) {
  std::ifstream in(run + "/metrics.jsonl");
  std::vector<nlohmann::json> rows;
  for (std::string line; std::getline(in, line) && !in.eof();) rows.push_back(nlohmann::json::parse(line));  // whole lines
  return rows;
}

void check_close(double a, double b, double tolerance = kSameLoss) {
  CHECK(std::abs(a - b) <= tolerance * std::abs(b));
}

// The first `steps` steps are all that `run` has.
void check_same_run(const std::string& run, const std::string& expected, std::size_t steps) {
  const auto rows = metrics_of(run), wanted = metrics_of(expected);
  REQUIRE(rows.size() == steps);
  REQUIRE(wanted.size() >= steps);
  for (std::size_t i = 0; i < steps; ++i) {
    CAPTURE(i);
    CHECK(rows[i]["step"] == wanted[i]["step"]);
    CHECK(rows[i]["tokens"] == wanted[i]["tokens"]);
    for (const std::string number : {"loss", "lr", "grad_norm", "val_loss"}) {
      CAPTURE(number);
      REQUIRE(rows[i].contains(number) == wanted[i].contains(number));
      // A gradient is a sum of terms of both signs, of which the norm feels the roundings more than the loss.
      if (rows[i].contains(number)) check_close(rows[i][number], wanted[i][number], number == "grad_norm" ? 10 * kSameLoss : kSameLoss);
    }
  }
}

// --- the same science ---------------------------------------------------------------------------------------------

// "mamba2 zero 3" -> loss, of what the program losses prints.
std::map<std::string, double> losses_in(const std::string& text) {
  std::map<std::string, double> losses;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    const auto space = line.rfind(' ');
    if (line.find("weights") == std::string::npos) losses[line.substr(0, space)] = std::strtod(line.c_str() + space, nullptr);
  }
  return losses;
}

// The recipes of all families with other keys of [train] and [data], as files of the site.
std::vector<std::string> recipes(const Site& site, const std::string& name, const std::string& train, const std::string& data = "") {
  std::vector<std::string> files;
  for (const std::string& family : kFamilies) {
    files.push_back(family + "-" + name + ".toml");
    std::string text = tiny_text(family) + "[data]\nfiles = [\"shard.jsonl\"]\n" + data;
    text.replace(text.find("batch_size = 4"), 14, train);
    std::ofstream(site.file(files.back())) << text;
  }
  return files;
}

std::vector<std::string> losses_words(const std::string& device, int steps, const std::vector<std::string>& files) {
  std::vector<std::string> words{LOSSES, device, std::to_string(steps)};
  words.insert(words.end(), files.begin(), files.end());
  return words;
}

std::string output_of(const ProcessResult& result) {
  REQUIRE_MESSAGE(result.code == 0, result.err);
  return result.out;
}

void check_same_losses(const std::string& out, const std::string& expected, int steps) {
  const auto losses = losses_in(out), wanted = losses_in(expected);
  REQUIRE(wanted.size() == static_cast<std::size_t>(3 * 5 * steps));
  REQUIRE(losses.size() == wanted.size());
  for (const auto& [step, loss] : losses) {
    CAPTURE(step);
    check_close(loss, wanted.at(step));
  }
}

TEST("scale: 2 and 4 processes have the losses of one in every step, for every family and strategy, and the same bits twice") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  const auto words = losses_words("cpu", kSteps, recipes(site, "even", "batch_size = 8\ngrad_accumulation = 2"));
  const std::string alone = output_of(site.run_alone(words));
  for (const int processes : {2, 4}) {
    CAPTURE(processes);
    const std::string first = output_of(site.run(processes, words));
    CHECK(first == output_of(site.run(processes, words)));
    check_same_losses(first, alone, kSteps);
  }
}

TEST("scale: parts of different sizes, and rows that end in padding, make no difference") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  constexpr int kFew = 12;
  // Five rows a micro-batch for four processes: 1, 1, 1 and 2. Streams of documents, for tbtt: rows are padded behind a document's end.
  const auto words =
      losses_words("cpu", kFew, recipes(site, "uneven", "batch_size = 10\ngrad_accumulation = 2", "stream_unit = \"document\"\n"));
  check_same_losses(output_of(site.run(4, words)), output_of(site.run_alone(words)), kFew);
}

// Four steps in which all learn, then four in which the process with the last rows has nothing to learn from last, and so on.
TEST("scale: a process without positions in its last micro-batch makes no difference") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  constexpr int kFew = 18;
  const auto words = losses_words("cpu-idle", kFew, recipes(site, "idle", "batch_size = 8\ngrad_accumulation = 2"));
  const std::string alone = output_of(site.run_alone(words));
  for (const int processes : {2, 4}) check_same_losses(output_of(site.run(processes, words)), alone, kFew);
}

TEST("scale: on two GPUs a process without positions in its last micro-batch makes no difference either") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  if (cuda_device_count() < 2) SKIP("fewer than two CUDA devices");
  const Site site;
  constexpr int kFew = 18;
  const auto words = losses_words("cuda-idle", kFew, recipes(site, "idle", "batch_size = 8\ngrad_accumulation = 2\ndtype = \"f32\""));
  const std::string two = output_of(site.run(2, words));
  check_same_losses(two, output_of(site.run_alone(words)), kFew);
  CHECK(output_of(site.run(2, words)) == two);
}

TEST("scale: a device that is not known is not taken for another one") {
  const Site site;
  for (const char* device : {"cpu-anything", "cuda-anything", "cpu-", "gpu"}) {
    CAPTURE(device);
    const ProcessResult refused = site.run_alone(losses_words(device, 1, {"mamba2.toml"}));
    CHECK(refused.code == 2);
    CHECK(refused.err.starts_with("usage: losses "));
  }
}

TEST("scale: on a GPU, NCCL in a captured step and outside one changes no bit of what one process does") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Site site;
  constexpr int kFew = 20;
  const auto captured = recipes(site, "gpu", "batch_size = 8\ngrad_accumulation = 2");
  const auto launched = recipes(site, "gpu-launches", "batch_size = 8\ngrad_accumulation = 2\ngraph = false");
  const std::string alone = output_of(site.run_alone(losses_words("cuda", kFew, captured)));
  CHECK(output_of(site.run_alone(losses_words("nccl", kFew, captured))) == alone);
  CHECK(output_of(site.run_alone(losses_words("nccl", kFew, launched))) == alone);
}

TEST("scale: two processes on GPUs have the losses of one, captured or not the same bits, and write its checkpoint") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  if (cuda_device_count() < 2) SKIP("fewer than two CUDA devices");
  const Site site;
  const std::string train = "batch_size = 8\ngrad_accumulation = 2\ndtype = \"f32\"";
  const auto captured = recipes(site, "gpus", train), launched = recipes(site, "gpus-launches", train + "\ngraph = false");
  const std::string two = output_of(site.run(2, losses_words("cuda", kSteps, captured)));
  check_same_losses(two, output_of(site.run_alone(losses_words("cuda", kSteps, captured))), kSteps);
  CHECK(output_of(site.run(2, losses_words("cuda", kSteps, captured))) == two);
  CHECK(output_of(site.run(2, losses_words("cuda", kSteps, launched))) == two);
  auto words = train_words("one", with_data({"train.dtype=bf16"}));
  words[4] = "cuda";
  output_of(site.run_alone(words));
  words[6] = "two";
  output_of(site.run(2, words));
  const std::string file = "/checkpoints/step-12/model.safetensors";
  const NamedTensors a = read_safetensors(site.file("runs/one" + file)), b = read_safetensors(site.file("runs/two" + file));
  for (const auto& [name, values] : a.tensors) expect_close(b.at(name).to_vector<double>(), values.to_vector<double>(), 1e-2, 1e-3, name);
}

TEST("scale: a run of three processes writes the checkpoint, the metrics and the validation of one") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  const auto settings = with_data({"initial_state=fitted-noise", "data.val_files=shard.jsonl", "train.val_every=6", "train.val_batches=5"});
  const ProcessResult alone = site.run_alone(train_words("one", settings));
  REQUIRE_MESSAGE(alone.code == 0, alone.err);
  for (const char* sharded : {"true", "false"}) {
    const std::string run = std::string("sharded-") + sharded;
    auto with_choice = settings;
    with_choice.push_back(std::string("train.shard_optimizer=") + sharded);
    const ProcessResult three = site.run(3, train_words(run, with_choice));
    REQUIRE_MESSAGE(three.code == 0, three.err);
    check_same_run(site.file("runs/" + run), site.file("runs/one"), 12);
    // The files have the same layout and, but for roundings, the same content; whoever reads them does not see how many wrote them.
    const std::string one = site.file("runs/one/checkpoints/step-12/"), many = site.file("runs/" + run + "/checkpoints/step-12/");
    for (const char* name : {"model.safetensors", "optimizer.safetensors", "carried_state.safetensors"}) {
      CAPTURE(name);
      const NamedTensors a = read_safetensors(one + name), b = read_safetensors(many + name);
      CHECK(a.metadata == b.metadata);
      REQUIRE(a.tensors.size() == b.tensors.size());
      CHECK(fs::file_size(one + name) == fs::file_size(many + name));
      for (const auto& [tensor, values] : a.tensors) {
        CAPTURE(tensor);
        // Where a gradient is all rounding AdamW makes steps of the size of the others out of it: 12 steps of 3e-3, but for a few.
        expect_close(b.at(tensor).to_vector<double>(), values.to_vector<double>(), 1e-3, 1e-5, tensor);
      }
    }
    CHECK(fs::exists(site.file("runs/" + run + "/logs/rank-1.log")));
    CHECK(fs::exists(site.file("runs/" + run + "/logs/rank-2.log")));
    CHECK(three.err.find("3 processes, MPI") != std::string::npos);
  }
}

// 9 rows of 20 tokens: a batch of 6, one of 3.
std::vector<std::string> with_short_validation(const Site& site, const std::string& val_batches) {
  std::ofstream(site.file("val.jsonl")) << R"({"text": ")" << std::string(170, 'v') << "\"}\n";
  return with_data({"data.val_files=val.jsonl", "train.steps=2", "train.val_batches=" + val_batches});
}
double val_loss_of(const Site& site, const std::string& run) {
  return metrics_of(site.file("runs/" + run)).back()["val_loss"].get<double>();
}

TEST("scale: the last rows of the validation count, also where they are fewer than a batch") {
  const Site site;
  output_of(site.run_alone(train_words("one", with_short_validation(site, "9"))));
  auto rows_alone = with_short_validation(site, "99");
  rows_alone.push_back("train.grad_accumulation=6");  // batches of one row
  output_of(site.run_alone(train_words("rows", rows_alone)));
  check_close(val_loss_of(site, "rows"), val_loss_of(site, "one"));
}

TEST("scale: the last rows of the validation count, also where none is left for a process") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  output_of(site.run_alone(train_words("one", with_short_validation(site, "9"))));
  output_of(site.run(3, train_words("three", with_short_validation(site, "9"))));
  check_close(val_loss_of(site, "three"), val_loss_of(site, "one"));
}

TEST("scale: a run of two processes goes on with three, and then alone, as if nothing had changed") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  for (const auto& [strategy, arrangement] : {std::pair("state-passing", "packed"), {"tbtt", "streams"}, {"fitted-noise", "packed"}}) {
    CAPTURE(strategy);
    const std::string name = strategy;
    const auto settings = with_data({"initial_state=" + name, std::string("data.arrangement=") + arrangement, "train.checkpoint_every=4"});
    const ProcessResult whole = site.run_alone(train_words(name + "-whole", settings));
    REQUIRE_MESSAGE(whole.code == 0, whole.err);
    // Ends early: the schedule is that of 12 steps, so the last checkpoint is taken away to go on from the one before.
    auto parts = train_words(name + "-parts", settings);
    const ProcessResult first = site.run(2, parts);
    REQUIRE_MESSAGE(first.code == 0, first.err);
    const std::string folder = site.file("runs/" + name + "-parts");
    auto go_back_to = [&](int step) {
      for (const auto& entry : fs::directory_iterator(folder + "/checkpoints"))
        if (const std::string checkpoint = entry.path().filename().string();
            checkpoint != "latest" && checkpoint != "step-" + std::to_string(step))
          fs::remove_all(entry.path());
      fs::remove(folder + "/checkpoints/latest");
      fs::create_directory_symlink("step-" + std::to_string(step), folder + "/checkpoints/latest");
    };
    go_back_to(8);
    const ProcessResult second = site.run(3, {LONGHAND_BINARY, "train", "--device", "cpu", "--resume", name + "-parts"});
    REQUIRE_MESSAGE(second.code == 0, second.err);
    CHECK(second.err.find("resumed after step 8") != std::string::npos);
    check_same_run(folder, site.file("runs/" + name + "-whole"), 12);
    go_back_to(8);
    const ProcessResult third = site.run_alone({LONGHAND_BINARY, "train", "--device", "cpu", "--resume", name + "-parts"});
    REQUIRE_MESSAGE(third.code == 0, third.err);
    check_same_run(folder, site.file("runs/" + name + "-whole"), 12);
  }
}

// Two tables of losses by position or range that are as close as losses are: a perplexity, exp(loss), and a standard error of losses feel
// the absolute difference of those.
void check_same_table(const std::string& many, const std::string& one) {
  const auto rows = split_at(many, '\n'), wanted = split_at(one, '\n');
  const auto columns = split_at(wanted[0], ',');
  const auto loss = std::find(columns.begin(), columns.end(), "loss") - columns.begin();
  REQUIRE(loss < std::ssize(columns));
  REQUIRE(rows.size() == wanted.size());
  CHECK(rows[0] == wanted[0]);
  for (std::size_t line = 1; line < rows.size(); ++line) {
    if (rows[line] == wanted[line]) continue;
    const auto a = split_at(rows[line], ','), b = split_at(wanted[line], ',');
    CAPTURE(rows[line]);
    CAPTURE(wanted[line]);
    REQUIRE(a.size() == columns.size());
    REQUIRE(b.size() == columns.size());
    const double off = kSameLoss * std::stod(b[static_cast<std::size_t>(loss)]);
    for (std::size_t i = 0; i < a.size(); ++i) {
      CAPTURE(columns[i]);
      if (columns[i] == "loss" || columns[i] == "standard_error") CHECK(std::abs(std::stod(a[i]) - std::stod(b[i])) <= off);
      else if (columns[i] == "perplexity") check_close(std::stod(a[i]), std::stod(b[i]), off);
      else CHECK(a[i] == b[i]);
    }
  }
}

TEST("scale: an evaluation by several processes is that of one; other commands do not run several times over") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  const ProcessResult trained = site.run_alone(train_words("model", with_data({"train.steps=3"})));
  REQUIRE_MESSAGE(trained.code == 0, trained.err);
  // A row alone goes through the same arithmetic wherever it is: then the tables are the same text, though three add up in another order.
  // In rows of four, other sequences stand beside it, and products may be put together in another way.
  for (const char* batch : {"1", "4"}) {
    CAPTURE(batch);
    std::vector<std::string> words{LONGHAND_BINARY, "eval",      "ppl", "--model",     "runs/model", "--data",
                                   "shard.jsonl",   "--context", "60",  "--documents", "all",        "--device",
                                   "cpu",           "--batch",   batch, "--chunk",     "16",         "--out"};
    const auto to = [&](const std::string& out) {
      auto with_out = words;
      with_out.push_back(out);
      return with_out;
    };
    const ProcessResult alone = site.run_alone(to("one.csv")), three = site.run(3, to("three.csv"));
    REQUIRE_MESSAGE(alone.code == 0, alone.err);
    REQUIRE_MESSAGE(three.code == 0, three.err);
    for (const char* table : {".csv", ".spread.csv"}) {
      CAPTURE(table);
      const std::string one = text_of(site.file(std::string("one") + table)), many = text_of(site.file(std::string("three") + table));
      REQUIRE(split_at(one, '\n').size() > 5);
      if (std::string(batch) == "1") CHECK(many == one);
      else check_same_table(many, one);
    }
    const auto described = nlohmann::json::parse(text_of(site.file("three.json"))),
               expected = nlohmann::json::parse(text_of(site.file("one.json")));
    CHECK(described["sequences"] == expected["sequences"]);
    CHECK(described["tokens"] == expected["tokens"]);
    CHECK(described["processes"] == 3);
  }
  // Ranges that end elsewhere, lines that count for one alone, another type, a switch: refused with what differs.
  std::vector<std::string> first = {LONGHAND_BINARY, "eval",        "ppl",       "--model", "runs/model",
                                    "--data",        "shard.jsonl", "--context", "60",      "--documents",
                                    "all",           "--device",    "cpu",       "--out",   "differing.csv"};
  const auto refused = [&](std::vector<std::string> before, const std::vector<std::string>& behind) {
    auto words = Site::with_mpirun(1, first);
    words.insert(words.end(), {":", "-n", "1"});
    words.insert(words.end(), before.begin(), before.end());
    words.insert(words.end(), first.begin(), first.end());
    words.insert(words.end(), behind.begin(), behind.end());
    const ProcessResult result = run_process(words, site.here());
    CHECK(result.code != 0);
    return result.err;
  };
  CHECK(refused({}, {"--train-length", "33"}).find("training length: 33") != std::string::npos);
  CHECK(refused({}, {"--skip-bad-lines"}).find("skip bad lines: true") != std::string::npos);
  CHECK(refused({}, {"--dtype", "f64"}).find("dtype: f64") != std::string::npos);
  CHECK(refused({"/usr/bin/env", "LONGHAND_CHECK=1"}, {}).find("environment: LONGHAND_CHECK=1") != std::string::npos);
  CHECK_FALSE(fs::exists(site.file("differing.csv")));
  const ProcessResult other = site.run(2, {LONGHAND_BINARY, "inspect", "switches"});
  CHECK(other.code != 0);
  CHECK(other.err.find("a command for one process was started as several") != std::string::npos);
}

// --- what goes wrong -----------------------------------------------------------------------------------------------

// The process of a job of the site that the launcher numbered `rank`.
pid_t process_of(const Site& site, const std::string& rank, const std::string& program = LONGHAND_BINARY) {
  for (const auto& entry : fs::directory_iterator("/proc")) {
    const std::string name = entry.path().filename().string();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    std::ifstream command(entry.path() / "cmdline"), environment(entry.path() / "environ");
    const std::string started((std::istreambuf_iterator<char>(command)), {}), variables((std::istreambuf_iterator<char>(environment)), {});
    std::error_code gone;
    if (started.starts_with(program) && variables.find("OMPI_COMM_WORLD_RANK=" + rank + '\0') != std::string::npos &&
        fs::read_symlink(entry.path() / "cwd", gone) == fs::canonical(site.file(".")))
      return std::stoi(name);
  }
  return 0;
}

TEST("scale: a job whose process is killed ends and names it; resumed, one that is asked to end writes a checkpoint; no step is lost") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  const auto settings = with_data({"train.steps=1000000", "train.checkpoint_every=5", "initial_state=state-passing"});
  const std::string run = site.file("runs/killed"), whole = site.file("runs/whole");
  {
    Process job = site.start(2, train_words("killed", settings));
    REQUIRE(job.wait_until([&] { return fs::exists(run + "/checkpoints/latest"); }));
    const pid_t victim = process_of(site, "1");
    REQUIRE(victim > 0);
    ::kill(victim, SIGKILL);
    const ProcessResult ended = job.finish();
    CHECK(ended.code != 0);
    CHECK(ended.err.find("rank 1") != std::string::npos);
    CHECK(ended.err.find("signal 9") != std::string::npos);
  }
  CHECK(fs::exists(run + "/checkpoints/latest/training.json"));
  const std::size_t enough = metrics_of(run).size() + 10;
  {
    Process job = site.start(2, {LONGHAND_BINARY, "train", "--device", "cpu", "--resume", "killed"});
    REQUIRE(job.wait_until([&] { return metrics_of(run).size() > enough; }));
    ::kill(process_of(site, "1"), SIGTERM);
    const ProcessResult ended = job.finish();
    CHECK(ended.code == 128 + SIGTERM);
    CHECK(ended.err.find("resumed after step") != std::string::npos);
    CHECK(ended.err.find("interrupted after step") != std::string::npos);
  }
  const auto rows = metrics_of(run);
  REQUIRE(rows.size() > 10);
  CHECK(fs::read_symlink(run + "/checkpoints/latest").filename().string() == "step-" + rows.back()["step"].dump());
  {
    Process alone(train_words("whole", settings), site.here());
    REQUIRE(alone.wait_until([&] { return metrics_of(whole).size() > rows.size(); }));
    alone.send(SIGTERM);
    CHECK(alone.finish().code == 128 + SIGTERM);
  }
  check_same_run(run, whole, rows.size());
}

TEST("scale: where the launcher does not notice that a process is gone, the others name it and end") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  ProcessOptions options = site.here();
  options.patience = std::chrono::seconds(60);
  Process job(Site::with_mpirun(2, train_words("left", with_data({"train.steps=1000000", "train.checkpoint_every=5"}))), options);
  REQUIRE(job.wait_until([&] { return fs::exists(site.file("runs/left/checkpoints/latest")); }));
  const pid_t victim = process_of(site, "1");
  REQUIRE(victim > 0);
  job.send(SIGSTOP);
  ::kill(victim, SIGKILL);
  CHECK(job.wait_until([&] { return process_of(site, "0") == 0; }));  // it waits for the other one inside MPI
  job.send(SIGCONT);
  const ProcessResult ended = job.finish();
  CHECK(ended.code != 0);
  CHECK(ended.err.find("process 1, id " + std::to_string(victim)) != std::string::npos);
  CHECK(ended.err.find("process 0 of 2 ends the run") != std::string::npos);
}

TEST("scale: a process that has finished and waits for the last one to, notices that it is gone") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  ProcessOptions options = site.here();
  options.patience = std::chrono::seconds(60);
  Process job(Site::with_mpirun(2, losses_words("cpu-late", 1, {recipes(site, "late", "batch_size = 8").front()})), options);
  REQUIRE(job.wait_until([&] { return fs::exists(site.file("late")); }));
  const pid_t victim = process_of(site, "1", LOSSES);
  REQUIRE(victim > 0);
  job.send(SIGSTOP);
  ::kill(victim, SIGKILL);
  CHECK(job.wait_until([&] { return process_of(site, "0", LOSSES) == 0; }));
  job.send(SIGCONT);
  CHECK(job.finish().err.find("process 0 of 2 ends the run") != std::string::npos);
}

TEST("scale: processes that would not train the same thing are refused with what differs") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  auto refused = [&](std::vector<std::string> first, std::vector<std::string> second) {
    auto words = Site::with_mpirun(1, std::move(first));
    words.insert(words.end(), {":", "-n", "1"});
    words.insert(words.end(), second.begin(), second.end());
    const ProcessResult result = run_process(words, site.here());
    CHECK(result.code != 0);
    return result.err;
  };
  const std::string settings =
      refused(train_words("a", with_data({"optimizer.lr=1e-3"})), train_words("a", with_data({"optimizer.lr=2e-3"})));
  CHECK(settings.find("setting: optimizer.lr=1e-3") != std::string::npos);
  CHECK(settings.find("setting: optimizer.lr=2e-3") != std::string::npos);
  const std::string recipes = refused(train_words("a", kData, "mamba2"), train_words("a", kData, "gla"));
  CHECK(recipes.find("recipe: mamba2.toml") != std::string::npos);
  CHECK(recipes.find("recipe: gla.toml") != std::string::npos);
  auto on_gpu = train_words("a", kData);
  on_gpu[4] = "cuda";
  const std::string devices = refused(train_words("a", kData), on_gpu);
  CHECK(devices.find("cpu on") != std::string::npos);
  CHECK(devices.find("cuda on") != std::string::npos);
  auto switched = train_words("a", kData);
  switched.insert(switched.begin(), {"/usr/bin/env", "LONGHAND_CHECK=1"});
  CHECK(refused(train_words("a", kData), switched).find("environment: LONGHAND_CHECK=1") != std::string::npos);
  fs::create_directories(site.file("other"));
  std::ofstream(site.file("other/shard.jsonl")) << "{\"text\": \"something else\"}\n";
  fs::copy(site.file("mamba2.toml"), site.file("other/mamba2.toml"));
  auto elsewhere = train_words("a", kData);
  elsewhere.insert(elsewhere.begin(), {"/usr/bin/env", "-C", site.file("other")});
  const std::string data = refused(train_words("a", kData), elsewhere);
  CHECK(data.find("data: shard.jsonl") != std::string::npos);
  CHECK_FALSE(fs::exists(site.file("runs/a")));
}

TEST("scale: a checkpoint that one process cannot read leaves the metrics behind it as they are") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  output_of(site.run(2, train_words("kept", with_data({}))));
  const std::string run = site.file("runs/kept");
  const auto before = metrics_of(run);
  fs::remove_all(run + "/checkpoints/step-12");
  fs::remove(run + "/checkpoints/latest");
  fs::create_directory_symlink("step-10", run + "/checkpoints/latest");
  // The machine of the second process sees the same folder, with a file that ends early.
  fs::create_directories(site.file("other"));
  for (const char* name : {"runs", "mamba2.toml", "shard.jsonl"})
    fs::copy(site.file(name), site.file(std::string("other/") + name), fs::copy_options::recursive | fs::copy_options::copy_symlinks);
  fs::resize_file(site.file("other/runs/kept/checkpoints/step-10/optimizer.safetensors"), 100);
  const std::vector<std::string> resume{LONGHAND_BINARY, "train", "--device", "cpu", "--resume", "kept"};
  auto words = Site::with_mpirun(1, resume);
  words.insert(words.end(), {":", "-n", "1", "/usr/bin/env", "-C", site.file("other")});
  words.insert(words.end(), resume.begin(), resume.end());
  const ProcessResult refused = run_process(words, site.here());
  CHECK(refused.code != 0);
  CHECK(refused.err.find("another one could not do its part") != std::string::npos);
  CHECK(refused.err.find("optimizer.safetensors") != std::string::npos);
  CHECK(metrics_of(run) == before);
}

TEST("scale: more processes than rows, and a device by number, are errors that say what to do") {
  if (std::string(MPIRUN).empty()) SKIP("this build has no MPI");
  const Site site;
  const ProcessResult rows = site.run(4, train_words("few", {"data.files=shard.jsonl", "train.batch_size=3"}));
  CHECK(rows.code != 0);
  CHECK(rows.err.find("a micro-batch has fewer rows than there are processes") != std::string::npos);
  CHECK(rows.err.find("process 0 of 4 ends the run") != std::string::npos);
  CHECK_FALSE(fs::exists(site.file("runs/few")));
  auto words = train_words("named", kData);
  words[4] = "cuda:0";
  const ProcessResult named = site.run(2, words);
  CHECK(named.code != 0);
  CHECK(named.err.find("none is named") != std::string::npos);
}

}  // namespace
}  // namespace longhand::test
