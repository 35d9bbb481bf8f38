// See readers.h.
#include "tests/fuzz/readers.h"

#include <unistd.h>
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
#include "data/tasks/babi.h"
#include "data/tasks/lambada.h"
#include "data/token_cache.h"
#include "data/tokenizer.h"
#include "data/unicode.h"
#include "eval/run_folder.h"
#include "models/checkpoint.h"
#include "models/model_config.h"
#include "models/recurrent_state.h"
#include "models/weight_files.h"
#include "train/recipe.h"
#include "train/run_folder.h"
#include "train/trainer.h"
#include "train/training_loop.h"

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
    ShardReader reader(path, {.skip_bad_lines = skip ? &bad : nullptr});
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

// --- weights in several files -------------------------------------------------------------------------------------

void read_index(const std::string& path) {
  const std::string shard = fs::path(path).parent_path().string() + "/part-1.safetensors";
  write_safetensors(shard, sample_tensors());
  touch(read_tensor_file(path).stored);
}
void write_index_samples(const std::string& folder) {
  nlohmann::json map = nlohmann::json::object();
  for (const auto& [name, tensor] : sample_tensors()) map[name] = "part-1.safetensors";
  put(folder + "/plain", nlohmann::json{{"metadata", {{"total_size", 48}}}, {"weight_map", map}}.dump());
}

// --- tasks --------------------------------------------------------------------------------------------------------

void read_babi_file(const std::string& path) {
  for (const BabiSample& sample : read_babi(path))
    for (const int64_t fact : sample.supporting)
      promise(fact >= 0 && fact < std::ssize(sample.facts), "babi: a supporting fact that is none");
}
void write_babi_samples(const std::string& folder) {
  put(folder + "/two",
      "1 Mary went to the hall.\n2 Where is Mary? \thall\t1\n3 John left.\n4 Who left? \tJohn\t3\n"
      "1 Sandra took it.\n2 What? \tit,that\t1\n");
}
void read_lambada_file(const std::string& path) {
  for (const LambadaSample& sample : read_lambada(path))
    promise(!sample.context.empty() && sample.target.size() > 1, "lambada: half of a text is empty");
}
void write_lambada_samples(const std::string& folder) {
  put(folder + "/two", "{\"text\": \"he opened the door\"}\n{\"text\": \"a  b\"}\n");
}

// --- runs ---------------------------------------------------------------------------------------------------------

// A tiny run that ended after its second step. One file of its checkpoint is then another one, and the run goes on from there.
class TinyRun {
 public:
  explicit TinyRun(const std::vector<std::string>& settings) : settings_(settings) {
    std::string pattern = fs::exists("/dev/shm") ? "/dev/shm/longhand-run-XXXXXX" : "/tmp/longhand-run-XXXXXX";
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no folder for a run");
    place_ = pattern;
    std::string lines;
    for (int i = 0; i < 12; ++i)
      lines += R"({"text": ")" + std::string(static_cast<std::size_t>(9 + i * 5), static_cast<char>('a' + i)) + "\"}\n";
    put(place_ + "/shard.jsonl", lines);
    train(2, false);
  }
  ~TinyRun() { fs::remove_all(place_); }
  TinyRun(const TinyRun&) = delete;
  TinyRun& operator=(const TinyRun&) = delete;

  std::string checkpoint() const { return place_ + "/run/checkpoints/step-2"; }

  // Puts the file in the place of the checkpoint's, goes on for one step, and leaves the run as it was.
  void go_on_with(const std::string& name, const std::string& path) {
    const std::string file = checkpoint() + "/" + name, sound = text_in(file);
    put(file, text_in(path));
    try {
      train(3, true);
      promise(fs::exists(place_ + "/run/checkpoints/step-3/training.json"), "run: it ended without a checkpoint");
    } catch (...) {
      go_back(file, sound);
      throw;
    }
    go_back(file, sound);
  }

 private:
  void go_back(const std::string& file, const std::string& sound) const {
    put(file, sound);
    fs::remove_all(place_ + "/run/checkpoints/step-3");
    fs::remove(place_ + "/run/checkpoints/latest");
  }
  void train(int64_t steps, bool resume) const {
    auto settings = settings_;
    settings.insert(settings.end(), {"data.files=" + place_ + "/shard.jsonl", "train.steps=" + std::to_string(steps)});
    Recipe recipe = parse_recipe(
        "seed = 3\n[model]\nfamily = \"mamba2\"\nd_model = 16\nn_layer = 1\nd_state = 4\nheaddim = 8\n[train]\nbatch_size = 2\n"
        "length = 8\ncheckpoint_every = 0\n[data]\nthreads = 0\nshuffle_rows = 8\n",
        "tiny.toml", settings);
    const std::shared_ptr<const Tokenizer> tokenizer = open_tokenizer("bytes");
    resolve_model(recipe, tokenizer->vocab_size());
    LanguageModel model(recipe.model, Device::cpu(), Dtype::f32);
    model.initialize(3);
    TrainingJob job{.recipe = recipe,
                    .folder = resume ? RunFolder::open(place_, "run") : RunFolder::create(place_, "run"),
                    .tokenizer = tokenizer,
                    .resume = resume,
                    .evaluate = {},
                    .messages = nullptr,
                    .on_step = {}};
    if (!resume) put(job.folder.file("config.toml"), to_toml(recipe));
    run_training(job, model);
  }

  std::vector<std::string> settings_;
  std::string place_;
};

