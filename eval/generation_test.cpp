// Generation against the model run on the whole text again for every token, and against itself interrupted, batched and saved.
#include "eval/generation.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/philox.h"
#include "core/safetensors.h"
#include "data/unicode.h"
#include "models/decoder.h"
#include "models/model_family.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

using Ids = std::vector<int32_t>;
using Prompts = std::vector<Ids>;

constexpr int32_t kVocab = 19, kEnd = 18, kGap = 7;
const Device kCpu = Device::cpu();

// A model of every family, small, of 19 tokens and a head of 24 rows, with weights large enough that its tokens vary.
std::vector<std::unique_ptr<LanguageModel>> models(uint64_t seed_of_all = 5) {
  std::vector<std::unique_ptr<LanguageModel>> all;
  for (const ModelFamily* family : model_families()) {
    ModelConfig c = default_config(family->name);
    c.d_model = 32;
    c.n_layer = 2;
    c.vocab_size = kVocab;
    c.pad_vocab_size_multiple = 8;
    for (const auto& [name, value] : std::map<std::string, double>{{"d_state", 8}, {"headdim", 16}, {"ngroups", 2}, {"chunk_size", 8}})
      if (std::any_of(family->options.begin(), family->options.end(), [&](const ModelOption& o) { return name == o.name; }))
        c.options[name] = value;
    auto model = std::make_unique<LanguageModel>(c, kCpu, Dtype::f32);
    uint64_t seed = seed_of_all + hash_name(family->name) % 1000 * 1000;
    model->initialize(seed);
    for (Parameter& p : model->parameters().all()) add_scaled(p.master, random_tensor(kCpu, p.master.dtype(), p.shape, ++seed), 0.2);
    all.push_back(std::move(model));
  }
  return all;
}

// Ids with text of all kinds: letters, the bytes of one character apart, words; one id that stands for nothing, one that ends a text.
class SmallTokenizer : public Tokenizer {
 public:
  void encode(std::string_view, Ids&) const override { throw ValueError("not needed here"); }
  std::string decode(std::span<const int32_t> ids) const override {
    std::string bytes;
    for (const int32_t id : ids) bytes += bytes_of(id).value();
    return replace_invalid_utf8(bytes);
  }
  std::optional<std::string_view> bytes_of(int32_t id) const override {
    static constexpr std::string_view kPieces[] = {"a",        "b",        "\xE2", "\x82", "\xAC", "\xE2\x82", "the ", "",  "\n",   "ab",
                                                   "\xF0\x9F", "\x98\x80", "c",    "d",    "\xC3", "\xA9",     " x",   "!", "<end>"};
    if (id < 0 || id >= kVocab || id == kGap) return std::nullopt;
    return kPieces[id];
  }
  int32_t vocab_size() const override { return kVocab; }
  int32_t end_of_text() const override { return kEnd; }
  std::string name() const override { return "small"; }
  std::string fingerprint() const override { return "small"; }
};
const SmallTokenizer kTokenizer;

const Prompts kPrompts{{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5}, {8}, {2, 17, 1, 8, 2}, {0, 0, 1, 2, 3}};

std::vector<float> last_logits(const LanguageModel& model, const Ids& tokens) {
  const NoGrad no_grad;
  const auto n = static_cast<int64_t>(tokens.size());
  const auto hidden = model.forward(Tensor::from(kCpu, {1, n}, tokens)).hidden;
  return model.logits(hidden.value().slice(1, n - 1, n)).to_vector<float>();
}

Prompts tokens_of(const Generation& generation) {
  Prompts tokens;
  for (const GeneratedRow& row : generation.rows) tokens.push_back(row.tokens);
  return tokens;
}

