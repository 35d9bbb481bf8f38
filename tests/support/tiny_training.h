// For the tests of training: a tiny model of each family, batches made up, and whole runs.
#pragma once
#include <signal.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/files.h"
#include "core/philox.h"
#include "data/tokenizer.h"
#include "models/language_model.h"
#include "tests/support/check.h"
#include "train/trainer.h"
#include "train/training_loop.h"

namespace longhand::test {

inline std::string tiny_text(const std::string& family) {
  const std::string sizes = family == "mamba2"   ? "d_state = 8\nheaddim = 8\n"
                            : family == "mamba1" ? "d_state = 8\n"
                                                 : "num_heads = 2\nuse_short_conv = true\nintermediate_size = 32\n";
  return "seed = 3\n[model]\nfamily = \"" + family + "\"\nd_model = 16\nn_layer = 2\n" + sizes + R"(
[train]
steps = 12
batch_size = 4
length = 20
log_every = 3
checkpoint_every = 5
[optimizer]
lr = 3e-3
)";
}

inline Recipe tiny_recipe(const std::vector<std::string>& settings = {}, const std::string& family = "mamba2") {
  Recipe recipe = parse_recipe(tiny_text(family), "tiny.toml", settings);
  resolve_model(recipe, 257);
  return recipe;
}

inline std::unique_ptr<LanguageModel> tiny_model(const Recipe& recipe, const Device& device = Device::cpu()) {
  auto model = std::make_unique<LanguageModel>(recipe.model, device, device.is_cuda() ? Dtype::bf16 : Dtype::f32);
  model->initialize(static_cast<uint64_t>(recipe.seed));
  return model;
}

// A batch of tokens drawn from a small alphabet; every position counts.
inline Batch made_up_batch(const Recipe& recipe, uint64_t key) {
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

inline StepReport step_and_report(Trainer& trainer, const Batch& batch) {
  trainer.step(batch);
  trainer.request_report();
  return trainer.receive_report();
}

inline TokenBatch on_model(const LanguageModel& model, const Batch& batch) {
  const Shape shape{batch.rows, batch.length};
  return {Tensor::from(model.device(), shape, batch.tokens), Tensor::from(model.device(), shape, batch.targets), {}};
}

// A shard of documents without structure; what matters is that they differ.
inline void write_shard(const std::string& path) {
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
  std::string family = "mamba2";
};

inline RunResult run(const ScratchFolder& scratch, const RunOptions& options, bool resume) {
  if (!std::filesystem::exists(scratch.file("shard.jsonl"))) write_shard(scratch.file("shard.jsonl"));
  auto settings = options.settings;
  settings.push_back("data.files=" + scratch.file("shard.jsonl"));
  const Recipe recipe = tiny_recipe(settings, options.family);
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

/// A run that is interrupted and resumed is the uninterrupted one, bit for bit.
inline void check_resume(const std::vector<std::string>& settings, const Device& device = Device::cpu(),
                         const std::string& family = "mamba2") {
  const ScratchFolder scratch;
  const RunResult whole =
      run(scratch, {.name = "whole", .settings = settings, .interrupt_at = 0, .device = device, .family = family}, false);
  CHECK(whole.outcome.step == 12);
  CHECK(whole.losses.size() == 12);
  CHECK(whole.lines.size() == 5);  // steps 1, 3, 6, 9, 12
  const RunResult first =
      run(scratch, {.name = "parts", .settings = settings, .interrupt_at = 6, .device = device, .family = family}, false);
  CHECK(first.outcome.signal == SIGINT);
  REQUIRE(first.outcome.step >= 6);
  REQUIRE(first.outcome.step < 12);
  const RunResult second =
      run(scratch, {.name = "parts", .settings = settings, .interrupt_at = 0, .device = device, .family = family}, true);
  CHECK(second.outcome.signal == 0);
  auto losses = first.losses;
  losses.insert(losses.end(), second.losses.begin(), second.losses.end());
  CHECK(losses == whole.losses);
  CHECK(second.weights == whole.weights);
  CHECK(second.lines == whole.lines);
}

}  // namespace longhand::test
