// Recipes: defaults, settings, and what each mistake says.
#include "train/recipe.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "core/error.h"
#include "models/checkpoint.h"
#include "models/language_model.h"
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

std::ptrdiff_t lines_with(const std::string& text, const std::string& part) {
  std::istringstream lines(text);
  std::ptrdiff_t found = 0;
  for (std::string line; std::getline(lines, line);) found += line.find(part) != std::string::npos ? 1 : 0;
  return found;
}

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
  CHECK(std::ssize(again.given) == lines_with(to_toml(r), "  # "));  // every key has a line
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
  expect_refused("initial_state = \"random_noise\"\n", {"unknown choice", "zero, random-noise, fitted-noise, state-passing, tbtt"});
  expect_refused("[initial_state_options]\nsigma = -0.1\n", {"out of range", "initial_state_options.sigma", "at least 0"});
  expect_refused("[initial_state_options]\nstatistics_decay = 2\n", {"out of range", "at least 0, at most 1"});
  expect_refused("[initial_state_options]\nstatistics_per = \"heads\"\n", {"unknown choice", "nearest  head"});
  expect_refused("[model]\nfamily = \"mamba22\"\n", {"unknown choice", "nearest  mamba2"});
  expect_refused("[model]\nd_state = \"x\"\n", {"wrong type", "model.d_state"});
  expect_refused("[train]\nbatch_size = 6\ngrad_accumulation = 4\n", {"micro-batches"});
  expect_refused("[optimizer]\nlr = 1e-6\n", {"larger than the peak", "optimizer.min_lr"});
  expect_refused("[train\nsteps = 1\n", {"not TOML", "r.toml:1:"});
  expect_refused("name = \"a/b\"\n", {"one folder name"});
  expect_refused("", {"not key=value"}, {"train.steps"});
  expect_refused("", {"wrong type", "whole number", "abc"}, {"train.steps=abc"});
}

TEST("recipe: an initial state that needs another arrangement of the data is refused, with the reason") {
  const std::string streams = "[data]\narrangement = \"streams\"\n", packed = "[data]\narrangement = \"packed\"\n";
  expect_refused("initial_state = \"tbtt\"\n", {"another arrangement", "packed", "expected          streams", "go on with the text"});
  expect_refused("initial_state = \"tbtt\"\n" + packed, {"another arrangement", "r.toml"});
  expect_refused("initial_state = \"state-passing\"\n" + streams, {"expected          packed", "called tbtt"});
  expect_refused("initial_state = \"fitted-noise\"\n" + streams, {"expected          packed", "padding"});
  for (const char* accepted : {"zero", "random-noise", "tbtt"})
    CHECK(parse_recipe("", "r.toml", {"data.arrangement=streams", std::string("initial_state=") + accepted}).initial_state == accepted);
  for (const char* accepted : {"zero", "random-noise", "fitted-noise", "state-passing"})
    CHECK(parse_recipe("", "r.toml", {std::string("initial_state=") + accepted}).initial_state == accepted);
}

TEST("recipe: a key that the task does not look at is refused by name") {
  const auto refused = [](const std::string& task, const std::string& setting) {
    CAPTURE(task);
    CAPTURE(setting);
    const std::string key = setting.substr(0, setting.find('='));
    expect_refused("[data]\ntask = \"" + task + "\"\n", {"does not look at", "key        " + key, "data.task  " + task}, {setting});
  };
  const auto taken = [](const std::string& task, const std::vector<std::string>& settings) {
    CAPTURE(task);
    CHECK_NOTHROW(parse_recipe("[data]\ntask = \"" + task + "\"\n", "r.toml", settings));
  };
  for (const char* setting : {"task.min_length=3", "task.max_length=3", "task.variant=prefix-ngram", "task.ngram=2", "task.answer_length=1",
                              "task.digits=5", "task.babi=qa1_x.txt", "task.lengths=1k", "task.book_set=PG"})
    refused("text", setting);
  for (const char* setting : {"task.digits=5", "task.babi=qa1_x.txt", "task.lengths=1k", "task.book_set=PG", "task.ngram=2",
                              "data.files=a.jsonl", "data.val_files=a.jsonl", "data.shuffle_rows=7", "data.skip_bad_lines=true"})
    refused("copy", setting);
  for (const char* setting :
       {"task.variant=prefix-ngram", "task.ngram=2", "task.answer_length=1", "task.babi=qa1_x.txt", "task.lengths=1k", "task.book_set=PG",
        "data.files=a.jsonl", "data.val_files=a.jsonl", "data.shuffle_rows=7", "data.skip_bad_lines=true"})
    refused("passkey", setting);
  for (const char* setting : {"task.variant=prefix-ngram", "task.ngram=2", "task.answer_length=1", "task.digits=5", "task.min_length=3",
                              "task.max_length=3", "data.val_files=a.jsonl", "data.shuffle_rows=7", "data.skip_bad_lines=true"})
    refused("babilong", setting);
  taken("text", {"data.files=a.jsonl", "data.val_files=a.jsonl", "data.shuffle_rows=7", "data.skip_bad_lines=true"});
  taken("copy", {"task.min_length=3", "task.max_length=9", "task.variant=prefix-ngram", "task.ngram=2", "task.answer_length=1"});
  taken("passkey", {"task.min_length=300", "task.max_length=400", "task.digits=5"});
  taken("babilong", {"task.babi=qa1_x.txt", "task.lengths=1k", "task.book_set=PG", "data.files=a.jsonl"});
  // A run's own configuration gives every key.
  for (const char* task : {"text", "copy", "passkey", "babilong"})
    CHECK_NOTHROW(parse_recipe(to_toml(parse_recipe(std::string("data.task = \"") + task + "\"\n", "r.toml")), "config.toml"));
}