Ids together(Ids a, const Ids& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// The same bits in every tensor, the same sequences.
void check_same_state(const GenerationState& a, const GenerationState& b) {
  const auto first = a.recurrent.named_tensors(), second = b.recurrent.named_tensors();
  REQUIRE(first.size() == second.size());
  for (const auto& [name, tensor] : first) {
    const Tensor one = tensor.contiguous(), other = second.at(name).contiguous();
    REQUIRE(one.shape() == other.shape());
    CHECK_MESSAGE(std::memcmp(one.raw(), other.raw(), static_cast<std::size_t>(one.numel() * size_of(one.dtype()))) == 0, name);
  }
  REQUIRE(a.sequences.size() == b.sequences.size());
  for (std::size_t i = 0; i < a.sequences.size(); ++i) {
    CAPTURE(i);
    CHECK(a.sequences[i].pending == b.sequences[i].pending);
    CHECK(a.sequences[i].read == b.sequences[i].read);
    CHECK(a.sequences[i].seen == b.sequences[i].seen);
    CHECK(a.sequences[i].held == b.sequences[i].held);
    CHECK(a.sequences[i].stop == b.sequences[i].stop);
  }
}

const std::vector<SamplingOptions> kSampling{
    {.temperature = 0}, {.seed = 3}, {.repetition_penalty = 1.3, .temperature = 0.9, .top_k = 9, .top_p = 0.95, .min_p = 0.01, .seed = 4}};

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& problem) {
    return problem.what();
  }
  return "no error";
}

}  // namespace

TEST("text that was held back may hold a stop string that the first call did not have: the row has ended") {
  const auto all = models();
  const auto& model = all.front();
  Generation first = generate(*model, {{3, 1}, {4}}, {.max_tokens = 1, .tokenizer = &kTokenizer});
  first.state.sequences[0].held = "xab";
  first.state.sequences[1].held = "xa";
  const Generation rest = generate(*model, {}, {.max_tokens = 1, .stop = {"ab"}, .tokenizer = &kTokenizer}, first.state);
  CHECK(rest.rows[0].stop == StopReason::stop_string);
  CHECK(rest.rows[0].tokens.empty());
  CHECK(rest.rows[0].text == "x");
  CHECK(rest.state.sequences[0].held.empty());
  CHECK(rest.state.sequences[0].stop == StopReason::stop_string);
  CHECK(rest.rows[1].tokens.size() == 1);
}

TEST("generation draws what the whole text, run again for each token, gives") {
  for (const auto& model : models()) {
    CAPTURE(model->config().family);
    for (const SamplingOptions& sampling : kSampling) {
      const Generation result = generate(*model, kPrompts, {.max_tokens = 12, .sampling = sampling, .chunk = 4});
      Sampler sampler(sampling);
      for (std::size_t row = 0; row < kPrompts.size(); ++row) {
        Ids text = kPrompts[row];
        for (int i = 0; i < 12; ++i) {
          const auto logits = last_logits(*model, text);
          text.push_back(sampler.draw(std::span(logits).first(kVocab), text, row, text.size()));
        }
        CHECK(together(kPrompts[row], result.rows[row].tokens) == text);
        CHECK(result.rows[row].stop == StopReason::max_tokens);
        CHECK(result.rows[row].prompt_tokens == static_cast<int64_t>(kPrompts[row].size()));
      }
      CHECK(result.speed.prefill_tokens == 10 + 0 + 4 + 4);
      CHECK(result.speed.decode_tokens == 4 * 12);
    }
  }
}

TEST("the chunks of a prompt and the rows of a batch do not change the tokens") {
  for (const auto& model : models()) {
    for (const SamplingOptions& sampling : kSampling) {
      GenerationOptions options{.max_tokens = 10, .sampling = sampling};
      const Prompts expected = tokens_of(generate(*model, kPrompts, options));
      for (const int64_t chunk : {1, 2, 3, 16, 1000})
        for (const int64_t batch : {1, 2, 3, 16}) {
          options.chunk = chunk, options.batch = batch;
          CHECK(tokens_of(generate(*model, kPrompts, options)) == expected);
        }
    }
    for (std::size_t row = 0; row < kPrompts.size(); ++row)  // greedily a row alone is the same too
      CHECK(tokens_of(generate(*model, {kPrompts[row]}, {.max_tokens = 10, .sampling = {.temperature = 0}}))[0] ==
            tokens_of(generate(*model, kPrompts, {.max_tokens = 10, .sampling = {.temperature = 0}}))[row]);
  }
}

