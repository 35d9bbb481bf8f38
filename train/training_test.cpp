// Whole runs of a tiny model: it learns, it resumes bit for bit, it carries states, it stops when numbers stop being numbers.
#include <signal.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "core/allocator.h"
#include "core/error.h"
#include "core/files.h"
#include "core/philox.h"
#include "core/safetensors.h"
#include "data/tokenizer.h"
#include "models/checkpoint.h"
#include "tests/support/check.h"
#include "train/trainer.h"
#include "train/training_loop.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using test::expect_close;
using test::ScratchFolder;

constexpr const char* kTiny = R"(
seed = 3
[model]
d_model = 16
n_layer = 2
d_state = 8
headdim = 8
[train]
steps = 12
batch_size = 4
length = 20
log_every = 3
checkpoint_every = 5
[optimizer]
lr = 3e-3
)";

Recipe tiny_recipe(const std::vector<std::string>& settings = {}) {
  Recipe recipe = parse_recipe(kTiny, "tiny.toml", settings);
  resolve_model(recipe, 257);
  return recipe;
}

std::unique_ptr<LanguageModel> tiny_model(const Recipe& recipe, const Device& device = Device::cpu()) {
  auto model = std::make_unique<LanguageModel>(recipe.model, device, device.is_cuda() ? Dtype::bf16 : Dtype::f32);
  model->initialize(static_cast<uint64_t>(recipe.seed));
  return model;
}

// A batch of tokens drawn from a small alphabet; every position counts.
Batch made_up_batch(const Recipe& recipe, uint64_t key) {
  Batch batch;
  batch.rows = recipe.train.batch_size;
  batch.length = recipe.train.length;
  const auto n = static_cast<std::size_t>(batch.rows * batch.length);
  for (std::size_t i = 0; i < n; ++i) {
    batch.tokens.push_back(static_cast<int32_t>(philox_u64(key, i) % 50));
    batch.targets.push_back(static_cast<int32_t>(philox_u64(key, i, 1) % 50));
  }
  batch.mask.assign(n, 1);
  batch.resets.assign(static_cast<std::size_t>(batch.rows), 1);
  for (int64_t b = 0; b < batch.rows; ++b) batch.row_ids.push_back(b);
  return batch;
}

StepReport step_and_report(Trainer& trainer, const Batch& batch) {
  trainer.step(batch);
  trainer.request_report();
  return trainer.receive_report();
}

TokenBatch on_model(const LanguageModel& model, const Batch& batch) {
  const Shape shape{batch.rows, batch.length};
  return {Tensor::from(model.device(), shape, batch.tokens), Tensor::from(model.device(), shape, batch.targets), {}};
}

// --- learning ---------------------------------------------------------------------------------------------------

TEST("training: the first loss is near log(vocabulary), and one batch is learnt by heart") {
  const Recipe recipe = tiny_recipe({"train.steps=250", "optimizer.lr=0.02", "model.tie_embeddings=false"});
  const auto model = tiny_model(recipe);
  Trainer trainer(recipe, *model);
  const Batch batch = made_up_batch(recipe, 1);
  const double first = step_and_report(trainer, batch).loss;
  CHECK(std::abs(first - std::log(272.0)) < 0.3);
  StepReport last;
  for (int64_t step = 1; step < recipe.train.steps; ++step) last = step_and_report(trainer, batch);
  CHECK(last.loss < 0.1);
  CHECK(last.updates == recipe.train.steps);
}

TEST("training: micro-batches give the step of the whole batch, also when their masks differ") {
  auto weights_after = [](const char* accumulation) {
    const Recipe recipe = tiny_recipe({std::string("train.grad_accumulation=") + accumulation, "initial_state=state-passing"});
    const auto model = tiny_model(recipe);
    Trainer trainer(recipe, *model);
    double loss = 0;
    for (uint64_t step = 0; step < 3; ++step) {
      Batch batch = made_up_batch(recipe, step);
      for (std::size_t i = 0; i < 13; ++i) batch.mask[i] = 0;
      for (std::size_t i = 20; i < 40; ++i) batch.mask[i] = 0;  // the whole second row
      loss = step_and_report(trainer, batch).loss;
    }
    auto out = model->parameters().flat_master().to_vector<double>();
    out.push_back(loss);
    return out;
  };
  const auto whole = weights_after("1");
  expect_close(weights_after("2"), whole, 2e-5);
  expect_close(weights_after("4"), whole, 2e-5);
}

