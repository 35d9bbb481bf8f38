// Recipes: defaults, settings, and what each mistake says.
#include "train/recipe.h"

#include <cmath>

#include "core/error.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

constexpr const char* kSmall = R"(name = "small"
[model]
d_model = 64
n_layer = 2
d_state = 16
dt_limit_max = inf
[data]
files = ["a.jsonl.zst", "b.jsonl.zst"]
[train]
steps = 20
batch_size = 8
[optimizer]
lr = 6e-4
)";

TEST("recipe: values, defaults and settings") {
  const Recipe r = parse_recipe(kSmall, "small.toml",
                                {"optimizer.lr=0.001", "train.steps=40", "data.tokenizer=/a b/tokenizer.json", "data.files=c.jsonl",
                                 "model.tie_embeddings=false", "model.conv_bias=false", "initial_state=state-passing"});
  CHECK(r.name == "small");
  CHECK(r.optimizer.lr == 0.001);
  CHECK(r.optimizer.beta2 == 0.95);
  CHECK(r.train.steps == 40);
  CHECK(r.train.batch_size == 8);
  CHECK(r.data.tokenizer == "/a b/tokenizer.json");
  CHECK(r.data.files == std::vector<std::string>{"c.jsonl"});
  CHECK(r.model.d_model == 64);
  CHECK_FALSE(r.model.tie_embeddings);
  CHECK(r.model.option("d_state") == 16);
  CHECK(r.model.option("conv_bias") == 0);
  CHECK(r.initial_state == "state-passing");
  CHECK(r.given.contains("train.steps"));
  CHECK_FALSE(r.given.contains("train.length"));
  CHECK(parse_recipe("", "folder/my-run.toml").name == "my-run");
}

TEST("recipe: written in full and read back, nothing changes") {
  Recipe r = parse_recipe(kSmall, "small.toml", {"data.tokenizer=odd \"name\"\\x"});
  resolve_model(r, 257);
  const Recipe again = parse_recipe(to_toml(r), "config.toml");
  CHECK(recipe_differences(r, again).empty());
  CHECK(again.given.size() == recipe_keys().size());
  CHECK(again.model.vocab_size == 257);
  CHECK(std::isinf(again.model.option("dt_limit_max")));
  CHECK(to_toml(again) == to_toml(r));
}

TEST("recipe: differences say which may change on resume") {
  const Recipe a = parse_recipe(kSmall, "a"), b = parse_recipe(kSmall, "b", {"name=small", "train.log_every=3", "optimizer.lr=1"});
  const auto differences = recipe_differences(a, b);
  REQUIRE(differences.size() == 2);
  CHECK(differences[0].key == "train.log_every");
  CHECK(differences[0].after == "3");
  CHECK(differences[0].allowed_on_resume);
  CHECK(differences[1].key == "optimizer.lr");
  CHECK_FALSE(differences[1].allowed_on_resume);
}

void expect_refused(const std::string& text, const std::vector<std::string>& parts, const std::vector<std::string>& settings = {}) {
  try {
    (void)parse_recipe(text, "r.toml", settings);
    FAIL("accepted: " << text);
  } catch (const ConfigError& error) {
    for (const std::string& part : parts)
      CHECK_MESSAGE(std::string(error.what()).find(part) != std::string::npos, error.what(), "\nlacks: ", part);
  }
}

TEST("recipe: unknown keys are refused with line, column and the nearest known one") {
  expect_refused("[train]\nstpes = 3\n", {"unknown key", "r.toml:2:1", "train.stpes", "nearest  train.steps"});
  expect_refused("[train]\n\n  lr = 3\n", {"r.toml:3:3", "nearest  optimizer.lr"});
  expect_refused("[model]\nd_sate = 3\n", {"nearest  model.d_state"});
  expect_refused("[optimiser]\nlr = 3\n", {"unknown section", "r.toml:1:2", "nearest  [optimizer]"});
  expect_refused("[train.deep]\nx = 3\n", {"unknown section", "[train.deep]"});
  expect_refused("", {"unknown key", "--set train.step=3", "nearest  train.steps"}, {"train.step=3"});
}

TEST("recipe: wrong types, ranges and choices are refused") {
  expect_refused("[train]\nsteps = \"many\"\n", {"wrong type", "r.toml:2:1", "given", "\"many\"", "expected  whole number"});
  expect_refused("[train]\nsteps = 2.5\n", {"wrong type", "2.5", "whole number"});
  expect_refused("[train]\nsteps = 0\n", {"out of range", "at least 1"});
  expect_refused("[optimizer]\nbeta1 = 1.5\n", {"out of range", "at least 0, at most 0.999999"});
  expect_refused("[data]\nfiles = [1, 2]\n", {"a list that holds", "data.files"});
  expect_refused("[data]\narrangement = \"pakced\"\n", {"unknown choice", "known    packed, streams", "nearest  packed"});
  expect_refused("initial_state = \"state_passing\"\n", {"unknown choice", "nearest  state-passing"});
  expect_refused("[model]\nfamily = \"mamba9\"\n", {"unknown choice", "nearest  mamba2"});
  expect_refused("[model]\nd_state = \"x\"\n", {"wrong type", "model.d_state"});
  expect_refused("[train]\nbatch_size = 6\ngrad_accumulation = 4\n", {"micro-batches"});
  expect_refused("[optimizer]\nlr = 1e-6\n", {"larger than the peak", "optimizer.min_lr"});
  expect_refused("[train\nsteps = 1\n", {"not TOML", "r.toml:1:"});
  expect_refused("name = \"a/b\"\n", {"one folder name"});
  expect_refused("", {"not key=value"}, {"train.steps"});
  expect_refused("", {"wrong type", "whole number", "abc"}, {"train.steps=abc"});
}

TEST("recipe: the vocabulary is the tokenizer's unless it is given") {
  Recipe r = parse_recipe(kSmall, "small.toml");
  resolve_model(r, 300);
  CHECK(r.model.vocab_size == 300);
  CHECK(r.model.padded_vocab() == 304);
  Recipe fixed = parse_recipe(kSmall, "small.toml", {"model.vocab_size=256"});
  CHECK_THROWS_WITH_AS(resolve_model(fixed, 257), doctest::Contains("the tokenizer has more tokens"), ConfigError);
}

TEST("recipe: a folder to start from must hold a model") {
  const test::ScratchFolder scratch;
  Recipe r = parse_recipe(kSmall, "small.toml", {"init_from=" + scratch.path()});
  CHECK_THROWS_WITH_AS(resolve_model(r, 257), doctest::Contains("no model to start from"), FileError);
}

}  // namespace
}  // namespace longhand