TEST("saved after any number of tokens and loaded, a generation goes on bit for bit") {
  const ScratchFolder scratch;
  constexpr int64_t kTokens = 16;
  const auto ends_in_three_ways = [](const Generation& generation) {
    std::set<StopReason> reasons;
    for (const GeneratedRow& row : generation.rows) reasons.insert(row.stop);
    return reasons.size() == 3;
  };
  for (const auto& model : models()) {
    CAPTURE(model->config().family);
    GenerationOptions options{.max_tokens = kTokens, .sampling = kSampling[2], .chunk = 3, .batch = 3};
    options.end_of_text = kEnd, options.tokenizer = &kTokenizer, options.stop = {"\xE2\x82\xAC", "ab", "the the"};
    Generation whole;
    for (uint64_t seed = 1; seed < 100 && !ends_in_three_ways(whole); ++seed) {
      options.sampling.seed = seed;
      whole = generate(*model, kPrompts, options);
    }
    REQUIRE(ends_in_three_ways(whole));
    for (int64_t before = 0; before < kTokens; ++before) {
      CAPTURE(before);
      options.max_tokens = before;
      const Generation first = generate(*model, kPrompts, options);
      const std::string path = scratch.file("state.safetensors");
      first.state.save(path, *model);
      const GenerationState loaded = GenerationState::load(path, *model);
      check_same_state(loaded, first.state);
      options.max_tokens = kTokens - before;
      const Generation rest = generate(*model, {}, options, loaded);
      for (std::size_t row = 0; row < kPrompts.size(); ++row) {
        CHECK(together(first.rows[row].tokens, rest.rows[row].tokens) == whole.rows[row].tokens);
        CHECK(first.rows[row].text + rest.rows[row].text == whole.rows[row].text);
        CHECK(rest.rows[row].stop == whole.rows[row].stop);
      }
      check_same_state(rest.state, whole.state);
    }
  }
}

TEST("interrupted at any moment, in the middle of a prompt too, a generation goes on bit for bit") {
  for (const auto& model : models()) {
    CAPTURE(model->config().family);
    GenerationOptions options{.max_tokens = 5, .sampling = kSampling[2], .chunk = 2};
    options.tokenizer = &kTokenizer;
    const Generation whole = generate(*model, kPrompts, options);
    int chunks = 0;
    for (int asked_at = 1;; ++asked_at) {
      CAPTURE(asked_at);
      int asked = 0;
      options.should_stop = [&] { return ++asked == asked_at; };  // true once: then nothing may run any more
      options.max_tokens = 5;
      const Generation first = generate(*model, kPrompts, options);
      options.should_stop = {};
      const std::size_t done = first.rows[0].tokens.size();
      if (done == 5) break;
      if (done == 0) ++chunks;
      for (const GeneratedRow& row : first.rows) {
        CHECK(row.stop == StopReason::interrupted);
        CHECK(row.tokens.size() == done);
      }
      options.max_tokens = 5 - static_cast<int64_t>(done);
      const Generation rest = generate(*model, {}, options, first.state);
      for (std::size_t row = 0; row < kPrompts.size(); ++row) {
        CHECK(together(first.rows[row].tokens, rest.rows[row].tokens) == whole.rows[row].tokens);
        CHECK(first.rows[row].text + rest.rows[row].text == whole.rows[row].text);
      }
      check_same_state(rest.state, whole.state);
    }
    CHECK(chunks == 5 + 2 + 1);  // of the prompts of 11 and of 5 tokens, and before the first step
  }
}

