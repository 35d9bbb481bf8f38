// See bench_scale_command.h.
#include "tools/bench_scale_command.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>

#include "core/allocator.h"
#include "core/error.h"
#include "core/philox.h"
#include "tools/option_checks.h"
#include "tools/process_device.h"
#include "train/communicator.h"
#include "train/gradient_exchange.h"
#include "train/progress.h"
#include "train/trainer.h"

namespace longhand {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kWarmSteps = 4;
constexpr auto kWarmTime = std::chrono::milliseconds(800);

// The same batch on every process, as in training.
Batch random_batch(const Recipe& recipe, uint64_t key) {
  Batch batch;
  batch.rows = recipe.train.batch_size;
  batch.length = recipe.train.length;
  const auto positions = static_cast<std::size_t>(batch.rows * batch.length);
  const auto vocab = static_cast<uint64_t>(recipe.model.vocab_size);
  for (std::size_t i = 0; i < positions; ++i) {
    batch.tokens.push_back(static_cast<int32_t>(philox_u64(2 * key, i) % vocab));
    batch.targets.push_back(static_cast<int32_t>(philox_u64(2 * key + 1, i) % vocab));
  }
  batch.mask.assign(positions, 1);
  batch.resets.assign(static_cast<std::size_t>(batch.rows), 0);
  for (int64_t b = 0; b < batch.rows; ++b) batch.row_ids.push_back(b);
  return batch;
}

// Processes that leave out some of what a step tells: what it costs shows in the time. Their weights drift apart.
struct Told {
  bool gradients = true, weights = true, numbers = true;  // loss and norm
};
class Muted final : public Communicator {
 public:
  Muted(Communicator& processes, const Told& told) : Communicator(processes.size(), processes.rank()), processes_(processes), told_(told) {}
  std::string describe() const override { return processes_.describe(); }
  void begin_overlap() override { processes_.begin_overlap(); }
  void end_overlap() override { processes_.end_overlap(); }
  void join() override { processes_.join(); }
  void as_one(const std::function<void()>& calls) override { processes_.as_one(calls); }
  void all_reduce_sum(const Tensor& t) override {
    if (t.dtype() == Dtype::f64 ? told_.numbers : told_.gradients) processes_.all_reduce_sum(t);
  }
  void reduce_scatter_sum(const Tensor& t, int64_t unit) override {
    if (told_.gradients) processes_.reduce_scatter_sum(t, unit);
  }
  void all_gather(const Tensor& whole, std::span<const int64_t> at) override {
    if (told_.weights) processes_.all_gather(whole, at);
  }
  void broadcast(const Tensor& whole, int64_t root) override { processes_.broadcast(whole, root); }
  Tensor gather(const Tensor& part) override { return processes_.gather(part); }
  std::vector<std::string> all_texts(const std::string& own_text) override { return processes_.all_texts(own_text); }
  int64_t all_reduce_max(int64_t value) override { return processes_.all_reduce_max(value); }
  void barrier() override { processes_.barrier(); }

 protected:
  void end_all(int code) override { end_all_of(processes_, code); }

 private:
  Communicator& processes_;
  const Told told_;
};

class Bench {
 public:
  Bench(const BenchScaleOptions& options, Communicator& processes, const Device& device)
      : options_(options), processes_(processes), device_(device) {}

  void model(const std::string& path) {
    Recipe recipe = read_recipe(path, options_.settings);
    recipe.model = recipe_model_config(path, options_.settings);
    recipe.model.complete();
    recipe.train.grad_accumulation = 1;
    const Dtype dtype = recipe.train.dtype != "auto" ? parse_dtype(recipe.train.dtype) : device_.is_cuda() ? Dtype::bf16 : Dtype::f32;
    LanguageModel model(recipe.model, device_, dtype);
    model.initialize(1);
    const int64_t n = processes_.size(), rows = options_.rows;
    say(fmt::format("{}: {} parameters, {} rows of {} a process\n", std::filesystem::path(path).stem().string(), model.parameter_count(),
                    rows, recipe.train.length));
    warm_steps_ = 0;
    const double before_ms = steps(recipe, model, rows, nullptr, "one process", 0);
    exchanges(model);
    const double weak_ms = steps(recipe, model, rows * n, &processes_, "weak", before_ms);
    Recipe afterwards = recipe, whole = recipe;
    afterwards.train.overlap = false;
    whole.train.shard_optimizer = false;
    const double afterwards_ms = steps(afterwards, model, rows * n, &processes_, "weak, without overlap", before_ms);
    if (n > 1) {
      const auto told = [&](const Told& what, const char* name) {
        Muted muted(processes_, what);
        return steps(recipe, model, rows * n, &muted, name, before_ms);
      };
      const double nothing_ms = told({.gradients = false, .weights = false, .numbers = false}, "nothing is told");
      const double numbers_ms = told({.gradients = false, .weights = false}, "loss and norm alone");
      told({.weights = false}, "no weights");
      const double weights_ms = told({.gradients = false}, "no gradients");
      say(fmt::format("    waiting for each other {:.2f} ms, weights {:.2f}, gradients {:.2f} during backward and {:.2f} after it\n",
                      numbers_ms - nothing_ms, weights_ms - numbers_ms, weak_ms - weights_ms, afterwards_ms - weights_ms));
    }
    steps(whole, model, rows * n, &processes_, "weak, whole optimizer", before_ms);
    if (rows % n == 0 && n > 1) {
      steps(recipe, model, rows / n, nullptr, "one process, its part", 0);
      steps(recipe, model, rows, &processes_, "strong", before_ms / static_cast<double>(n));
    }
    steps(recipe, model, rows, nullptr, "one process again", before_ms);
  }

