// Caches give back what went in, and refuse what is not as it was written.
#include "data/token_cache.h"

#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "data/byte_tokenizer.h"
#include "data/document_source.h"
#include "data/shard_writer.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

using test::ScratchFolder;

// Ids far apart, so that they need four bytes.
class WideTokenizer : public ByteTokenizer {
 public:
  void encode(std::string_view utf8, std::vector<int32_t>& out) const override {
    for (const char c : utf8) out.push_back(70000 + static_cast<unsigned char>(c));
  }
  int32_t vocab_size() const override { return 80000; }
  std::string fingerprint() const override { return "wide"; }
};

void write_sample(const ScratchFolder& scratch) {
  write_shard(scratch.file("a.jsonl.zst"), [](ShardWriter& writer) {
    writer.add("first", "A");
    writer.add("", "");
    writer.add("third", "B");
  });
  write_shard(scratch.file("b.jsonl.zst"), [](ShardWriter& writer) { writer.add("fourth", "A"); });
}

std::vector<TokenDocument> documents_of(const std::string& path, std::shared_ptr<const Tokenizer> tokenizer) {
  SourceOptions options;
  options.files = {path};
  DocumentSource source(options, std::move(tokenizer));
  std::vector<TokenDocument> out;
  for (TokenDocument document; source.next(document);) out.push_back(document);
  return out;
}

TEST("a cache holds the documents of its shards, in two bytes a token and in four") {
  const ScratchFolder scratch;
  write_sample(scratch);
  for (const bool wide : {false, true}) {
    std::shared_ptr<const Tokenizer> tokenizer = std::make_shared<ByteTokenizer>();
    if (wide) tokenizer = std::make_shared<WideTokenizer>();
    const std::string path = scratch.file("c.tokens");
    const CacheSummary summary = write_token_cache(path, {scratch.file("a.jsonl.zst"), scratch.file("b.jsonl.zst")}, tokenizer, {});
    CHECK(summary.shards == 2);
    CHECK(summary.documents == 4);
    CHECK(summary.text_bytes == 16);
    CHECK(summary.tokens == 20);
    CHECK(summary.file_bytes == static_cast<int64_t>(std::filesystem::file_size(path)));
    CHECK(TokenCache::is_cache(path));
    const TokenCache cache(path);
    cache.verify();
    CHECK(cache.tokens() == 20);
    CHECK(cache.fingerprint() == tokenizer->fingerprint());
    REQUIRE(cache.shards().size() == 2);
    CHECK(cache.shards()[1].name == "b.jsonl.zst");
    CHECK(cache.shards()[1].bytes == static_cast<int64_t>(std::filesystem::file_size(scratch.file("b.jsonl.zst"))));
    CHECK(cache.shards()[1].first_document == 3);
    std::vector<TokenDocument> expected = documents_of(scratch.file("a.jsonl.zst"), tokenizer);
    expected.push_back(documents_of(scratch.file("b.jsonl.zst"), tokenizer)[0]);
    expected[3].at.part = 1;
    const std::vector<TokenDocument> found = documents_of(path, nullptr);
    REQUIRE(found.size() == 4);
    for (std::size_t i = 0; i < 4; ++i) {
      CHECK(found[i].at == expected[i].at);
      CHECK(found[i].tokens == expected[i].tokens);
      CHECK(found[i].text_bytes == expected[i].text_bytes);
      CHECK(found[i].set_name == expected[i].set_name);
    }
  }
}

TEST("a cache of another tokenizer, and a shard without a tokenizer, are refused") {
  const ScratchFolder scratch;
  write_sample(scratch);
  write_token_cache(scratch.file("c.tokens"), {scratch.file("a.jsonl.zst")}, std::make_shared<ByteTokenizer>(), {});
  CHECK_THROWS_AS(documents_of(scratch.file("c.tokens"), std::make_shared<WideTokenizer>()), ConfigError);
  CHECK_THROWS_AS(documents_of(scratch.file("a.jsonl.zst"), nullptr), ConfigError);
}

TEST("a cache cut anywhere is refused, and so is any changed byte of it") {
  const ScratchFolder scratch;
  write_sample(scratch);
  const std::string path = scratch.file("c.tokens");
  write_token_cache(path, {scratch.file("a.jsonl.zst"), scratch.file("b.jsonl.zst")}, std::make_shared<ByteTokenizer>(), {});
  const std::string sound = read_text_file(path);
  const auto refused = [&](const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
    try {
      TokenCache(path).verify();
    } catch (const FileError&) {
      return true;
    }
    return false;
  };
  CHECK(!refused(sound));
  for (std::size_t size = 0; size < sound.size(); ++size) CHECK_MESSAGE(refused(sound.substr(0, size)), "cut to ", size, " bytes");
  CHECK(refused(sound + "x"));
  for (std::size_t byte = 0; byte < sound.size(); ++byte)
    for (const int bit : {0, 7}) {
      std::string changed = sound;
      changed[byte] = static_cast<char>(changed[byte] ^ (1 << bit));
      CHECK_MESSAGE(refused(changed), "byte ", byte);
    }
}

TEST("a fault in a shard leaves no cache behind, and an older one as it was") {
  const ScratchFolder scratch;
  std::ofstream(scratch.file("bad.jsonl")) << "{\"text\": \"a\"}\n{\"text\": \"b\n";
  const auto tokenizer = std::make_shared<ByteTokenizer>();
  CHECK_THROWS_AS(write_token_cache(scratch.file("c.tokens"), {scratch.file("bad.jsonl")}, tokenizer, {}), FileError);
  CHECK(!std::filesystem::exists(scratch.file("c.tokens")));
  CHECK(std::distance(std::filesystem::directory_iterator(scratch.path()), {}) == 1);
  BadLines bad_lines;
  CHECK(write_token_cache(scratch.file("c.tokens"), {scratch.file("bad.jsonl")}, tokenizer, {.skip_bad_lines = &bad_lines}).documents == 1);
  CHECK(bad_lines.count() == 1);
}

}  // namespace
}  // namespace longhand