TEST("one state serves many prompts, each as if it followed the text alone") {
  const Ids book{4, 8, 15, 16, 2, 3, 4, 2};
  const Prompts questions{{1, 2}, {3}, {5, 6, 8, 9}};
  for (const auto& model : models()) {
    const Generation read = generate(*model, {book}, {.max_tokens = 0, .chunk = 3});
    CHECK(read.rows[0].tokens.empty());
    CHECK(read.state.sequences[0].pending == Ids{book.back()});
    for (const SamplingOptions& sampling : kSampling) {
      const Generation answers = generate(*model, questions, {.max_tokens = 9, .sampling = sampling}, read.state);
      Prompts whole;
      for (const Ids& question : questions) whole.push_back(together(book, question));
      CHECK(tokens_of(answers) == tokens_of(generate(*model, whole, {.max_tokens = 9, .sampling = sampling})));
      CHECK(answers.state.recurrent.rows() == 3);
      CHECK(answers.state.sequences[2].length() == static_cast<int64_t>(whole[2].size()) + 9);
    }
    // The same prompt for several rows of a state, and a prompt for each.
    const Generation two = generate(*model, {book, questions[2]}, {.max_tokens = 0});
    const GenerationOptions greedy{.max_tokens = 6, .sampling = {.temperature = 0}};
    const auto expected = tokens_of(generate(*model, {together(book, {1, 2}), together(questions[2], {1, 2})}, greedy));
    CHECK(tokens_of(generate(*model, {{1, 2}}, greedy, two.state)) == expected);
    CHECK(tokens_of(generate(*model, {{1, 2}, {1, 2}}, greedy, two.state)) == expected);
    CHECK(holds(message_of([&] { generate(*model, questions, greedy, two.state); }), "differ in number"));
  }
}

TEST("rows that end by themselves keep their state, and go on only with a new prompt") {
  const auto all = models();
  const LanguageModel& model = *all.front();
  const Generation plain = generate(model, kPrompts, {.max_tokens = 12, .sampling = {.seed = 8}});
  const int32_t end = plain.rows[0].tokens[6];
  GenerationOptions options{.max_tokens = 12, .sampling = {.seed = 8}, .end_of_text = end};
  std::vector<std::size_t> last_calls(kPrompts.size());
  options.on_token = [&](std::size_t row, const GeneratedRow& so_far) {
    CHECK(last_calls[row] == 0);
    if (so_far.stop != StopReason::none) last_calls[row] = so_far.tokens.size();
  };
  const Generation ended = generate(model, kPrompts, options);
  for (std::size_t row = 0; row < kPrompts.size(); ++row) {
    Ids expected = plain.rows[row].tokens;
    const auto found = std::find(expected.begin(), expected.end(), end);
    CHECK(ended.rows[row].stop == (found == expected.end() ? StopReason::max_tokens : StopReason::end_of_text));
    if (found != expected.end()) expected.erase(found + 1, expected.end());
    CHECK(ended.rows[row].tokens == expected);
    CHECK(last_calls[row] == expected.size());
    // Its state is what reading its own text gives, whatever the others did afterwards.
    const Generation alone = generate(model, {together(kPrompts[row], expected)}, {.max_tokens = 0});
    for (const auto& [name, tensor] : alone.state.recurrent.named_tensors()) {
      const auto index = static_cast<int64_t>(row);
      expect_close(ended.state.recurrent.named_tensors().at(name).slice(0, index, index + 1).to_vector<double>(),
                   tensor.to_vector<double>(), 1e-4, 1e-30, name);
    }
  }
  options.on_token = {};
  REQUIRE(ended.rows[0].stop == StopReason::end_of_text);
  const Generation rest = generate(model, {}, options, ended.state);
  CHECK(rest.rows[0].tokens.empty());
  CHECK(rest.rows[0].stop == StopReason::end_of_text);
  const Generation asked = generate(model, {{3}}, options, ended.state);
  CHECK_FALSE(asked.rows[0].tokens.empty());
  const Generation pushed = generate(model, {Ids{}}, options, ended.state);  // an empty prompt: on from the end-of-text token
  CHECK_FALSE(pushed.rows[0].tokens.empty());
}

