// Training on tasks: a tiny model learns to copy, runs resume bit for bit with every initial state, and only answers count.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "tests/support/tiny_training.h"
#include "train/run_batches.h"

namespace longhand {
namespace {

using namespace test;

// run() of tiny_training.h with the model and the tokenizer of a task.
RunResult run_task(const ScratchFolder& scratch, const std::string& name, const std::vector<std::string>& settings, bool resume,
                   int64_t interrupt_at = 0) {
  Recipe recipe = parse_recipe(tiny_text("mamba2"), "tiny.toml", settings);
  const std::shared_ptr<const Tokenizer> tokenizer = open_tokenizer(recipe.data.tokenizer);
  resolve_model(recipe, tokenizer->vocab_size());
  const auto model = tiny_model(recipe);
  RunResult result;
  TrainingJob job{.recipe = recipe,
                  .folder = resume ? RunFolder::open(scratch.path(), name) : RunFolder::create(scratch.path(), name),
                  .tokenizer = tokenizer,
                  .resume = resume,
                  .evaluate = {},
                  .messages = nullptr,
                  .on_step = [&](const LoggedStep& step) {
                    result.losses.push_back(step.loss);
                    if (step.step == interrupt_at) ::raise(SIGINT);
                  }};
  write_file_atomically(job.folder.file("config.toml"), to_toml(recipe));
  result.outcome = run_training(job, *model);
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

TEST("task training: interrupted and resumed equals uninterrupted, bit for bit, with every initial state") {
  for (const InitialStateStrategy& strategy : initial_state_strategies()) {
    CAPTURE(strategy.name);
    std::vector<std::string> settings{"data.task=copy",    "data.tokenizer=letters:4", "task.min_length=2",
                                      "task.max_length=5", "train.length=40",          std::string("initial_state=") + strategy.name};
    settings.push_back(std::string("data.arrangement=") + (strategy.arrangement != nullptr ? strategy.arrangement : "packed"));
    const ScratchFolder scratch;
    const RunResult whole = run_task(scratch, "whole", settings, false);
    const RunResult first = run_task(scratch, "parts", settings, false, 6);
    REQUIRE(first.outcome.step < 12);
    const RunResult second = run_task(scratch, "parts", settings, true);
    auto losses = first.losses;
    losses.insert(losses.end(), second.losses.begin(), second.losses.end());
    CHECK(losses == whole.losses);
    CHECK(second.weights == whole.weights);
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
