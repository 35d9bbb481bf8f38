// The recipes of tools/recipes: all can be read, and the published sizes are what was published.
#include <algorithm>
#include <filesystem>
#include <set>

#include "models/language_model.h"
#include "tests/support/check.h"
#include "train/recipe.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;

const std::string kFolder = std::string(LONGHAND_SOURCE_DIR) + "/tools/recipes/";

// Where the published tables say nothing: 0.
struct Size {
  const char* recipe;
  int64_t total, without_embedding, per_layer;
  double forward_gflops;                // per token
  double ssm_elements, state_elements;  // of one sequence, all layers: the recurrent state, and with the convolution's window
};
constexpr Size kSizes[] = {
    {"mamba1-45m", 46'086'656, 20'343'296, 1'695'232, 0, 0, 0},
    {"mamba1-130m", 129'135'360, 90'520'320, 3'771'648, 0.261, 590e3, 700e3},
    {"mamba1-370m", 371'516'416, 320'029'696, 6'667'264, 0.751, 1.57e6, 1.87e6},
    {"mamba1-790m", 793'204'224, 715'974'144, 14'916'096, 1.599, 2.36e6, 2.80e6},
    {"mamba1-1.4b", 1'372'178'432, 1'269'204'992, 26'441'728, 2.761, 3.15e6, 3.74e6},
    {"mamba1-2.8b", 2'768'345'600, 2'639'628'800, 41'244'160, 5.565, 5.24e6, 6.23e6},
    {"mamba2-45m", 0, 0, 0, 0, 0, 0},
    {"mamba2-130m", 128'989'632, 90'368'448, 3'765'320, 0.287, 4'718'592, 4'847'616},
    {"mamba2-370m", 368'346'624, 316'851'712, 6'601'056, 0.813, 12.6e6, 12.9e6},
    {"mamba2-780m", 780'161'280, 702'918'912, 14'644'112, 1.674, 18.9e6, 19.4e6},
    {"mamba2-1.3b", 1'343'757'312, 1'240'767'488, 25'849'280, 2.839, 25.2e6, 25.8e6},
    {"mamba2-2.7b", 2'702'599'680, 2'573'862'400, 40'216'560, 5.657, 41.9e6, 43.0e6},
    {"gla-45m", 46'271'744, 20'529'920, 3'421'568, 0, 0, 0},
    {"gla-125m", 123'794'688, 85'181'952, 7'098'432, 0, 0, 0},
    {"gla-340m", 374'475'776, 308'939'776, 0, 0.698, 3.15e6, 3.15e6},
    {"gla-340m-tied", 341'707'776, 308'939'776, 0, 0.698, 3.15e6, 3.15e6},
    {"gla-760m", 757'690'368, 680'464'896, 28'352'640, 0, 0, 0},
    {"gla-1.3b", 1'365'514'240, 1'234'442'240, 0, 2.655, 12.6e6, 12.6e6},
    {"gla-2.7b", 2'703'583'744, 2'539'743'744, 0, 5.335, 21.0e6, 21.0e6},
};

Recipe read(const Size& size) {
  return read_recipe(kFolder + size.recipe + ".toml");
}

}  // namespace

TEST("recipes: every file can be read, and its resolved form reads back the same") {
  int seen = 0;
  for (const auto& entry : fs::directory_iterator(kFolder)) {
    CAPTURE(entry.path().string());
    const Recipe recipe = read_recipe(entry.path().string());
    CHECK(recipe.name == entry.path().stem().string());
    const Recipe again = parse_recipe(to_toml(recipe), "config.toml");
    CHECK(recipe_differences(recipe, again).empty());
    ++seen;
  }
  CHECK(seen >= 20);
}

