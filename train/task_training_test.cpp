// Training on tasks: a tiny model learns to copy, runs resume bit for bit with every initial state, and only answers count.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "core/error.h"
#include "models/checkpoint.h"
#include "tests/support/tiny_training.h"
#include "train/run_batches.h"

namespace longhand {
namespace {

using namespace test;

// run() of tiny_training.h with the model and the tokenizer of a task.
RunResult run_task(const ScratchFolder& scratch, const std::string& name, const std::vector<std::string>& settings, bool resume,
                   int64_t interrupt_at = 0, double* last_grad_norm = nullptr, const std::string& text = tiny_text("mamba2")) {
  Recipe recipe = parse_recipe(text, "tiny.toml", settings);
  const std::shared_ptr<const Tokenizer> tokenizer = open_tokenizer(recipe.data.tokenizer);
  resolve_model(recipe, tokenizer->vocab_size());
  const auto model = tiny_model(recipe);
  if (!recipe.init_from.empty() && !resume) load_weights(*model, recipe.init_from);
  RunResult result;
  double grad_norm = 0;
  TrainingJob job{.recipe = recipe,
                  .folder = resume ? RunFolder::open(scratch.path(), name) : RunFolder::create(scratch.path(), name),
                  .tokenizer = tokenizer,
                  .resume = resume,
                  .evaluate = {},
                  .messages = nullptr,
                  .on_step = [&](const LoggedStep& step) {
                    result.losses.push_back(step.loss), grad_norm = step.grad_norm;
                    if (step.step == interrupt_at) ::raise(SIGINT);
                  }};
  write_file_atomically(job.folder.file("config.toml"), to_toml(recipe));
  result.outcome = run_training(job, *model);
  if (last_grad_norm != nullptr) *last_grad_norm = grad_norm;
  result.weights = model->parameters().flat_master().to_vector<float>();
  return result;
}

TEST("task training: a tiny model learns to copy short words") {
  const ScratchFolder scratch;
  const RunResult result =
      run_task(scratch, "copy",
               {"data.task=copy", "data.tokenizer=letters:2", "task.min_length=1", "task.max_length=2", "train.length=31",
                "train.batch_size=16", "train.steps=200", "optimizer.lr=0.02", "model.tie_embeddings=false"},
               false);
  const auto mean = [&](std::size_t from) {
    return std::accumulate(result.losses.begin() + static_cast<std::ptrdiff_t>(from),
                           result.losses.begin() + static_cast<std::ptrdiff_t>(from + 10), 0.0) /
           10;
  };
  CHECK(std::abs(result.losses[0] - std::log(16)) < 0.3);
  CHECK(mean(0) > 1.5);
  CHECK(mean(190) < 0.2);  // a model that only knew the alphabet would stay above 0.4: of the answers' tokens a half are letters, at log 2
}

// The three tasks in rows so short that training on them takes no time.
struct TaskCase {
  std::string name;
  std::vector<std::string> settings;
};

std::vector<TaskCase> task_cases(const ScratchFolder& scratch) {
  std::string book;
  for (int i = 1000; i < 4000; ++i) book += "Sentence " + std::to_string(i) + " of the book. ";
  write_file_atomically(scratch.file("books.jsonl"), "{\"text\": \"" + book + "\"}\n");
  write_file_atomically(scratch.file("qa1_x.txt"),
                        "1 Ann ran.\n2 Where is Ann? \tbarn\t1\n1 Bob ate.\n2 Where is Bob? \thall\t1\n1 Eve.\n2 Eve? \tyes\t1\n");
  return {{"copy", {"data.task=copy", "data.tokenizer=letters:4", "task.min_length=2", "task.max_length=5", "train.length=40"}},
          {"passkey", {"data.task=passkey", "task.digits=2", "task.min_length=280", "train.length=320", "train.batch_size=2"}},
          {"babilong",
           {"data.task=babilong", "data.files=" + scratch.file("books.jsonl"), "task.babi=" + scratch.file("qa1_x.txt"),
            "task.lengths=[\"0k\", \"400\"]", "train.length=160", "train.batch_size=2"}}};
}

std::vector<std::string> with_strategy(std::vector<std::string> settings, const InitialStateStrategy& strategy) {
  settings.push_back(std::string("initial_state=") + strategy.name);
  settings.push_back(std::string("data.arrangement=") + (strategy.arrangement != nullptr ? strategy.arrangement : "packed"));
  return settings;
}

TEST("task training: every task with every initial state: interrupted and resumed equals uninterrupted, bit for bit") {
  std::set<std::vector<float>> weights;
  for (const InitialStateStrategy& strategy : initial_state_strategies()) {
    CAPTURE(strategy.name);
    const ScratchFolder scratch;
    for (const TaskCase& task : task_cases(scratch)) {
      CAPTURE(task.name);
      auto settings = with_strategy(task.settings, strategy);
      settings.emplace_back("train.steps=6");
      const RunResult whole = run_task(scratch, task.name, settings, false);
      CHECK(whole.outcome.step == 6);
      const RunResult first = run_task(scratch, task.name + "-parts", settings, false, 3);
      REQUIRE(first.outcome.step < 6);
      const RunResult second = run_task(scratch, task.name + "-parts", settings, true);
      auto losses = first.losses;
      losses.insert(losses.end(), second.losses.begin(), second.losses.end());
      CHECK(losses == whole.losses);
      CHECK(second.weights == whole.weights);
      weights.insert(whole.weights);
    }
  }
  CHECK(std::ssize(weights) == 3 * std::ssize(initial_state_strategies()));  // no strategy is another one in disguise
}

TEST("task training: every task goes on from a trained base with every initial state") {
  const ScratchFolder scratch;
  const std::vector<TaskCase> cases = task_cases(scratch);
  for (const TaskCase& task : cases) {
    CAPTURE(task.name);
    auto base_settings = task.settings;
    base_settings.insert(base_settings.end(), {"train.steps=2"});
    if (task.name == "passkey" || task.name == "babilong") {  // a base trained on text
      write_shard(scratch.file("text.jsonl"));
      base_settings = {"train.steps=2", "data.files=" + scratch.file("text.jsonl")};
    }
    const RunResult base = run_task(scratch, "base-" + task.name, base_settings, false);
    for (const InitialStateStrategy& strategy : initial_state_strategies()) {
      CAPTURE(strategy.name);
      auto settings = with_strategy(task.settings, strategy);
      settings.insert(settings.end(), {"init_from=" + scratch.file("base-" + task.name), "train.steps=2", "optimizer.lr=1e-5"});
      const RunResult tuned = run_task(scratch, task.name + "-" + strategy.name, settings, false);
      CHECK(tuned.outcome.step == 2);
      for (const double loss : tuned.losses) CHECK(std::isfinite(loss));
      // Two small steps from the base: close to its weights, and not the same.
      double most = 0;
      REQUIRE(tuned.weights.size() == base.weights.size());
      for (std::size_t i = 0; i < base.weights.size(); ++i)
        most = std::max(most, std::abs(static_cast<double>(tuned.weights[i]) - static_cast<double>(base.weights[i])));
      CHECK(most > 0);
      CHECK(most < 1e-3);
    }
  }
}

// The published folders have models of 96 ids, too few for bytes: they learn to copy.
TEST("post-training: starts from folders in every published format, with every initial state") {
  const auto golden = folder_from("LONGHAND_GOLDEN");
  if (!golden) SKIP("LONGHAND_GOLDEN is not set");
  const ScratchFolder scratch;
  for (const std::string name : {"ss-mamba1", "ss-mamba2-g2", "ss-mamba2-fp16", "hf-mamba1", "hf-mamba2-g1", "hf-mamba2-g2", "fla-gla"}) {
    CAPTURE(name);
    const std::string from = *golden + "/" + name;
    const std::vector<float> published = load_model(from, Device::cpu(), Dtype::f32)->parameters().flat_master().to_vector<float>();
    for (const InitialStateStrategy& strategy : initial_state_strategies()) {
      CAPTURE(strategy.name);
      const auto settings = with_strategy(
          {"init_from=" + from, "data.task=copy", "data.tokenizer=letters:26", "task.min_length=3", "task.max_length=6", "train.steps=2",
           "train.batch_size=2", "train.length=48", "train.dtype=f32", "train.log_every=1", "optimizer.lr=1e-5"},
          strategy);
      const std::string run = name + "-" + strategy.name;
      const RunResult tuned = run_task(scratch, run, settings, false, 0, nullptr, "name = \"post\"\n");
      CHECK(tuned.outcome.step == 2);
      CHECK(tuned.losses.size() == 2);
      for (const double loss : tuned.losses) CHECK(std::isfinite(loss));
      REQUIRE(tuned.weights.size() == published.size());
      double most = 0;  // two small steps away, and the checkpoint has what was trained
      for (std::size_t i = 0; i < published.size(); ++i)
        most = std::max(most, std::abs(static_cast<double>(tuned.weights[i]) - static_cast<double>(published[i])));
      CHECK(most > 0);
      CHECK(most < 1e-4);
      const auto saved = load_model(scratch.file(run + "/checkpoints/step-2"), Device::cpu(), Dtype::f32);
      CHECK(saved->parameters().flat_master().to_vector<float>() == tuned.weights);
    }
  }
}

TEST("task training: micro-batches with unequally many answers weigh by their answers") {
  const ScratchFolder scratch;
  for (const TaskCase& task : task_cases(scratch)) {
    CAPTURE(task.name);
    auto settings = task.settings;
    settings.insert(settings.end(), {"train.steps=1", "train.batch_size=4"});
    double norm_of_one = 0, norm_of_four = 0;
    const RunResult one = run_task(scratch, task.name + "-1", settings, false, 0, &norm_of_one);
    settings.emplace_back("train.grad_accumulation=4");
    const RunResult four = run_task(scratch, task.name + "-4", settings, false, 0, &norm_of_four);
    CHECK(four.losses[0] == doctest::Approx(one.losses[0]).epsilon(1e-6));
    CHECK(norm_of_four == doctest::Approx(norm_of_one).epsilon(1e-5));
  }
}

TEST("task training: stories that changed since the checkpoint are named") {
  const ScratchFolder scratch;
  const std::string stories = scratch.file("qa1_x.txt"), sound = "1 Ann went to the barn.\n2 Where is Ann? \tbarn\t1\n";
  write_file_atomically(stories, sound);
  const std::vector<std::string> settings{"data.task=babilong", "task.babi=" + stories, "train.length=600", "train.batch_size=1"};
  run_task(scratch, "run", settings, false, 6);
  std::string changed = sound;
  changed[2] = 'E';  // the same length
  write_file_atomically(stories, changed);
  CHECK_THROWS_WITH_AS(run_task(scratch, "run", settings, true), doctest::Contains("qa1_x.txt"), FileError);
  write_file_atomically(stories, sound);
  CHECK(run_task(scratch, "run", settings, true).outcome.step == 12);
}

TEST("task training: passkey on bytes, validated on other samples") {
  const ScratchFolder scratch;
  const std::vector<std::string> settings{"data.task=passkey", "task.digits=3", "train.length=320", "train.batch_size=2", "train.steps=3"};
  const RunResult result = run_task(scratch, "passkey", settings, false);
  CHECK(result.losses.size() == 3);
  Recipe recipe = parse_recipe(tiny_text("mamba2"), "tiny.toml", settings);
  CHECK(has_validation(recipe));
  CHECK_FALSE(has_validation(parse_recipe(tiny_text("mamba2"), "tiny.toml")));
  const std::shared_ptr<const Tokenizer> bytes = open_tokenizer("bytes");
  Batch seen, held_out;
  training_batches(recipe, bytes).next(seen);
  validation_source(recipe, bytes)().next(held_out);
  CHECK(seen.tokens != held_out.tokens);
  CHECK(seen.tokens.size() == held_out.tokens.size());
  CHECK(std::count(seen.mask.begin(), seen.mask.end(), uint8_t{1}) == 2 * 6);  // " 123." and the end of text
}

TEST("task training: recipes that cannot be followed are refused") {
  const auto refused = [](const std::vector<std::string>& settings) {
    Recipe recipe = parse_recipe(tiny_text("mamba2"), "tiny.toml", settings);
    training_batches(recipe, open_tokenizer(recipe.data.tokenizer));
  };
  CHECK_THROWS_AS(refused({"data.task=copying"}), ConfigError);
  CHECK_THROWS_AS(refused({"data.task=copy"}), ConfigError);  // of bytes
  CHECK_THROWS_AS(refused({"data.task=copy", "data.tokenizer=letters:4", "task.variant=duplicate-ngram"}), ConfigError);
  CHECK_THROWS_AS(refused({"data.task=copy", "data.tokenizer=letters:4"}), ConfigError);  // words of 50 letters in rows of 20 tokens
  CHECK_THROWS_AS(refused({"data.task=passkey"}), ConfigError);
  CHECK_THROWS_AS(refused({"data.task=copy", "data.arrangement=streams", "data.stream_unit=document"}), ConfigError);
}

}  // namespace
}  // namespace longhand
