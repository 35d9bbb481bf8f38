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
#include "core/plain_text.h"
#include "data/tokenizer.h"
#include "models/checkpoint.h"
#include "models/model_family.h"
#include "models/model_place.h"
#include "models/recompute_plan.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
constexpr std::size_t kLargestFile = 1 << 20;
using Files = std::vector<std::string>;
using Field = std::variant<bool*, int64_t*, double*, std::string*, Files*>;

constexpr double kAny = std::numeric_limits<double>::infinity();
constexpr int64_t kVocabOfTokenizer = 0;
constexpr const char *kExtends = "extends", *kFamilyKey = "model.family";

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
    {"initial_state_options.sigma", FIELD(initial_state_options.sigma), "random-noise: standard deviation of every element", 0, 1e6},
    {"initial_state_options.statistics_per", FIELD(initial_state_options.statistics_per),
     "fitted-noise: a mean and deviation per head, tensors without heads being one; or per channel of these", -kAny, kAny, "head|channel"},
    {"initial_state_options.statistics_decay", FIELD(initial_state_options.statistics_decay),
     "fitted-noise: by which a final state's weight falls with every step; 1: all of the run count the same, 0: only the last step", 0, 1},

    {"model.family", FIELD(model.family), "kind of model"},
    {"model.d_model", FIELD(model.d_model), "width of the residual stream", 1},
    {"model.n_layer", FIELD(model.n_layer), "layers", 1},
    {"model.vocab_size", FIELD(model.vocab_size), "tokens; 0: as many as the tokenizer has", 0},
    {"model.pad_vocab_size_multiple", FIELD(model.pad_vocab_size_multiple), "rows of the embedding are rounded up to this", 1},
    {"model.tie_embeddings", FIELD(model.tie_embeddings), "the head is the embedding"},
    {"model.norm_eps", FIELD(model.norm_eps), "added to the mean square in every norm", 0},

    {"data.task", FIELD(data.task), "what rows are made of: text, or samples of a task (docs/tasks.md), of which only the answers count"},
    {"data.files", FIELD(data.files), "training text: shards, token caches, folders of them; relative to the current directory"},
    {"data.val_files", FIELD(data.val_files), "held-out text, likewise"},
    {"data.tokenizer", FIELD(data.tokenizer), "bytes, letters:N (for the task copy), or the path of a tokenizer.json"},
    {"data.arrangement", FIELD(data.arrangement), "packed: shuffled rows; streams: row b goes on where row b of the batch before ended",
     -kAny, kAny, "packed|streams"},
    {"data.stream_unit", FIELD(data.stream_unit), "streams: a row is documents one after the other (packed), or one document at a time",
     -kAny, kAny, "packed|document"},
    {"data.threads", FIELD(data.threads), "tokenising threads; 0: none in the background", 0, 1024, nullptr, true},
    {"data.shuffle_rows", FIELD(data.shuffle_rows), "rows shuffled together; 0: as many as 4 Mi tokens hold", 0},
    {"data.skip_bad_lines", FIELD(data.skip_bad_lines), "leave bad lines out and count them, instead of stopping", -kAny, kAny, nullptr,
     true},

    {"task.min_length", FIELD(task.min_length),
     "copy: letters of the shortest words, 0: 8; passkey: tokens of the shortest samples, 0: max_length", 0},
    {"task.max_length", FIELD(task.max_length),
     "copy: letters of the longest words, 0: 50; passkey: tokens of the longest samples, 0: a row", 0},
    {"task.variant", FIELD(task.variant), "copy: what is asked for", -kAny, kAny, "copy|prefix-ngram|suffix-ngram"},
    {"task.ngram", FIELD(task.ngram), "copy: letters of the n-grams", 1},
    {"task.answer_length", FIELD(task.answer_length), "copy: letters of the answer; 0: all", 0},
    {"task.digits", FIELD(task.digits), "passkey: digits of the key; 0: a number from 1 to 50000", 0, 18},
    {"task.babi", FIELD(task.babi), "babilong: bAbI files; every sample takes one of them"},
    {"task.book_set", FIELD(task.book_set), "babilong: only documents of data.files with this meta.pile_set_name; empty: all"},
    {"task.lengths", FIELD(task.lengths), "babilong: lengths such as 0k, 16k (k is 1000 tokens); every sample takes one of them; none: 0k"},

    {"train.steps", FIELD(train.steps), "optimizer steps", 1, kAny, nullptr, true},
    {"train.batch_size", FIELD(train.batch_size), "rows of one optimizer step", 1},
    {"train.length", FIELD(train.length), "tokens of a row", 1},
    {"train.grad_accumulation", FIELD(train.grad_accumulation), "micro-batches that the rows of a step are cut into, to save memory", 1},
    {"train.dtype", FIELD(train.dtype), "compute type; auto: bf16 on a GPU, f32 on the CPU", -kAny, kAny, "auto|f32|bf16"},
    {"train.graph", FIELD(train.graph), "on a GPU, record a step as a graph and replay it: the same bits, less work for the host", -kAny,
     kAny, nullptr, true},
    {"train.shard_optimizer", FIELD(train.shard_optimizer),
     "of several processes each keeps the moments of, and updates, a part of the weights; false: each does all of it", -kAny, kAny, nullptr,
     true},
    {"train.overlap", FIELD(train.overlap),
     "several processes sum their gradients while backward still runs; false: after it, to see what that hides", -kAny, kAny, nullptr,
     true},
    {"train.recompute", FIELD(train.recompute),
     "what a backward makes again instead of keeping it, to save memory, with the same bits: none; light: convolutions, gates, "
     "in f32 norms; projections: these too; full: layers; or by layers, light:20,full:4; auto: as little as memory_gib allows",
     -kAny, kAny, nullptr, true},
    {"train.memory_gib", FIELD(train.memory_gib), "memory of the device for recompute = auto and for --batch auto; 0: all that is free", 0,
     kAny, nullptr, true},
    {"train.log_every", FIELD(train.log_every), "steps between lines of metrics.jsonl", 1, kAny, nullptr, true},
    {"train.checkpoint_every", FIELD(train.checkpoint_every), "steps between checkpoints; 0: only at the end", 0, kAny, nullptr, true},
    {"train.keep_last", FIELD(train.keep_last), "newest checkpoints that are kept; 0: all", 0, kAny, nullptr, true},
    {"train.keep_every", FIELD(train.keep_every), "checkpoints of steps that are multiples of this are kept as well; 0: none", 0, kAny,
     nullptr, true},
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

