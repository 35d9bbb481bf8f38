// What is chosen for a limit of memory fits it, nothing cheaper does, and the choice changes no number.
#include "train/memory_fit.h"

#include "core/allocator.h"
#include "core/error.h"
#include "models/recompute_plan.h"
#include "tests/support/tiny_training.h"

namespace longhand {
namespace {

using namespace test;

std::vector<Device> devices() {
  std::vector<Device> out{Device::cpu()};
  if (cuda_device_count() > 0) out.push_back(Device::cuda());
  return out;
}

// Large enough that a step's activations outweigh its weights. Launch by launch: in so small a model a graph takes a tenth more, how much
// depends on where free memory lies.
Recipe longer_recipe(const Device& device, std::vector<std::string> settings = {}) {
  settings.insert(settings.begin(), {"train.graph=false", "train.length=300", "train.batch_size=8",
                                     std::string("train.dtype=") + (device.is_cuda() ? "bf16" : "f32")});
  return tiny_recipe(settings);
}

// Most bytes alive at a time in steps of the recipe.
int64_t peak_of(const Recipe& recipe, const Device& device) {
  const auto model = tiny_model(recipe, device);
  Trainer trainer(recipe, *model);
  device.allocator().reset_peak();
  for (uint64_t step = 0; step < 3; ++step) (void)step_and_report(trainer, made_up_batch(recipe, step));
  return device.allocator().use().peak_bytes;
}

void set_limit(Recipe& recipe, int64_t bytes) {
  recipe.train.memory_gib = static_cast<double>(bytes) / (1 << 30);
}

TEST("memory fit: a limited allocator refuses what would go beyond its limit, and says so") {
  CachingAllocator& allocator = Device::cpu().allocator();
  const int64_t live = allocator.use().live_bytes;
  allocator.set_limit(live + 8192);
  CHECK_NOTHROW(Tensor::empty(Device::cpu(), Dtype::f32, {1024}));
  CHECK_THROWS_WITH_AS(Tensor::empty(Device::cpu(), Dtype::f32, {1 << 20}), doctest::Contains(" that may be"), MemoryError);
  allocator.set_limit(0);
  CHECK_NOTHROW(Tensor::empty(Device::cpu(), Dtype::f32, {1 << 20}));
}

TEST("memory fit: train.recompute = auto takes the fastest plan that fits, and a step of that plan stays below the limit") {
  for (const Device& device : devices()) {
    CAPTURE(device.name());
    const int64_t outside = device.allocator().use().live_bytes;
    const int64_t none = peak_of(longer_recipe(device), device) - outside,
                  full = peak_of(longer_recipe(device, {"train.recompute=full"}), device) - outside;
    REQUIRE(full < none);
    for (const double share : {1.05, 0.9, 0.7, 0.4, 0.1}) {
      CAPTURE(share);
      Recipe recipe = longer_recipe(device, {"train.recompute=auto"});
      const auto limit = outside + static_cast<int64_t>((static_cast<double>(full) + share * static_cast<double>(none - full)) * 1.02);
      set_limit(recipe, limit);
      choose_recompute(recipe, device);
      const RecomputePlan plan = parse_recompute_plan(recipe.train.recompute, recipe.model.n_layer);
      if (share > 1) CHECK(recipe.train.recompute == "none");
      CHECK(peak_of(recipe, device) <= limit);
      int64_t place = 0;
      while (recompute_plan_at(place, recipe.model.n_layer) != plan) ++place;
      if (place == 0) continue;
      recipe.train.recompute = text_of(recompute_plan_at(place - 1, recipe.model.n_layer));
      CHECK_FALSE(step_fits(recipe, device, limit));
    }
    Recipe tight = longer_recipe(device, {"train.recompute=auto"});
    set_limit(tight, outside + full / 2);
    CHECK_THROWS_WITH_AS(choose_recompute(tight, device), doctest::Contains("does not fit, whatever is made again"), MemoryError);
    CHECK(device.allocator().use().live_bytes == outside);
    CHECK_NOTHROW(Tensor::empty(device, Dtype::f32, {static_cast<int64_t>(none)}));  // no limit is left behind
  }
}

TEST("memory fit: --batch auto cuts a step into as few micro-batches as fit, and keeps the step") {
  for (const Device& device : devices()) {
    CAPTURE(device.name());
    const int64_t outside = device.allocator().use().live_bytes;
    const auto parts_within = [&](int64_t limit) {
      Recipe recipe = longer_recipe(device);
      set_limit(recipe, limit);
      choose_micro_batches(recipe, device);
      CHECK(recipe.train.batch_size == 8);
      CHECK(peak_of(recipe, device) <= limit);
      return recipe.train.grad_accumulation;
    };
    std::vector<int64_t> peaks;
    for (const char* parts : {"1", "2", "4", "8"})
      peaks.push_back(peak_of(longer_recipe(device, {std::string("train.grad_accumulation=") + parts}), device) - outside);
    const int64_t cuts[] = {1, 2, 4, 8};
    for (std::size_t i = 0; i < peaks.size(); ++i) {
      CAPTURE(cuts[i]);
      CHECK(parts_within(outside + peaks[i] + peaks[i] / 32) == cuts[i]);
      if (i > 0) CHECK(peaks[i] < peaks[i - 1]);
    }
    Recipe recipe = longer_recipe(device);
    set_limit(recipe, outside + peaks[3] / 2);
    CHECK_THROWS_WITH_AS(choose_micro_batches(recipe, device), doctest::Contains("not even one row"), MemoryError);
  }
}

TEST("memory fit: --batch auto and train.recompute = auto together take what fits, and where all fits cut nothing and make nothing again") {
  for (const Device& device : devices()) {
    CAPTURE(device.name());
    const int64_t outside = device.allocator().use().live_bytes;
    const auto chosen_within = [&](int64_t limit) {
      Recipe recipe = longer_recipe(device, {"train.recompute=auto"});
      set_limit(recipe, limit);
      choose_micro_batches(recipe, device);
      CHECK(recipe.train.batch_size == 8);
      CHECK(8 % recipe.train.grad_accumulation == 0);
      CHECK(peak_of(recipe, device) <= limit);
      return std::pair(recipe.train.grad_accumulation, recipe.train.recompute);
    };
    const int64_t most = peak_of(longer_recipe(device), device) - outside,
                  least = peak_of(longer_recipe(device, {"train.recompute=full", "train.grad_accumulation=8"}), device) - outside;
    CHECK(chosen_within(outside + most + most / 16) == std::pair<int64_t, std::string>(1, "none"));
    CHECK(chosen_within(outside + most / 2 + least / 2) != std::pair<int64_t, std::string>(1, "none"));
    CHECK(chosen_within(outside + least + least / 16).first == 8);
    Recipe tight = longer_recipe(device, {"train.recompute=auto"});
    set_limit(tight, outside + least / 2);
    CHECK_THROWS_WITH_AS(choose_micro_batches(tight, device), doctest::Contains("not even one row"), MemoryError);
  }
}

TEST("memory fit: the most rows for a measurement fit, and an eighth more do not") {
  const Device cpu = Device::cpu();
  Recipe recipe = longer_recipe(cpu);
  set_limit(recipe, cpu.allocator().use().live_bytes + 3 * peak_of(recipe, cpu));
  const int64_t rows = most_rows(recipe, cpu);
  CHECK(rows >= 16);
  const auto with_rows = [&](int64_t count) {
    Recipe tried = recipe;
    tried.train.batch_size = count;
    return step_fits(tried, cpu, memory_for_training(recipe, cpu));
  };
  CHECK(with_rows(rows));
  CHECK_FALSE(with_rows(rows + rows / 4));
}

TEST("memory fit: a CPU needs to be told its limit; a GPU has one") {
  Recipe recipe = longer_recipe(Device::cpu(), {"train.recompute=auto"});
  CHECK_THROWS_WITH_AS(choose_recompute(recipe, Device::cpu()), doctest::Contains("train.memory_gib"), ConfigError);
  CHECK(memory_for_training(recipe, Device::cpu()) == 0);
  recipe.train.memory_gib = 0.5;
  CHECK(memory_for_training(recipe, Device::cpu()) == int64_t{1} << 29);
  if (cuda_device_count() == 0) return;
  recipe.train.memory_gib = 0;
  CHECK(memory_for_training(recipe, Device::cuda()) > int64_t{1} << 29);
  choose_recompute(recipe, Device::cuda());
  CHECK(recipe.train.recompute == "none");
}

TEST("memory fit: plans are read and written, go from the fastest to the smallest, and what does not add up is refused") {
  CHECK(text_of(parse_recompute_plan("light", 3)) == "light");
  CHECK(text_of(parse_recompute_plan("light:2,full:1", 3)) == "light:2,full:1");
  CHECK(text_of(parse_recompute_plan("light:2,light:1", 3)) == "light");
  CHECK_THROWS_WITH_AS(parse_recompute_plan("light:2", 3), doctest::Contains("2 layers"), ConfigError);
  CHECK_THROWS_WITH_AS(parse_recompute_plan("light:2,full:2", 3), doctest::Contains("4 layers"), ConfigError);
  for (const char* wrong : {"light:x", "light:", ":3", "light:1,", "light:-1,full:4", "light:9999999999999999999"})
    CHECK_THROWS_AS(parse_recompute_plan(wrong, 3), ConfigError);
  CHECK_THROWS_WITH_AS(tiny_recipe({"train.recompute=some"}), doctest::Contains("projections"), ConfigError);
  CHECK(tiny_recipe({"train.recompute=light:1,full:1"}).train.recompute == "light:1,full:1");
  std::vector<std::string> texts;
  for (int64_t place = 0; place < recompute_plans(2); ++place) texts.push_back(text_of(recompute_plan_at(place, 2)));
  CHECK(texts == std::vector<std::string>{"none", "light:1,none:1", "light", "projections:1,light:1", "projections", "full:1,projections:1",
                                          "full"});
}

}  // namespace
}  // namespace longhand
