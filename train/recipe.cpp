// The table of keys and what follows from it; see recipe.h.
#include "train/recipe.h"

#include <fmt/format.h>
#include <toml++/toml.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <optional>
#include <variant>

#include "core/error.h"
#include "core/files.h"
#include "core/nearest.h"
#include "data/tokenizer.h"
#include "models/checkpoint.h"
#include "models/model_family.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using Files = std::vector<std::string>;
using Field = std::variant<bool*, int64_t*, double*, std::string*, Files*>;

constexpr double kAny = std::numeric_limits<double>::infinity();
constexpr int64_t kVocabOfTokenizer = 0;

struct Key {
  const char* name;
  Field (*field)(Recipe&);
  const char* meaning;
  double low = -kAny, high = kAny;  // what a number may be
  const char* choices = nullptr;    // what a text may be, "a|b"
  bool allowed_on_resume = false;
};

#define FIELD(member) [](Recipe& r) -> Field { return &r.member; }
constexpr Key kKeys[] = {
    {"name", FIELD(name), "the run folder is runs/NAME; empty: the recipe's file name"},
    {"seed", FIELD(seed), "of initial values, row order and all noise", 0},
    {"init_from", FIELD(init_from), "model or run folder to start from; empty: fresh weights"},
    {"initial_state", FIELD(initial_state), "where the recurrent state of a batch comes from"},

    {"initial_state_options.cover", FIELD(initial_state_options.cover),
     "which state tensors the strategy sets: all, or ssm (convolution window from zeros)", -kAny, kAny, "all|ssm"},
    {"initial_state_options.probability", FIELD(initial_state_options.probability), "of a row being treated; the others start from zero", 0,
     1},

    {"model.family", FIELD(model.family), "kind of model"},
    {"model.d_model", FIELD(model.d_model), "width of the residual stream", 1},
    {"model.n_layer", FIELD(model.n_layer), "layers", 1},
    {"model.vocab_size", FIELD(model.vocab_size), "tokens; 0: as many as the tokenizer has", 0},
    {"model.pad_vocab_size_multiple", FIELD(model.pad_vocab_size_multiple), "rows of the embedding are rounded up to this", 1},
    {"model.tie_embeddings", FIELD(model.tie_embeddings), "the head is the embedding"},
    {"model.norm_eps", FIELD(model.norm_eps), "added to the mean square in every norm", 0},

    {"data.files", FIELD(data.files), "training text: shards, token caches, folders of them; relative to the current directory"},
    {"data.val_files", FIELD(data.val_files), "held-out text, likewise"},
    {"data.tokenizer", FIELD(data.tokenizer), "bytes, or the path of a tokenizer.json"},
    {"data.arrangement", FIELD(data.arrangement), "packed: shuffled rows; streams: row b goes on where row b of the batch before ended",
     -kAny, kAny, "packed|streams"},
    {"data.stream_unit", FIELD(data.stream_unit), "streams: a row is documents one after the other (packed), or one document at a time",
     -kAny, kAny, "packed|document"},
    {"data.threads", FIELD(data.threads), "tokenising threads; 0: none in the background", 0, 1024, nullptr, true},
    {"data.shuffle_rows", FIELD(data.shuffle_rows), "rows shuffled together; 0: as many as 4 Mi tokens hold", 0},
    {"data.skip_bad_lines", FIELD(data.skip_bad_lines), "leave bad lines out and count them, instead of stopping", -kAny, kAny, nullptr,
     true},

    {"train.steps", FIELD(train.steps), "optimizer steps", 1, kAny, nullptr, true},
    {"train.batch_size", FIELD(train.batch_size), "rows of one optimizer step", 1},
    {"train.length", FIELD(train.length), "tokens of a row", 1},
    {"train.grad_accumulation", FIELD(train.grad_accumulation), "micro-batches that the rows of a step are cut into, to save memory", 1},
    {"train.dtype", FIELD(train.dtype), "compute type; auto: bf16 on a GPU, f32 on the CPU", -kAny, kAny, "auto|f32|bf16"},
    {"train.log_every", FIELD(train.log_every), "steps between lines of metrics.jsonl", 1, kAny, nullptr, true},
    {"train.checkpoint_every", FIELD(train.checkpoint_every), "steps between checkpoints; 0: only at the end", 0, kAny, nullptr, true},
    {"train.keep_last", FIELD(train.keep_last), "checkpoints kept; 0: all", 0, kAny, nullptr, true},
    {"train.val_every", FIELD(train.val_every), "steps between validations; 0: only at the end, when there are val_files", 0, kAny, nullptr,
     true},
    {"train.val_batches", FIELD(train.val_batches), "batches of a validation", 1, kAny, nullptr, true},

    {"optimizer.lr", FIELD(optimizer.lr), "peak learning rate", 0},
    {"optimizer.min_lr", FIELD(optimizer.min_lr), "learning rate of the last step, at most lr", 0},
    {"optimizer.warmup_fraction", FIELD(optimizer.warmup_fraction), "share of the steps with linear warmup", 0, 1},
    {"optimizer.beta1", FIELD(optimizer.beta1), "decay of the first moment", 0, 0.999999},
    {"optimizer.beta2", FIELD(optimizer.beta2), "decay of the second moment", 0, 0.999999},
    {"optimizer.eps", FIELD(optimizer.eps), "added to the root of the second moment", 1e-30},
    {"optimizer.weight_decay", FIELD(optimizer.weight_decay), "decoupled weight decay at its peak", 0},
    {"optimizer.weight_decay_schedule", FIELD(optimizer.weight_decay_schedule), "follow-lr: the shape of the learning rate", -kAny, kAny,
     "follow-lr|constant|off"},
    {"optimizer.decay_embedding", FIELD(optimizer.decay_embedding), "the embedding takes weight decay"},
    {"optimizer.clip", FIELD(optimizer.clip), "largest global gradient norm; 0: no clipping", 0},
};
#undef FIELD