TEST("text is that of the tokens, up to the stop string or the end of text") {
  for (const auto& model : models()) {
    GenerationOptions options{.max_tokens = 60, .sampling = {.temperature = 1.5, .seed = 2}, .end_of_text = kEnd};
    options.tokenizer = &kTokenizer;
    options.keep_state = false;
    std::vector<std::string> grown(kPrompts.size());
    options.on_token = [&](std::size_t row, const GeneratedRow& so_far) {
      CHECK(so_far.text.starts_with(grown[row]));
      CHECK_FALSE(find_invalid_utf8(so_far.text));
      grown[row] = so_far.text;
    };
    const Generation free = generate(*model, kPrompts, options);
    CHECK(free.state.absent());
    for (std::size_t row = 0; row < kPrompts.size(); ++row) {
      Ids tokens = free.rows[row].tokens;
      CHECK(std::find(tokens.begin(), tokens.end(), kGap) == tokens.end());
      CHECK(grown[row] == free.rows[row].text);
      if (free.rows[row].stop == StopReason::end_of_text) tokens.pop_back();
      CHECK(free.rows[row].text == kTokenizer.decode(tokens));
    }
    options.on_token = {};
    for (options.max_tokens = 0; options.max_tokens < 20; ++options.max_tokens)  // also where the last character is unfinished
      for (const GeneratedRow& row : generate(*model, kPrompts, options).rows)
        if (row.stop == StopReason::max_tokens) CHECK(row.text == kTokenizer.decode(row.tokens));
    options.max_tokens = 60;
    const std::string text = free.rows[0].text;
    std::size_t at = 2;  // where two letters follow one another
    while (at + 1 < text.size() && !(text[at] > 0 && text[at + 1] > 0)) ++at;
    REQUIRE(at + 1 < text.size());
    const std::string stop = text.substr(at, 2);
    options.stop = {"zzz", stop};
    const Generation stopped = generate(*model, kPrompts, options);
    CHECK(stopped.rows[0].text == text.substr(0, text.find(stop)));
    CHECK(stopped.rows[0].stop == StopReason::stop_string);
  }
}

TEST("rows of the head that only pad it are never drawn") {
  for (const auto& model : models()) {
    const ModelConfig& c = model->config();
    for (Parameter& p : model->parameters().all())
      if (p.shape.rank() == 2 && p.shape[0] == c.padded_vocab() && p.shape[1] == c.d_model)
        add_scaled(p.master.slice(0, kVocab, 24), random_tensor(kCpu, Dtype::f32, {24 - kVocab, c.d_model}, 1), 50);
    for (const double temperature : {0.0, 1.0, 50.0}) {
      const Generation result = generate(*model, kPrompts, {.max_tokens = 10, .sampling = {.temperature = temperature}});
      for (const GeneratedRow& row : result.rows)
        for (const int32_t id : row.tokens) CHECK(id < kVocab);
    }
    const auto logits = last_logits(*model, kPrompts[0]);
    CHECK(std::max_element(logits.begin(), logits.end()) - logits.begin() >= kVocab);  // or this shows nothing
  }
}

TEST("an empty prompt begins with the end of text") {
  const auto all = models();
  const GenerationOptions options{.max_tokens = 5, .sampling = {.seed = 1}, .end_of_text = kEnd};
  CHECK(tokens_of(generate(*all.front(), {Ids{}}, options)) == tokens_of(generate(*all.front(), {{kEnd}}, options)));
  CHECK(holds(message_of([&] { generate(*all.front(), {Ids{}}, {.max_tokens = 5}); }), "a prompt is empty"));
}

