// Tokenizers on small definitions made here: merging against a naive version, refusals, damaged files, decoding, threads.
#include "data/tokenizer.h"

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "core/error.h"
#include "data/bpe_tokenizer.h"
#include "data/tokenizer_json.h"
#include "data/tokenizer_speed.h"
#include "data/unicode.h"
#include "data/word_cache.h"
#include "tests/support/check.h"

using namespace longhand;
using Ids = std::vector<int32_t>;
using Json = nlohmann::json;

namespace {

constexpr int32_t kEndId = 300, kTwoSpacesId = 301, kFourSpacesId = 302;

std::string symbol_of(unsigned byte) {
  std::string symbol;
  append_utf8(byte_symbol(static_cast<uint8_t>(byte)), symbol);
  return symbol;
}

// A tokenizer.json: id b for byte b, ids from 256 on for the merges, then three added tokens.
Json small_json(const std::vector<std::pair<std::string, std::string>>& merges = {{"l", "o"}, {"lo", "w"}, {"e", "r"}, {"low", "er"}}) {
  Json vocab = Json::object(), merge_list = Json::array();
  for (unsigned byte = 0; byte < 256; ++byte) vocab[symbol_of(byte)] = byte;
  int32_t next = 256;
  for (const auto& [left, right] : merges) {
    merge_list.push_back(left + " " + right);
    if (!vocab.contains(left + right)) vocab[left + right] = next++;
  }
  const auto added = [](int32_t id, const std::string& content, bool special) {
    return Json{{"id", id},        {"content", content}, {"special", special}, {"normalized", !special}, {"single_word", false},
                {"lstrip", false}, {"rstrip", false}};
  };
  const Json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", {added(kEndId, "<|endoftext|>", true), added(kTwoSpacesId, "  ", false), added(kFourSpacesId, "    ", false)}},
          {"normalizer", {{"type", "NFC"}}},
          {"pre_tokenizer", byte_level},
          {"post_processor", byte_level},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"vocab", vocab},
            {"merges", merge_list}}}};
}

struct SmallFile {
  test::ScratchFolder folder;
  std::string path = folder.file("small.json");
  explicit SmallFile(const std::string& text) { std::ofstream(path, std::ios::binary) << text; }
  explicit SmallFile(const Json& json) : SmallFile(json.dump()) {}
};

std::unique_ptr<Tokenizer> open_small(const Json& json, TokenizerOptions options = {}) {
  return open_tokenizer(SmallFile(json).path, options);
}

Ids encode(const Tokenizer& tokenizer, std::string_view text) {
  Ids ids;
  tokenizer.encode(text, ids);
  return ids;
}

// BPE as its definition tells it, on strings: the specification for the two ways of merging in BpeTokenizer.
Ids naive_bpe(const Json& json, const std::string& word) {
  std::map<std::string, int> ranks;
  for (const auto& merge : json["model"]["merges"]) ranks.emplace(merge, static_cast<int>(ranks.size()));
  std::vector<std::string> symbols;
  for (char c : word) symbols.emplace_back(1, c);
  for (;;) {
    std::size_t best = symbols.size();
    int best_rank = INT32_MAX;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i)
      if (const auto found = ranks.find(symbols[i] + " " + symbols[i + 1]); found != ranks.end() && found->second < best_rank)
        best = i, best_rank = found->second;
    if (best == symbols.size()) break;
    symbols[best] += symbols[best + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
  Ids ids;
  for (const auto& symbol : symbols) ids.push_back(json["model"]["vocab"][symbol]);
  return ids;
}

}  // namespace

TEST("merging by hand: lowest rank first, not leftmost or longest first") {
  // ranks: 0 l+o, 1 lo+w, 2 e+r, 3 low+er     ids: lo 256, low 257, er 258, lower 259
  const auto tokenizer = open_small(small_json());
  CHECK(encode(*tokenizer, "lower") == Ids{259});
  CHECK(encode(*tokenizer, "low") == Ids{257});
  CHECK(encode(*tokenizer, "lowe") == Ids{257, 'e'});
  CHECK(encode(*tokenizer, "slowerer") == Ids{'s', 259, 258});
  CHECK(encode(*tokenizer, "owl") == Ids{'o', 'w', 'l'});
  // "aab": b joins a (rank 0) before the two a's could join (rank 1)
  const auto other = open_small(small_json({{"a", "b"}, {"a", "a"}}));
  CHECK(encode(*other, "aab") == Ids{'a', 256});
  CHECK(encode(*other, "aaa") == Ids{257, 'a'});
  CHECK(encode(*other, "") == Ids{});
}

