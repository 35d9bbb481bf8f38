// Model folders on the command line: convert, init, inspect.
#include <filesystem>
#include <regex>

#include "core/safetensors.h"
#include "models/checkpoint.h"
#include "tests/support/process.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;

ProcessResult longhand(std::vector<std::string> words, const std::string& folder = "") {
  words.insert(words.begin(), LONGHAND_BINARY);
  return run_process(std::move(words), {.folder = folder, .input = {}, .environment = {}});
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void write_text(const std::string& path, const std::string& text) {
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

const char* const kRecipe =
    "seed = 3\n[model]\nfamily = \"mamba2\"\nd_model = 32\nn_layer = 2\nvocab_size = 40\nheaddim = 16\nd_state = 16\n";

// The number that stands at the end of the line that begins with `name`.
std::string last_word_after(const std::string& text, const std::string& name) {
  std::smatch match;
  const std::regex line("\n *" + name + " .*?([0-9,]+)\n");
  return std::regex_search(text, match, line) ? match[1].str() : "(no line " + name + ")";
}

}  // namespace

TEST("command line: init writes what a library opens, the same weights for the same seed") {
  const ScratchFolder scratch;
  write_text(scratch.file("r.toml"), kRecipe);
  const ProcessResult first = longhand({"init", "r.toml", "--out", "a"}, scratch.path());
  CHECK(first.code == 0);
  CHECK(holds(first.out, "wrote a\n"));
  CHECK(holds(first.out, "seed 3"));
  CHECK(holds(first.out, "model.safetensors"));
  CHECK(longhand({"init", "r.toml", "--out", "b", "--to", "state-spaces", "--dtype", "bf16"}, scratch.path()).code == 0);
  CHECK(longhand({"init", "r.toml", "--out", "c", "--seed", "4", "--set", "model.n_layer=3"}, scratch.path()).code == 0);
  CHECK(fs::exists(scratch.file("b/pytorch_model.bin")));
  const StoredModel a = open_model(scratch.file("a")), b = open_model(scratch.file("b")), c = open_model(scratch.file("c"));
  CHECK(c.config.n_layer == 3);
  const std::string name = "backbone.layers.1.mixer.in_proj.weight";
  CHECK(a.tensor(name).to(Dtype::bf16).to_vector<float>() == b.tensor(name).to_vector<float>());
  CHECK(a.tensor(name).to_vector<float>() != c.tensor(name).to_vector<float>());
  LanguageModel model(a.config, Device::cpu(), Dtype::f32);
  model.initialize(3);
  CHECK(model.parameters().find(name)->master.to_vector<float>() == a.tensor(name).to_vector<float>());

  const ProcessResult again = longhand({"init", "r.toml", "--out", "a"}, scratch.path());
  CHECK(again.code == 1);
  CHECK(holds(again.err, "not empty"));
  const ProcessResult other = longhand({"init", "r.toml", "--out", "d", "--to", "fla"}, scratch.path());
  CHECK(other.code == 1);
  CHECK(holds(other.err, "cannot hold this model"));
  CHECK(holds(other.err, "can hold it"));
  CHECK_FALSE(fs::exists(scratch.file("d")));
  CHECK(longhand({"init", "r.toml", "--out", "d", "--to", "gguf"}, scratch.path()).code == 2);
  const ProcessResult started = longhand({"init", "r.toml", "--out", "d", "--set", "init_from=a"}, scratch.path());
  CHECK(started.code == 1);
  CHECK(holds(started.err, "starts from other weights"));
}

TEST("command line: convert there and back gives the same bytes, and leaves nothing half done") {
  const ScratchFolder scratch;
  write_text(scratch.file("r.toml"), kRecipe);
  REQUIRE(longhand({"init", "r.toml", "--out", "hf", "--dtype", "f16"}, scratch.path()).code == 0);
  write_text(scratch.file("hf/tokenizer.json"), "{}");
  const ProcessResult there = longhand({"convert", "--model", "hf", "--to", "state-spaces", "--out", "ss"}, scratch.path());
  CHECK(there.code == 0);
  CHECK(there.err.empty());
  for (const char* part : {"from hf (hf, model.safetensors)", "wrote ss", "pytorch_model.bin", "tokenizer.json", "f16"})
    CHECK(holds(there.out, part));
  CHECK(longhand({"convert", "--model", "ss", "--to", "hf", "--out", "back/"}, scratch.path()).code == 0);
  for (const char* file : {"model.safetensors", "config.json", "tokenizer.json"})
    CHECK_MESSAGE(text_of(scratch.file(std::string("hf/") + file)) == text_of(scratch.file(std::string("back/") + file)), file);
  CHECK(longhand({"convert", "--model", "ss", "--to", "hf", "--out", "wide", "--dtype", "f32"}, scratch.path()).code == 0);
  CHECK(open_model(scratch.file("wide")).weights.stored.tensors.begin()->second.dtype() == Dtype::f32);

  const ProcessResult full = longhand({"convert", "--model", "ss", "--to", "hf", "--out", "back"}, scratch.path());
  CHECK(full.code == 1);
  CHECK(holds(full.err, "not empty"));
  std::string damaged = text_of(scratch.file("ss/pytorch_model.bin"));
  damaged[damaged.size() / 2] = static_cast<char>(damaged[damaged.size() / 2] ^ 1);
  write_text(scratch.file("ss/pytorch_model.bin"), damaged);
  const ProcessResult bad = longhand({"convert", "--model", "ss", "--to", "hf", "--out", "new"}, scratch.path());
  CHECK(bad.code == 1);
  CHECK(holds(bad.err, "checksum"));
  CHECK(longhand({"convert", "--model", "ss", "--to", "hf", "--out", "skipped", "--skip-checksums"}, scratch.path()).code == 0);
  CHECK(longhand({"convert", "--model", "ss", "--to", "fla", "--out", "new"}, scratch.path()).code == 1);
  CHECK_FALSE(fs::exists(scratch.file("new")));
  for (const auto& entry : fs::directory_iterator(scratch.path())) CHECK_FALSE(holds(entry.path().string(), "unfinished"));
}

TEST("command line: inspect reads folders and files of every kind") {
  const ScratchFolder scratch;
  write_text(scratch.file("r.toml"), kRecipe);
  REQUIRE(longhand({"init", "r.toml", "--out", "hf"}, scratch.path()).code == 0);
  REQUIRE(longhand({"init", "r.toml", "--out", "ss", "--to", "state-spaces", "--dtype", "f16"}, scratch.path()).code == 0);
  const ProcessResult folder = longhand({"inspect", "ss"}, scratch.path());
  CHECK(folder.code == 0);
  for (const char* part : {"layout                      state-spaces", "pytorch_model.bin", "stored\n", "yes           f16\n", "21, f16",
                           "names and shapes are those of the configuration"})
    CHECK_MESSAGE(holds(folder.out, part), part);
  CHECK(holds(longhand({"inspect", "ss/pytorch_model.bin"}, scratch.path()).out, "the same memory as backbone.embedding.weight"));
  CHECK(holds(longhand({"inspect", "hf/model.safetensors"}, scratch.path()).out, "20 tensors, "));
  write_text(scratch.file("ss/model.safetensors"), "");
  CHECK(longhand({"inspect", "ss"}, scratch.path()).code == 1);  // the first of the weight files is damaged
  fs::remove(scratch.file("ss/model.safetensors"));
  fs::rename(scratch.file("hf/model.safetensors"), scratch.file("hf/part.safetensors"));
  CHECK(holds(longhand({"inspect", "hf"}, scratch.path()).out, "none in this folder"));
  std::string map;
  for (const auto& [name, tensor] : open_model(scratch.file("ss")).weights.stored.tensors)
    if (name != "lm_head.weight")
      map += (map.empty() ? "" : ", ") +
             ("\"" + std::regex_replace(name, std::regex("embedding\\."), "embeddings.") + "\": \"part.safetensors\"");
  write_text(scratch.file("hf/model.safetensors.index.json"), "{\"weight_map\": {" + map + "}}");
  const ProcessResult index = longhand({"inspect", "hf/model.safetensors.index.json"}, scratch.path());
  CHECK_MESSAGE(index.code == 0, index.err);
  CHECK(holds(index.out, "shard hf/part.safetensors"));
  CHECK(longhand({"inspect", "hf"}, scratch.path()).code == 0);

  std::string config = text_of(scratch.file("hf/config.json"));
  write_text(scratch.file("hf/config.json"), std::regex_replace(config, std::regex("\"state_size\": 16"), "\"state_size\": 32"));
  const ProcessResult wrong = longhand({"inspect", "hf"}, scratch.path());
  CHECK(wrong.code == 1);
  CHECK(holds(wrong.out, "[196, 32]"));  // the table is printed all the same
  CHECK(holds(wrong.err, "expected [196, 32]"));
}

TEST("command line: convert says how many values f16 cannot hold, and which files it leaves out") {
  const ScratchFolder scratch;
  write_text(scratch.file("r.toml"), kRecipe);
  REQUIRE(longhand({"init", "r.toml", "--out", "hf"}, scratch.path()).code == 0);
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, tensor] : read_safetensors(scratch.file("hf/model.safetensors")).tensors) tensors[name] = tensor.clone();
  const std::string first = "backbone.layers.0.norm.weight", second = "backbone.norm_f.weight";
  fill(tensors.at(first).slice(0, 0, 3), 1e-9);
  fill(tensors.at(second).slice(0, 5, 6), -1e-20);
  write_safetensors(scratch.file("hf/model.safetensors"), tensors);
  write_text(scratch.file("hf/pytorch_model.bin"), "not opened");
  const ProcessResult half = longhand({"convert", "--model", "hf", "--to", "hf", "--out", "f16", "--dtype", "f16"}, scratch.path());
  CHECK(half.code == 0);
  CHECK(holds(half.err, "warning: 4 values of 2 tensors became 0, because f16 has none so small; the first stand in " + first));
  CHECK(holds(half.err, "warning: hf/pytorch_model.bin is not read: hf/model.safetensors comes first"));
  const ProcessResult brain = longhand({"convert", "--model", "hf", "--to", "hf", "--out", "bf16", "--dtype", "bf16"}, scratch.path());
  CHECK_FALSE(holds(brain.err, "became 0"));
}

