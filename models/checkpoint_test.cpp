// Model folders of every kind: written and read back, converted to the bit, refused by name when something is wrong.
#include "models/checkpoint.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "autograd/tape.h"
#include "core/allocator.h"
#include "core/error.h"
#include "core/safetensors.h"
#include "models/config_json.h"
#include "tests/support/check.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;
const Device kCpu = Device::cpu();
constexpr double kHalfTolerance = 2e-3;  // logits from weights rounded to f16 (2^-11 each), relative to the largest

ModelConfig tiny(const std::string& family, bool tied = true) {
  ModelConfig c = default_config(family);
  c.d_model = 32;
  c.n_layer = 2;
  c.vocab_size = 19;
  c.pad_vocab_size_multiple = 8;
  c.tie_embeddings = tied;
  c.complete();
  return c;
}

LanguageModel initialized(const ModelConfig& config) {
  LanguageModel model(config, kCpu, Dtype::f32);
  model.initialize(9);
  return model;
}

std::string bits_of(const Tensor& tensor) {
  const Tensor host = tensor.contiguous();
  return {static_cast<const char*>(host.raw()), static_cast<std::size_t>(host.numel() * size_of(host.dtype()))};
}

// Every tensor of two folders under longhand's names, bit for bit.
void expect_same_tensors(const std::string& folder, const std::string& other) {
  const StoredModel a = open_model(folder), b = open_model(other, Checksums::all);
  CHECK(a.config.options == b.config.options);
  CHECK(a.config.norm_eps == b.config.norm_eps);
  CHECK(a.config.padded_vocab() == b.config.padded_vocab());
  CHECK(a.config.tie_embeddings == b.config.tie_embeddings);
  const LanguageModel plan = LanguageModel::plan(a.config);
  for (const Parameter& p : plan.parameters().all()) {
    CHECK_MESSAGE(a.tensor(p.name).dtype() == b.tensor(p.name).dtype(), p.name);
    CHECK_MESSAGE(bits_of(a.tensor(p.name)) == bits_of(b.tensor(p.name)), p.name);
  }
}