// What a text may be; empty: anything. Two keys choose from tables that other files own.
std::vector<std::string> choices_of(const Key& key) {
  std::vector<std::string> known;
  if (key.name == std::string_view("initial_state")) {
    for (const InitialStateStrategy& strategy : initial_state_strategies()) known.emplace_back(strategy.name);
  } else if (key.name == std::string_view("model.family")) {
    for (const ModelFamily* family : model_families()) known.emplace_back(family->name);
  } else if (key.choices != nullptr) {
    const std::string list = key.choices;
    for (std::size_t at = 0; at <= list.size();) {
      const auto end = std::min(list.find('|', at), list.size());
      known.push_back(list.substr(at, end - at));
      at = end + 1;
    }
  }
  return known;
}

const Key* find_key(const std::string& name) {
  for (const Key& key : kKeys)
    if (key.name == name) return &key;
  return nullptr;
}

std::string section_of(const std::string& key) {
  const auto dot = key.find('.');
  return dot == std::string::npos ? "" : key.substr(0, dot);
}

const ModelOption* find_option(const Recipe& recipe, const std::string& key) {
  if (section_of(key) != "model") return nullptr;
  for (const ModelOption& option : model_family(recipe.model.family).options)
    if (key.substr(6) == option.name) return &option;
  return nullptr;
}

std::vector<std::string> known_keys(const Recipe& recipe) {
  std::vector<std::string> names;
  for (const Key& key : kKeys) names.emplace_back(key.name);
  for (const ModelOption& option : model_family(recipe.model.family).options) names.push_back(std::string("model.") + option.name);
  return names;
}

// The same last part in another section is a better guess than a similar spelling.
std::string nearest_key(const std::string& given, const std::vector<std::string>& known) {
  const std::string last = given.substr(given.rfind('.') + 1);
  for (const std::string& name : known)
    if (name.substr(name.rfind('.') + 1) == last) return name;
  return nearest_name(given, known);
}