TEST("options, prompts and states that cannot be are refused by name") {
  const auto all = models();
  const LanguageModel& model = *all.front();
  const auto refused = [&](const GenerationOptions& options, const Prompts& prompts = {{1}}, const GenerationState& from = {}) {
    return message_of([&] { generate(model, prompts, options, from); });
  };
  CHECK(refused({.max_tokens = 1}) == "no error");
  CHECK(holds(refused({.max_tokens = -1}), "max_tokens must be at least 0"));
  CHECK(holds(refused({.chunk = 0}), "chunk must be at least 1"));
  CHECK(holds(refused({.batch = 0}), "batch must be at least 1"));
  CHECK(holds(refused({.sampling = {.top_p = 2}}), "top_p"));
  CHECK(holds(refused({.end_of_text = kVocab}), "end-of-text token is outside"));
  CHECK(holds(refused({.stop = {"a"}}), "need a tokenizer"));
  CHECK(holds(refused({.stop = {""}, .tokenizer = &kTokenizer}), "a stop string is empty"));
  CHECK(holds(refused({}, {{1}, {2, kVocab}}), "19 at index 1 of prompt 1"));
  CHECK(holds(refused({}, {{-1}}), "-1 at index 0 of prompt 0"));
  CHECK(holds(refused({}, {}), "neither a prompt nor a state"));
  GenerationState state = generate(model, {{1, 2}}, {.max_tokens = 1, .tokenizer = &kTokenizer}).state;
  CHECK(state.tokenizer == "small");
  state.tokenizer = "another";
  CHECK(holds(refused({.tokenizer = &kTokenizer}, {}, state), "another tokenizer"));
  state.tokenizer = "";
  state.sequences.emplace_back();
  CHECK(holds(refused({}, {}, state), "differ in number"));
}

TEST("a state file of another kind, another model or with damage is refused by its path") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("state.safetensors");
  const auto all = models();
  const LanguageModel& model = *all.front();
  generate(model, {{1, 2, 3}, {4}}, {.max_tokens = 3, .tokenizer = &kTokenizer}).state.save(path, model);
  const NamedTensors good = read_safetensors(path);
  CHECK(GenerationState::load(path, model).weights == weights_fingerprint(model));
  CHECK(weights_fingerprint(*models(6).front()) != weights_fingerprint(model));

  using Tensors = std::map<std::string, Tensor>;
  using Metadata = std::map<std::string, std::string>;
  const std::string bad = scratch.file("bad.safetensors");
  const auto refusal = [&](const std::function<void(Tensors&, Metadata&)>& change) {
    Tensors tensors = good.tensors;
    Metadata metadata = good.metadata;
    change(tensors, metadata);
    write_safetensors(bad, tensors, metadata);
    const std::string text = message_of([&] { GenerationState::load(bad, model); });
    CHECK((text == "no error" || holds(text, bad)));
    return text;
  };
  const auto i32 = [](const Ids& ids) { return Tensor::from(kCpu, {static_cast<int64_t>(ids.size())}, ids); };
  CHECK(refusal([](Tensors&, Metadata&) {}) == "no error");
  CHECK(holds(refusal([](Tensors&, Metadata& m) { m.erase("format"); }), "the file is not one"));
  CHECK(holds(refusal([](Tensors&, Metadata& m) { m["version"] = "2"; }), "the file is not one"));
  CHECK(holds(refusal([](Tensors&, Metadata& m) { m["d_model"] = "64"; }), "d_model  64 in the state, 32 in the model"));
  CHECK(holds(refusal([](Tensors&, Metadata& m) { m["family"] = "other"; }), "another model"));
  CHECK(holds(refusal([](Tensors& t, Metadata&) { t.erase("rows.read"); }), "rows.read"));
  CHECK(holds(refusal([](Tensors& t, Metadata&) { t.erase("layers.1.ssm"); }), "layers.1"));
  CHECK(holds(refusal([](Tensors& t, Metadata&) { t.erase("rows.0.pending"); }), "no token to go on from"));
  CHECK(holds(refusal([&](Tensors& t, Metadata&) { t["rows.0.pending"] = i32({kVocab}); }), "rows.0.pending[0]"));
  CHECK(holds(refusal([&](Tensors& t, Metadata&) { t["rows.1.seen"] = i32({3, -1}); }), "rows.1.seen[1]"));
  CHECK(holds(refusal([&](Tensors& t, Metadata&) { t["rows.1.seen"] = i32({3, 3}); }), "do not ascend"));
  CHECK(holds(refusal([&](Tensors& t, Metadata&) { t["rows.2.pending"] = i32({3}); }), "rows.2.pending"));
  CHECK(holds(refusal([&](Tensors& t, Metadata&) { t["rows.stop"] = i32({0, 9}); }), "rows.stop[1]"));
  CHECK(holds(refusal([&](Tensors& t, Metadata&) { t["rows.stop"] = i32({0}); }), "expected   [2] i32"));
  CHECK(holds(refusal([](Tensors& t, Metadata&) {
                t["rows.read"] = Tensor::from(kCpu, {2}, std::vector<int64_t>{-1, 3});
              }),
              "rows.read[0]"));
  CHECK(holds(refusal([](Tensors& t, Metadata&) { t["layers.0.ssm"] = t["layers.0.ssm"].slice(0, 0, 1); }), "rows"));
  CHECK(holds(refusal([](Tensors& t, Metadata&) { t["layers.0.extra"] = t["layers.0.ssm"]; }), "layers.0.extra"));
  CHECK(holds(refusal([](Tensors& t, Metadata&) { t["layers.0.ssm"] = t["layers.0.ssm"].slice(2, 0, 1).clone(); }), "layers.0.ssm"));
  CHECK(holds(refusal([](Tensors& t, Metadata&) {
                t["layers.0.ssm"] = t["layers.0.ssm"].clone();
                t["layers.0.ssm"].data<float>()[5] = NAN;
              }),
              "not a finite number"));
  CHECK(holds(refusal([](Tensors& t, Metadata&) { t["layers.0.ssm"] = Tensor::zeros(kCpu, Dtype::i32, t["layers.0.ssm"].shape()); }),
              "layers.0.ssm"));
}

