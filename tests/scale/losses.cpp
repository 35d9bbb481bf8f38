// losses: trains the model of each recipe with every initial-state strategy, alone or as one of several processes, and has process 0 print
// the loss of every step, exactly. Usage: losses DEVICE STEPS RECIPE.toml..., started by mpirun or by itself.
//   DEVICE   cpu; cuda: a GPU each; nccl: a GPU joined by NCCL although it is alone; shared: one GPU for all, through the host.
//            With -idle behind it: four steps of every eight lack the positions of the second half of the last micro-batch's rows.
//            With -late: process 1 makes the file `late` at the end and stays for a minute, while the others wait for it
//   prints   mamba2 state-passing 17 0x1.52ab3ap+2     family, strategy, step, loss
//            mamba2 state-passing weights 5f3a9c01     check sum of the weights that products read, at the end
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
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

// Processes on one GPU, which NCCL does not join: everything but NCCL is as between several. Each tensor goes to the host and back.
class ThroughHost final : public Communicator {
 public:
  explicit ThroughHost(std::unique_ptr<Communicator> host) : Communicator(host->size(), host->rank()), host_(std::move(host)) {}
  std::string describe() const override { return host_->describe() + " on one GPU"; }
  void all_reduce_sum(const Tensor& t) override {
    there_and_back(t, [&](const Tensor& h) { host_->all_reduce_sum(h); });
  }
  void reduce_scatter_sum(const Tensor& t, int64_t unit) override {
    there_and_back(t, [&](const Tensor& h) { host_->reduce_scatter_sum(h, unit); });
  }
  void all_gather(const Tensor& whole, std::span<const int64_t> at) override {
    there_and_back(whole, [&](const Tensor& h) { host_->all_gather(h, at); });
  }
  void broadcast(const Tensor& whole, int64_t root) override {
    there_and_back(whole, [&](const Tensor& h) { host_->broadcast(h, root); });
  }
  Tensor gather(const Tensor& part) override { return host_->gather(part); }
  std::vector<std::string> all_texts(const std::string& own_text) override { return host_->all_texts(own_text); }
  int64_t all_reduce_max(int64_t value) override { return host_->all_reduce_max(value); }
  void barrier() override { host_->barrier(); }

 protected:
  void end_all(int code) override { end_all_of(*host_, code); }

 private:
  template <class F>
  static void there_and_back(const Tensor& t, F&& f) {
    const Tensor host = t.to(Device::cpu());
    f(host);
    copy(t, host);
  }
  std::unique_ptr<Communicator> host_;
};

// The last of several processes then has nothing to learn from last: no gradient arrives at it before the end of the step.
void leave_out_last_rows(Batch& batch, int64_t grad_accumulation) {
  const int64_t left_out = batch.rows / grad_accumulation / 2 * batch.length;
  std::fill(batch.mask.end() - left_out, batch.mask.end(), uint8_t{0});
}

struct Company {
  Communicator& processes;
  bool together = false;  // they share the training, though it may be only one
  bool idle = false;
};

void train(const std::string& file, const std::string& strategy, const Device& device, int64_t steps, const Company& company) {
  Communicator& processes = company.processes;
  std::vector<std::string> settings{"initial_state=" + strategy, fmt::format("train.steps={}", steps)};
  if (strategy == "tbtt") settings.push_back("data.arrangement=streams");
  Recipe recipe = read_recipe(file, settings);
  if (dynamic_cast<const ThroughHost*>(&processes) != nullptr) recipe.train.graph = false;  // the host takes part in a step
  const std::shared_ptr<const Tokenizer> tokenizer = open_tokenizer(recipe.data.tokenizer);
  resolve_model(recipe, tokenizer->vocab_size());
  if (recipe.train.dtype == "auto") recipe.train.dtype = device.is_cuda() ? "bf16" : "f32";
  LanguageModel model(recipe.model, device, parse_dtype(recipe.train.dtype));
  model.initialize(static_cast<uint64_t>(recipe.seed));
  Trainer trainer(recipe, model, company.together ? &processes : nullptr);
  BatchStream batches = training_batches(recipe, tokenizer);
  Batch batch;
  std::string text;
  for (int64_t step = 1; step <= steps; ++step) {
    if (!batches.next(batch)) throw ValueError("losses: the data ended", {{"step", std::to_string(step)}});
    if (company.idle && (step - 1) / 4 % 2 == 1) leave_out_last_rows(batch, recipe.train.grad_accumulation);
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

constexpr std::array kKinds{"cpu", "cuda", "nccl", "shared"};
constexpr std::array kManners{"", "-idle", "-late"};

bool is_known(const std::string& device) {
  for (const std::string kind : kKinds)
    for (const char* manner : kManners)
      if (device == kind + manner) return true;
  return false;
}

int run(int argc, char** argv) {
  LocalPlace place;
  std::unique_ptr<Communicator> processes = join_processes(place);
  std::string kind = argv[1];
  const bool idle = kind.ends_with("-idle"), late = kind.ends_with("-late");
  kind = kind.substr(0, kind.find('-'));
  const bool shared = kind == "shared", together = !processes->alone() || kind == "nccl";
  const Device device = kind == "cpu" ? Device::cpu() : Device::cuda(shared ? 0 : static_cast<int>(place.rank));
  if (shared) processes = std::make_unique<ThroughHost>(std::move(processes));
  else with_device(processes, device, together);
  try {
    for (int i = 3; i < argc; ++i)
      for (const InitialStateStrategy& strategy : initial_state_strategies())
        train(argv[i], strategy.name, device, std::stoll(argv[2]), {*processes, together, idle});
  } catch (const std::exception& error) {
    fmt::print(stderr, "process {}: {}\n", processes->rank(), error.what());
    processes->abort(1);
  }
  if (late && processes->rank() == 1) {
    std::ofstream("late").put('\n');
    ::sleep(60);
  }
  return 0;
}

}  // namespace
}  // namespace longhand

int main(int argc, char** argv) {
  if (argc < 4 || !longhand::is_known(argv[1])) {
    fmt::print(stderr, "usage: losses cpu|cuda|nccl|shared[-idle|-late] STEPS RECIPE.toml...\n");
    return 2;
  }
  try {
    return longhand::run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