// What a text may be; empty: anything. Three keys choose from tables that other files own.
std::vector<std::string> choices_of(const Key& key) {
  std::vector<std::string> known;
  if (key.name == std::string_view("initial_state")) {
    for (const InitialStateStrategy& strategy : initial_state_strategies()) known.emplace_back(strategy.name);
  } else if (key.name == std::string_view("data.task")) {
    known.emplace_back(kTextRows);
    for (const TaskKind& task : task_kinds()) known.emplace_back(task.name);
  } else if (key.name == std::string_view(kFamilyKey)) {
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
  std::vector<std::string> names{kExtends};
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
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
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
  if (std::isfinite(value) && value >= key.low && value <= key.high) return;
  std::string range = fmt::format("at least {}", written(key.low));
  if (std::isinf(key.high)) range += ", finite";
  else range += fmt::format(", at most {}", written(key.high));
  refuse(given, "a value out of range", {{"given", written(given.value)}, {"expected", range}});
}

void require_choice(const Given& given, const Key& key, const std::string& value) {
  const auto known = choices_of(key);
  if (known.empty() || std::find(known.begin(), known.end(), value) != known.end()) return;
  refuse(given, "an unknown choice",
         {{"given", toml_text(value)}, {"known", joined(known, ", ")}, {"nearest", nearest_name(value, known)}});
}

void require_utf8(const Given& given) {
  const auto* text = std::get_if<std::string>(&given.value);
  const auto* files = std::get_if<Files>(&given.value);
  if ((text == nullptr || is_utf8(*text)) && (files == nullptr || std::all_of(files->begin(), files->end(), is_utf8))) return;
  refuse(given, "a text that is not UTF-8",
         {{"because", "a recipe is, and a run keeps its own"}, {"try", "another name, or a link to the file"}});
}

void assign(Recipe& recipe, const Given& given) {
  require_utf8(given);
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

// A file, and what to say behind its name in messages: which file extends it.
struct Origin {
  std::string file, remark;
};

std::string place(const Origin& origin, const toml::source_region& source) {
  return fmt::format("{}:{}:{}{}", origin.file, source.begin.line, source.begin.column, origin.remark);
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

toml::table parse_toml(const std::string& text, const Origin& origin) {
  try {
    return toml::parse(text);
  } catch (const toml::parse_error& error) {
    throw ConfigError("recipe: the file is not TOML",
                      {{"where", place(origin, error.source())}, {"reason", std::string(error.description())}});
  }
}

void collect(const toml::table& table, const std::string& prefix, const Origin& origin, std::vector<Given>& out) {
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

// The keys of a recipe: first those of the recipes that it extends, so that its own, being later, win.
void collect_extended(const std::string& text, const Origin& origin, std::vector<fs::path>& chain, std::vector<Given>& out) {
  toml::table table = parse_toml(text, origin);
  if (const toml::node* extends = table.get(kExtends)) {
    const std::string where = place(origin, extends->source());
    const auto name = extends->value_exact<std::string>();
    if (!name) throw ConfigError("recipe: a value of the wrong type", {{"where", where}, {"key", kExtends}, {"expected", "text"}});
    const fs::path path = (fs::path(origin.file).parent_path() / *name).lexically_normal();
    if (!fs::is_regular_file(path))
      throw ConfigError("recipe: the recipe to extend is not there",
                        {{"where", where}, {"looked for", path.string()}, {"try", "a path relative to " + origin.file}});
    const fs::path real = fs::canonical(path);
    if (std::find(chain.begin(), chain.end(), real) != chain.end())
      throw ConfigError("recipe: recipes extend each other in a circle", {{"where", where}, {"extends", path.string()}});
    chain.push_back(real);
    collect_extended(read_text_file(path.string(), kLargestFile), {path.string(), ", which " + origin.file + " extends"}, chain, out);
    std::erase_if(out, [](const Given& given) { return given.key == "name"; });  // each recipe has its own
    table.erase(kExtends);
  }
  collect(table, "", origin, out);
}

// "a.b=value": texts may stand without quotes, everything else is written as in TOML.
Given parse_setting(const std::string& setting, Recipe& recipe) {
  const std::string where = "--set " + setting;
  const auto equals = setting.find('=');
  if (equals == std::string::npos || equals == 0)
    throw ConfigError("recipe: a setting is not key=value", {{"where", where}, {"try", "--set train.steps=100"}});
  const std::string key = setting.substr(0, equals), text = setting.substr(equals + 1);
  if (key == kExtends) throw ConfigError("recipe: only a file can extend a recipe", {{"where", where}});
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

// A key of [task] or [data] that the rows of the run have no use for is never what was meant. Keys that were given with their default say
// nothing: the config.toml of a run gives all of them.
void require_keys_of_task(const Recipe& r, const std::string& origin) {
  const TaskKind* kind = nullptr;
  for (const TaskKind& task : task_kinds())
    if (r.data.task == task.name) kind = &task;
  const bool is_copy = kind != nullptr && r.data.task == std::string_view("copy");
  const auto is_read = [&](const std::string& key) {
    if (key == "data.val_files" || key == "data.shuffle_rows" || key == "data.skip_bad_lines" || key == "data.stream_unit")
      return kind == nullptr;
    if (key == "data.files") return kind == nullptr || kind->reads_files;
    if (section_of(key) != "task") return true;
    if (is_copy && key == "task.ngram" && r.task.variant == "copy") return false;
    return kind != nullptr && std::string_view(kind->settings).find(" " + key.substr(5) + " ") != std::string_view::npos;
  };
  Recipe given = r, defaults;
  for (const Key& key : kKeys) {
    if (is_read(key.name) || !r.given.contains(key.name)) continue;
    const std::string value = written(key.field(given));
    if (value == written(key.field(defaults))) continue;
    throw ConfigError("recipe: a key that this task does not look at", {{"where", origin},
                                                                        {"key", key.name},
                                                                        {"given", value},
                                                                        {"data.task", r.data.task},
                                                                        {"meaning", key.meaning},
                                                                        {"try", "leave the key out"}});
  }
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
  constexpr int64_t kMostTokens = int64_t{1} << 31;
  if (r.train.batch_size > kMostTokens / (r.train.length + 1))
    refuse_values("a step of too many tokens", {{"train.batch_size", std::to_string(r.train.batch_size)},
                                                {"train.length", std::to_string(r.train.length)},
                                                {"expected", fmt::format("at most {} together", kMostTokens)}});
  if (r.optimizer.min_lr > r.optimizer.lr)
    refuse_values("the last learning rate is larger than the peak", {{"optimizer.lr", written(r.optimizer.lr)},
                                                                     {"optimizer.min_lr", written(r.optimizer.min_lr)},
                                                                     {"try", "set optimizer.min_lr as well"}});
  for (const InitialStateStrategy& strategy : initial_state_strategies())
    if (r.initial_state == strategy.name && strategy.arrangement != nullptr && r.data.arrangement != strategy.arrangement)
      refuse_values("this initial state needs another arrangement of the data", {{"initial_state", r.initial_state},
                                                                                 {"data.arrangement", r.data.arrangement},
                                                                                 {"expected", strategy.arrangement},
                                                                                 {"because", strategy.because}});
  require_keys_of_task(r, origin);
  if (r.name.find_first_of("/\\") != std::string::npos || r.name == "." || r.name == "..")
    refuse_values("a run's name is one folder name", {{"name", r.name}});
}

}  // namespace

Recipe parse_recipe(const std::string& text, const std::string& origin, const std::vector<std::string>& settings) {
  std::vector<Given> all;
  std::vector<fs::path> chain{fs::weakly_canonical(origin)};
  collect_extended(text, {origin, ""}, chain, all);
  Recipe recipe;
  for (const std::string& setting : settings) all.push_back(parse_setting(setting, recipe));
  std::stable_partition(all.begin(), all.end(), [](const Given& given) { return given.key == kFamilyKey; });  // options need it
  const auto after_family = std::find_if(all.begin(), all.end(), [](const Given& given) { return given.key != kFamilyKey; });
  for (auto given = all.begin(); given != after_family; ++given) assign(recipe, *given);
  model_family(recipe.model.family).defaults(recipe.model);
  for (auto given = after_family; given != all.end(); ++given) assign(recipe, *given);
  for (const Given& given : all) recipe.given.insert(given.key);
  if (recipe.name.empty()) recipe.name = fs::path(origin).stem().string();
  require_consistent(recipe, origin);
  return recipe;
}

std::vector<std::string> unread_keys(const Recipe& recipe) {
  const InitialStateStrategy* strategy = nullptr;
  for (const InitialStateStrategy& known : initial_state_strategies())
    if (recipe.initial_state == known.name) strategy = &known;
  const auto reason = [&](const std::string& key) -> std::string {
    const std::string section = section_of(key), name = key.substr(key.find('.') + 1);
    if (section == "initial_state_options" && strategy != nullptr &&
        std::string_view(strategy->options).find(" " + name + " ") == std::string_view::npos)
      return "with initial_state = " + recipe.initial_state;
    if ((key == "train.val_every" || key == "train.val_batches") && recipe.data.val_files.empty() && recipe.data.task == kTextRows)
      return "without data.val_files";
    if (key == "data.stream_unit" && recipe.data.arrangement != "streams") return "with data.arrangement = " + recipe.data.arrangement;
    return "";
  };
  Recipe given = recipe, defaults;
  std::vector<std::string> unread;
  for (const Key& key : kKeys)
    if (const std::string why = reason(key.name);
        !why.empty() && recipe.given.contains(key.name) && written(key.field(given)) != written(key.field(defaults)))
      unread.push_back(std::string(key.name) + ", " + why);
  return unread;
}

Recipe read_recipe(const std::string& path, const std::vector<std::string>& settings) {
  return parse_recipe(read_text_file(path, kLargestFile), path, settings);
}

// --- the model --------------------------------------------------------------------------------------------------

void resolve_model(Recipe& recipe, int64_t tokenizer_vocab) {
  if (!recipe.init_from.empty()) {
    recipe.init_from = find_model(recipe.init_from).model_folder;
    Recipe found = recipe;
    found.model = read_model_config(recipe.init_from);
    found.model.complete();
    if (recipe.model.vocab_size == kVocabOfTokenizer) recipe.model.vocab_size = found.model.vocab_size;
    if (found.model.family != recipe.model.family)  // then no other model key means anything
      for (const std::string& key : recipe.given)
        if (section_of(key) == "model")
          throw ConfigError("recipe: a model key for a model of another family", {{"key", key},
                                                                                  {"family", recipe.model.family},
                                                                                  {recipe.init_from, found.model.family},
                                                                                  {"try", "leave the model's keys out"}});
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
  if (recipe.train.recompute != kAutomaticRecompute) (void)parse_recompute_plan(recipe.train.recompute, recipe.model.n_layer);
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
    if (!is_built_in_tokenizer(tokenizer) && !fs::exists(tokenizer))
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

std::vector<KeyText> option_keys(const ModelConfig& model) {
  std::vector<KeyText> out;
  for (const ModelOption& option : model_family(model.family).options) {
    const auto set = model.options.find(option.name);
    out.push_back({std::string("model.") + option.name, written(set == model.options.end() ? option.default_value : set->second),
                   option.meaning, false});
  }
  return out;
}

// Every key of a recipe in the order of the table, `options` behind the model's common keys.
std::vector<KeyText> all_keys(const Recipe& original, const std::vector<KeyText>& options) {
  Recipe recipe = original;
  std::vector<KeyText> out;
  std::string section;
  for (const Key& key : kKeys) {
    if (section == "model" && section_of(key.name) != "model") out.insert(out.end(), options.begin(), options.end());
    section = section_of(key.name);
    out.push_back({key.name, written(key.field(recipe)), key.meaning, key.allowed_on_resume});
  }
  return out;
}

std::vector<KeyText> all_keys(const Recipe& recipe) {
  return all_keys(recipe, option_keys(recipe.model));
}

// "8 (mamba1), 16 (mamba2)", or the value alone where every family has the same.
std::string default_by_family(const Key& key) {
  std::vector<std::string> values, named;
  for (const ModelFamily* family : model_families()) {
    Recipe recipe;
    family->defaults(recipe.model);
    values.push_back(written(key.field(recipe)));
    named.push_back(values.back() + " (" + family->name + ")");
  }
  return std::count(values.begin(), values.end(), values[0]) == std::ssize(values) ? values[0] : joined(named, ", ");
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
  std::vector<RecipeKeyHelp> out{
      {kExtends, "text", "\"\"", "recipe whose keys, all but its name, come before these; a path relative to this file"}};
  std::vector<KeyText> options;
  for (const ModelFamily* family : model_families())
    for (KeyText row : option_keys(default_config(family->name))) {
      row.meaning = std::string(family->name) + ": " + row.meaning;
      options.push_back(std::move(row));
    }
  Recipe defaults;
  for (const KeyText& row : all_keys(defaults, options)) {
    const Key* key = find_key(row.key);
    std::string type = key == nullptr ? "number" : type_name(key->field(defaults)), meaning = row.meaning;
    if (key != nullptr)
      if (const auto choices = choices_of(*key); !choices.empty()) type = joined(choices, "|");
    if (row.key == "initial_state")
      for (const InitialStateStrategy& strategy : initial_state_strategies())
        meaning += fmt::format("; {}: {}", strategy.name, strategy.meaning);
    out.push_back({row.key, type, key != nullptr && section_of(row.key) == "model" ? default_by_family(*key) : row.value, meaning});
  }
  return out;
}

std::vector<RecipeDifference> recipe_differences(const Recipe& before, const Recipe& after) {
  const auto left = all_keys(before), right = all_keys(after);
  std::vector<RecipeDifference> out;
  if (before.model.family != after.model.family)
    return {{kFamilyKey, toml_text(before.model.family), toml_text(after.model.family), false}};
  for (std::size_t i = 0; i < left.size(); ++i)
    if (left[i].value != right[i].value) out.push_back({left[i].key, left[i].value, right[i].value, left[i].allowed_on_resume});
  return out;
}

}  // namespace longhand