TEST("on a GPU rows draw what the host draws from the logits of a decoder, whatever ends before them, and go on bit for bit") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const auto& on_cpu : models()) {
    CAPTURE(on_cpu->config().family);
    LanguageModel model(on_cpu->config(), Device::cuda(), Dtype::f32);
    for (Parameter& p : model.parameters().all()) copy(p.master, on_cpu->parameters().find(p.name)->master.to(Device::cuda()));
    model.parameters().refresh_compute();
    for (const SamplingOptions& sampling : kSampling) {
      const GenerationOptions options{.max_tokens = 14, .sampling = sampling, .end_of_text = kEnd, .tokenizer = &kTokenizer};
      const Generation all = generate(model, kPrompts, options);
      for (std::size_t row = 0; row < kPrompts.size(); ++row) {  // the same decoder's logits, drawn from by Sampler
        const NoGrad no_grad;
        const auto count = static_cast<int64_t>(kPrompts[row].size());
        RecurrentState state = model.zero_state(1);
        if (count > 1)
          state =
              model.forward(Tensor::from(model.device(), {1, count - 1}, Ids(kPrompts[row].begin(), kPrompts[row].end() - 1)), state).state;
        Decoder decoder(model, state);
        Sampler sampler(sampling, {kGap});
        Ids text = kPrompts[row], drawn;
        while (drawn.size() < 14 && (drawn.empty() || drawn.back() != kEnd)) {
          const auto logits = decoder.step(std::span(text).last(1)).to_vector<float>();
          drawn.push_back(sampler.draw(std::span(logits).first(kVocab), text, row, text.size()));
          text.push_back(drawn.back());
        }
        CHECK(all.rows[row].tokens == drawn);
      }
      GenerationOptions half = options;
      half.max_tokens = 5;
      const Generation first = generate(model, kPrompts, half);
      half.max_tokens = 9;
      const Generation second = generate(model, {}, half, first.state);
      for (std::size_t row = 0; row < kPrompts.size(); ++row)
        CHECK(together(first.rows[row].tokens, second.rows[row].tokens) == all.rows[row].tokens);
    }
  }
}
