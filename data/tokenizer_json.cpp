// Reads tokenizer.json; see tokenizer_json.h. Each slot of the file has one function, in the order of the file.
#include "data/tokenizer_json.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/files.h"
#include "data/unicode.h"

namespace longhand {
namespace {

using Json = nlohmann::json;

// Limits far above any real vocabulary; they bound memory when a file is damaged or hostile.
constexpr std::size_t kMaxFileBytes = std::size_t{256} << 20;
constexpr std::size_t kMaxTokens = std::size_t{1} << 22;
constexpr std::size_t kMaxAddedBytes = std::size_t{1} << 14;
constexpr std::size_t kMaxShownBytes = 60;
constexpr int kMaxDepth = 16;

// The file being read: names it in every error.
struct Source {
  std::string path;

  [[noreturn]] void refuse(const std::string& where, const std::string& sentence, const std::string& actual,
                           const std::string& expected) const {
    throw FileError("tokenizer: " + sentence, {{"file", path}, {"place", where}, {"actual", actual}, {"expected", expected}});
  }
};

// A value as an error shows it: cut, if it is long.
std::string shown(const Json& value) {
  if (value.is_object() && value.contains("type")) return "type " + shown(value["type"]);
  if (value.is_structured()) return fmt::format("{} of {}", value.type_name(), value.size());
  std::string text = value.dump();
  if (text.size() > kMaxShownBytes) text = replace_invalid_utf8(text.substr(0, kMaxShownBytes)) + " ...";
  return text;
}

const Json& field(const Source& source, const Json& object, const std::string& where, const std::string& key) {
  if (!object.contains(key)) source.refuse(where, "a key is missing", "no \"" + key + "\"", "\"" + key + "\"");
  return object[key];
}

std::string join(const std::string& where, const std::string& key) {
  return where.empty() ? key : where + "." + key;
}

bool read_flag(const Source& source, const Json& object, const std::string& where, const std::string& key) {
  const Json& value = field(source, object, where, key);
  if (!value.is_boolean()) source.refuse(join(where, key), "a setting has the wrong type", shown(value), "true or false");
  return value.get<bool>();
}

std::string read_text(const Source& source, const Json& value, const std::string& where) {
  if (!value.is_string() || value.get_ref<const std::string&>().empty())
    source.refuse(where, "a token has the wrong type", shown(value), "a string that is not empty");
  return value.get<std::string>();
}

int32_t read_id(const Source& source, const Json& value, const std::string& where) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() >= kMaxTokens)
    source.refuse(where, "an id is out of range", shown(value), fmt::format("a whole number from 0 to {}", kMaxTokens - 1));
  return value.get<int32_t>();
}

void require_object(const Source& source, const Json& value, const std::string& where) {
  if (!value.is_object()) source.refuse(where, "a part of the file has the wrong type", shown(value), "an object");
}

// Refuses a key that nobody here understands: it may change what the file means.
void require_known_keys(const Source& source, const Json& object, const std::string& where, const std::vector<std::string>& known) {
  std::string list;
  for (const auto& key : known) list += (list.empty() ? "only " : ", ") + key;
  for (const auto& [key, value] : object.items())
    if (std::find(known.begin(), known.end(), key) == known.end())
      source.refuse(join(where, key), "an unknown setting", shown(value), list);
}

// Refuses a setting that differs from the only value supported; it may be left out.
void require_value(const Source& source, const Json& object, const std::string& where, const std::string& key,
                   const std::vector<Json>& allowed) {
  if (!object.contains(key)) return;
  if (std::find(allowed.begin(), allowed.end(), object[key]) == allowed.end())
    source.refuse(join(where, key), "a setting is not supported", shown(object[key]), allowed.front().dump());
}

void require_type(const Source& source, const Json& top, const std::string& slot, const std::string& type) {
  const Json& value = field(source, top, "the top level", slot);
  if (!value.is_object() || !value.contains("type") || value["type"] != type)
    source.refuse(slot, slot + " is of a kind that is not supported", shown(value), "type \"" + type + "\"");
}

