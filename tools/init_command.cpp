// See init_command.h.
#include "tools/init_command.h"

#include <fmt/core.h>

#include <CLI/CLI.hpp>

#include "core/error.h"
#include "core/files.h"
#include "models/checkpoint.h"
#include "tools/model_text.h"
#include "train/recipe.h"

namespace longhand {

void add_init_options(CLI::App& command, InitCommand& options) {
  command.add_option("recipe", options.recipe, "TOML recipe (see tools/recipes)")->required()->type_name("RECIPE.toml");
  command.add_option("--out", options.out, "The folder to write; it must be empty or not exist")->required()->type_name("DIR");
  command.add_option("--to", options.layout, "hf (transformers), state-spaces or fla (default: the first that can hold the model)")
      ->check(CLI::IsMember(layout_names()))
      ->type_name("LAYOUT");
  command.add_option("--seed", options.seed, "Seed of the initial values (default: the recipe's)")->type_name("N");
  command.add_option("--dtype", options.dtype, "f32, f16 or bf16")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}))
      ->type_name("TYPE")
      ->capture_default_str();
  command.add_option("--set", options.overrides, "Change one key of the recipe, for example --set model.d_model=1024; may be repeated")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
}

int run_init(const InitCommand& options) {
  const Recipe recipe = read_recipe(options.recipe, options.overrides);
  if (!recipe.init_from.empty())
    throw ConfigError(
        "init: the recipe starts from other weights",
        {{"recipe", options.recipe}, {"init_from", recipe.init_from}, {"try", "longhand convert --model " + recipe.init_from}});
  const ModelConfig config = recipe_model_config(options.recipe, options.overrides);
  const SaveOptions save{.layout = options.layout, .dtype = parse_dtype(options.dtype)};
  find_layout(config, save.layout);
  write_folder_atomically(options.out, [&](const std::string& folder) {
    LanguageModel model(config, Device::cpu(), Dtype::f32);
    model.initialize(static_cast<uint64_t>(options.seed.value_or(recipe.seed)));
    save_model(model, folder, save);
  });
  fmt::print("from {}, seed {}\n", options.recipe, options.seed.value_or(recipe.seed));
  print_written_model(options.out);
  return 0;
}

}  // namespace longhand