std::string joined(const std::vector<std::string>& parts, const char* between) {
  std::string out;
  for (const std::string& part : parts) out += (out.empty() ? "" : between) + part;
  return out;
}

// --- values -----------------------------------------------------------------------------------------------------

using Value = std::variant<bool, int64_t, double, std::string, Files>;

// A key with its value as given, and where.
struct Given {
  std::string key, where;
  Value value;
};

const char* type_name(const Field& field) {
  constexpr const char* kNames[] = {"true or false", "whole number", "number", "text", "list of texts"};
  return kNames[field.index()];
}

std::string toml_text(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04X}", static_cast<int>(c));
    } else {
      out += c;
    }
  }
  return out + "\"";
}

std::string written(double value) {
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  if (std::abs(value) < 1e15 && value == std::floor(value)) return fmt::format("{}", static_cast<int64_t>(value));
  return fmt::format("{}", value);
}

std::string written(const Field& field) {
  struct Writer {
    std::string operator()(const bool* v) const { return *v ? "true" : "false"; }
    std::string operator()(const int64_t* v) const { return std::to_string(*v); }
    std::string operator()(const double* v) const { return written(*v); }
    std::string operator()(const std::string* v) const { return toml_text(*v); }
    std::string operator()(const Files* v) const {
      std::string out;
      for (const std::string& file : *v) out += (out.empty() ? "" : ", ") + toml_text(file);
      return "[" + out + "]";
    }
  };
  return std::visit(Writer{}, field);
}

std::string written(const Value& value) {
  Value copy = value;
  return std::visit([](auto& v) { return written(Field(&v)); }, copy);
}

[[noreturn]] void refuse(const Given& given, const std::string& sentence, std::vector<ErrorRow> rows) {
  rows.insert(rows.begin(), {{"where", given.where}, {"key", given.key}});
  throw ConfigError("recipe: " + sentence, std::move(rows));
}

[[noreturn]] void refuse_type(const Given& given, const std::string& expected) {
  refuse(given, "a value of the wrong type", {{"given", written(given.value)}, {"expected", expected}});
}

std::optional<double> number_in(const Value& value) {
  if (const auto* whole = std::get_if<int64_t>(&value)) return static_cast<double>(*whole);
  if (const auto* real = std::get_if<double>(&value)) return *real;
  return std::nullopt;
}

void require_range(const Given& given, const Key& key, double value) {
  if (value >= key.low && value <= key.high) return;
  std::string range = fmt::format("at least {}", written(key.low));
  if (!std::isinf(key.high)) range += fmt::format(", at most {}", written(key.high));
  refuse(given, "a value out of range", {{"given", written(given.value)}, {"expected", range}});
}

void require_choice(const Given& given, const Key& key, const std::string& value) {
  const auto known = choices_of(key);
  if (known.empty() || std::find(known.begin(), known.end(), value) != known.end()) return;
  refuse(given, "an unknown choice",
         {{"given", toml_text(value)}, {"known", joined(known, ", ")}, {"nearest", nearest_name(value, known)}});
}