 private:
  void say(const std::string& text) const {
    if (!processes_.leads()) return;
    fmt::print("{}", text);
    std::fflush(stdout);
  }

  // A device that comes from rest is faster than one that has worked: every case is measured behind the same number of steps, those that
  // the first one of a model makes in a while.
  template <class F>
  void warm_up(F&& step) {
    for (int64_t i = 0; i < warm_steps_; ++i) step();
    if (warm_steps_ > 0) return;
    for (const auto begin = Clock::now(); Clock::now() - begin < kWarmTime; ++warm_steps_) {
      step();
      device_.synchronize();
    }
    warm_steps_ = processes_.all_reduce_max(warm_steps_);
  }

  // Milliseconds of `f`, done `count` times by all processes at once.
  template <class F>
  double timed(int64_t count, F&& f) {
    device_.synchronize();
    processes_.barrier();
    const auto begin = Clock::now();
    for (int64_t i = 0; i < count; ++i) f();
    device_.synchronize();
    processes_.barrier();
    return std::chrono::duration<double, std::milli>(Clock::now() - begin).count() / static_cast<double>(count);
  }

  // ideal_ms  what a step would take if processes cost nothing; 0: not to be compared
  double steps(Recipe recipe, LanguageModel& model, int64_t rows, Communicator* processes, const char* name, double ideal_ms) {
    recipe.train.batch_size = rows;
    device_.allocator().release_cached();
    device_.allocator().reset_peak();
    Trainer trainer(recipe, model, processes);
    const Batch first = random_batch(recipe, 1), second = random_batch(recipe, 2);
    int64_t count = 0;
    const auto step = [&] { trainer.step(count++ % 2 == 0 ? first : second); };
    for (int i = 0; i < kWarmSteps; ++i) step();
    warm_up(step);
    const double ms = timed(options_.steps, step);
    // Without processes each one does these rows; their tokens are counted once.
    const double tokens = static_cast<double>(rows * recipe.train.length);
    say(fmt::format("    {:<24}{:>5} rows{:>10.2f} ms{:>12.0f} tokens/s  {:<10}{:>11}  {}\n", name, rows, ms, tokens / ms * 1e3,
                    ideal_ms > 0 ? fmt::format("{:.1f}%", 100 * ideal_ms / ms) : "", bytes_text(device_.allocator().use().peak_bytes),
                    trainer.queued()));
    return ms;
  }

  // All exchanges of a step, with nothing beside them. All gradients leave as one here, as they do without overlap; in a step most buckets
  // leave by themselves, when backward has come to them.
  void exchanges(LanguageModel& model) {
    model.parameters().allocate_grads();
    GradientExchange exchange(model.parameters(), processes_);
    const auto gradients = [&] { exchange.begin(), exchange.complete(), exchange.end(); };
    const auto weights = [&] { exchange.share_weights(); };
    gradients(), weights();
    const double gradients_ms = timed(options_.steps, gradients), weights_ms = timed(options_.steps, weights);
    const GradientExchange::Traffic traffic = exchange.traffic();
    const auto rate = [](int64_t bytes, double ms) { return static_cast<double>(bytes) / ms / 1e6; };
    say(fmt::format(
        "    exchanges by themselves: gradients {} in {:.2f} ms, {:.0f} GB/s, {} buckets; weights {} in {:.2f} ms, {:.0f} GB/s\n",
        bytes_text(traffic.gradients), gradients_ms, rate(traffic.gradients, gradients_ms), exchange.buckets(), bytes_text(traffic.weights),
        weights_ms, rate(traffic.weights, weights_ms)));
  }

  const BenchScaleOptions& options_;
  Communicator& processes_;
  Device device_;
  int64_t warm_steps_ = 0;  // of every case of a model
};

}  // namespace

void add_bench_scale_options(CLI::App& command, BenchScaleOptions& o) {
  command.add_option("recipes", o.recipes, "Recipes: their models with fresh weights")->required()->type_name("RECIPE.toml");
  command.add_option("--set", o.settings, "Change one key of every recipe; may be repeated")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  command.add_option("--device", o.device, "cpu or cuda; default: a GPU each where there are GPUs")->type_name("DEVICE");
  command.add_option("--rows", o.rows, "Of a process")->type_name("N")->check(at_least(1))->capture_default_str();
  command.add_option("--steps", o.steps, "Timed steps of every case")->type_name("N")->check(at_least(1))->capture_default_str();
}

int run_bench_scale(const BenchScaleOptions& options) {
  return with_processes([&](std::unique_ptr<Communicator>& processes, const LocalPlace& place) {
    const Device device = device_of_process(options.device, *processes, place);
    with_device(processes, device, true);
    if (processes->leads()) fmt::print("{}, {}\n", processes->describe(), device.is_cuda() ? device.description() : "cpu");
    Bench bench(options, *processes, device);
    for (const std::string& path : options.recipes) bench.model(path);
    return 0;
  });
}

}  // namespace longhand