std::string refusal(const std::string& folder) {
  try {
    load_model(folder, kCpu, Dtype::f32);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void expect_refused(const std::string& folder, std::initializer_list<const char*> parts) {
  const std::string text = refusal(folder);
  for (const char* part : parts) CHECK_MESSAGE(text.find(part) != std::string::npos, part << " in " << text);
}

std::vector<double> logits_of(const LanguageModel& model, const Tensor& tokens) {
  const NoGrad no_grad;
  return model.logits(model.forward(tokens).hidden.value()).to_vector<double>();
}

void write_text(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

// The tensors of a folder in two shards with an index, and the single file gone. `ending`: ".safetensors" or ".bin".
struct Shards {
  std::string folder, base, ending;
  std::map<std::string, Tensor> first, second;
  std::map<std::string, std::string> map;
  int64_t bytes = 0;

  Shards(const std::string& at, const std::string& kind) : folder(at), base(kind == ".bin" ? "pytorch_model" : "model"), ending(kind) {
    const NamedTensors whole = read_safetensors(folder + "/model.safetensors");
    std::size_t place = 0;
    for (const auto& [name, tensor] : whole.tensors) {
      auto& part = place++ % 2 == 0 ? first : second;
      part[name] = tensor.clone();
      map[name] = shard(&part == &first ? 1 : 2);
      bytes += tensor.numel() * size_of(tensor.dtype());
    }
    fs::remove(folder + "/model.safetensors");
    write();
  }
  std::string shard(int n) const { return base + "-0000" + std::to_string(n) + "-of-00002" + ending; }
  std::string index() const { return folder + "/" + base + ending + ".index.json"; }
  void write() const {
    for (int n : {1, 2}) {
      const auto& part = n == 1 ? first : second;
      if (ending == ".bin") write_torch_file(folder + "/" + shard(n), part);
      else write_safetensors(folder + "/" + shard(n), part);
    }
    write_index(std::to_string(bytes));
  }
  void write_index(const std::string& total_size) const {
    std::string text = "{\"metadata\": {\"total_size\": " + total_size + "}, \"weight_map\": {";
    for (const auto& [name, file] : map) text += (text.back() == '{' ? "\"" : ", \"") + name + "\": \"" + file + "\"";
    write_text(index(), text + "}}");
  }
};

}  // namespace

TEST("checkpoint: every family is saved in every layout that can hold it, in the file that the library opens") {
  for (const ModelFamily* family : model_families()) {
    for (const bool tied : {true, false}) {
      const LanguageModel model = initialized(tiny(family->name, tied));
      for (const CheckpointLayout& layout : family->layouts) {
        if (!layout.obstacle(model.config()).empty()) continue;
        CAPTURE(family->name);
        CAPTURE(layout.name);
        const ScratchFolder scratch;
        save_model(model, scratch.path(), {.layout = layout.name});
        CHECK(fs::exists(scratch.file(weights_file_of(layout))));
        const StoredModel stored = open_model(scratch.path(), Checksums::all);
        CHECK(std::string(stored.layout->name) == layout.name);
        const std::string head = layout.tensor_name(family->head_name);
        CHECK(stored.weights.stored.contains(head) == (!tied || layout.lists_tied_head));
        if (tied && layout.lists_tied_head) CHECK(stored.weights.stored.at(head).same_storage(stored.tensor(family->embedding_name)));
        const auto read = load_model(scratch.path(), kCpu, Dtype::f32);
        CHECK(read->config().options == model.config().options);
        for (const Parameter& p : model.parameters().all())
          CHECK_MESSAGE(bits_of(read->parameters().find(p.name)->master) == bits_of(p.master), p.name);
      }
    }
  }
}

TEST("checkpoint: weights are stored in another type where asked") {
  const ScratchFolder half, brain;
  const LanguageModel model = initialized(tiny("mamba2"));
  save_model(model, half.path(), {.layout = "hf", .dtype = Dtype::f16});
  save_model(model, brain.path(), {.layout = "state-spaces", .dtype = Dtype::bf16});
  for (const Parameter& p : model.parameters().all()) {
    CHECK(bits_of(open_model(half.path()).tensor(p.name)) == bits_of(p.master.to(Dtype::f16)));
    CHECK(bits_of(open_model(brain.path()).tensor(p.name)) == bits_of(p.master.to(Dtype::bf16)));
  }
  const auto read = load_model(half.path(), kCpu, Dtype::f32);
  const Parameter& embedding = read->parameters().all()[0];
  CHECK(bits_of(embedding.master) == bits_of(model.parameters().all()[0].master.to(Dtype::f16).to(Dtype::f32)));
}

TEST("checkpoint: the special tokens are those of the tokenizer or of the source, and null where nobody knows") {
  for (const ModelFamily* family : model_families()) {
    CAPTURE(family->name);
    const ScratchFolder scratch;
    const std::string a = scratch.file("a"), b = scratch.file("b"), c = scratch.file("c");
    const LanguageModel model = initialized(tiny(family->name));
    const auto written = [](const std::string& folder) { return parse_python_json(read_text_file(folder + "/config.json"), folder); };
    save_model(model, a);
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
      REQUIRE(written(a).contains(key));
      CHECK(written(a).at(key).is_null());
    }
    save_model(model, b, {.end_of_text = 3});
    const SpecialTokens expected{{"bos_token_id", 3}, {"eos_token_id", 3}};
    CHECK(open_model(b).special_tokens == expected);
    convert_model(open_model(b), c, {.layout = open_model(b).layout->name});
    CHECK(open_model(c).special_tokens == expected);
    CHECK(read_text_file(b + "/config.json") == read_text_file(c + "/config.json"));
  }
}

TEST("checkpoint: a layout that cannot hold a model, or that the family does not have, is refused with the reasons") {
  ModelConfig c = default_config("mamba2");
  c.options["ngroups"] = 2;
  c.options["norm_per_group"] = 1;
  c.complete();
  CHECK(checkpoint_layout(c) == "state-spaces");
  CHECK_THROWS_WITH_AS(find_layout(c, "hf"), doctest::Contains("per group"), ConfigError);
  CHECK_THROWS_WITH_AS(find_layout(c, "hf"), doctest::Contains("can hold it"), ConfigError);
  CHECK_THROWS_WITH_AS(find_layout(c, "fla"), doctest::Contains("fla"), ConfigError);
}

TEST("checkpoint: conversions there and back keep every bit and every dtype") {
  for (const ModelFamily* family : model_families()) {
    const ScratchFolder scratch;
    LanguageModel model = initialized(tiny(family->name));
    save_model(model, scratch.file("start"));
    // Mixed types, as in some published files: small tensors f32, matrices half.
    const StoredModel start = open_model(scratch.file("start"));
    std::map<std::string, Tensor> mixed;
    for (const auto& [name, tensor] : start.weights.stored.tensors)
      mixed[name] = tensor.rank() < 2 ? tensor.clone() : tensor.to(Dtype::bf16);
    write_safetensors(scratch.file("start/model.safetensors"), mixed);
    for (const CheckpointLayout& layout : family->layouts) {
      if (!layout.obstacle(model.config()).empty()) continue;
      CAPTURE(family->name);
      CAPTURE(layout.name);
      const std::string there = scratch.file(layout.name), back = there + "-back";
      convert_model(open_model(scratch.file("start")), there, {.layout = layout.name});
      expect_same_tensors(scratch.file("start"), there);
      convert_model(open_model(there), back, {.layout = start.layout->name});
      expect_same_tensors(scratch.file("start"), back);
      CHECK(read_text_file(back + "/config.json") == read_text_file(scratch.file("start/config.json")));
    }
  }
}

TEST("checkpoint: the reference folders convert there and back, byte for byte") {
  const auto golden = folder_from("LONGHAND_GOLDEN");
  if (!golden) SKIP("LONGHAND_GOLDEN is not set");
  for (const char* name : {"hf-mamba1", "hf-mamba2-g1", "hf-mamba2-g2", "ss-mamba1", "ss-mamba2-fp16", "ss-mamba2-g2", "fla-gla"}) {
    CAPTURE(name);
    const std::string folder = *golden + "/" + name;
    const StoredModel start = open_model(folder, Checksums::all);
    int layouts = 0;
    for (const CheckpointLayout& layout : model_family(start.config.family).layouts) {
      if (!layout.obstacle(start.config).empty()) continue;
      CAPTURE(layout.name);
      const ScratchFolder scratch;
      convert_model(start, scratch.file("there"), {.layout = layout.name});
      expect_same_tensors(folder, scratch.file("there"));
      convert_model(open_model(scratch.file("there")), scratch.file("back"), {.layout = start.layout->name});
      expect_same_tensors(folder, scratch.file("back"));
      ++layouts;
    }
    CHECK(layouts > 0);
  }
}

TEST("checkpoint: the half precision state-spaces file gives transformers' logits to half precision") {
  const auto golden = folder_from("LONGHAND_GOLDEN");
  if (!golden) SKIP("LONGHAND_GOLDEN is not set");
  const NamedTensors expected = read_safetensors(*golden + "/hf-mamba2-g1/case.safetensors");
  const auto model = load_model(*golden + "/ss-mamba2-fp16", kCpu, Dtype::f32);
  expect_close(logits_of(*model, expected.at("input_ids")), expected.at("logits").to_vector<double>(), kHalfTolerance);
}

TEST("checkpoint: shards with an index, safetensors and torch, give the same model") {
  const LanguageModel model = initialized(tiny("mamba2"));
  for (const char* kind : {".safetensors", ".bin"}) {
    const ScratchFolder scratch;
    save_model(model, scratch.path(), {.layout = "hf"});
    Shards shards(scratch.path(), kind);
    const auto read = load_model(scratch.path(), kCpu, Dtype::f32);
    for (const Parameter& p : model.parameters().all()) CHECK(bits_of(read->parameters().find(p.name)->master) == bits_of(p.master));
    CHECK(read_weight_files(scratch.path()).paths.size() == 2);
    CHECK(read_weight_files(scratch.path()).doubt.empty());

    const std::string name = shards.first.begin()->first;
    const auto broken = [&](const std::string& shard, const char* rule) {
      shards.map[name] = shard;
      shards.write_index(std::to_string(shards.bytes));
      expect_refused(scratch.path(), {shards.index().c_str(), rule});
      shards.map[name] = shards.shard(1);
    };
    broken("../" + shards.shard(1), "no plain file name");
    broken("/etc/passwd", "no plain file name");
    broken("a\\\\b.bin", "no plain file name");
    broken("", "no plain file name");
    broken("model.gguf", "neither .safetensors nor .bin");
    broken("gone.bin", "gone.bin");
    broken(shards.shard(2), "index does not list");  // it stands in shard 1
    shards.write_index("7");                         // other conversions have such totals
    CHECK(refusal(scratch.path()).empty());
    CHECK(read_weight_files(scratch.path()).doubt.find("total_size says 7, the tensors have") != std::string::npos);
    shards.map["more.weight"] = shards.shard(2);
    shards.write_index(std::to_string(shards.bytes));
    expect_refused(scratch.path(), {"more.weight", "not in its shard"});
    shards.map.erase("more.weight");
    shards.map.erase(name);
    shards.write_index(std::to_string(shards.bytes));
    expect_refused(scratch.path(), {"index does not list", name.c_str()});
    write_text(shards.index(), "{\"weight_map\": {\"a\": 1}}");
    expect_refused(scratch.path(), {"weight_map is not a string"});
    write_text(shards.index(), "{\"weight_map\": {\"a\": \"b\", \"a\": \"c\"}}");
    expect_refused(scratch.path(), {"stands twice"});
    write_text(shards.index(), "{}");
    expect_refused(scratch.path(), {"weight_map"});
    write_text(shards.index(), "[");
    expect_refused(scratch.path(), {"not valid JSON"});
  }
}

TEST("checkpoint: of several weight files the first in the documented order counts") {
  const ScratchFolder scratch;
  const LanguageModel model = initialized(tiny("mamba2"));
  save_model(model, scratch.path(), {.layout = "hf"});
  write_text(scratch.file("pytorch_model.bin"), "not opened");
  const WeightFiles files = read_weight_files(scratch.path());
  CHECK(files.paths == std::vector<std::string>{scratch.file("model.safetensors")});
  CHECK(files.left_out == std::vector<std::string>{scratch.file("pytorch_model.bin")});
  CHECK(refusal(scratch.path()).empty());
  CHECK_THROWS_WITH_AS(save_model(model, scratch.path(), {.layout = "state-spaces"}), doctest::Contains("model.safetensors"), FileError);
  fs::remove(scratch.file("model.safetensors"));
  expect_refused(scratch.path(), {"pytorch_model.bin", "does not begin with PK"});
  fs::remove(scratch.file("pytorch_model.bin"));
  expect_refused(scratch.path(), {"no weights", "model.safetensors.index.json", "pytorch_model.bin"});
}

TEST("checkpoint: every problem of a folder is named in one message") {
  const ScratchFolder scratch;
  const LanguageModel model = initialized(tiny("mamba2"));
  save_model(model, scratch.path(), {.layout = "hf"});
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, tensor] : read_safetensors(scratch.file("model.safetensors")).tensors) tensors[name] = tensor.clone();
  const auto with = [&](const std::function<void(std::map<std::string, Tensor>&)>& change, std::initializer_list<const char*> parts) {
    auto changed = tensors;
    change(changed);
    write_safetensors(scratch.file("model.safetensors"), changed);
    expect_refused(scratch.path(), parts);
  };
  const std::string layer = "backbone.layers.1.mixer.";
  with(
      [&](auto& t) {
        t.erase(layer + "D");
        t[layer + "B"] = tensors.at(layer + "D");
        t[layer + "A_log"] = Tensor::zeros(kCpu, Dtype::f32, {7});
        t[layer + "dt_bias"] = Tensor::zeros(kCpu, Dtype::i32, tensors.at(layer + "dt_bias").shape());
      },
      {"missing  backbone.layers.1.mixer.D [", "unknown  backbone.layers.1.mixer.B [", "A_log [7], expected [",
       "dt_bias i32, expected a floating type"});
  with([&](auto& t) { t.clear(); }, {"missing", "and      "});
  const std::string embedding = "backbone.embeddings.weight";
  with([&](auto& t) { t["lm_head.weight"] = Tensor::zeros(kCpu, Dtype::f32, tensors.at(embedding).shape()); }, {"tied", "lm_head.weight"});
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    with(
        [&](auto& t) {
          t[embedding] = tensors.at(embedding).clone();
          fill(t.at(embedding).select(0, 3).slice(0, 5, 6), bad);
        },
        {"NaN or infinite", embedding.c_str(), "101 (row-major)"});
    CHECK_THROWS_WITH_AS(convert_model(open_model(scratch.path()), scratch.file("out")), doctest::Contains("101 (row-major)"), FileError);
  }
  // An equal head in another type is the same head.
  auto same = tensors;
  same[embedding] = tensors.at(embedding).to(Dtype::f16).to(Dtype::f32);
  same["lm_head.weight"] = same[embedding].to(Dtype::f16);
  write_safetensors(scratch.file("model.safetensors"), same);
  CHECK(refusal(scratch.path()).empty());
}

