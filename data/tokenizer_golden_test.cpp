// The gpt-neox-20b tokenizer against reference encodings made with the field's own library.
#include <zstd.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"
#include "data/tokenizer.h"
#include "data/tokenizer_speed.h"
#include "data/unicode.h"
#include "tests/support/check.h"
#include "tests/support/sha256.h"

using namespace longhand;
using Ids = std::vector<int32_t>;

namespace {

// Sets `tokenizer` to gpt-neox-20b, or ends the test as skipped.
#define OPEN_NEOX(tokenizer, ...)                       \
  const auto data = test::folder_from("LONGHAND_DATA"); \
  if (!data) SKIP("LONGHAND_DATA names no folder");     \
  const auto tokenizer = open_tokenizer(*data + "/tokenizer/20B_tokenizer.json" __VA_OPT__(, ) __VA_ARGS__)

constexpr TokenizerOptions kParseSpecial = {.parse_special = true};

Ids encode(const Tokenizer& tokenizer, std::string_view text) {
  Ids ids;
  tokenizer.encode(text, ids);
  return ids;
}

// All lines of a zstd file, parsed as JSON.
std::vector<nlohmann::json> read_shard(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string packed{std::istreambuf_iterator<char>(file), {}};
  std::string text;
  const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(ZSTD_createDCtx(), &ZSTD_freeDCtx);
  ZSTD_inBuffer in{packed.data(), packed.size(), 0};
  std::string chunk(1 << 20, '\0');
  while (in.pos < in.size) {
    ZSTD_outBuffer out{chunk.data(), chunk.size(), 0};
    REQUIRE(!ZSTD_isError(ZSTD_decompressStream(context.get(), &out, &in)));
    text.append(chunk, 0, out.pos);
    if (in.pos == in.size && out.pos == out.size) in.pos = in.size;
  }
  std::vector<nlohmann::json> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

std::vector<nlohmann::json> read_lines(const std::string& path) {
  std::ifstream file(path);
  std::vector<nlohmann::json> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

std::string as_u16_bytes(const Ids& ids) {
  std::string bytes;
  for (int32_t id : ids) bytes += {static_cast<char>(id & 0xFF), static_cast<char>(id >> 8)};
  return bytes;
}

}  // namespace

TEST("gpt-neox: check values") {
  OPEN_NEOX(tokenizer);
  const std::vector<std::pair<std::string, Ids>> cases = {
      {"Hey how are you doing?", {8262, 849, 403, 368, 2509, 32}},
      {"Hello world", {12092, 1533}},
      {" banana", {36767}},  // docs/tokenizer.md follows these two
      {"banana", {5568, 3230}},
      {"Hello  world", {12092, 50276, 10186}},
      {"def f(x):\n    return x+1\n", {1545, 269, 9, 89, 2262, 187, 50274, 2309, 1269, 12, 18, 187}},
      {std::string(25, ' ') + "x", {50254, 1269}},
      {std::string(26, ' ') + "x", {50254, 50276, 89}},
      {"a\n\n\nb", {66, 535, 187, 67}},
      {"I'm can't WE'LL", {42, 1353, 476, 626, 13573, 8, 2293}},
      {"1234567 99", {42594, 2251, 8688}},
      {"cafe\u0301 \u00e9", {68, 2320, 860, 3974}},
      {"\u4f60\u597d \U0001f600", {24553, 34439, 49042, 211}},
      {"a\u00a0b", {66, 575, 67}},
      {"\t\tx  \n", {186, 186, 89, 50276, 187}},
  };
  for (const auto& [text, ids] : cases) CHECK_MESSAGE(encode(*tokenizer, text) == ids, text);
  CHECK(tokenizer->vocab_size() == 50277);
  CHECK(tokenizer->end_of_text() == 0);
  CHECK(tokenizer->name() == "20B_tokenizer.json");
}

TEST("gpt-neox: special tokens in a text are parsed on request only") {
  OPEN_NEOX(plain);
  const auto parsing = open_tokenizer(*data + "/tokenizer/20B_tokenizer.json", kParseSpecial);
  CHECK(encode(*parsing, "<|endoftext|>The") == Ids{0, 510});
  CHECK(encode(*plain, "<|endoftext|>The") == Ids{29, 93, 423, 1171, 1156, 49651, 510});
  CHECK(plain->decode(encode(*plain, "<|endoftext|>The")) == "<|endoftext|>The");
  CHECK(plain->fingerprint() != parsing->fingerprint());
}

TEST("gpt-neox: 595 reference texts, ids and decoded text") {
  const auto golden = test::folder_from("LONGHAND_GOLDEN");
  if (!golden) SKIP("LONGHAND_GOLDEN names no folder");
  OPEN_NEOX(tokenizer, kParseSpecial);
  const auto lines = read_lines(*golden + "/tokenizer_golden.jsonl");
  CHECK(lines.size() == 595);
  for (const auto& line : lines) {
    const std::string text = line.at("text");
    CHECK_MESSAGE(encode(*tokenizer, text) == line.at("ids").get<Ids>(), text);
    CHECK_MESSAGE(tokenizer->decode(line.at("ids").get<Ids>()) == line.at("decoded").get<std::string>(), text);
  }
}

TEST("gpt-neox: 428 reference texts, and decoding gives their NFC form") {
  OPEN_NEOX(tokenizer, kParseSpecial);
  const auto lines = read_lines(*data + "/tokenizer/golden.jsonl");
  CHECK(lines.size() == 428);
  std::string buffer;
  for (const auto& line : lines) {
    const std::string text = line.at("text");
    const Ids ids = encode(*tokenizer, text);
    CHECK_MESSAGE(ids == line.at("ids").get<Ids>(), text);
    CHECK_MESSAGE(tokenizer->decode(ids) == to_nfc(text, buffer), text);
  }
}

TEST("gpt-neox: every whole document of val and test") {
  OPEN_NEOX(tokenizer);
  std::map<std::string, std::vector<nlohmann::json>> shards;
  for (const std::string name : {"val", "test"}) shards[name] = read_shard(*data + "/minipile/" + name + ".jsonl.zst");
  std::ifstream file(*data + "/tokenizer/golden_documents.tsv");
  std::string row;
  std::getline(file, row);  // column names
  std::size_t documents = 0;
  std::string buffer;
  for (; std::getline(file, row); ++documents) {
    std::istringstream fields(row);
    std::string shard, line, set, bytes, tokens, digest;
    for (std::string* field : {&shard, &line, &set, &bytes, &tokens, &digest}) std::getline(fields, *field, '\t');
    const std::string text = shards.at(shard).at(std::stoul(line) - 1).at("text");
    const Ids ids = encode(*tokenizer, text);
    CHECK_MESSAGE(ids.size() == std::stoul(tokens), row);
    CHECK_MESSAGE(test::sha256(as_u16_bytes(ids)) == digest, row);
    CHECK_MESSAGE(tokenizer->decode(ids) == to_nfc(text, buffer), row);
  }
  CHECK(documents == 263);
}

TEST("gpt-neox: three megabytes without a break take seconds") {
  OPEN_NEOX(tokenizer);
  for (const std::string piece : {"a", "xyzzy", "\n", "!?"}) {
    std::string text;
    while (text.size() < 3'000'000) text += piece;
    const Ids ids = encode(*tokenizer, text);
    CHECK(ids.size() < text.size());
    CHECK(tokenizer->decode(ids) == text);
  }
}

TEST("gpt-neox: the speed measurement counts the tokens of val") {
  OPEN_NEOX(tokenizer);
  std::vector<std::string> texts;
  for (const auto& line : read_shard(*data + "/minipile/val.jsonl.zst")) texts.push_back(line.at("text"));
  const TokenizerSpeed speed = measure_tokenizer(*tokenizer, texts, 1);
  CHECK(speed.tokens == 904'291);
  MESSAGE("gpt-neox: ", speed.cold_mb_per_s, " MB/s in the first pass, ", speed.warm_mb_per_s, " MB/s in the second");
}

TEST("sha256 of the standard's examples") {
  CHECK(test::sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(test::sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(test::sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}
