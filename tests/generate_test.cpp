// Generation and logits through every door: the reference cases of other libraries, and the program as a user meets it.
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "core/safetensors.h"
#include "data/unicode.h"
#include "eval/generation.h"
#include "models/checkpoint.h"
#include "models/model_family.h"
#include "tests/support/process.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Ids = std::vector<int32_t>;

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

ProcessResult longhand(std::vector<std::string> words, const std::string& input = "") {
  words.insert(words.begin(), LONGHAND_BINARY);
  return run_process(std::move(words), {.folder = {}, .input = input, .environment = {}});
}

// --- the reference cases ------------------------------------------------------------------------------------------

// A model folder among the reference cases, the folder of its numbers, and how near they must come.
struct Reference {
  const char *folder, *numbers, *family;
  double logits = 2e-5, gradients = 1e-4;
};
constexpr Reference kReferences[] = {
    {"hf-mamba1", "hf-mamba1", "mamba1"},
    {"hf-mamba2-g1", "hf-mamba2-g1", "mamba2"},
    {"hf-mamba2-g2", "hf-mamba2-g2", "mamba2"},
    {"ss-mamba2-g2", "ss-mamba2-g2", "mamba2"},
    {"fla-gla", "fla-gla", "gla"},
    {"ss-mamba1", "hf-mamba1", "mamba1"},
    {"ss-mamba2-fp16", "hf-mamba2-g1", "mamba2", 5e-3, 5e-2},  // weights of 11 bits
};

// Why a case cannot be run here; empty when it can.
std::string obstacle(const Reference& reference) {
  if (!folder_from("LONGHAND_GOLDEN")) return "LONGHAND_GOLDEN is not set";
  for (const ModelFamily* family : model_families())
    if (std::string(family->name) == reference.family) return "";
  return std::string(reference.folder) + ": this build has no family " + reference.family;
}

std::string golden(const char* folder) {
  return *folder_from("LONGHAND_GOLDEN") + "/" + folder;
}

// The program's numbers for a case against the file's.
void compare_logits(const Reference& reference) {
  const ScratchFolder scratch;
  const std::string tokens = golden(reference.numbers) + "/case.safetensors", out = scratch.file("out.safetensors");
  const NamedTensors expected = read_safetensors(tokens);
  const bool gradients =
      std::any_of(expected.tensors.begin(), expected.tensors.end(), [](auto& t) { return t.first.starts_with("grad."); });
  std::vector<std::string> words{"logits", "--model", golden(reference.folder), "--tokens", tokens, "--out", out, "--device", "cpu"};
  if (gradients) words.push_back("--gradients");
  const ProcessResult result = longhand(words);
  REQUIRE_MESSAGE(result.code == 0, result.err);
  CHECK(result.out.empty());
  const NamedTensors actual = read_safetensors(out);
  const auto compare = [&](const std::string& ours, const std::string& theirs, double tolerance) {
    expect_close(actual.at(ours).to_vector<double>(), expected.at(theirs).to_vector<double>(), tolerance, 1e-30, ours);
  };
  compare("logits", "logits", reference.logits);
  compare("loss", "loss", reference.logits);
  std::size_t grads = 0, states = 0;
  for (const auto& [name, tensor] : expected.tensors) {
    if (name.starts_with("grad.")) compare(name, name, reference.gradients), ++grads;
    if (!name.starts_with("final_state.")) continue;
    const std::string ours = name.ends_with(".S") ? name.substr(0, name.size() - 1) + "ssm" : name;  // one name in every family here
    compare(ours, name, reference.logits);
    ++states;
  }
  std::size_t written = 2;
  for (const auto& [name, tensor] : actual.tensors)
    if (name.starts_with("grad.")) --grads, ++written;
    else if (name.starts_with("final_state.")) ++written;
  CHECK(grads == 0);  // each of the file's, and no other
  CHECK(written == actual.tensors.size());
  if (states > 0) CHECK(states <= written - 2);
}

// The greedy tokens after row 0, for prompts read in chunks of several sizes, then step by step; on a GPU too, where there is one.
void compare_greedy(const Reference& reference) {
  const NamedTensors expected = read_safetensors(golden(reference.numbers) + "/case.safetensors");
  const Ids prompt = expected.at("input_ids").slice(0, 0, 1).to_vector<int32_t>(), greedy = expected.at("greedy").to_vector<int32_t>();
  std::vector<Device> devices{Device::cpu()};
  if (cuda_device_count() > 0) devices.push_back(Device::cuda());
  for (const Device& device : devices) {
    const auto model = load_model(golden(reference.folder), device, Dtype::f32);
    for (const int64_t chunk : {1, 2, 3, 16, 1000}) {
      CAPTURE(device.name());
      CAPTURE(chunk);
      const auto tokens = static_cast<int64_t>(greedy.size());
      const Generation result = generate(*model, {prompt}, {.max_tokens = tokens, .sampling = {.temperature = 0}, .chunk = chunk});
      CHECK(result.rows[0].tokens == greedy);
    }
  }
}