// A model of 58 million weights, 51 of them in one tensor.
ModelConfig medium() {
  ModelConfig c = default_config("mamba2");
  c.d_model = 512;
  c.n_layer = 4;
  c.vocab_size = 100'000;
  c.complete();
  return c;
}

constexpr double kSizeClass = 1.125;  // the allocator's rounding

TEST("checkpoint: loading takes the memory of the model and no gradients") {
  const ScratchFolder scratch;
  const int64_t weights = LanguageModel::plan(medium()).parameter_count();
  save_model(initialized(medium()), scratch.path(), {.dtype = Dtype::f16});
  kCpu.allocator().release_cached();
  kCpu.allocator().reset_peak();
  const int64_t before = kCpu.allocator().use().live_bytes;
  const auto model = load_model(scratch.path(), kCpu, Dtype::f32);
  CHECK(kCpu.allocator().use().peak_bytes - before <= static_cast<int64_t>(4 * kSizeClass * static_cast<double>(weights)));
}

// A number of bytes in /proc/self/status; 0 where there is none.
int64_t resident_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with(key + ":")) return std::stoll(line.substr(key.size() + 1)) * 1024;
  return 0;
}

// VmHWM, the most memory that was resident, starts anew; false where the system does not let us.
bool restart_resident_peak() {
  return (std::ofstream("/proc/self/clear_refs") << "5").flush().good() && resident_bytes("VmHWM") > 0;
}