TinyRun& passing_run() {
  static TinyRun run({"initial_state=state-passing"});
  return run;
}
TinyRun& stream_run() {
  static TinyRun run({"initial_state=tbtt", "data.arrangement=streams", "data.stream_unit=document"});
  return run;
}
TinyRun& fitted_run() {
  static TinyRun run({"initial_state=fitted-noise"});
  return run;
}

void read_training(const std::string& path) {
  TinyRun& run = text_in(path).find("stream_unit") != std::string::npos ? stream_run() : passing_run();
  run.go_on_with("training.json", path);
}
void write_training_samples(const std::string& folder) {
  fs::copy_file(passing_run().checkpoint() + "/training.json", folder + "/packed");
  fs::copy_file(stream_run().checkpoint() + "/training.json", folder + "/streams");
}

void read_optimizer(const std::string& path) {
  passing_run().go_on_with("optimizer.safetensors", path);
}
void write_optimizer_samples(const std::string& folder) {
  fs::copy_file(passing_run().checkpoint() + "/optimizer.safetensors", folder + "/two-steps");
}

void read_carried(const std::string& path) {
  TinyRun& run = text_in(path).find("statistics.") != std::string::npos ? fitted_run() : stream_run();
  run.go_on_with("carried_state.safetensors", path);
}
void write_carried_samples(const std::string& folder) {
  fs::copy_file(stream_run().checkpoint() + "/carried_state.safetensors", folder + "/streams");
  fs::copy_file(fitted_run().checkpoint() + "/carried_state.safetensors", folder + "/fitted");
}

void read_metrics_file(const std::string& path) {
  const fs::path run = fs::path(path).parent_path();
  read_metrics(path);
  RunFolder::beside(run.string()).truncate_metrics(7);
  for (const auto& [name, values] : read_metrics(path).values)
    promise(values.empty() || values.rbegin()->first <= 7, "metrics: a step that was cut away is there");
}
void write_metrics_samples(const std::string& folder) {
  std::string lines;
  for (int step = 1; step < 10; ++step)
    lines += to_json(LoggedStep{
                 .step = step, .tokens = step * 96, .loss = 5.0 / step, .val_loss = {}, .device = "cpu", .first_non_finite = {}}) +
             "\n";
  put(folder + "/ten", lines);
  put(folder + "/cut", lines.substr(0, lines.size() - 30));
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
    {"index", "model.safetensors.index.json", read_index, write_index_samples},
    {"babi", "qa1_facts.txt", read_babi_file, write_babi_samples},
    {"lambada", "lambada.jsonl", read_lambada_file, write_lambada_samples},
    {"training", "training.json", read_training, write_training_samples},
    {"optimizer", "optimizer.safetensors", read_optimizer, write_optimizer_samples},
    {"carried", "carried_state.safetensors", read_carried, write_carried_samples},
    {"metrics", "metrics.jsonl", read_metrics_file, write_metrics_samples},
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