TEST("recipe: the vocabulary is the tokenizer's unless it is given") {
  Recipe r = parse_recipe(kSmall, "small.toml");
  resolve_model(r, 300);
  CHECK(r.model.vocab_size == 300);
  CHECK(r.model.padded_vocab() == 304);
  Recipe fixed = parse_recipe(kSmall, "small.toml", {"model.vocab_size=256"});
  CHECK_THROWS_WITH_AS(resolve_model(fixed, 257), doctest::Contains("the tokenizer has more tokens"), ConfigError);
}

TEST("recipe: model keys that nobody gives are those of the family, wherever the family stands") {
  for (const ModelFamily* family : model_families()) {
    const std::string name = family->name;
    ModelConfig expected;
    family->defaults(expected);
    for (const std::string& text :
         {"[model]\nfamily = \"" + name + "\"\nd_model = 64\n", "[model]\nd_model = 64\nfamily = \"" + name + "\"\n"}) {
      const Recipe r = parse_recipe(text, "r.toml");
      CHECK(r.model.family == name);
      CHECK(r.model.norm_eps == expected.norm_eps);
      CHECK(r.model.pad_vocab_size_multiple == expected.pad_vocab_size_multiple);
      CHECK(r.model.tie_embeddings == expected.tie_embeddings);
      CHECK(r.model.d_model == 64);
      CHECK(recipe_differences(r, parse_recipe(to_toml(r), "config.toml")).empty());
    }
    const Recipe given =
        parse_recipe("[model]\nnorm_eps = 0.25\npad_vocab_size_multiple = 3\nfamily = \"mamba2\"\n", "r.toml",
                     {"model.tie_embeddings=" + std::string(expected.tie_embeddings ? "false" : "true"), "model.family=" + name});
    CHECK(given.model.family == name);
    CHECK(given.model.norm_eps == 0.25);
    CHECK(given.model.pad_vocab_size_multiple == 3);
    CHECK(given.model.tie_embeddings != expected.tie_embeddings);
  }
}

void write(const std::string& path, const std::string& text) {
  std::ofstream(path) << text;
}

TEST("recipe: a recipe that extends another starts from its keys, all but the name") {
  const test::ScratchFolder scratch;
  write(scratch.file("base.toml"), "name = \"base\"\nseed = 3\n[model]\nd_model = 64\nd_state = 16\n[train]\nsteps = 20\nlength = 128\n");
  write(scratch.file("middle.toml"), "extends = \"base.toml\"\n[train]\nlength = 64\n[optimizer]\nlr = 1e-4\n");
  write(scratch.file("size.toml"), "extends = \"./middle.toml\"\n[model]\nd_model = 32\n[train]\nsteps = 5\n");
  const Recipe r = read_recipe(scratch.file("size.toml"), {"train.length=32"});
  CHECK(r.name == "size");
  CHECK(r.seed == 3);
  CHECK(r.model.d_model == 32);
  CHECK(r.model.option("d_state") == 16);
  CHECK(r.train.steps == 5);
  CHECK(r.train.length == 32);
  CHECK(r.optimizer.lr == 1e-4);
  CHECK(r.given.contains("seed"));
  CHECK(to_toml(r).find("extends") == std::string::npos);
  CHECK(recipe_differences(r, parse_recipe(to_toml(r), "config.toml")).empty());
}

