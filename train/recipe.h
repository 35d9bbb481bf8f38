// Recipe: everything that defines a training run, as a TOML file. One table in recipe.cpp lists the keys with type, default and meaning; it
// drives reading, --set, the messages about unknown keys, the resolved config.toml and `longhand train --help-recipe`.
#pragma once
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "data/tasks/task.h"
#include "models/model_config.h"
#include "train/initial_state/initial_state.h"

namespace longhand {

/// The value of train.recompute that memory_fit.h replaces.
inline constexpr const char* kAutomaticRecompute = "auto";
/// The value of data.task for rows of text.
inline constexpr const char* kTextRows = "text";

struct Recipe {
  std::string name;  // of the run folder; empty: the recipe's file name
  int64_t seed = 0;  // of initial values, row order and everything random in the run
  std::string init_from;
  std::string initial_state = "zero";
  InitialStateOptions initial_state_options;
  ModelConfig model{.vocab_size = 0, .options = {}};

  struct Data {
    std::string task = kTextRows;
    std::vector<std::string> files, val_files;
    std::string tokenizer = "bytes";
    std::string arrangement = "packed";
    std::string stream_unit = "packed";
    int64_t threads = 1;
    int64_t shuffle_rows = 0;
    bool skip_bad_lines = false;
  } data;

  TaskOptions task;

  struct Train {
    int64_t steps = 1000;
    int64_t batch_size = 32;
    int64_t length = 2048;
    int64_t grad_accumulation = 1;
    std::string dtype = "auto";
    bool graph = true;
    bool shard_optimizer = true;
    bool overlap = true;
    std::string recompute = "none";
    double memory_gib = 0;
    int64_t log_every = 10;
    int64_t checkpoint_every = 1000;
    int64_t keep_last = 2;
    int64_t keep_every = 0;
    int64_t val_every = 0;
    int64_t val_batches = 10;
  } train;

  struct Optimizer {
    double lr = 1e-3, min_lr = 1e-5, warmup_fraction = 0.1;
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
    double weight_decay = 0.01;
    std::string weight_decay_schedule = "follow-lr";
    bool decay_embedding = true;
    double clip = 1.0;
  } optimizer;

  std::set<std::string> given;  // keys that the file or --set gave, under dotted names
};

/// Reads a recipe and applies settings "a.b=value" in order. A value is written as in TOML; strings need no quotes, and a single file needs
/// no list. A file that says extends = "other.toml" (relative to itself) starts from the keys of that one, all but its name. Model keys
/// that nobody gives are those of the family. The model is not completed yet: see resolve_model(). errors  ConfigError naming file, line
/// and column: not TOML, an unknown key (with the nearest known one), a wrong type, a value out of
///         range, files that extend each other
Recipe read_recipe(const std::string& path, const std::vector<std::string>& settings = {});

/// The same from text; `origin` names it in messages.
Recipe parse_recipe(const std::string& text, const std::string& origin, const std::vector<std::string>& settings = {});

/// Settles the model: with init_from, the model of that folder, which every model key that was given must agree with; else the keys, with
/// vocab_size 0 replaced by `tokenizer_vocab`. init_from becomes the model folder itself where it named a run.
/// errors  ConfigError naming the key that disagrees, or a vocabulary smaller than the tokenizer's
void resolve_model(Recipe& recipe, int64_t tokenizer_vocab);

/// The model that a recipe with these settings trains; opens its tokenizer where the recipe does not say how large the vocabulary is.
/// errors  those of read_recipe() and resolve_model(); FileError when that tokenizer is not there
ModelConfig recipe_model_config(const std::string& path, const std::vector<std::string>& settings = {});

/// The recipe with every key, its value and its meaning, as TOML; reading it back gives the same recipe.
std::string to_toml(const Recipe& recipe);

/// One row of the table of keys, for help texts; the options of every family come behind the model's common keys.
struct RecipeKeyHelp {
  std::string key, type, default_value, meaning;
};
std::vector<RecipeKeyHelp> recipe_keys();

/// Keys that were given another value than their default and that nothing looks at beside the other keys: "train.val_every, without
/// data.val_files". For people; what can only be a mistake is refused when a recipe is read.
std::vector<std::string> unread_keys(const Recipe& recipe);

/// A key whose value differs between two recipes.
struct RecipeDifference {
  std::string key, before, after;
  bool allowed_on_resume;  // changes neither the model nor the meaning of what is stored in a checkpoint
};
std::vector<RecipeDifference> recipe_differences(const Recipe& before, const Recipe& after);

}  // namespace longhand
