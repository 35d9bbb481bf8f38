// Whole runs of a tiny model: it learns, it resumes bit for bit, it carries states, it stops when numbers stop being numbers.
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
#include "tests/support/tiny_training.h"
#include "train/single_process.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using namespace test;

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

TEST("training: every level of train.recompute gives the same weights, in micro-batches that carry states, on a GPU as graphs too") {
  std::vector<Device> devices{Device::cpu()};
  if (cuda_device_count() > 0) devices.push_back(Device::cuda());
  for (const Device& device : devices)
    for (const char* family : {"mamba1", "mamba2", "gla"}) {
      CAPTURE(family);
      CAPTURE(device.name());
      auto weights_after = [&](const char* level) {
        const Recipe recipe = tiny_recipe(
            {std::string("train.recompute=") + level, "train.grad_accumulation=2", "initial_state=tbtt", "data.arrangement=streams"},
            family);
        const auto model = tiny_model(recipe, device);
        Trainer trainer(recipe, *model);
        for (uint64_t step = 0; step < 5; ++step) (void)step_and_report(trainer, made_up_batch(recipe, step));
        if (device.is_cuda()) CHECK_MESSAGE(trainer.queued().starts_with("a graph of "), trainer.queued());
        return model->parameters().flat_master().to_vector<float>();
      };
      const auto none = weights_after("none");
      for (const char* plan : {"light", "projections", "full", "none:1,light:1", "light:1,full:1", "full:1,projections:1"}) {
        CAPTURE(plan);
        CHECK(weights_after(plan) == none);
      }
    }
}

// --- steps as graphs --------------------------------------------------------------------------------------------

// Two micro-batches, whose states are carried on: the first one's are there when the recording of the second fails.
Recipe carrying_recipe(const std::string& graph) {
  return tiny_recipe({"train.dtype=bf16", "train.graph=" + graph, "train.grad_accumulation=2", "initial_state=state-passing"});
}

// Losses, norms and weights of steps in which a number of positions, by step, do not count.
std::vector<double> numbers_of(const Recipe& recipe, const std::vector<std::size_t>& masked, Communicator* processes, std::string& queued) {
  const auto model = tiny_model(recipe, Device::cuda());
  Trainer trainer(recipe, *model, processes);
  std::vector<double> numbers;
  for (std::size_t step = 0; step < masked.size(); ++step) {
    Batch batch = made_up_batch(recipe, step);
    for (std::size_t i = 0; i < masked[step]; ++i) batch.mask[3 * i] = 0;
    const StepReport report = step_and_report(trainer, batch);
    numbers.insert(numbers.end(), {report.loss, report.grad_norm});
  }
  queued = trainer.queued();
  const auto weights = model->parameters().flat_master().to_vector<double>();
  numbers.insert(numbers.end(), weights.begin(), weights.end());
  return numbers;
}

TEST("training: a step of another form than the recorded one is not replayed, but recorded anew when it comes again") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const std::vector<std::size_t> masked{0, 0, 0, 5, 0, 5, 5, 5, 0, 0, 0, 2, 2};
  std::string with_graph, without;
  const auto replayed = numbers_of(carrying_recipe("true"), masked, nullptr, with_graph);
  CHECK(replayed == numbers_of(carrying_recipe("false"), masked, nullptr, without));
  CHECK_MESSAGE(with_graph.starts_with("a graph of "), with_graph);
  CHECK(without.empty());
}

// Looks at what it sums, for which the host has to wait: no graph can hold that.
class WatchingProcess final : public SingleProcess {
 public:
  void all_reduce_sum(const Tensor& t) override { (void)t.to_vector<double>(); }
  void reduce_scatter_sum(const Tensor& t, int64_t) override { all_reduce_sum(t); }
};