void assign(Recipe& recipe, const Given& given) {
  const Key* key = find_key(given.key);
  if (key == nullptr) {
    if (find_option(recipe, given.key) == nullptr) {
      refuse(given, "an unknown key",
             {{"nearest", nearest_key(given.key, known_keys(recipe))}, {"try", "longhand train --help-recipe lists every key"}});
    }
    auto value = number_in(given.value);
    if (const auto* flag = std::get_if<bool>(&given.value)) value = *flag ? 1.0 : 0.0;
    if (!value) refuse_type(given, "number, or true or false");
    recipe.model.options[given.key.substr(6)] = *value;
    return;
  }
  const Field field = key->field(recipe);
  const char* expected = type_name(field);
  if (auto* flag = std::get_if<bool*>(&field)) {
    if (!std::holds_alternative<bool>(given.value)) refuse_type(given, expected);
    **flag = std::get<bool>(given.value);
  } else if (auto* whole = std::get_if<int64_t*>(&field)) {
    if (!std::holds_alternative<int64_t>(given.value)) refuse_type(given, expected);
    **whole = std::get<int64_t>(given.value);
    require_range(given, *key, static_cast<double>(**whole));
  } else if (auto* number = std::get_if<double*>(&field)) {
    const auto value = number_in(given.value);
    if (!value) refuse_type(given, expected);
    require_range(given, *key, *value);
    **number = *value;
  } else if (auto* text = std::get_if<std::string*>(&field)) {
    if (!std::holds_alternative<std::string>(given.value)) refuse_type(given, expected);
    **text = std::get<std::string>(given.value);
    require_choice(given, *key, **text);
  } else if (auto* files = std::get_if<Files*>(&field)) {
    if (const auto* one = std::get_if<std::string>(&given.value)) {
      **files = {*one};
    } else if (const auto* several = std::get_if<Files>(&given.value)) {
      **files = *several;
    } else {
      refuse_type(given, expected);
    }
  }
}

// --- reading ----------------------------------------------------------------------------------------------------

std::string place(const std::string& origin, const toml::source_region& source) {
  return fmt::format("{}:{}:{}", origin, source.begin.line, source.begin.column);
}

Value value_of(const toml::node& node, const std::string& key, const std::string& where) {
  if (const auto v = node.value_exact<bool>()) return *v;
  if (const auto v = node.value_exact<int64_t>()) return *v;
  if (const auto v = node.value_exact<double>()) return *v;
  if (const auto v = node.value_exact<std::string>()) return *v;
  if (const auto* array = node.as_array()) {
    Files files;
    for (const toml::node& element : *array) {
      const auto text = element.value_exact<std::string>();
      if (!text) throw ConfigError("recipe: a list that holds something other than texts", {{"where", where}, {"key", key}});
      files.push_back(*text);
    }
    return files;
  }
  throw ConfigError("recipe: a date or time, which no key takes", {{"where", where}, {"key", key}});
}

toml::table parse_toml(const std::string& text, const std::string& origin) {
  try {
    return toml::parse(text);
  } catch (const toml::parse_error& error) {
    throw ConfigError("recipe: the file is not TOML",
                      {{"where", place(origin, error.source())}, {"reason", std::string(error.description())}});
  }
}

void collect(const toml::table& table, const std::string& prefix, const std::string& origin, std::vector<Given>& out) {
  for (const auto& [name, node] : table) {
    const std::string key = prefix + std::string(name.str());
    const std::string where = place(origin, name.source());
    if (const auto* inner = node.as_table()) {
      std::vector<std::string> sections;
      for (const Key& known : kKeys)
        if (const std::string section = section_of(known.name); !section.empty()) sections.push_back(section);
      if (std::find(sections.begin(), sections.end(), key) == sections.end())
        throw ConfigError("recipe: an unknown section",
                          {{"where", where}, {"given", "[" + key + "]"}, {"nearest", "[" + nearest_name(key, sections) + "]"}});
      collect(*inner, key + ".", origin, out);
    } else {
      out.push_back({key, where, value_of(node, key, where)});
    }
  }
}

// "a.b=value": texts may stand without quotes, everything else is written as in TOML.
Given parse_setting(const std::string& setting, Recipe& recipe) {
  const std::string where = "--set " + setting;
  const auto equals = setting.find('=');
  if (equals == std::string::npos || equals == 0)
    throw ConfigError("recipe: a setting is not key=value", {{"where", where}, {"try", "--set train.steps=100"}});
  const std::string key = setting.substr(0, equals), text = setting.substr(equals + 1);
  const Key* known = find_key(key);
  const bool is_text = known != nullptr && known->field(recipe).index() >= 3;  // text, or a list of texts
  if (is_text && (text.empty() || (text.front() != '"' && text.front() != '\'' && text.front() != '['))) return {key, where, text};
  toml::table table;
  try {
    table = toml::parse("value = " + text + "\n");
  } catch (const toml::parse_error&) {
    return {key, where, text};  // refused by its type, with the key and what was expected
  }
  return {key, where, value_of(*table.get("value"), key, where)};
}