TEST("short and long words merge as the naive version does") {
  std::mt19937 random(3);
  const auto pick = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  for (int vocabulary = 0; vocabulary < 8; ++vocabulary) {
    std::vector<std::pair<std::string, std::string>> merges;
    std::vector<std::string> tokens = {"a", "b", "c"};
    for (int tries = 0; tries < 30; ++tries) {
      const std::pair merge{tokens[pick(tokens.size())], tokens[pick(tokens.size())]};
      if (std::find(merges.begin(), merges.end(), merge) != merges.end()) continue;
      merges.push_back(merge);
      tokens.push_back(merge.first + merge.second);
    }
    const Json json = small_json(merges);
    const auto tokenizer = open_small(json);
    for (std::size_t length : {1, 2, 3, 7, 23, 24, 25, 47, 48, 49, 50, 97, 300})
      for (int i = 0; i < 20; ++i) {
        std::string word;
        while (word.size() < length) word.push_back("abc"[pick(3)]);
        const Ids expected = naive_bpe(json, word);
        CHECK_MESSAGE(encode(*tokenizer, word) == expected, word);
        CHECK_MESSAGE(encode(*tokenizer, word) == expected, word);  // now from the cache
      }
  }
}

TEST("added tokens: leftmost-longest, special ones on request only") {
  const auto plain = open_small(small_json());
  const auto parsing = open_small(small_json(), {.parse_special = true});
  CHECK(encode(*plain, std::string(7, ' ') + "a") == Ids{kFourSpacesId, kTwoSpacesId, ' ', 'a'});
  CHECK(encode(*plain, std::string(9, ' ')) == Ids{kFourSpacesId, kFourSpacesId, ' '});
  CHECK(encode(*parsing, "a<|endoftext|>  <|endoftext|>b") == Ids{'a', kEndId, kTwoSpacesId, kEndId, 'b'});
  CHECK(encode(*parsing, "<|endoftext<|endoftext|>").back() == kEndId);
  CHECK(encode(*plain, "<|endoftext|>").size() == 13);
  CHECK(plain->vocab_size() == 303);
  CHECK(plain->end_of_text() == kEndId);
}

TEST("text is brought to NFC before words are cut") {
  const auto tokenizer = open_small(small_json());
  CHECK(encode(*tokenizer, "e\u0301") == Ids{0xC3, 0xA9});
  CHECK(tokenizer->decode(encode(*tokenizer, "e\u0301")) == "\u00e9");
}

TEST("encode appends, and refuses text that is not UTF-8 with the byte offset") {
  const auto bpe = open_small(small_json());
  const auto bytes = open_tokenizer("bytes");
  for (const Tokenizer* tokenizer : {bpe.get(), bytes.get()}) {
    Ids ids = {7};
    tokenizer->encode("a", ids);
    CHECK(ids == Ids{7, 'a'});
    CHECK_THROWS_WITH_AS(tokenizer->encode("abc\xC3(", ids), doctest::Contains("byte offset  3"), ValueError);
    CHECK(ids == Ids{7, 'a'});
  }
}

TEST("decode: cut characters become U+FFFD, special tokens can be left out, unknown ids are refused") {
  const auto tokenizer = open_small(small_json());
  CHECK(tokenizer->decode(Ids{259, ' ', 0xF0, 0x9F, 0x98, 0x80}) == "lower \U0001f600");
  CHECK(tokenizer->decode(Ids{0xF0, 0x9F, 0x98, 'a'}) == "\ufffda");
  CHECK(tokenizer->decode(Ids{'a', kEndId, kFourSpacesId}) == "a<|endoftext|>    ");
  CHECK(open_small(small_json(), {.skip_special = true})->decode(Ids{'a', kEndId, kFourSpacesId}) == "a    ");
  CHECK(tokenizer->decode(Ids{}).empty());
  CHECK_THROWS_WITH_AS(tokenizer->decode(Ids{'a', 303}), doctest::Contains("position  1"), ValueError);
  CHECK_THROWS_AS(tokenizer->decode(Ids{-1}), ValueError);
  CHECK_THROWS_AS(tokenizer->decode(Ids{299}), ValueError);  // a gap between vocabulary and added tokens
}

