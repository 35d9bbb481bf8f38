// losses: trains the model of each recipe with every initial-state strategy, alone or as one of several processes, and has process 0 print
// the loss of every step, exactly. Usage: losses cpu|cuda|nccl STEPS RECIPE.toml..., started by mpirun or by itself; nccl: a
// GPU joined by NCCL although it is alone.
//   mamba2 state-passing 17 0x1.52ab3ap+2     family, strategy, step, loss
//   mamba2 state-passing weights 5f3a9c01     check sum of all weights at the end
#include <fmt/format.h>

#include <cstdio>
#include <string>

#include "core/crc32.h"
#include "core/error.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "models/language_model.h"
#include "train/communicator.h"
#include "train/gradient_exchange.h"
#include "train/recipe.h"
#include "train/run_batches.h"
#include "train/trainer.h"

namespace longhand {
namespace {

void train(const std::string& file, const std::string& strategy, const Device& device, int64_t steps, Communicator& processes,
           bool together) {
  std::vector<std::string> settings{"initial_state=" + strategy, fmt::format("train.steps={}", steps)};
  if (strategy == "tbtt") settings.push_back("data.arrangement=streams");
  Recipe recipe = read_recipe(file, settings);
  const std::shared_ptr<const Tokenizer> tokenizer = open_tokenizer(recipe.data.tokenizer);
  resolve_model(recipe, tokenizer->vocab_size());
  if (recipe.train.dtype == "auto") recipe.train.dtype = device.is_cuda() ? "bf16" : "f32";
  LanguageModel model(recipe.model, device, parse_dtype(recipe.train.dtype));
  model.initialize(static_cast<uint64_t>(recipe.seed));
  Trainer trainer(recipe, model, together ? &processes : nullptr);
  BatchStream batches = training_batches(recipe, tokenizer);
  Batch batch;
  std::string text;
  for (int64_t step = 1; step <= steps; ++step) {
    if (!batches.next(batch)) throw ValueError("losses: the data ended", {{"step", std::to_string(step)}});
    trainer.step(batch);
    trainer.request_report();
    text += fmt::format("{} {} {} {:a}\n", recipe.model.family, strategy, step, trainer.receive_report().loss);
  }
  const Tensor weights =
      (model.parameters().flat_compute() ? model.parameters().flat_compute() : model.parameters().flat_master()).to(Device::cpu());
  const std::string check =
      fmt::format("{:08x}", crc32(weights.raw(), static_cast<std::size_t>(weights.numel() * size_of(weights.dtype()))));
  require_same_everywhere(processes, "weights: " + check);  // all end with the same model
  if (!processes.leads()) return;
  fmt::print("{}{} {} weights {}\n", text, recipe.model.family, strategy, check);
  if (trainer.exchange() != nullptr)
    fmt::print(stderr, "{} {}: {}, {} buckets, {}\n", recipe.model.family, strategy, processes.describe(), trainer.exchange()->buckets(),
               trainer.queued());
}

int run(int argc, char** argv) {
  LocalPlace place;
  std::unique_ptr<Communicator> processes = join_processes(place);
  const std::string kind = argv[1];
  const Device device = kind == "cpu" ? Device::cpu() : Device::cuda(static_cast<int>(place.rank));
  const bool together = !processes->alone() || kind == "nccl";
  processes = with_device(std::move(processes), device, together);
  try {
    for (int i = 3; i < argc; ++i)
      for (const InitialStateStrategy& strategy : initial_state_strategies())
        train(argv[i], strategy.name, device, std::stoll(argv[2]), *processes, together);
  } catch (const std::exception& error) {
    fmt::print(stderr, "process {}: {}\n", processes->rank(), error.what());
    processes->abort(1);
  }
  return 0;
}

}  // namespace
}  // namespace longhand

int main(int argc, char** argv) {
  if (argc < 4) {
    fmt::print(stderr, "usage: losses cpu|cuda|nccl STEPS RECIPE.toml...\n");
    return 2;
  }
  try {
    return longhand::run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