void compare_with_reference(const char* folder) {
  const auto reference =
      std::find_if(std::begin(kReferences), std::end(kReferences), [&](auto& r) { return r.folder == std::string(folder); });
  REQUIRE(reference != std::end(kReferences));
  if (const std::string reason = obstacle(*reference); !reason.empty()) SKIP(reason);
  compare_logits(*reference);
  compare_greedy(*reference);
}

TEST("logits and greedy tokens of hf-mamba1") {
  compare_with_reference("hf-mamba1");
}
TEST("logits and greedy tokens of hf-mamba2-g1") {
  compare_with_reference("hf-mamba2-g1");
}
TEST("logits and greedy tokens of hf-mamba2-g2") {
  compare_with_reference("hf-mamba2-g2");
}
TEST("logits and greedy tokens of ss-mamba2-g2") {
  compare_with_reference("ss-mamba2-g2");
}
TEST("logits and greedy tokens of fla-gla") {
  compare_with_reference("fla-gla");
}
TEST("logits and greedy tokens of ss-mamba1") {
  compare_with_reference("ss-mamba1");
}
TEST("logits and greedy tokens of ss-mamba2-fp16") {
  compare_with_reference("ss-mamba2-fp16");
}

TEST("every model among the reference cases has its test") {
  if (!folder_from("LONGHAND_GOLDEN")) SKIP("LONGHAND_GOLDEN is not set");
  for (const auto& entry : fs::directory_iterator(*folder_from("LONGHAND_GOLDEN"))) {
    if (!fs::exists(entry.path() / "config.json")) continue;
    const std::string name = entry.path().filename().string();
    CHECK_MESSAGE(std::any_of(std::begin(kReferences), std::end(kReferences), [&](auto& r) { return r.folder == name; }), name);
  }
}

// --- the program --------------------------------------------------------------------------------------------------

// A small model of bytes with random weights, in a folder.
class Workshop {
 public:
  Workshop() {
    ModelConfig c;
    c.d_model = 32;
    c.n_layer = 2;
    c.vocab_size = 257;
    c.options = {{"d_state", 8}, {"headdim", 16}};
    LanguageModel model(c, Device::cpu(), Dtype::f32);
    model.initialize(4);
    for (Parameter& p : model.parameters().all()) multiply(p.master, p.shape.rank() == 2 ? 4 : 1);
    for (Parameter& p : model.parameters().all())  // the end of text has the logit 0: greedily it never comes
      if (p.name == "backbone.embeddings.weight") fill(p.master.slice(0, 256, 257), 0);
    fs::create_directories(file("model"));
    save_model(model, file("model"));
  }
  std::string file(const std::string& name) const { return scratch_.file(name); }

  ProcessResult generate(std::vector<std::string> words, const std::string& input = "") const {
    for (const char* word : {"cpu", "--device", "bytes", "--tokenizer"}) words.insert(words.begin(), word);
    words.insert(words.begin(), {"generate", "--model", file("model")});
    return longhand(std::move(words), input);
  }
  std::vector<Json> rows(std::vector<std::string> words, const std::string& input = "") const {
    words.push_back("--json");
    const ProcessResult result = generate(std::move(words), input);
    REQUIRE_MESSAGE(result.code == 0, result.err);
    std::vector<Json> rows;
    std::istringstream in(result.out);
    for (std::string line; std::getline(in, line);) rows.push_back(Json::parse(line));
    return rows;
  }

 private:
  ScratchFolder scratch_;
};