TEST("recipe: mistakes in recipes that extend others name both files") {
  const test::ScratchFolder scratch;
  auto refusal = [&](const std::string& file, const std::vector<std::string>& settings = {}) {
    try {
      (void)read_recipe(scratch.file(file), settings);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  auto expect_parts = [](const std::string& message, const std::vector<std::string>& parts) {
    for (const std::string& part : parts) CHECK_MESSAGE(message.find(part) != std::string::npos, message, "\nlacks: ", part);
  };
  write(scratch.file("gone.toml"), "seed = 1\nextends = \"nowhere.toml\"\n");
  expect_parts(refusal("gone.toml"), {"not there", "gone.toml:2:", scratch.file("nowhere.toml")});
  write(scratch.file("a.toml"), "extends = \"b.toml\"\n");
  write(scratch.file("b.toml"), "extends = \"a.toml\"\n");
  expect_parts(refusal("a.toml"), {"circle", "b.toml:1:", "a.toml"});
  write(scratch.file("self.toml"), "extends = \"self.toml\"\n");
  expect_parts(refusal("self.toml"), {"circle", "self.toml:1:"});
  write(scratch.file("number.toml"), "extends = 3\n");
  expect_parts(refusal("number.toml"), {"wrong type", "extends"});
  write(scratch.file("bad.toml"), "[train]\nstpes = 3\n");
  write(scratch.file("user.toml"), "extends = \"bad.toml\"\n");
  expect_parts(refusal("user.toml"), {"unknown key", scratch.file("bad.toml") + ":2:1", scratch.file("user.toml"), "train.steps"});
  write(scratch.file("mamba.toml"), "[model]\nfamily = \"mamba2\"\nheaddim = 32\n");
  write(scratch.file("other.toml"), "extends = \"mamba.toml\"\n[model]\nfamily = \"mamba1\"\n");  // headdim is of mamba2
  expect_parts(refusal("other.toml"), {"model.headdim", "mamba.toml:3:1", "other.toml"});
  expect_parts(refusal("mamba.toml", {"extends=a.toml"}), {"only a file can extend"});
}

TEST("recipe: the help lists the options of every family") {
  const auto rows = recipe_keys();
  for (const ModelFamily* family : model_families())
    for (const ModelOption& option : family->options)
      CHECK(std::any_of(rows.begin(), rows.end(), [&](const RecipeKeyHelp& row) {
        return row.key == std::string("model.") + option.name && row.meaning == std::string(family->name) + ": " + option.meaning;
      }));
  for (const RecipeKeyHelp& row : rows)
    if (row.key == "model.pad_vocab_size_multiple") CHECK(row.default_value.find("16 (mamba2)") != std::string::npos);
}

TEST("recipe: a model to start from of another family leaves no model key without a word") {
  const test::ScratchFolder scratch;
  ModelConfig config = default_config("mamba1");
  config.d_model = 16;
  config.n_layer = 1;
  config.vocab_size = 300;
  LanguageModel model(config, Device::cpu(), Dtype::f32);
  model.initialize(1);
  save_model(model, scratch.path());
  const std::string from = "init_from = \"" + scratch.path() + "\"\n";
  Recipe plain = parse_recipe(from, "post.toml");
  resolve_model(plain, 257);
  CHECK(plain.model.family == "mamba1");
  CHECK(plain.model.d_model == 16);
  for (const std::string keys : {"[model]\nd_model = 16\n", "[model]\nfamily = \"mamba2\"\n", "[model]\nd_state = 16\n"}) {
    Recipe r = parse_recipe(from + keys, "post.toml");
    CHECK_THROWS_WITH_AS(resolve_model(r, 257), doctest::Contains("another family"), ConfigError);
  }
  Recipe same = parse_recipe(from + "[model]\nd_model = 16\nfamily = \"mamba1\"\n", "post.toml");
  resolve_model(same, 257);
  CHECK(same.model.vocab_size == 300);
}

TEST("recipe: what no run could mean is refused: infinite rates, texts that are not UTF-8, steps beyond 2^31 tokens") {
  const auto expect = [](const std::string& setting, const char* part) {
    CAPTURE(setting);
    CHECK_THROWS_WITH_AS(parse_recipe(kSmall, "small.toml", {setting}), doctest::Contains(part), ConfigError);
  };
  for (const char* key : {"optimizer.lr", "optimizer.eps", "optimizer.weight_decay"}) expect(std::string(key) + "=inf", "finite");
  expect("data.files=caf\xe9.jsonl", "not UTF-8");
  expect("name=caf\xe9", "not UTF-8");
  expect("train.length=1000000000", "train.length");
  const Recipe odd = parse_recipe(kSmall, "small.toml", {"data.files=a\x7f.jsonl"});
  CHECK(parse_recipe(to_toml(odd), "again.toml").data.files == odd.data.files);
}

TEST("recipe: keys that nothing looks at beside the others are told") {
  const auto unread = [](std::vector<std::string> settings) { return unread_keys(parse_recipe(kSmall, "small.toml", settings)); };
  CHECK(unread({"initial_state_options.sigma=5"}) == std::vector<std::string>{"initial_state_options.sigma, with initial_state = zero"});
  CHECK(unread({"initial_state_options.sigma=5", "initial_state=random-noise"}).empty());
  CHECK(unread({"initial_state_options.sigma=0.1"}).empty());  // its default
  CHECK(unread({"train.val_every=2"}) == std::vector<std::string>{"train.val_every, without data.val_files"});
  CHECK(unread({"train.val_every=2", "data.val_files=v.jsonl"}).empty());
}

TEST("recipe: a folder to start from must hold a model") {
  const test::ScratchFolder scratch;
  Recipe r = parse_recipe(kSmall, "small.toml", {"init_from=" + scratch.path()});
  CHECK_THROWS_WITH_AS(resolve_model(r, 257), doctest::Contains("the folder holds neither a model nor a run"), FileError);
}

}  // namespace
}  // namespace longhand