void require_consistent(const Recipe& r, const std::string& origin) {
  auto refuse_values = [&](const std::string& sentence, std::vector<ErrorRow> rows) {
    rows.insert(rows.begin(), {"where", origin});
    throw ConfigError("recipe: " + sentence, std::move(rows));
  };
  if (r.train.batch_size % r.train.grad_accumulation != 0)
    refuse_values(
        "the rows of a step cannot be cut into equal micro-batches",
        {{"train.batch_size", std::to_string(r.train.batch_size)}, {"train.grad_accumulation", std::to_string(r.train.grad_accumulation)}});
  if (r.optimizer.min_lr > r.optimizer.lr)
    refuse_values("the last learning rate is larger than the peak", {{"optimizer.lr", written(r.optimizer.lr)},
                                                                     {"optimizer.min_lr", written(r.optimizer.min_lr)},
                                                                     {"try", "set optimizer.min_lr as well"}});
  if (r.name.find_first_of("/\\") != std::string::npos || r.name == "." || r.name == "..")
    refuse_values("a run's name is one folder name", {{"name", r.name}});
}

}  // namespace

Recipe parse_recipe(const std::string& text, const std::string& origin, const std::vector<std::string>& settings) {
  std::vector<Given> all;
  collect(parse_toml(text, origin), "", origin, all);
  std::sort(all.begin(), all.end(),
            [](const Given& a, const Given& b) { return a.key == "model.family" && b.key != "model.family"; });  // options need it
  Recipe recipe;
  for (const std::string& setting : settings) {
    Given given = parse_setting(setting, recipe);
    all.insert(given.key == "model.family" ? all.begin() + (!all.empty() && all[0].key == "model.family" ? 1 : 0) : all.end(),
               std::move(given));
  }
  for (const Given& given : all) {
    assign(recipe, given);
    recipe.given.insert(given.key);
  }
  if (recipe.name.empty()) recipe.name = fs::path(origin).stem().string();
  require_consistent(recipe, origin);
  return recipe;
}

Recipe read_recipe(const std::string& path, const std::vector<std::string>& settings) {
  return parse_recipe(read_text_file(path, std::size_t{1} << 20), path, settings);
}

// --- the model --------------------------------------------------------------------------------------------------

std::string model_folder_of(const std::string& path) {
  if (fs::exists(fs::path(path) / "config.json")) return path;
  const fs::path latest = fs::path(path) / "checkpoints" / "latest";
  if (fs::exists(latest / "config.json")) return (fs::path(path) / "checkpoints" / fs::canonical(latest).filename()).string();
  throw FileError("recipe: no model to start from",
                  {{"looked for", path + "/config.json, " + (latest / "config.json").string()},
                   {"try", "paths are relative to the current directory, " + fs::current_path().string()}});
}

void resolve_model(Recipe& recipe, int64_t tokenizer_vocab) {
  if (!recipe.init_from.empty()) {
    recipe.init_from = model_folder_of(recipe.init_from);
    Recipe found = recipe;
    found.model = read_model_config(recipe.init_from);
    found.model.complete();
    if (recipe.model.vocab_size == kVocabOfTokenizer) recipe.model.vocab_size = found.model.vocab_size;
    for (const RecipeDifference& difference : recipe_differences(found, recipe))
      if (recipe.given.contains(difference.key))
        throw ConfigError(
            "recipe: a model key disagrees with the model to start from",
            {{"key", difference.key}, {"given", difference.after}, {recipe.init_from, difference.before}, {"try", "leave the key out"}});
    recipe.model = found.model;
  } else if (recipe.model.vocab_size == kVocabOfTokenizer) {
    recipe.model.vocab_size = tokenizer_vocab;
  }
  recipe.model.complete();
  checkpoint_layout(recipe.model);  // a model that cannot be saved is refused before its first step
  if (recipe.model.padded_vocab() < tokenizer_vocab)
    throw ConfigError("recipe: the tokenizer has more tokens than the model",
                      {{"tokenizer", recipe.data.tokenizer + ", " + std::to_string(tokenizer_vocab) + " tokens"},
                       {"model", std::to_string(recipe.model.padded_vocab()) + " tokens"}});
}