void write_text(const std::string& path, const std::string& text) {
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

TEST("generate: one prompt streams to stdout, the same text with the same seed") {
  const Workshop shop;
  const std::vector<std::string> words{"--prompt", "Hello", "--max-tokens", "40", "--seed", "3"};
  const ProcessResult text = shop.generate(words);
  CHECK(text.code == 0);
  CHECK_FALSE(text.out.empty());
  CHECK_FALSE(find_invalid_utf8(text.out));
  CHECK(holds(text.err, "prefill 4 tokens, "));
  CHECK(holds(text.err, "decode "));
  CHECK(shop.generate(words).out == text.out);
  const auto rows = shop.rows(words);
  REQUIRE(rows.size() == 1);
  CHECK(rows[0].at("text") == text.out);
  CHECK(rows[0].at("prompt_tokens") == 5);
  CHECK(rows[0].at("row") == 0);
  CHECK(rows[0].at("tokens_per_s").get<double>() > 0);
  CHECK(open_tokenizer("bytes", {.skip_special = true})->decode(rows[0].at("tokens").get<Ids>()) == text.out);
  auto other = words;
  other.back() = "4";
  CHECK(shop.generate(other).out != text.out);
  auto echoed = words;
  echoed.push_back("--echo");
  CHECK(shop.generate(echoed).out == "Hello" + text.out);
  CHECK(shop.generate({"--prompt-file", "-", "--max-tokens", "40", "--seed", "3"}, "Hello").out == text.out);
  write_text(shop.file("prompt.txt"), "Hello");
  CHECK(shop.generate({"--prompt-file", shop.file("prompt.txt"), "--max-tokens", "40", "--seed", "3"}).out == text.out);
  CHECK(shop.generate({"--prompt", "", "--max-tokens", "3", "--temperature", "0"}).out ==
        shop.generate({"--prompt", "<|endoftext|>", "--max-tokens", "3", "--temperature", "0"}).out);
  CHECK(shop.rows({"--prompt", "<|endoftext|>", "--no-special", "--max-tokens", "1"})[0].at("prompt_tokens") == 13);
  CHECK(shop.rows({"--prompt", "-x", "--max-tokens", "1"})[0].at("prompt_tokens") == 2);
}

TEST("generate: several prompts come whole and in order") {
  const Workshop shop;
  write_text(shop.file("prompts.jsonl"), "{\"prompt\": \"one\"}\n\n{\"text\": \"a second \\u00e9\", \"meta\": 1}\n{\"prompt\": \"3\"}\n");
  const std::vector<std::string> options{"--max-tokens", "30", "--batch", "2", "--temperature", "0.7"};
  auto words = options;
  words.insert(words.end(), {"--prompts", shop.file("prompts.jsonl")});
  const auto rows = shop.rows(words);
  REQUIRE(rows.size() == 3);
  std::string expected;
  const int lengths[] = {3, 11, 1};
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(rows[i].at("row") == i);
    CHECK(rows[i].at("prompt_tokens") == lengths[i]);
    expected += rows[i].at("text").get<std::string>() + "\n";
  }
  CHECK(shop.generate(words).out == expected);
  words = options;
  words.insert(words.end(), {"--prompt", "one", "--prompt", "a second \xC3\xA9", "--prompt", "3"});
  CHECK(shop.generate(words).out == expected);
  words = options;
  words.insert(words.end(), {"--prompts", "-"});
  CHECK(shop.generate(words, text_of(shop.file("prompts.jsonl"))).out == expected);
  // A row that ends first waits for the rows before it.
  const std::string first = rows[0].at("text"), second = rows[1].at("text");
  std::size_t at = 0;
  while (at < second.size() && !(second[at] > ' ' && first.find(second[at]) == std::string::npos)) ++at;
  REQUIRE(at < second.size());
  words = options;
  words.insert(words.end(), {"--stop", second.substr(at, 1), "--prompt", "one", "--prompt", "a second \xC3\xA9"});
  CHECK(shop.generate(words).out == first + "\n" + second.substr(0, at) + "\n");
  words = options;
  words.insert(words.end(), {"--prompts", "-"});
  for (const char* line : {"{\"prompt\": 3}", "[1]", "{\"prompt\": \"a\", \"text\": \"b\"}", "{\"prompt\": \"a\"", "{}"}) {
    const ProcessResult bad = shop.generate(words, std::string("{\"prompt\": \"x\"}\n") + line + "\n");
    CHECK(bad.code == 1);
    CHECK(bad.out.empty());
    CHECK(holds(bad.err, "line      2\n"));
  }
}