TEST("training: a step that no graph can hold is queued launch by launch, to the same bits, and the reason is said") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const std::vector<std::size_t> masked(5, 0);
  WatchingProcess watching;
  std::string with_graph, without;
  const auto fallen_back = numbers_of(carrying_recipe("true"), masked, &watching, with_graph);
  CHECK(fallen_back == numbers_of(carrying_recipe("false"), masked, &watching, without));
  CHECK_MESSAGE(with_graph.starts_with("launch by launch: no graph could be recorded\n"), with_graph);
  CHECK_MESSAGE(with_graph.find("stream is capturing") != std::string::npos, with_graph);
  CHECK(without.empty());
}

// --- runs -------------------------------------------------------------------------------------------------------

TEST("training: interrupted and resumed equals uninterrupted, bit for bit: zero states") {
  check_resume({}, Device::cpu());
}

TEST("training: interrupted and resumed equals uninterrupted, bit for bit: streams of documents") {
  check_resume({"initial_state=tbtt", "data.arrangement=streams", "data.stream_unit=document"}, Device::cpu());
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
  std::optional<RunFolder> opened = RunFolder::open(scratch.path(), "run");
  const RunFolder& folder = *opened;
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
  opened.reset();  // one at a time works on a run
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

TEST("training: what a checkpoint carries on is looked at before anything of the run is changed") {
  for (const std::string strategy : {"state-passing", "fitted-noise"}) {
    CAPTURE(strategy);
    const ScratchFolder scratch;
    write_shard(scratch.file("shard.jsonl"));
    const std::vector<std::string> settings{"train.steps=2", "initial_state=" + strategy, "data.files=" + scratch.file("shard.jsonl")};
    const Recipe recipe = tiny_recipe(settings);
    TrainingJob job{.recipe = recipe,
                    .folder = RunFolder::create(scratch.path(), "run"),
                    .tokenizer = open_tokenizer("bytes"),
                    .resume = false,
                    .evaluate = {},
                    .messages = nullptr,
                    .on_step = {}};
    run_training(job, *tiny_model(recipe));
    const std::string config = job.folder.file("config.toml"), file = job.folder.checkpoint(2) + "/carried_state.safetensors";
    write_file_atomically(config, "as it was");
    const std::string metrics = read_text_file(job.folder.file("metrics.jsonl"));
    const auto sound = read_safetensors(file).tensors;
    const auto name = sound.begin()->first;
    job.resume = true;
    job.recipe.train.steps = 4;
    const auto refused = [&](int64_t index, double value) {
      auto broken = sound;
      broken[name] = sound.at(name).clone();
      fill(broken[name].reshape({broken[name].numel()}).slice(0, index, index + 1), value);
      write_safetensors(file, broken, read_safetensors(file).metadata);
      CHECK_THROWS_WITH_AS(run_training(job, *tiny_model(recipe)), doctest::Contains(name.c_str()), FileError);
      CHECK(read_text_file(config) == "as it was");
      CHECK(read_text_file(job.folder.file("metrics.jsonl")) == metrics);
    };
    refused(1, NAN);
    if (strategy == "fitted-noise") refused(2, -1);  // squared deviations
    write_safetensors(file, sound);
    run_training(job, *tiny_model(recipe));
    CHECK(job.folder.latest_step() == 4);
    CHECK(read_text_file(config).find("steps = 4") != std::string::npos);
  }
}

TEST("training: a run that ends with weights that are not finite writes no checkpoint of them, and says so") {
  const ScratchFolder scratch;
  write_shard(scratch.file("shard.jsonl"));
  const Recipe recipe = tiny_recipe({"train.steps=6", "train.checkpoint_every=2", "data.files=" + scratch.file("shard.jsonl")});
  const auto model = tiny_model(recipe);
  const TrainingJob job{.recipe = recipe,
                        .folder = RunFolder::create(scratch.path(), "ruined"),
                        .tokenizer = open_tokenizer("bytes"),
                        .resume = false,
                        .evaluate = {},
                        .messages = nullptr,
                        .on_step = [&](const LoggedStep& s) {
                          if (s.step == 3) fill(model->parameters().flat_master().slice(0, 3, 4), NAN);
                        }};
  CHECK_THROWS_WITH_AS(run_training(job, *model), doctest::Contains("the weights are not finite"), NumericError);
  CHECK(job.folder.latest_step() == 2);
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

// A run of which one weight is set to `value` after its second step: its messages, and the error that ends it.
struct BrokenRun {
  std::string messages, error, metrics;
};

BrokenRun break_run(const std::string& parameter, double value, const std::vector<std::string>& settings = {}, int64_t mended_after = 0,
                    const Device& device = Device::cpu()) {
  const ScratchFolder scratch;
  write_shard(scratch.file("shard.jsonl"));
  auto all = settings;
  all.insert(all.end(), {"train.steps=20", "train.checkpoint_every=2", "data.files=" + scratch.file("shard.jsonl")});
  const Recipe recipe = tiny_recipe(all);
  const auto model = tiny_model(recipe, device);
  const Parameter* p = model->parameters().find(parameter);
  REQUIRE(p != nullptr);
  const Tensor one = p->master.reshape({p->shape.numel()}).slice(0, 3, 4);
  const double sound = one.to(Device::cpu()).item();
  std::FILE* messages = std::fopen(scratch.file("messages").c_str(), "w");
  REQUIRE(messages != nullptr);
  const TrainingJob job{.recipe = recipe,
                        .folder = RunFolder::create(scratch.path(), "broken"),
                        .tokenizer = open_tokenizer("bytes"),
                        .resume = false,
                        .evaluate = {},
                        .messages = messages,
                        .on_step = [&](const LoggedStep& s) {
                          if (s.step == 2) fill(one, value);
                          if (mended_after > 0 && s.step == mended_after) fill(one, sound);
                        }};
  BrokenRun result;
  try {
    run_training(job, *model);
  } catch (const NumericError& error) {
    result.error = error.what();
  }
  std::fclose(messages);
  result.messages = read_text_file(scratch.file("messages"));
  result.metrics = read_text_file(job.folder.file("metrics.jsonl"));
  return result;
}

TEST("training: a step that is left out says which weight, or which op of which layer, was the first not to be finite") {
  const std::string weight = "backbone.layers.1.mixer.in_proj.weight";
  const BrokenRun nan = break_run(weight, NAN);
  CHECK(nan.messages.find("first not finite: weight " + weight) != std::string::npos);
  CHECK(nan.messages.find("index 3") != std::string::npos);
  CHECK(nan.error.find("weight " + weight) != std::string::npos);
  CHECK(nan.error.find("checkpoints/step-2") != std::string::npos);  // the last good one
  CHECK(nan.metrics.find("\"first_non_finite\":\"weight " + weight) != std::string::npos);

  const BrokenRun overflow = break_run(weight, 3e38);  // finite itself; the product that it enters is not
  CHECK_MESSAGE(overflow.messages.find("first not finite: linear: output 0, layer layers.1.mixer, index ") != std::string::npos,
                overflow.messages);
  CHECK(overflow.messages.find("weight " + weight) == std::string::npos);
  CHECK(overflow.metrics.find("\"first_non_finite\":\"") != std::string::npos);
}

TEST("training: on a GPU a weight that is not finite is found behind the steps under way, also where they are replayed as a graph") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const std::string weight = "backbone.layers.1.mixer.in_proj.weight";
  for (const char* graph : {"train.graph=true", "train.graph=false"})
    for (const char* strategy : {"initial_state=zero", "initial_state=state-passing", "initial_state=fitted-noise"}) {
      CAPTURE(graph);
      CAPTURE(strategy);
      const BrokenRun nan = break_run(weight, NAN, {graph, strategy, "train.dtype=bf16"}, 0, Device::cuda());
      CHECK_MESSAGE(nan.messages.find("first not finite: weight " + weight) != std::string::npos, nan.messages);
      CHECK(nan.messages.find("the step was left out, 10 so far") != std::string::npos);
      CHECK(nan.error.find("too many steps in a row") != std::string::npos);
      CHECK(nan.error.find("checkpoints/step-2") != std::string::npos);
      CHECK(nan.metrics.find("\"first_non_finite\":\"weight " + weight) != std::string::npos);

      // Finite itself; the step is computed again to find where it leads to what is not.
      const BrokenRun overflow = break_run(weight, 3e38, {graph, strategy, "train.dtype=bf16"}, 0, Device::cuda());
      CHECK_MESSAGE(overflow.messages.find("first not finite: linear: output 0, layer layers.1.mixer, index ") != std::string::npos,
                    overflow.messages);
    }
}

TEST("training: behind a step that was left out the next one starts from zeros and counts, whenever the host looks, also as a graph") {
  std::vector<Device> devices{Device::cpu()};
  if (cuda_device_count() > 0) devices.push_back(Device::cuda());
  for (const Device& device : devices)
    for (const std::string strategy : {"state-passing", "tbtt"}) {
      CAPTURE(device.name());
      CAPTURE(strategy);
      const auto weights_after = [&](const std::string& graph, bool looks) {
        std::vector<std::string> settings{"train.graph=" + graph, "train.grad_accumulation=2", "initial_state=" + strategy};
        if (strategy == "tbtt") settings.emplace_back("data.arrangement=streams");
        const Recipe recipe = tiny_recipe(settings);
        const auto model = tiny_model(recipe, device);
        const Tensor computed = model->parameters().flat_compute();  // in bf16; the masters are not looked at in a forward then
        const Tensor one = (computed.defined() ? computed : model->parameters().flat_master()).slice(0, 3, 4);
        Trainer trainer(recipe, *model);
        const auto take = [&](const Batch& batch) {
          if (looks) (void)step_and_report(trainer, batch);
          else trainer.step(batch);
        };
        for (uint64_t step = 0; step < 7; ++step) {
          const Tensor sound = one.clone();
          if (step == 4) fill(one, NAN);
          take(made_up_batch(recipe, step));
          if (step == 4) copy(one, sound);
        }
        const StepReport report = step_and_report(trainer, made_up_batch(recipe, 7));
        CHECK(report.skipped == 1);
        CHECK(report.updates == 7);
        if (device.is_cuda() && graph == "true") CHECK_MESSAGE(trainer.queued().starts_with("a graph of "), trainer.queued());
        return model->parameters().flat_master().to_vector<float>();
      };
      const auto expected = weights_after("false", true);
      CHECK(weights_after("false", false) == expected);
      CHECK(weights_after("true", true) == expected);
      CHECK(weights_after("true", false) == expected);
    }
}

TEST("training: a run whose numbers become finite again goes on, with the skipped steps counted") {
  for (const char* strategy : {"initial_state=zero", "initial_state=state-passing"}) {
    const BrokenRun mended = break_run("backbone.layers.0.mixer.in_proj.weight", NAN, {strategy, "train.grad_accumulation=2"}, 6);
    CHECK(mended.error.empty());
    CHECK(mended.messages.find("the step was left out, 4 so far") != std::string::npos);
    CHECK(mended.messages.find("the step was left out, 5 so far") == std::string::npos);
    CHECK(mended.messages.find("step 20/20") != std::string::npos);
    CHECK(mended.metrics.find("\"skipped\":4") != std::string::npos);
  }
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
               .device = "cpu",
               .first_non_finite = {}};
  CHECK(
      to_json(s) ==
      R"({"step":3,"tokens":96,"loss":5.5,"lr":0.001,"weight_decay":0.01,"grad_norm":null,"tokens_per_s":10.0,"elapsed_s":1.5,"peak_memory_bytes":4096,"skipped":1,"device":"cpu"})");
}

}  // namespace
}  // namespace longhand