// --- initial states ---------------------------------------------------------------------------------------------

struct TwoBatches {
  Recipe recipe;
  std::unique_ptr<LanguageModel> model;
  Batch first, second;
};

// Rates of zero: the weights stay, so that what a trainer computes can be repeated by hand.
TwoBatches still_model(std::vector<std::string> settings) {
  settings.insert(settings.end(), {"optimizer.lr=0", "optimizer.min_lr=0"});
  TwoBatches out{tiny_recipe(settings), nullptr, {}, {}};
  out.model = tiny_model(out.recipe);
  out.first = made_up_batch(out.recipe, 1);
  out.second = made_up_batch(out.recipe, 2);
  return out;
}

double loss_of_second(TwoBatches& t) {
  Trainer trainer(t.recipe, *t.model);
  step_and_report(trainer, t.first);
  return step_and_report(trainer, t.second).loss;
}

double loss_by_hand(const LanguageModel& model, const Batch& batch, const RecurrentState& h0) {
  const NoGrad no_grad;
  return model.loss(on_model(model, batch), h0).loss.value().item();
}

TEST("state-passing: a batch starts from the final state of the batch before; zero does not") {
  TwoBatches passing = still_model({"initial_state=state-passing"}), zero = still_model({});
  const RecurrentState h_T = [&] {
    const NoGrad no_grad;
    return passing.model->loss(on_model(*passing.model, passing.first)).state;
  }();
  const double from_state = loss_by_hand(*passing.model, passing.second, h_T), from_zero = loss_by_hand(*zero.model, zero.second, {});
  CHECK(std::abs(from_state - from_zero) > 1e-4);
  CHECK(loss_of_second(passing) == doctest::Approx(from_state).epsilon(1e-6));
  CHECK(loss_of_second(zero) == doctest::Approx(from_zero).epsilon(1e-6));

  TwoBatches halves = still_model({"initial_state=state-passing", "train.grad_accumulation=2"});
  CHECK(loss_of_second(halves) == doctest::Approx(from_state).epsilon(1e-6));

  RecurrentState ssm_only = h_T.detach();
  for (LayerState& layer : ssm_only.layers()) layer.erase("conv");
  TwoBatches ssm = still_model({"initial_state=state-passing", "initial_state_options.cover=ssm"});
  CHECK(loss_of_second(ssm) == doctest::Approx(loss_by_hand(*ssm.model, ssm.second, ssm_only)).epsilon(1e-6));
  CHECK(std::abs(loss_of_second(ssm) - from_state) > 1e-5);

  TwoBatches never = still_model({"initial_state=state-passing", "initial_state_options.probability=0"});
  CHECK(loss_of_second(never) == doctest::Approx(from_zero).epsilon(1e-6));
}

TEST("state-passing: in streams, rows that begin a new sequence start from zero") {
  TwoBatches t = still_model({"initial_state=state-passing", "data.arrangement=streams"});
  t.second.resets = {0, 1, 1, 0};
  const RecurrentState h_T = [&] {
    const NoGrad no_grad;
    return t.model->loss(on_model(*t.model, t.first)).state;
  }();
  const double expected = loss_by_hand(*t.model, t.second, h_T.reset_rows(t.second.resets));
  CHECK(std::abs(expected - loss_by_hand(*t.model, t.second, h_T)) > 1e-4);
  CHECK(loss_of_second(t) == doctest::Approx(expected).epsilon(1e-6));
}