TEST("byte tokenizer") {
  const auto bytes = open_tokenizer("bytes");
  CHECK(encode(*bytes, "a\u00e9\n") == Ids{'a', 0xC3, 0xA9, '\n'});
  CHECK(encode(*bytes, "<|endoftext|>").size() == 13);
  CHECK(encode(*open_tokenizer("bytes", {.parse_special = true}), "a<|endoftext|>b") == Ids{'a', 256, 'b'});
  CHECK(bytes->decode(Ids{'a', 0xC3, 0xA9, 0xC3, 'b', 256}) == "a\u00e9\ufffdb<|endoftext|>");
  CHECK(open_tokenizer("bytes", {.skip_special = true})->decode(Ids{'a', 256}) == "a");
  CHECK_THROWS_WITH_AS(bytes->decode(Ids{257}), doctest::Contains("257"), ValueError);
  CHECK(bytes->vocab_size() == 257);
  CHECK(bytes->end_of_text() == 256);
  CHECK(bytes->name() == "bytes");
}

TEST("every id has the bytes that decode writes, and an id without a token has none") {
  for (const bool skip : {false, true}) {
    const auto small = open_small(small_json(), {.skip_special = skip}), bytes = open_tokenizer("bytes", {.skip_special = skip});
    for (const Tokenizer* tokenizer : {small.get(), bytes.get()})
      for (int32_t id = -1; id <= tokenizer->vocab_size(); ++id) {
        const auto piece = tokenizer->bytes_of(id);
        if (piece) CHECK(replace_invalid_utf8(*piece) == tokenizer->decode(Ids{id}));
        else CHECK_THROWS_AS(tokenizer->decode(Ids{id}), ValueError);
      }
    CHECK(small->bytes_of(259) == "lower");
    CHECK(small->bytes_of(0xC3) == "\xC3");
    CHECK(small->bytes_of(kEndId) == (skip ? "" : kEndOfText));
    CHECK_FALSE(small->bytes_of(270));  // a gap in the vocabulary
    CHECK(bytes->bytes_of(0) == std::string_view("\0", 1));
    CHECK(bytes->bytes_of(256) == (skip ? "" : kEndOfText));
  }
}

TEST("the vocabulary's fingerprint does not depend on special tokens being parsed") {
  for (const bool special : {false, true}) {
    const TokenizerOptions options{.parse_special = special};
    CHECK(vocabulary_fingerprint(open_tokenizer("bytes", options)->fingerprint()) == "bytes");
    CHECK(vocabulary_fingerprint(open_small(small_json(), options)->fingerprint()) == open_small(small_json())->fingerprint());
  }
}

TEST("byte symbols: visible Latin-1 characters stand for themselves, the rest borrow from U+0100 on") {
  CHECK(byte_symbol('!') == '!');
  CHECK(byte_symbol(0) == 0x100);
  CHECK(byte_symbol('\n') == 0x10A);
  CHECK(byte_symbol(' ') == 0x120);
  CHECK(byte_symbol(0x7F) == 0x121);
  CHECK(byte_symbol(0xAD) == 0x143);
  CHECK(byte_symbol(0xFF) == 0xFF);
  for (unsigned byte = 0; byte < 256; ++byte) CHECK(token_bytes(symbol_of(byte)) == std::string(1, static_cast<char>(byte)));
  CHECK(token_bytes("a b") == "a b");  // a space is no byte symbol, so the token stands for itself
}

TEST("two fingerprints have the same vocabulary when they differ in nothing but special tokens in texts") {
  CHECK(same_vocabulary("bytes", "bytes+special"));
  CHECK(same_vocabulary("bytes+special", "bytes+special"));
  CHECK_FALSE(same_vocabulary("bytes", "bpe-300-0"));
  CHECK_FALSE(same_vocabulary("bytes", ""));
}

TEST("fingerprints tell definitions apart") {
  const Json json = small_json();
  const std::string original = open_small(json)->fingerprint();
  CHECK(open_small(json)->fingerprint() == original);
  CHECK(open_small(json, {.skip_special = true})->fingerprint() == original);
  CHECK(open_small(json, {.parse_special = true})->fingerprint() != original);
  Json changed = json;
  std::swap(changed["model"]["merges"][0], changed["model"]["merges"][2]);
  CHECK(open_small(changed)->fingerprint() != original);
}