ModelConfig recipe_model_config(const std::string& path, const std::vector<std::string>& settings) {
  Recipe recipe = read_recipe(path, settings);
  int64_t vocab = 0;
  if (recipe.model.vocab_size == kVocabOfTokenizer && recipe.init_from.empty()) {
    const std::string& tokenizer = recipe.data.tokenizer;
    if (tokenizer != "bytes" && !fs::exists(tokenizer))
      throw FileError("recipe: the size of the vocabulary is that of a tokenizer which is not there",
                      {{"recipe", path}, {"data.tokenizer", tokenizer}, {"try", "--set model.vocab_size=N or --set data.tokenizer=FILE"}});
    vocab = open_tokenizer(tokenizer)->vocab_size();
  }
  resolve_model(recipe, vocab);
  return recipe.model;
}

// --- writing and comparing --------------------------------------------------------------------------------------

namespace {

struct KeyText {
  std::string key, value, meaning;
  bool allowed_on_resume;
};

// Every key of a recipe in the order of the table, the family's options behind the model's common keys.
std::vector<KeyText> all_keys(const Recipe& original) {
  Recipe recipe = original;
  std::vector<KeyText> out;
  auto add_options = [&] {
    for (const ModelOption& option : model_family(recipe.model.family).options) {
      const auto set = recipe.model.options.find(option.name);
      out.push_back({std::string("model.") + option.name, written(set == recipe.model.options.end() ? option.default_value : set->second),
                     option.meaning, false});
    }
  };
  std::string section;
  for (const Key& key : kKeys) {
    if (section == "model" && section_of(key.name) != "model") add_options();
    section = section_of(key.name);
    out.push_back({key.name, written(key.field(recipe)), key.meaning, key.allowed_on_resume});
  }
  return out;
}

}  // namespace

std::string to_toml(const Recipe& recipe) {
  std::string out, section;
  for (const KeyText& row : all_keys(recipe)) {
    if (const std::string now = section_of(row.key); now != section) {
      section = now;
      out += fmt::format("\n[{}]\n", section);
    }
    const std::string name = row.key.substr(section.empty() ? 0 : section.size() + 1);
    std::string line = name + " = " + row.value;
    line.resize(std::max<std::size_t>(line.size() + 2, 40), ' ');
    out += line + "# " + row.meaning + "\n";
  }
  return out;
}

std::vector<RecipeKeyHelp> recipe_keys() {
  std::vector<RecipeKeyHelp> out;
  Recipe defaults;
  for (const KeyText& row : all_keys(defaults)) {
    const Key* key = find_key(row.key);
    std::string type = key == nullptr ? "number" : type_name(key->field(defaults)), meaning = row.meaning;
    if (key != nullptr)
      if (const auto choices = choices_of(*key); !choices.empty()) type = joined(choices, "|");
    if (row.key == "initial_state")
      for (const InitialStateStrategy& strategy : initial_state_strategies())
        meaning += fmt::format("; {}: {}", strategy.name, strategy.meaning);
    out.push_back({row.key, type, row.value, meaning});
  }
  return out;
}

std::vector<RecipeDifference> recipe_differences(const Recipe& before, const Recipe& after) {
  const auto left = all_keys(before), right = all_keys(after);
  std::vector<RecipeDifference> out;
  if (before.model.family != after.model.family)
    return {{"model.family", toml_text(before.model.family), toml_text(after.model.family), false}};
  for (std::size_t i = 0; i < left.size(); ++i)
    if (left[i].value != right[i].value) out.push_back({left[i].key, left[i].value, right[i].value, left[i].allowed_on_resume});
  return out;
}

}  // namespace longhand