TEST("state-passing: rows are drawn by seed, step and row id, not by their place") {
  const Recipe recipe = tiny_recipe();
  const auto model = tiny_model(recipe);
  const InitialStateContext context{.zero_state = [&](int64_t rows) { return model->zero_state(rows); },
                                    .device = Device::cpu(),
                                    .seed = 5,
                                    .options = {.cover = "all", .probability = 0.5}};
  constexpr int64_t kRows = 64;
  auto treated = [&](std::vector<int64_t> ids, int64_t step) {
    const auto strategy = make_initial_state("state-passing", context);
    RecurrentState ones = model->zero_state(kRows);
    for (LayerState& layer : ones.layers())
      for (auto& [name, value] : layer) value = Variable(Tensor::full(Device::cpu(), value.value().dtype(), value.shape(), 1));
    BatchInfo info{.step = step, .micro = 0, .rows = kRows, .resets = {}, .row_ids = ids};
    strategy->end(info, ones);
    const Tensor ssm = strategy->begin(info).get(0, "ssm").value();
    std::vector<bool> out;
    for (int64_t b = 0; b < kRows; ++b) out.push_back(ssm.to_vector<float>()[static_cast<std::size_t>(b * ssm.numel() / kRows)] == 1);
    return out;
  };
  std::vector<int64_t> ids(kRows), reversed(kRows);
  for (int64_t b = 0; b < kRows; ++b)
    ids[static_cast<std::size_t>(b)] = 1000 + b, reversed[static_cast<std::size_t>(kRows - 1 - b)] = 1000 + b;
  const auto forward = treated(ids, 7);
  auto backward_order = treated(reversed, 7);
  const auto count = std::count(forward.begin(), forward.end(), true);
  CHECK(count > 16);
  CHECK(count < 48);
  std::reverse(backward_order.begin(), backward_order.end());
  CHECK(forward == backward_order);
  CHECK(forward != treated(ids, 8));
  CHECK_THROWS_WITH_AS(make_initial_state("state-pasing", context), doctest::Contains("nearest  state-passing"), ConfigError);
}

// --- runs -------------------------------------------------------------------------------------------------------

// A shard of documents without structure; what matters is that they differ.
void write_shard(const std::string& path) {
  std::ofstream out(path);
  for (uint64_t document = 0; document < 60; ++document) {
    std::string text;
    const uint64_t words = 20 + philox_u64(1, document) % 60;
    for (uint64_t w = 0; w < words; ++w) text += static_cast<char>('a' + philox_u64(2, document, w) % 26), text += w % 5 == 4 ? ' ' : 'e';
    out << nlohmann::json{{"text", text}}.dump() << "\n";
  }
}

struct RunResult {
  TrainingOutcome outcome;
  std::vector<double> losses;      // of every step
  std::vector<std::string> lines;  // metrics without the times
  std::vector<float> weights;
};

struct RunOptions {
  std::string name;
  std::vector<std::string> settings;
  int64_t interrupt_at = 0;  // raise SIGINT when this step is reported
  Device device = Device::cpu();
};

RunResult run(const ScratchFolder& scratch, const RunOptions& options, bool resume) {
  if (!fs::exists(scratch.file("shard.jsonl"))) write_shard(scratch.file("shard.jsonl"));
  auto settings = options.settings;
  settings.push_back("data.files=" + scratch.file("shard.jsonl"));
  const Recipe recipe = tiny_recipe(settings);
  const auto model = tiny_model(recipe, options.device);
  RunResult result;
  TrainingJob job{.recipe = recipe,
                  .folder = resume ? RunFolder::open(scratch.path(), options.name) : RunFolder::create(scratch.path(), options.name),
                  .tokenizer = open_tokenizer("bytes"),
                  .resume = resume,
                  .evaluate = {},
                  .messages = nullptr,
                  .on_step = [&](const LoggedStep& step) {
                    result.losses.push_back(step.loss);
                    if (step.step == options.interrupt_at) ::raise(SIGINT);
                  }};
  write_file_atomically(job.folder.file("config.toml"), to_toml(recipe));
  result.outcome = run_training(job, *model);
  result.weights = model->parameters().flat_master().to_vector<float>();
  std::ifstream in(job.folder.file("metrics.jsonl"));
  for (std::string line; std::getline(in, line);) {
    auto json = nlohmann::ordered_json::parse(line);
    for (const char* measured : {"tokens_per_s", "elapsed_s", "mfu", "peak_memory_bytes"}) json.erase(measured);
    result.lines.push_back(json.dump());
  }
  return result;
}

