// The check of determinism, and that it would see a difference; runs with any number of data threads.
#include "train/determinism.h"

#include "core/error.h"
#include "tests/support/tiny_training.h"

namespace longhand {
namespace {

using namespace test;

Recipe recipe_over(const ScratchFolder& scratch, std::vector<std::string> settings, const std::string& family = "mamba2") {
  write_shard(scratch.file("shard.jsonl"));
  settings.push_back("data.files=" + scratch.file("shard.jsonl"));
  return tiny_recipe(settings, family);
}

TEST("determinism: every family and strategy does the same steps twice") {
  const ScratchFolder scratch;
  for (const char* family : {"mamba2", "mamba1", "gla"})
    for (const InitialStateStrategy& strategy : initial_state_strategies()) {
      CAPTURE(family);
      CAPTURE(strategy.name);
      std::vector<std::string> settings{std::string("initial_state=") + strategy.name};
      if (strategy.arrangement != nullptr) settings.push_back(std::string("data.arrangement=") + strategy.arrangement);
      const Recipe recipe = recipe_over(scratch, settings, family);
      const DeterminismReport report = verify_determinism(recipe, open_tokenizer("bytes"), 5, [&] { return tiny_model(recipe); });
      CHECK(report.steps == 5);
      CHECK(report.threads[0] == 1);
      CHECK(report.threads[1] == 3);
      CHECK(report.weights == tiny_model(recipe)->parameters().count());
    }
}

TEST("determinism: one bit of one weight is seen, and named") {
  const ScratchFolder scratch;
  const Recipe recipe = recipe_over(scratch, {});
  int made = 0;
  const auto another = [&] {
    auto model = tiny_model(recipe);
    const Parameter& p = model->parameters().all().front();
    const Tensor one = p.master.reshape({p.shape.numel()}).slice(0, 0, 1);
    if (++made == 2) fill(one, std::nextafter(static_cast<float>(one.item()), 1e9F));
    return model;
  };
  const std::string name = tiny_model(recipe)->parameters().all().front().name;
  for (const std::string& part : {std::string("step    1"), std::string("weights "), name}) {
    made = 0;
    CHECK_THROWS_WITH_AS(verify_determinism(recipe, open_tokenizer("bytes"), 2, another), doctest::Contains(part.c_str()), NumericError);
  }
}

TEST("determinism: any number of data threads gives the same run") {
  const ScratchFolder scratch;
  for (const std::vector<std::string>& settings :
       {std::vector<std::string>{"data.shuffle_rows=64"},
        std::vector<std::string>{"initial_state=tbtt", "data.arrangement=streams", "data.stream_unit=document"}}) {
    const std::string kind = settings.back();
    std::vector<RunResult> results;
    for (const char* threads : {"0", "1", "2", "5"}) {
      auto with_threads = settings;
      with_threads.push_back(std::string("data.threads=") + threads);
      results.push_back(run(scratch, {.name = kind + threads, .settings = with_threads}, false));
      CHECK(results.back().losses.size() == 12);
      CHECK(results.back().losses == results.front().losses);
      CHECK(results.back().lines == results.front().lines);
      CHECK(results.back().weights == results.front().weights);
    }
  }
}

}  // namespace
}  // namespace longhand