Json parse_file(const Source& source) {
  const std::string text = read_text_file(source.path, kMaxFileBytes);

  // A key given twice would silently lose one of its values, and deep nesting belongs to no tokenizer.
  std::vector<std::unordered_set<std::string>> keys(kMaxDepth + 2);
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxDepth) source.refuse("the JSON text", "the file is nested too deeply", "", fmt::format("at most {} levels", kMaxDepth));
    if (event == Json::parse_event_t::object_start) keys[static_cast<std::size_t>(depth) + 1].clear();
    if (event == Json::parse_event_t::key && !keys[static_cast<std::size_t>(depth)].insert(parsed.get<std::string>()).second)
      source.refuse("the JSON text", "a key is there twice", shown(parsed), "different keys");
    return true;
  };
  try {
    return Json::parse(text, watch);
  } catch (const Json::parse_error& e) {
    throw FileError(
        "tokenizer: the file is not valid JSON",
        {{"file", source.path}, {"byte offset", std::to_string(e.byte > 0 ? e.byte - 1 : 0)}, {"reason", replace_invalid_utf8(e.what())}});
  } catch (const Json::exception& e) {  // for example a number that no double can hold
    throw FileError("tokenizer: the file is not valid JSON", {{"file", source.path}, {"reason", replace_invalid_utf8(e.what())}});
  }
}