TEST("recipes: published sizes have the published parameters, FLOPs and states") {
  for (const Size& size : kSizes) {
    CAPTURE(size.recipe);
    ModelConfig config = recipe_model_config(kFolder + size.recipe + ".toml");
    const LanguageModel model = LanguageModel::plan(config);
    const int64_t layers = config.n_layer, in_layers = model.non_embedding_parameter_count() - config.d_model;
    if (size.total > 0) {
      CHECK(model.parameter_count() == size.total);
      CHECK(model.non_embedding_parameter_count() == size.without_embedding);
    }
    if (size.per_layer > 0) CHECK(in_layers / layers == size.per_layer);
    if (size.forward_gflops > 0) CHECK(model.forward_flops_per_token() / 1e9 == doctest::Approx(size.forward_gflops).epsilon(0.003));
    if (size.ssm_elements == 0) continue;
    config.n_layer = 1;
    const RecurrentState state = LanguageModel::plan(config).zero_state(1);
    int64_t all = 0;
    for (const auto& [name, variable] : state.layers()[0]) all += variable.value().numel();
    CHECK(static_cast<double>(layers * state.get(0, "ssm").value().numel()) == doctest::Approx(size.ssm_elements).epsilon(0.005));
    CHECK(static_cast<double>(layers * all) == doctest::Approx(size.state_elements).epsilon(0.005));
  }
}

TEST("recipes: the sizes train 20 tokens for each parameter at the peak rate of their size") {
  for (const Size& size : kSizes) {
    CAPTURE(size.recipe);
    const Recipe recipe = read(size);
    const auto parameters = static_cast<double>(LanguageModel::plan(recipe.model).parameter_count());
    const auto tokens = static_cast<double>(recipe.train.steps * recipe.train.batch_size * recipe.train.length);
    CHECK(tokens / parameters == doctest::Approx(20).epsilon(0.02));
    const double peak = parameters < 100e6   ? 1e-3
                        : parameters < 200e6 ? 6e-4
                        : parameters < 500e6 ? 3e-4
                        : parameters < 1e9   ? 2.5e-4
                        : parameters < 2e9   ? 2e-4
                                             : 1.6e-4;
    CHECK(recipe.optimizer.lr == peak);
    CHECK(recipe.optimizer.min_lr == 1e-5);
    CHECK(recipe.train.length == (recipe.model.family == "gla" || recipe.name == "mamba2-45m" ? 512 : 2048));
  }
}

TEST("recipes: every family has a small size, and every size file is in the table") {
  std::set<std::string> listed;
  for (const Size& size : kSizes) listed.insert(size.recipe);
  for (const ModelFamily* family : model_families()) {
    CHECK_MESSAGE(listed.contains(std::string(family->name) + "-45m"), family->name);
    for (const auto& entry : fs::directory_iterator(kFolder)) {
      const std::string name = entry.path().stem().string();
      if (name.starts_with(std::string(family->name) + "-") && name.find("cpu") == std::string::npos)
        CHECK_MESSAGE(listed.contains(name), name);
    }
  }
}

TEST("recipes: post-training has a recipe for every initial state, and they differ in nothing else") {
  const Recipe zero = read_recipe(kFolder + "posttrain-zero.toml");
  CHECK(zero.train.steps == 500);
  CHECK(zero.optimizer.warmup_fraction == 0.1);
  CHECK(zero.optimizer.min_lr == 1e-5);
  CHECK_FALSE(zero.init_from.empty());
  for (const std::string& key : zero.given) CHECK_FALSE(key.starts_with("model."));
  for (const InitialStateStrategy& strategy : initial_state_strategies()) {
    CAPTURE(strategy.name);
    const Recipe recipe = read_recipe(kFolder + "posttrain-" + strategy.name + ".toml");
    CHECK(recipe.initial_state == strategy.name);
    for (const RecipeDifference& difference : recipe_differences(zero, recipe))
      CHECK_MESSAGE((difference.key == "name" || difference.key.starts_with("initial_state") || difference.key == "data.arrangement"),
                    difference.key);
  }
}

}  // namespace longhand::test
