// See readers.h.
#include "tests/fuzz/readers.h"

#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "core/error.h"
#include "core/files.h"
#include "core/pickle.h"
#include "core/safetensors.h"
#include "core/tensor.h"
#include "core/torch_file.h"
#include "core/zip_archive.h"
#include "data/bpe_tokenizer.h"
#include "data/cursor.h"
#include "data/document_source.h"
#include "data/json_line.h"
#include "data/shard_reader.h"
#include "data/token_cache.h"
#include "data/tokenizer.h"
#include "data/unicode.h"
#include "models/checkpoint.h"
#include "models/model_config.h"
#include "models/recurrent_state.h"
#include "train/recipe.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;

void promise(bool kept, const char* what) {
  if (!kept) throw std::logic_error(what);
}

std::string text_in(const std::string& path) {
  return read_text_file(path);
}
void put(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// Every byte of every tensor is touched: a view that reaches outside its file would be seen.
void touch(const NamedTensors& tensors) {
  volatile unsigned sum = 0;
  for (const auto& [name, tensor] : tensors.tensors) {
    const auto* bytes = static_cast<const unsigned char*>(tensor.numel() == 0 ? nullptr : tensor.contiguous().raw());
    for (int64_t i = 0; i < tensor.numel() * size_of(tensor.dtype()); ++i) sum = sum + bytes[i];
  }
}

std::map<std::string, Tensor> sample_tensors() {
  const Device cpu = Device::cpu();
  return {{"a.weight", Tensor::from(cpu, {2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6})},
          {"b", Tensor::from(cpu, {3}, std::vector<double>{1, 2, 3})},
          {"empty", Tensor::from(cpu, {0, 4}, std::vector<float>{})}};
}

// --- tensors ------------------------------------------------------------------------------------------------------

void read_safetensors_file(const std::string& path) {
  touch(read_safetensors(path));
}
void write_safetensors_samples(const std::string& folder) {
  write_safetensors(folder + "/plain", sample_tensors(), {{"format", "pt"}});
  write_safetensors(folder + "/bf16", {{"x", sample_tensors().at("a.weight").to(Dtype::bf16)}});
  write_safetensors(folder + "/none", {});
}

void read_torch(const std::string& path) {
  touch(read_torch_file(path, Checksums::none));  // a wrong checksum would end most inputs at once
}
void write_torch_samples(const std::string& folder) {
  auto tensors = sample_tensors();
  tensors["tied"] = tensors.at("a.weight");
  write_torch_file(folder + "/plain", tensors);
  write_torch_file(folder + "/none", {});
}

int64_t count(const PickleValue& value) {
  int64_t n = 1;
  for (const PickleValue* item : value.items) n += count(*item);
  return n;
}
void read_pickle_file(const std::string& path) {
  const std::string bytes = text_in(path);
  const Pickle pickle = read_pickle(std::as_bytes(std::span(bytes)), path);
  if (pickle.root().depth <= 6) count(pickle.root());  // values may be shared: what a walk meets can be many times what is there
}
void write_pickle_samples(const std::string& folder) {
  write_torch_samples(folder + "/..");
  const ZipArchive archive{MappedFile(folder + "/../plain")};
  for (const auto& [name, entry] : archive.entries())
    if (name.ends_with("/data.pkl")) {
      const auto bytes = archive.bytes(entry);
      put(folder + "/tensors", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    }
  put(folder + "/dict", std::string("\x80\2}q\0(X\1\0\0\0wK\1X\1\0\0\0x\206q\1u.", 25));
  put(folder + "/list", std::string("\x80\2](K\1M\1\2J\1\2\3\4G@\0\0\0\0\0\0\0\x88\x89Ne.", 28));
}

// --- text ---------------------------------------------------------------------------------------------------------

void read_tokenizer(const std::string& path) {
  const auto tokenizer = open_tokenizer(path);
  std::vector<int32_t> ids;
  tokenizer->encode("low lower  l\xC3\xB6w<|endoftext|>\n", ids);
  for (const int32_t id : ids) promise(id >= 0 && id < tokenizer->vocab_size(), "tokenizer: an id outside the vocabulary");
  tokenizer->decode(ids);
}
void write_tokenizer_samples(const std::string& folder) {
  nlohmann::ordered_json vocab = nlohmann::ordered_json::object(), merges = nlohmann::ordered_json::array();
  for (int byte = 0; byte < 256; ++byte) {
    std::string symbol;
    append_utf8(byte_symbol(static_cast<uint8_t>(byte)), symbol);
    vocab[symbol] = byte;
  }
  int id = 256;
  for (const auto& [left, right] : std::vector<std::pair<std::string, std::string>>{{"l", "o"}, {"lo", "w"}}) {
    vocab[left + right] = id++;
    merges.push_back(left + " " + right);
  }
  const nlohmann::ordered_json level{{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}};
  nlohmann::ordered_json end{{"id", id}, {"content", "<|endoftext|>"}};
  for (const char* key : {"single_word", "lstrip", "rstrip", "normalized"}) end[key] = false;
  end["special"] = true;
  const nlohmann::ordered_json json{
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", nlohmann::ordered_json::array({end})},
      {"normalizer", {{"type", "NFC"}}},
      {"pre_tokenizer", level},
      {"post_processor", level},
      {"decoder", level},
      {"model",
       {{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", nullptr}, {"fuse_unk", false}, {"vocab", vocab}, {"merges", merges}}}};
  put(folder + "/small", json.dump());
}

void read_config(const std::string& path) {
  read_model_config(fs::path(path).parent_path().string());
}
void write_config_samples(const std::string& folder) {
  for (const char* family : {"mamba1", "mamba2", "gla"}) {
    ModelConfig config = default_config(family);
    config.d_model = 64, config.n_layer = 1, config.vocab_size = 32;
    config.complete();
    LanguageModel model(config, Device::cpu(), Dtype::f32);
    const std::string model_folder = folder + "-" + family;
    fs::create_directories(model_folder);
    save_model(model, model_folder);
    fs::copy_file(model_folder + "/config.json", folder + "/" + family);
    fs::remove_all(model_folder);
  }
}

void read_recipe_file(const std::string& path) {
  const std::string text = text_in(path);
  if (text.find("extends") != std::string::npos || text.find("init_from") != std::string::npos) return;  // would open other files
  Recipe recipe = parse_recipe(text, "recipe.toml");
  const std::string resolved = to_toml(recipe);
  promise(to_toml(parse_recipe(resolved, "again.toml")) == resolved, "recipe: written and read again it is another one");
}
void write_recipe_samples(const std::string& folder) {
  put(folder + "/all", to_toml(parse_recipe("[model]\nd_model = 64\n", "all.toml")));
  put(folder + "/gla", "seed = 3 # x\n[model]\nfamily = \"gla\"\nd_model = 16\n[train]\nsteps = 1_000\n[optimizer]\nlr = 3e-3\n");
  put(folder + "/inline", "data = {files = ['a', \"\\u0041\"], threads = 0x2}\ntrain.steps = 5\n");
}

void read_cursor(const std::string& path) {
  const DataCursor cursor = DataCursor::from_json(text_in(path));
  promise(DataCursor::from_json(cursor.to_json()) == cursor, "cursor: written and read again it is another one");
}
void write_cursor_samples(const std::string& folder) {
  DataCursor cursor;
  cursor.made_with = {{"rows", "4"}, {"length", "20"}};
  cursor.streams.push_back({true, true, {1, 0, 3, 17}});
  put(folder + "/streams", cursor.to_json());
  put(folder + "/new", DataCursor().to_json());
}

// --- data ---------------------------------------------------------------------------------------------------------

void read_documents(const std::string& path) {
  for (const bool skip : {true, false}) {
    BadLines bad;
    ShardOptions options{.skip_bad_lines = skip ? &bad : nullptr, .max_line_bytes = 1 << 16, .source = {.window_log = 20}};
    ShardReader reader(path, options);
    Document document;
    std::size_t bytes = 0;
    while (bytes < (std::size_t{64} << 20) && reader.next(document)) bytes += document.text.size() + 16;
  }
}
void read_shard(const std::string& path) {
  // A line that is taken must mean the same to another strict parser.
  const std::string text = text_in(path);
  JsonLine line;
  const std::string_view first = std::string_view(text).substr(0, text.find('\n'));
  if (!first.empty() && !parse_json_line(first, line)) {
    const auto json = nlohmann::json::parse(first, nullptr, false);
    promise(json.is_object() && json.contains("text") && json["text"] == line.text, "json line: another parser reads another text");
  }
  read_documents(path);
}
const std::string kLines =
    "{\"text\": \"h\\u00e9 \\ud83d\\ude00\\n\", \"meta\": {\"pile_set_name\": \"Local\"}}\n\r\n{\"x\": [1, -2.5e3, true, null, {}], "
    "\"text\": \"\"}\n";
void write_shard_samples(const std::string& folder) {
  put(folder + "/lines", kLines);
  put(folder + "/bad", "{\"text\": 3}\n{\"text\": \"b\"}");
}
std::string compressed(std::string_view text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}
void write_zstd_samples(const std::string& folder) {
  put(folder + "/one", compressed(kLines));
  put(folder + "/frames", compressed(kLines) + std::string("\x50\x2A\x4D\x18\2\0\0\0xy", 10) + compressed(kLines));
  std::string many;
  for (int i = 0; i < 50; ++i) many += "{\"text\": \"" + std::string(static_cast<std::size_t>(i * 7), 'a') + "\"}\n";
  put(folder + "/many", compressed(many));
}

void read_documents_of(const TokenCache& cache) {
  TokenDocument document;
  for (int64_t i = 0; i < cache.documents(); ++i) cache.read(i, document), cache.line_of(i);
  for (const CachedShard& shard : cache.shards())
    promise(shard.documents >= 0 && shard.first_document + shard.documents <= cache.documents(), "cache: a shard outside the documents");
}
// The file with the check sum that its tables ought to have, so that what lies behind that check is read as well (data/README.md).
std::string with_right_checksum(std::string bytes) {
  constexpr std::size_t kTail = 88, kCheckedTail = 64;
  if (bytes.size() < 16 + kTail) return bytes;
  char* tail = bytes.data() + bytes.size() - kTail;
  uint64_t numbers[3];  // version, bytes of a token, tokens
  std::memcpy(numbers, tail, sizeof numbers);
  const uint64_t tables_at = (16 + numbers[1] * numbers[2] + 7) / 8 * 8;
  if (tables_at > bytes.size() - kTail) return bytes;
  const std::string checked = bytes.substr(tables_at, bytes.size() - kTail + kCheckedTail - tables_at);
  uint64_t hash = 0xcbf29ce484222325u;
  for (std::size_t at = 0; at < checked.size(); at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, checked.data() + at, std::min<std::size_t>(8, checked.size() - at));
    hash = (hash ^ word) * 0x100000001b3u;
    hash ^= hash >> 29;
  }
  std::memcpy(tail + kCheckedTail, &hash, sizeof hash);
  return bytes;
}
void read_cache(const std::string& path) {
  const std::string sealed = path + ".sealed";
  put(sealed, with_right_checksum(text_in(path)));
  try {
    read_documents_of(TokenCache(sealed));
  } catch (const Error&) {
  }
  const TokenCache cache(path);
  read_documents_of(cache);
  cache.verify();
  promise(text_in(path) == text_in(sealed), "cache: a sound one has another check sum");
}
void write_cache_samples(const std::string& folder) {
  const std::string shard = folder + "-shard.jsonl";
  put(shard, "{\"text\": \"one two\"}\n{\"text\": \"\", \"meta\": {\"pile_set_name\": \"B\"}}\n{\"text\": \"three\"}\n");
  write_token_cache(folder + "/bytes", {shard}, open_tokenizer("bytes"), {});
  fs::remove(shard);
}

void read_state(const std::string& path) {
  const RecurrentState state = RecurrentState::load(path, Device::cpu());
  promise(state.rows() >= 0 && state.size_bytes() >= 0, "state: sizes below zero");
  if (!state.absent() && state.rows() > 0) state.select_rows({0});
}
void write_state_samples(const std::string& folder) {
  const Device cpu = Device::cpu();
  write_safetensors(folder + "/two-layers", {{"layers.0.ssm", Tensor::zeros(cpu, Dtype::f32, {2, 2, 2, 4})},
                                             {"layers.0.conv", Tensor::zeros(cpu, Dtype::f32, {2, 3, 4})},
                                             {"layers.1.ssm", Tensor::zeros(cpu, Dtype::f32, {2, 2, 2, 4})}});
}

constexpr Reader kReaders[] = {
    {"safetensors", "model.safetensors", read_safetensors_file, write_safetensors_samples},
    {"torch", "pytorch_model.bin", read_torch, write_torch_samples},
    {"pickle", "data.pkl", read_pickle_file, write_pickle_samples},
    {"tokenizer", "tokenizer.json", read_tokenizer, write_tokenizer_samples},
    {"config", "config.json", read_config, write_config_samples},
    {"recipe", "recipe.toml", read_recipe_file, write_recipe_samples},
    {"cursor", "cursor.json", read_cursor, write_cursor_samples},
    {"jsonl", "shard.jsonl", read_shard, write_shard_samples},
    {"zstd", "shard.jsonl.zst", read_documents, write_zstd_samples},
    {"cache", "shard.tokens", read_cache, write_cache_samples},
    {"state", "state.safetensors", read_state, write_state_samples},
};

}  // namespace

std::span<const Reader> readers() {
  return kReaders;
}

std::optional<std::string> read_bytes(const Reader& reader, const std::string& folder, std::string_view bytes) {
  const std::string path = folder + "/" + reader.file;
  put(path, bytes);
  try {
    reader.read(path);
    return std::nullopt;
  } catch (const Error& error) {
    return error.what();
  }
}

std::vector<std::string> samples_of(const Reader& reader, const std::string& folder) {
  const std::string here = folder + "/samples";
  fs::remove_all(here);
  fs::create_directories(here);
  reader.write_samples(here);
  std::vector<fs::path> paths;
  for (const auto& entry : fs::directory_iterator(here)) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<std::string> out;
  for (const fs::path& path : paths) out.push_back(text_in(path.string()));
  fs::remove_all(here);
  return out;
}

}  // namespace longhand::test