void check_resume(const std::vector<std::string>& settings, const Device& device) {
  const ScratchFolder scratch;
  const RunResult whole = run(scratch, {.name = "whole", .settings = settings, .interrupt_at = 0, .device = device}, false);
  CHECK(whole.outcome.step == 12);
  CHECK(whole.losses.size() == 12);
  CHECK(whole.lines.size() == 5);  // steps 1, 3, 6, 9, 12
  const RunResult first = run(scratch, {.name = "parts", .settings = settings, .interrupt_at = 6, .device = device}, false);
  CHECK(first.outcome.signal == SIGINT);
  REQUIRE(first.outcome.step >= 6);
  REQUIRE(first.outcome.step < 12);
  const RunResult second = run(scratch, {.name = "parts", .settings = settings, .interrupt_at = 0, .device = device}, true);
  CHECK(second.outcome.signal == 0);
  auto losses = first.losses;
  losses.insert(losses.end(), second.losses.begin(), second.losses.end());
  CHECK(losses == whole.losses);
  CHECK(second.weights == whole.weights);
  CHECK(second.lines == whole.lines);
}

TEST("training: interrupted and resumed equals uninterrupted, bit for bit: zero states") {
  check_resume({}, Device::cpu());
}

TEST("training: interrupted and resumed equals uninterrupted, bit for bit: state-passing with accumulation") {
  check_resume({"initial_state=state-passing", "train.grad_accumulation=2", "initial_state_options.probability=0.7"}, Device::cpu());
}

TEST("training: interrupted and resumed equals uninterrupted, bit for bit: streams") {
  check_resume({"initial_state=state-passing", "data.arrangement=streams", "data.stream_unit=document"}, Device::cpu());
}

TEST("training: interrupted and resumed equals uninterrupted, bit for bit: on a GPU in bf16") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  check_resume({"initial_state=state-passing", "train.grad_accumulation=2"}, Device::cuda());
}

TEST("training: a run that was cut off goes back to its last checkpoint and drops later metrics") {
  const ScratchFolder scratch;
  const RunResult whole = run(scratch, {.name = "whole", .settings = {}}, false);
  run(scratch, {.name = "cut", .settings = {}}, false);
  const std::string checkpoints = scratch.file("cut/checkpoints");
  fs::remove_all(checkpoints + "/step-12");  // as if the power had failed after step 10
  fs::remove(checkpoints + "/latest");
  fs::create_directory_symlink("step-10", checkpoints + "/latest");
  fs::create_directories(checkpoints + "/unfinished-step-12");
  std::ofstream(scratch.file("cut/metrics.jsonl"), std::ios::app) << "{\"step\": 13, \"lo";
  const RunResult again = run(scratch, {.name = "cut", .settings = {}}, true);
  CHECK(again.weights == whole.weights);
  CHECK(again.lines == whole.lines);
  CHECK(again.losses.size() == 2);
  CHECK_FALSE(fs::exists(checkpoints + "/unfinished-step-12"));
}

TEST("training: what a run leaves behind") {
  const ScratchFolder scratch;
  const RunResult result = run(scratch, {.name = "run", .settings = {"initial_state=state-passing"}}, false);
  const RunFolder folder = RunFolder::open(scratch.path(), "run");
  CHECK(folder.latest_step() == 12);
  CHECK_FALSE(fs::exists(folder.checkpoint(5)));  // keep_last = 2
  CHECK(fs::exists(folder.checkpoint(10)));
  CHECK(fs::canonical(folder.file("checkpoints/latest")) == fs::canonical(folder.checkpoint(12)));
  const auto model = load_model(folder.checkpoint(12), Device::cpu(), Dtype::f32);
  CHECK(model->parameters().flat_master().to_vector<float>() == result.weights);
  const RecurrentState carried = RecurrentState::load(folder.checkpoint(12) + "/carried_state.safetensors", Device::cpu());
  CHECK(carried.rows() == 4);
  const auto json = nlohmann::json::parse(read_text_file(folder.checkpoint(12) + "/training.json"));
  CHECK(json["step"] == 12);
  CHECK(json["tokens"] == 12 * 4 * 20);
  CHECK(json["tokenizer_fingerprint"] == "bytes");
  CHECK_THROWS_WITH_AS(RunFolder::create(scratch.path(), "run"), doctest::Contains("--resume run"), FileError);
  CHECK_THROWS_WITH_AS(RunFolder::open(scratch.path(), "other"), doctest::Contains("no such run"), FileError);
  const RunResult finished = run(scratch, {.name = "run", .settings = {"initial_state=state-passing"}}, true);
  CHECK(finished.losses.empty());
  CHECK(finished.weights == result.weights);
}