void check_slots(const Source& source, const Json& top) {
  require_object(source, top, "the top level");
  require_known_keys(
      source, top, "",
      {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"});
  require_value(source, top, "", "version", {"1.0"});
  require_value(source, top, "", "truncation", {nullptr});
  require_value(source, top, "", "padding", {nullptr});
  require_type(source, top, "normalizer", "NFC");
  require_known_keys(source, top["normalizer"], "normalizer", {"type"});
  for (const std::string slot : {"pre_tokenizer", "post_processor", "decoder"}) {
    require_type(source, top, slot, "ByteLevel");
    require_known_keys(source, top[slot], slot, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
    require_value(source, top[slot], slot, "trim_offsets", {true, false});  // about character offsets only
  }
  // Only the pre-tokenizer acts on these two; post-processor and decoder merely carry them.
  if (read_flag(source, top["pre_tokenizer"], "pre_tokenizer", "add_prefix_space"))
    source.refuse("pre_tokenizer.add_prefix_space", "a setting is not supported", "true", "false");
  require_value(source, top["pre_tokenizer"], "pre_tokenizer", "use_regex", {true});
}

void check_model(const Source& source, const Json& model) {
  require_object(source, model, "model");
  require_value(source, model, "model", "type", {"BPE"});  // older files leave it out
  require_known_keys(source, model, "model",
                     {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
                      "ignore_merges", "vocab", "merges"});
  for (const char* key : {"dropout", "unk_token"}) require_value(source, model, "model", key, {nullptr});
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) require_value(source, model, "model", key, {nullptr, ""});
  for (const char* key : {"fuse_unk", "byte_fallback", "ignore_merges"}) require_value(source, model, "model", key, {false});
  require_object(source, field(source, model, "model", "vocab"), "model.vocab");
  const Json& merges = field(source, model, "model", "merges");
  if (!merges.is_array() || merges.size() > kMaxTokens)
    source.refuse("model.merges", "a part of the file has the wrong type", shown(merges),
                  fmt::format("an array of at most {}", kMaxTokens));
}

// Enters a token under its id; an id stands for one token.
void place_token(const Source& source, const std::string& where, int32_t id, const std::string& token, std::vector<std::string>& tokens) {
  if (tokens.size() <= static_cast<std::size_t>(id)) tokens.resize(static_cast<std::size_t>(id) + 1);
  std::string& slot = tokens[static_cast<std::size_t>(id)];
  if (!slot.empty() && slot != token)
    source.refuse(where, "an id stands for two tokens", fmt::format("id {} is {} and {}", id, Json(slot).dump(), Json(token).dump()),
                  "one token for each id");
  slot = token;
}

using Vocab = std::unordered_map<std::string, int32_t>;

Vocab read_vocab(const Source& source, const Json& json, std::vector<std::string>& tokens) {
  Vocab vocab;
  vocab.reserve(json.size());
  for (const auto& [token, id_json] : json.items()) {
    const std::string where = "model.vocab." + token;
    if (token.empty()) source.refuse(where, "a token is empty", "\"\"", "at least one character");
    const int32_t id = read_id(source, id_json, where);
    place_token(source, where, id, token, tokens);
    vocab.emplace(token, id);
  }
  return vocab;
}

std::array<int32_t, 256> find_byte_ids(const Vocab& vocab) {
  std::array<int32_t, 256> ids;
  for (unsigned byte = 0; byte < 256; ++byte) {
    std::string symbol;
    append_utf8(byte_symbol(static_cast<uint8_t>(byte)), symbol);
    const auto found = vocab.find(symbol);
    ids[byte] = found == vocab.end() ? -1 : found->second;
  }
  return ids;
}

// A merge is "left right" or ["left", "right"].
std::pair<std::string, std::string> read_merge_sides(const Source& source, const Json& json, const std::string& where) {
  const std::string expected = "\"left right\" or [\"left\", \"right\"]";
  if (json.is_array() && json.size() == 2) return {read_text(source, json[0], where), read_text(source, json[1], where)};
  if (!json.is_string()) source.refuse(where, "a merge has the wrong form", shown(json), expected);
  const auto& text = json.get_ref<const std::string&>();
  const std::size_t space = text.find(' ');
  if (space == std::string::npos || space == 0 || space + 1 == text.size() || text.find(' ', space + 1) != std::string::npos)
    source.refuse(where, "a merge has the wrong form", shown(json), expected);
  return {text.substr(0, space), text.substr(space + 1)};
}

std::vector<BpeDefinition::Merge> read_merges(const Source& source, const Json& json, const Vocab& vocab) {
  std::vector<BpeDefinition::Merge> merges;
  std::unordered_set<uint64_t> pairs;
  pairs.reserve(json.size());
  for (std::size_t rank = 0; rank < json.size(); ++rank) {
    const std::string where = fmt::format("model.merges[{}]", rank);
    const auto [left, right] = read_merge_sides(source, json[rank], where);
    const auto id_of = [&](const std::string& token) {
      const auto found = vocab.find(token);
      if (found == vocab.end()) source.refuse(where, "a merge names an unknown token", shown(Json(token)), "a token of model.vocab");
      return found->second;
    };
    const BpeDefinition::Merge merge{id_of(left), id_of(right), id_of(left + right)};
    if (!pairs.insert(static_cast<uint64_t>(merge.left) << 32 | static_cast<uint32_t>(merge.right)).second)
      source.refuse(where, "a merge is there twice", shown(json[rank]), "different merges");
    merges.push_back(merge);
  }
  return merges;
}

BpeDefinition::AddedToken read_added_token(const Source& source, const Json& json, const std::string& where) {
  require_object(source, json, where);
  require_known_keys(source, json, where, {"id", "content", "special", "normalized", "single_word", "lstrip", "rstrip"});
  for (const std::string key : {"single_word", "lstrip", "rstrip"})
    if (read_flag(source, json, where, key)) source.refuse(where + "." + key, "a setting is not supported", "true", "false");
  return {.id = read_id(source, field(source, json, where, "id"), where + ".id"),
          .content = read_text(source, field(source, json, where, "content"), where + ".content"),
          .special = read_flag(source, json, where, "special"),
          .normalized = read_flag(source, json, where, "normalized")};
}

std::vector<BpeDefinition::AddedToken> read_added_tokens(const Source& source, const Json& json, const Vocab& vocab,
                                                         std::vector<std::string>& tokens) {
  if (!json.is_array()) source.refuse("added_tokens", "a part of the file has the wrong type", shown(json), "an array");
  std::vector<BpeDefinition::AddedToken> added;
  std::unordered_set<std::string> contents;
  std::size_t total_bytes = 0;
  for (std::size_t i = 0; i < json.size(); ++i) {
    const std::string where = fmt::format("added_tokens[{}]", i);
    auto token = read_added_token(source, json[i], where);
    if (!contents.insert(token.content).second)
      source.refuse(where, "an added token is there twice", Json(token.content).dump(), "different tokens");
    if (const auto found = vocab.find(token.content); found != vocab.end() && found->second != token.id)
      source.refuse(where, "a token has two ids", fmt::format("{} is {} and {}", Json(token.content).dump(), token.id, found->second),
                    "the id it has in model.vocab");
    total_bytes += token.content.size();
    if (total_bytes > kMaxAddedBytes)
      source.refuse(where, "the added tokens are too long", fmt::format("{} bytes", total_bytes),
                    fmt::format("at most {} bytes", kMaxAddedBytes));
    place_token(source, where, token.id, token.content, tokens);
    added.push_back(std::move(token));
  }
  return added;
}

}  // namespace

BpeDefinition read_tokenizer_json(const std::string& path) {
  const Source source{path};
  const Json top = parse_file(source);
  check_slots(source, top);
  const Json& model = field(source, top, "the top level", "model");
  check_model(source, model);

  BpeDefinition definition;
  definition.name = std::filesystem::path(path).filename().string();
  const Vocab vocab = read_vocab(source, model["vocab"], definition.tokens);
  definition.byte_ids = find_byte_ids(vocab);
  definition.merges = read_merges(source, model["merges"], vocab);
  definition.added = read_added_tokens(source, field(source, top, "the top level", "added_tokens"), vocab, definition.tokens);
  return definition;
}

}  // namespace longhand