TEST("generate: a saved state goes on where it stopped, and one state serves many prompts") {
  const Workshop shop;
  const std::string state = shop.file("state.safetensors"), after = shop.file("after.safetensors");
  const std::vector<std::string> seed{"--seed", "9", "--temperature", "1.2", "--repetition-penalty", "1.1"};
  const auto with = [&](std::vector<std::string> words) {
    words.insert(words.end(), seed.begin(), seed.end());
    return words;
  };
  const std::string whole = shop.generate(with({"--prompt", "Once", "--max-tokens", "30", "--save-state", after})).out;
  for (const int first : {0, 1, 7, 29}) {
    const ProcessResult begun = shop.generate(with({"--prompt", "Once", "--max-tokens", std::to_string(first), "--save-state", state}));
    const ProcessResult rest = shop.generate(
        with({"--load-state", state, "--max-tokens", std::to_string(30 - first), "--save-state", shop.file("end.safetensors")}));
    CHECK(rest.code == 0);
    CHECK(begun.out + rest.out == whole);
    CHECK(text_of(shop.file("end.safetensors")) == text_of(after));
  }
  CHECK(shop.generate({"--prompt", "A long book. ", "--max-tokens", "0", "--save-state", state}).code == 0);
  const std::vector<std::string> greedy{"--max-tokens", "8", "--temperature", "0"};
  auto asked = greedy;
  asked.insert(asked.end(), {"--load-state", state, "--prompt", "Who?", "--prompt", "Where to?"});
  auto plain = greedy;
  plain.insert(plain.end(), {"--prompt", "A long book. Who?", "--prompt", "A long book. Where to?"});
  CHECK(shop.generate(asked).out == shop.generate(plain).out);

  const ProcessResult gone = shop.generate({"--load-state", shop.file("gone.safetensors")});
  CHECK(gone.code == 1);
  CHECK(holds(gone.err, "gone.safetensors"));
  const ProcessResult wrong = shop.generate({"--load-state", shop.file("model/model.safetensors")});
  CHECK(wrong.code == 1);
  CHECK(holds(wrong.err, "generation state: the file is not one"));
  CHECK(holds(wrong.err, "model.safetensors"));
}

TEST("generate: stop strings are not printed") {
  const Workshop shop;
  const auto row = shop.rows({"--prompt", "Hello", "--max-tokens", "60", "--seed", "3", "--top-k", "100"})[0];
  const std::string text = row.at("text");
  std::size_t at = 4;
  while (at + 2 < text.size() && !(text[at] > 32 && text[at + 1] > 32)) ++at;
  REQUIRE(at + 2 < text.size());
  const std::string stop = text.substr(at, 2);
  const auto stopped =
      shop.rows({"--prompt", "Hello", "--max-tokens", "60", "--seed", "3", "--top-k", "100", "--stop", "not there", "--stop", stop})[0];
  CHECK(stopped.at("text") == text.substr(0, text.find(stop)));
  CHECK(stopped.at("stop") == "stop_string");
}

TEST("generate: Ctrl-C ends cleanly, with the text so far and the state to go on from") {
  const Workshop shop;
  const std::string state = shop.file("state.safetensors");
  std::vector<std::string> words{LONGHAND_BINARY, "generate", "--model", shop.file("model"), "--tokenizer", "bytes",        "--device",
                                 "cpu",           "--prompt", "Once",    "--save-state",     state,         "--max-tokens", "100000000",
                                 "--temperature", "0"};
  Process process(words);
  REQUIRE(process.wait_for_message(" on CPU"));
  process.send(SIGINT);
  const ProcessResult interrupted = process.finish();
  CHECK(interrupted.code == 128 + SIGINT);
  CHECK(holds(interrupted.err, "interrupted; go on with --load-state"));
  CHECK(read_safetensors(state).at("rows.stop").to_vector<int32_t>() == Ids{static_cast<int32_t>(StopReason::interrupted)});
  const ProcessResult rest = shop.generate({"--load-state", state, "--max-tokens", "5"});
  CHECK(rest.code == 0);
  CHECK_FALSE(find_invalid_utf8(interrupted.out));
}

TEST("generate: the state is saved too when stdout is full, or its reader goes away") {
  const Workshop shop;
  const std::string state = shop.file("state.safetensors");
  const std::string command = std::string("'") + LONGHAND_BINARY + "' generate --model '" + shop.file("model") +
                              "' --tokenizer bytes --device cpu --prompt Once --temperature 0 --save-state '" + state + "' --max-tokens ";
  for (const std::string& line : {command + "100000000 > /dev/full", command + "0 --echo > /dev/full", command + "3 --json > /dev/full",
                                  "(" + command + "100000000; echo code $? >&2) | true"}) {
    CAPTURE(line);
    fs::remove(state);
    const ProcessResult result = run_process({"/bin/sh", "-c", line}, {});
    CHECK((result.code == 1 || holds(result.err, "code 1\n")));
    CHECK(holds(result.err, "generate: stdout could not take all of the text"));
    REQUIRE(fs::exists(state));
    CHECK(shop.generate({"--load-state", state, "--max-tokens", "2"}).code == 0);
  }
}