TEST("training: post-training starts from a run's latest checkpoint and takes its model") {
  const ScratchFolder scratch;
  const RunResult base = run(scratch, {.name = "base", .settings = {"model.d_model=24"}}, false);
  Recipe recipe = parse_recipe("init_from = \"" + scratch.file("base") + "\"\n[train]\nlength = 20\nbatch_size = 4\n", "post.toml");
  resolve_model(recipe, 257);
  CHECK(recipe.model.d_model == 24);
  CHECK(recipe.init_from == scratch.file("base/checkpoints/step-12"));
  const auto model = tiny_model(recipe);
  load_weights(*model, recipe.init_from);
  CHECK(model->parameters().flat_master().to_vector<float>() == base.weights);
  Recipe other = parse_recipe("init_from = \"" + scratch.file("base") + "\"\n[model]\nd_model = 32\n", "post.toml");
  CHECK_THROWS_WITH_AS(resolve_model(other, 257), doctest::Contains("model.d_model"), ConfigError);
}

TEST("training: validation is recorded where it is due") {
  const ScratchFolder scratch;
  write_shard(scratch.file("shard.jsonl"));
  const Recipe recipe = tiny_recipe({"train.val_every=4", "data.files=" + scratch.file("shard.jsonl")});
  const auto model = tiny_model(recipe);
  std::vector<int64_t> validated;
  int calls = 0;
  const TrainingJob job{.recipe = recipe,
                        .folder = RunFolder::create(scratch.path(), "val"),
                        .tokenizer = open_tokenizer("bytes"),
                        .resume = false,
                        .evaluate = [&](const LanguageModel&) { return 1.5 + ++calls; },
                        .messages = nullptr,
                        .on_step =
                            [&](const LoggedStep& s) {
                              if (s.val_loss) validated.push_back(s.step);
                            }};
  run_training(job, *model);
  CHECK(validated == std::vector<int64_t>{4, 8, 12});
  CHECK(read_text_file(job.folder.file("metrics.jsonl")).find("\"val_loss\":4.5") != std::string::npos);
}

TEST("training: a validation that fails ends the run, but keeps the steps") {
  const ScratchFolder scratch;
  write_shard(scratch.file("shard.jsonl"));
  const Recipe recipe = tiny_recipe({"train.val_every=4", "train.checkpoint_every=0", "data.files=" + scratch.file("shard.jsonl")});
  const auto model = tiny_model(recipe);
  const TrainingJob job{.recipe = recipe,
                        .folder = RunFolder::create(scratch.path(), "val"),
                        .tokenizer = open_tokenizer("bytes"),
                        .resume = false,
                        .evaluate = [](const LanguageModel&) -> double { throw FileError("the validation shard is gone"); },
                        .messages = nullptr,
                        .on_step = {}};
  CHECK_THROWS_WITH_AS(run_training(job, *model), doctest::Contains("the validation shard is gone"), FileError);
  CHECK(job.folder.latest_step() == 4);
}

TEST("training: on a CPU a step's rate counts the time of that step, also of the last and of those beside a pause") {
  const ScratchFolder scratch;
  write_shard(scratch.file("shard.jsonl"));
  const Recipe recipe =
      tiny_recipe({"train.steps=24", "train.log_every=1", "train.checkpoint_every=8", "data.files=" + scratch.file("shard.jsonl")});
  const auto model = tiny_model(recipe);
  std::vector<double> rates;
  const TrainingJob job{.recipe = recipe,
                        .folder = RunFolder::create(scratch.path(), "rates"),
                        .tokenizer = open_tokenizer("bytes"),
                        .resume = false,
                        .evaluate = {},
                        .messages = nullptr,
                        .on_step = [&](const LoggedStep& s) { rates.push_back(s.tokens_per_s); }};
  run_training(job, *model);
  REQUIRE(rates.size() == 24);
  auto sorted = rates;
  std::nth_element(sorted.begin(), sorted.begin() + 12, sorted.end());
  const double median = sorted[12];
  for (std::size_t i = 0; i < rates.size(); ++i) {  // a disturbed machine makes a step slower, never many times faster
    CAPTURE(i + 1);
    CHECK(rates[i] > 0);
    CHECK(rates[i] < 20 * median);
  }
}