TEST("checkpoint: a file never lies in memory as a whole beside the model that is loaded from it") {
#if defined(__SANITIZE_ADDRESS__)
  SKIP("the sanitizer's own memory counts too");
#endif
  if (!restart_resident_peak()) SKIP("the system does not say how much memory is resident, or does not let the peak start anew");
  constexpr int64_t kBlockBytes = 4 << 22, kSlack = 8 << 20;  // what is read and not yet let go of; everything else
  const LanguageModel source = initialized(medium());
  const double bytes = 4 * static_cast<double>(source.parameter_count());
  const auto measure = [&](const std::string& folder) {
    kCpu.allocator().release_cached();
    REQUIRE(restart_resident_peak());
    const int64_t before = resident_bytes("VmRSS");
    const auto model = load_model(folder, kCpu, Dtype::f32);
    const auto grown = static_cast<double>(resident_bytes("VmHWM") - before);
    CHECK(grown >= 0.9 * bytes);  // the model itself: what is measured is what was meant
    CHECK(grown <= kSizeClass * bytes + kBlockBytes + kSlack);
  };
  const ScratchFolder scratch;
  for (const char* layout : {"hf", "state-spaces"}) {  // safetensors; torch
    CAPTURE(layout);
    const std::string folder = scratch.file(layout);
    save_model(source, folder, {.layout = layout});
    measure(folder);
    fs::remove_all(folder);
  }
  // A tied head with bytes of its own, which are compared with the embedding's.
  save_model(source, scratch.file("two"), {.layout = "hf"});
  auto tensors = read_safetensors(scratch.file("two/model.safetensors")).tensors;
  tensors["lm_head.weight"] = tensors.at("backbone.embeddings.weight");
  write_safetensors(scratch.file("two/model.safetensors"), tensors);
  tensors.clear();
  measure(scratch.file("two"));
}

}  // namespace longhand::test