TEST("generate: the tokenizer is the run's, or lies beside the model, or must be named") {
  const Workshop shop;
  const std::vector<std::string> words{"generate", "--model", shop.file("model"), "--prompt", "a", "--max-tokens", "2", "--device", "cpu"};
  const ProcessResult unknown = longhand(words);
  CHECK(unknown.code == 1);
  CHECK(unknown.out.empty());
  CHECK(holds(unknown.err, "the tokenizer of the model is not known"));
  CHECK(holds(unknown.err, "tokenizer.json"));
  CHECK(holds(unknown.err, "--tokenizer"));
  write_text(shop.file("model/training.json"), R"({"tokenizer": {"name": "bytes", "fingerprint": "bytes"}})");
  CHECK(longhand(words).code == 0);
  write_text(shop.file("model/training.json"), R"({"tokenizer": {"name": "bytes", "fingerprint": "bpe-300-0"}})");
  const ProcessResult other = longhand(words);
  CHECK(other.code == 1);
  CHECK(holds(other.err, "not the one that the model was trained with"));
  fs::remove(shop.file("model/training.json"));
  write_text(shop.file("model/tokenizer.json"), "{}");
  const ProcessResult beside = longhand(words);  // found, and refused for what it holds
  CHECK(beside.code == 1);
  CHECK(holds(beside.err, "model/tokenizer.json"));
  CHECK_FALSE(holds(beside.err, "is not known"));
  write_text(shop.file("a.jsonl"), "{\"text\": \"a\"}\n");
  for (std::vector<std::string> measure :
       {std::vector<std::string>{"eval", "ppl", "--data", shop.file("a.jsonl"), "--context", "8"}, {"eval", "passkey"}}) {
    measure.insert(measure.end(), {"--model", shop.file("model"), "--device", "cpu"});
    const ProcessResult result = longhand(measure);
    CHECK(result.code == 1);
    CHECK(holds(result.err, "model/tokenizer.json"));
    CHECK_FALSE(holds(result.err, "is not known"));
  }
}

TEST("generate and logits: mistakes are named") {
  const Workshop shop;
  CHECK(holds(shop.generate({}).err, "there is nothing to continue"));
  CHECK(shop.generate({}).code == 1);
  CHECK(shop.generate({"--prompt", "a", "--prompt-file", "b"}).code == 2);
  CHECK(shop.generate({"--prompt", "a", "--max-tokens", "-1"}).code == 2);
  for (const auto& [option, value] :
       {std::pair{"--top-p", "0"}, {"--temperature", "-1"}, {"--min-p", "2"}, {"--repetition-penalty", "0"}}) {
    const ProcessResult result = shop.generate({"--prompt", "a", option, value});
    CHECK(result.code == 1);
    CHECK(result.out.empty());
    CHECK(holds(result.err, "sampling: "));
  }
  CHECK(holds(longhand({"generate", "--model", "gone", "--prompt", "a", "--top-p", "0"}).err, "sampling: "));  // before any file is read
  CHECK(shop.generate({"--prompt", "\xFF"}).code == 1);
  CHECK(holds(shop.generate({"--prompt", "a", "--stop", ""}).err, "stop string is empty"));
  CHECK(
      longhand({"generate", "--model", "gone", "--prompt", "a"}).err.starts_with("error: model: there is no such folder\n  model  gone\n"));

  write_safetensors(shop.file("tokens.safetensors"), {{"input_ids", Tensor::from(Device::cpu(), {1, 3}, Ids{1, 2, 257})}});
  const std::vector<std::string> words{
      "logits",   "--model", shop.file("model"), "--tokens", shop.file("tokens.safetensors"), "--out", shop.file("out.safetensors"),
      "--device", "cpu"};
  const ProcessResult outside = longhand(words);
  CHECK(outside.code == 1);
  CHECK(holds(outside.err, "input_ids[0, 2]"));
  CHECK_FALSE(fs::exists(shop.file("out.safetensors")));
  write_safetensors(shop.file("tokens.safetensors"), {{"input_ids", Tensor::from(Device::cpu(), {1, 3}, std::vector<int64_t>{1, 2, 3})}});
  CHECK(longhand(words).code == 0);
  CHECK(read_safetensors(shop.file("out.safetensors")).at("logits").shape() == Shape{1, 3, 272});
  auto gradients = words;
  gradients.push_back("--gradients");
  CHECK(holds(longhand(gradients).err, "there are no labels"));
}

}  // namespace
}  // namespace longhand::test