TEST("training: the peak of the device's memory is in the metrics and in the last lines") {
  const ScratchFolder scratch;
  write_shard(scratch.file("shard.jsonl"));
  const Recipe recipe = tiny_recipe({"data.files=" + scratch.file("shard.jsonl")});
  const auto model = tiny_model(recipe);
  std::FILE* messages = std::fopen(scratch.file("messages").c_str(), "w");
  REQUIRE(messages != nullptr);
  const TrainingJob job{.recipe = recipe,
                        .folder = RunFolder::create(scratch.path(), "memory"),
                        .tokenizer = open_tokenizer("bytes"),
                        .resume = false,
                        .evaluate = {},
                        .messages = messages,
                        .on_step = {}};
  run_training(job, *model);
  std::fclose(messages);
  const int64_t peak = Device::cpu().allocator().use().peak_bytes;
  std::ifstream in(job.folder.file("metrics.jsonl"));
  int64_t last = 0;
  for (std::string line; std::getline(in, line);) {
    const auto bytes = nlohmann::json::parse(line).at("peak_memory_bytes").get<int64_t>();
    CHECK(bytes >= std::max(last, model->parameter_count() * 4 * 4));  // weights, gradients and two moments in f32
    last = bytes;
  }
  CHECK(last == peak);
  CHECK(read_text_file(scratch.file("messages")).find("peak memory  " + bytes_text(peak) + "\n") != std::string::npos);
}

TEST("training: numbers that are not finite are reported, and end the run after ten steps") {
  const ScratchFolder scratch;
  write_shard(scratch.file("shard.jsonl"));
  const Recipe recipe = tiny_recipe({"train.steps=40", "train.checkpoint_every=0", "data.files=" + scratch.file("shard.jsonl")});
  const auto model = tiny_model(recipe);
  int64_t steps = 0;
  const TrainingJob job{.recipe = recipe,
                        .folder = RunFolder::create(scratch.path(), "nan"),
                        .tokenizer = open_tokenizer("bytes"),
                        .resume = false,
                        .evaluate = {},
                        .messages = nullptr,
                        .on_step = [&](const LoggedStep& s) {
                          if (++steps == 3)
                            fill(model->parameters().all()[1].master.reshape({model->parameters().all()[1].shape.numel()}).slice(0, 0, 1),
                                 NAN);
                          if (s.step >= 6) CHECK(s.skipped > 0);
                        }};
  CHECK_THROWS_WITH_AS(run_training(job, *model), doctest::Contains("too many steps in a row"), NumericError);
  CHECK(steps >= 12);
  CHECK(steps <= 16);
  CHECK(read_text_file(job.folder.file("metrics.jsonl")).find("\"loss\":null") != std::string::npos);
}

TEST("progress: durations and metrics lines") {
  CHECK(duration_text(0.2) == "0s");
  CHECK(duration_text(65) == "1m 05s");
  CHECK(duration_text(7380) == "2h 03m");
  CHECK(duration_text(4 * 86400) == "4d 00h");
  CHECK(bytes_text(512) == "512 bytes");
  CHECK(bytes_text(1536) == "1.5 KiB");
  CHECK(bytes_text(3 << 20) == "3.0 MiB");
  CHECK(bytes_text(int64_t{5} << 28) == "1.2 GiB");
  LoggedStep s{.step = 3,
               .tokens = 96,
               .loss = 5.5,
               .lr = 1e-3,
               .weight_decay = 0.01,
               .grad_norm = INFINITY,
               .skipped = 1,
               .tokens_per_s = 10.04,
               .mfu = 0,
               .elapsed_s = 1.5,
               .peak_memory_bytes = 4096,
               .val_loss = {},
               .device = "cpu"};
  CHECK(
      to_json(s) ==
      R"({"step":3,"tokens":96,"loss":5.5,"lr":0.001,"weight_decay":0.01,"grad_norm":null,"tokens_per_s":10.0,"elapsed_s":1.5,"peak_memory_bytes":4096,"skipped":1,"device":"cpu"})");
}

}  // namespace
}  // namespace longhand