TEST("both forms of merges and the optional keys are accepted") {
  Json json = small_json();
  Json pairs = Json::array();
  for (const std::string merge : json["model"]["merges"]) {
    const auto space = merge.find(' ');
    pairs.push_back({merge.substr(0, space), merge.substr(space + 1)});
  }
  const std::string original = open_small(json)->fingerprint();
  json["model"]["merges"] = pairs;
  json["model"]["byte_fallback"] = false;
  json["model"]["ignore_merges"] = false;
  json["model"].erase("type");
  for (const std::string slot : {"pre_tokenizer", "post_processor", "decoder"}) json[slot]["use_regex"] = true;
  CHECK(open_small(json)->fingerprint() == original);
}

TEST("what a tokenizer.json asks for and this tokenizer does not do is refused by name") {
  struct Case {
    std::string pointer, value, named;
  };
  const std::vector<Case> cases = {
      {"/version", R"("2.0")", "version"},
      {"/truncation", R"({"max_length": 5})", "truncation"},
      {"/padding", R"({})", "padding"},
      {"/surprise", "1", "surprise"},
      {"/normalizer", R"({"type": "NFKC"})", "NFKC"},
      {"/normalizer", "null", "normalizer"},
      {"/pre_tokenizer", R"({"type": "Whitespace"})", "Whitespace"},
      {"/pre_tokenizer/add_prefix_space", "true", "pre_tokenizer.add_prefix_space"},
      {"/pre_tokenizer/use_regex", "false", "pre_tokenizer.use_regex"},
      {"/post_processor", R"({"type": "TemplateProcessing"})", "TemplateProcessing"},
      {"/decoder", R"({"type": "WordPiece"})", "WordPiece"},
      {"/decoder", "7", "decoder"},
      {"/model", "[]", "model"},
      {"/model/type", R"("Unigram")", "Unigram"},
      {"/model/dropout", "0.1", "model.dropout"},
      {"/model/unk_token", R"("<unk>")", "model.unk_token"},
      {"/model/continuing_subword_prefix", R"("##")", "model.continuing_subword_prefix"},
      {"/model/end_of_word_suffix", R"("</w>")", "model.end_of_word_suffix"},
      {"/model/fuse_unk", "true", "model.fuse_unk"},
      {"/model/byte_fallback", "true", "model.byte_fallback"},
      {"/model/ignore_merges", "true", "model.ignore_merges"},
      {"/model/surprise", "1", "model.surprise"},
      {"/model/vocab", "[]", "model.vocab"},
      {"/model/vocab/lower", "256", "id 256"},
      {"/model/vocab/lower", "-1", "model.vocab.lower"},
      {"/model/vocab/lower", "1.5", "model.vocab.lower"},
      {"/model/vocab/lower", "99999999999999", "model.vocab.lower"},
      {"/model/merges", "{}", "model.merges"},
      {"/model/merges/1", R"("low")", "model.merges[1]"},
      {"/model/merges/1", R"("l o w")", "model.merges[1]"},
      {"/model/merges/1", R"(["lo"])", "model.merges[1]"},
      {"/model/merges/1", R"(["lo", 3])", "model.merges[1]"},
      {"/model/merges/1", R"("lo X")", "\"loX\""},
      {"/model/merges/1", R"("XX w")", "\"XX\""},
      {"/model/merges/1", R"("l o")", "twice"},
      {"/added_tokens", "3", "added_tokens"},
      {"/added_tokens/0", "3", "added_tokens[0]"},
      {"/added_tokens/1/content", R"("")", "added_tokens[1].content"},
      {"/added_tokens/1/content", R"("    ")", "twice"},
      {"/added_tokens/1/content", R"("low")", "two ids"},
      {"/added_tokens/1/id", "302", "id 302"},
      {"/added_tokens/1/id", R"("1")", "added_tokens[1].id"},
      {"/added_tokens/1/lstrip", "true", "added_tokens[1].lstrip"},
      {"/added_tokens/1/special", "1", "added_tokens[1].special"},
      {"/added_tokens/1/surprise", "1", "added_tokens[1].surprise"},
  };
  for (const auto& [pointer, value, named] : cases) {
    Json json = small_json();
    json[Json::json_pointer(pointer)] = Json::parse(value);
    CHECK_THROWS_WITH_AS(open_small(json), doctest::Contains(named.c_str()), FileError);
  }
  for (const std::string key : {"added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"}) {
    Json json = small_json();
    json.erase(key);
    CHECK_THROWS_WITH_AS(open_small(json), doctest::Contains(key.c_str()), FileError);
  }
  Json no_end = small_json();
  no_end["added_tokens"].erase(0);
  CHECK_THROWS_WITH_AS(open_small(no_end)->end_of_text(), doctest::Contains("<|endoftext|>"), ValueError);
}

TEST("a damaged file is an error with its path, never a crash") {
  const std::string text = small_json().dump();
  CHECK_THROWS_WITH_AS(open_tokenizer("/no/such/file.json"), doctest::Contains("/no/such/file.json"), FileError);
  CHECK_THROWS_AS(open_tokenizer(test::ScratchFolder().path()), FileError);
  CHECK_THROWS_AS(open_tokenizer(SmallFile(std::string()).path), FileError);
  CHECK_THROWS_WITH_AS(open_tokenizer(SmallFile(std::string("{\"version\": \xFF}")).path), doctest::Contains("byte offset  12"), FileError);
  CHECK_THROWS_WITH_AS(open_tokenizer(SmallFile(std::string(100'000, '[')).path), doctest::Contains("nested"), FileError);
  CHECK_THROWS_WITH_AS(open_tokenizer(SmallFile("{\"version\": 1, " + text.substr(1)).path), doctest::Contains("twice"), FileError);
  CHECK_THROWS_AS(open_tokenizer(SmallFile(std::string("{\"version\": 1e999}")).path), FileError);
  for (std::size_t length = 0; length < text.size(); length += 41)
    CHECK_THROWS_AS(open_tokenizer(SmallFile(text.substr(0, length)).path), FileError);

  std::mt19937 random(4);
  int refused = 0;
  for (int i = 0; i < 1000; ++i) {
    std::string damaged = text;
    damaged[random() % text.size()] = static_cast<char>(random() & 0xFF);
    try {
      encode(*open_tokenizer(SmallFile(damaged).path), "some lower text  ");
    } catch (const FileError&) {
      ++refused;
    }
  }
  CHECK(refused > 500);
}

TEST("word cache: a hit means the same bytes, length and tokenizer") {
  WordCache cache;
  const Ids ids = {1, 2};
  for (uint32_t owner = 1; owner <= 50'000; ++owner) cache.put({"word", owner}, ids);
  for (uint32_t owner = 50'001; owner <= 100'000; ++owner) REQUIRE(cache.find({"word", owner}).empty());
  const auto found = cache.find({"word", 50'000});
  CHECK(Ids(found.begin(), found.end()) == ids);
  cache.put({"!", 1}, ids);
  CHECK(cache.find({std::string_view("!\0", 2), 1}).empty());
  cache.put({"long", 1}, Ids(WordCache::kMaxIds + 1, 1));
  CHECK(cache.find({"long", 1}).empty());
  cache.put({"full", 1}, Ids(WordCache::kMaxIds, 5));
  CHECK(cache.find({"full", 1}).size() == WordCache::kMaxIds);
  const std::string longest(WordCache::kMaxWordBytes, 'x');
  CHECK(WordCache::takes(longest));
  CHECK(!WordCache::takes(longest + "x"));
  cache.put({longest, 1}, ids);
  CHECK(cache.find({longest, 1}).size() == 2);
}

TEST("threads and several tokenizers share nothing by mistake") {
  const auto one = open_small(small_json());
  const auto two = open_small(small_json({{"w", "e"}, {"l", "o"}}));
  const std::string text = "lower low slower lo we owe lower lowe";
  const Ids ids_one = encode(*one, text), ids_two = encode(*two, text);
  CHECK(ids_one != ids_two);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < wrong.size(); ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 2000; ++i) wrong[t] += (encode(*one, text) == ids_one ? 0 : 1) + (encode(*two, text) == ids_two ? 0 : 1);
    });
  for (auto& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4, 0));
}

TEST("the speed measurement counts bytes and tokens") {
  const std::vector<std::string> texts = {"lower", "low lower"};
  const auto speed = measure_tokenizer(*open_small(small_json()), texts);
  CHECK(speed.text_bytes == 14);
  CHECK(speed.tokens == 4);
  CHECK(speed.cold_mb_per_s > 0);
  CHECK(speed.warm_mb_per_s > 0);
}