TEST("command line: inspect says on which side an option has no limit") {
  const ScratchFolder scratch;
  write_text(scratch.file("gla.toml"), "[model]\nfamily = \"gla\"\nvocab_size = 40\n");
  write_text(scratch.file("mamba2.toml"), "[model]\nfamily = \"mamba2\"\nvocab_size = 40\n");
  const ProcessResult lower = longhand({"inspect", "gla.toml"}, scratch.path());
  CHECK_MESSAGE(std::regex_search(lower.out, std::regex("\n +clamp_min +-inf +lower limit")), lower.out);
  const ProcessResult large = longhand({"inspect", "mamba2.toml", "--set", "model.dt_limit_max=1e30"}, scratch.path());
  CHECK_MESSAGE(std::regex_search(large.out, std::regex("\n +dt_limit_max +1e\\+30 +upper clamp")), large.out);
  CHECK_MESSAGE(std::regex_search(large.out, std::regex("\n +d_state +128 +")), large.out);
  const ProcessResult upper = longhand({"inspect", "mamba2.toml"}, scratch.path());
  CHECK_MESSAGE(std::regex_search(upper.out, std::regex("\n +dt_limit_max +unlimited +upper clamp")), upper.out);
}

TEST("command line: inspect counts the parameters of the published sizes") {
  const ScratchFolder scratch;
  struct Size {
    std::string config, layer, total, inner;  // parameters of a layer | of the model | without embedding and head
  };
  const auto mamba = [](int d, int layers) {
    return "{\"d_model\": " + std::to_string(d) + ", \"n_layer\": " + std::to_string(layers) +
           ", \"vocab_size\": 50277, \"ssm_cfg\": {}, \"rms_norm\": true, \"residual_in_fp32\": true, \"fused_add_norm\": true, "
           "\"pad_vocab_size_multiple\": 8}";
  };
  const auto mamba2 = [](int d, int layers) {
    return "{\"d_model\": " + std::to_string(d) + ", \"d_intermediate\": 0, \"n_layer\": " + std::to_string(layers) +
           ", \"vocab_size\": 50277, \"ssm_cfg\": {\"layer\": \"Mamba2\"}, \"attn_layer_idx\": [], \"attn_cfg\": {}, \"rms_norm\": true, "
           "\"residual_in_fp32\": true, \"fused_add_norm\": true, \"pad_vocab_size_multiple\": 16, \"tie_embeddings\": true}";
  };
  const auto gla = [](int h, int layers, int heads, int width, bool tied) {
    return "{\"model_type\": \"gla\", \"hidden_size\": " + std::to_string(h) + ", \"num_hidden_layers\": " + std::to_string(layers) +
           ", \"num_heads\": " + std::to_string(heads) + ", \"intermediate_size\": " + std::to_string(width) +
           ", \"vocab_size\": 32000, \"tie_word_embeddings\": " + (tied ? "true" : "false") + "}";
  };
  const std::vector<Size> sizes{
      {mamba(768, 24), "3,771,648", "129,135,360", "90,520,320"},
      {mamba(1024, 48), "6,667,264", "371,516,416", "320,029,696"},
      {mamba(1536, 48), "14,916,096", "793,204,224", "715,974,144"},
      {mamba(2048, 48), "26,441,728", "1,372,178,432", "1,269,204,992"},
      {mamba(2560, 64), "41,244,160", "2,768,345,600", "2,639,628,800"},
      {mamba2(768, 24), "3,765,320", "128,989,632", "90,368,448"},
      {mamba2(1024, 48), "6,601,056", "368,346,624", "316,851,712"},
      {mamba2(1536, 48), "14,644,112", "780,161,280", "702,918,912"},
      {mamba2(2048, 48), "25,849,280", "1,343,757,312", "1,240,767,488"},
      {mamba2(2560, 64), "40,216,560", "2,702,599,680", "2,573,862,400"},
      {gla(1024, 24, 4, 2816, false), "", "374,475,776", "308,939,776"},
      {gla(1024, 24, 4, 2816, true), "", "341,707,776", "308,939,776"},
      {gla(2048, 24, 4, 5632, false), "", "1,365,514,240", "1,234,442,240"},
      {gla(2560, 32, 5, 6912, false), "", "2,703,583,744", "2,539,743,744"},
  };
  for (const Size& size : sizes) {
    CAPTURE(size.config);
    write_text(scratch.file("m/config.json"), size.config);
    const ProcessResult result = longhand({"inspect", scratch.file("m")});
    CHECK_MESSAGE(result.code == 0, result.err);
    CHECK(last_word_after(result.out, "total") == size.total);
    CHECK(last_word_after(result.out, "without embedding and head") == size.inner);
    if (!size.layer.empty()) CHECK(last_word_after(result.out, "per layer") == size.layer);
    if (holds(size.config, "gla"))  // the two matrices of a decomposed gate are two kinds
      for (const char* kind : {"gk_proj.0.weight", "gk_proj.1.weight"}) CHECK_MESSAGE(holds(result.out, kind), kind);
  }
}

}  // namespace longhand::test
