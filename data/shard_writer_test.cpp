// Packing a folder, and counting what is in a shard.
#include "data/shard_writer.h"

#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "data/byte_tokenizer.h"
#include "data/shard_check.h"
#include "data/token_cache.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

using test::ScratchFolder;

void write_file(const std::string& path, const std::string& content) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << content;
}

std::vector<std::string> texts_of(const std::string& path) {
  std::vector<std::string> out;
  ShardReader reader(path);
  for (Document document; reader.next(document);) out.push_back(document.text);
  return out;
}

TEST("a folder becomes a shard, one document a file, in the order of the paths") {
  const ScratchFolder scratch;
  write_file(scratch.file("in/b.txt"), "bee \"quoted\" \\ \n\t\x01 \xC3\xA9\xF0\x9F\x98\x80");
  write_file(scratch.file("in/a.md"),
             "\xEF\xBB\xBF"
             "ay");
  write_file(scratch.file("in/sub/c.txt"), "sea");
  write_file(scratch.file("in/sub/zero.bin"), std::string("x\0y", 3));
  write_file(scratch.file("in/latin.txt"), "caf\xE9");
  write_file(scratch.file("in/empty.txt"), "");
  write_file(scratch.file("in/.git/config"), "hidden");
  PackOptions options;
  options.folder = scratch.file("in");
  options.out = scratch.file("in/out.jsonl.zst");
  options.set_name = "Mine";
  for (int again = 0; again < 2; ++again) {  // the second time the shard itself lies in the folder
    const PackReport report = pack_folder(options);
    CHECK(report.documents == 3);
    CHECK(report.left_out.size() == 3);
    CHECK(texts_of(options.out) == std::vector<std::string>{"ay", "bee \"quoted\" \\ \n\t\x01 \xC3\xA9\xF0\x9F\x98\x80", "sea"});
  }
  std::ifstream shard(options.out, std::ios::binary);
  char head[5] = {};
  shard.read(head, sizeof head);
  CHECK((head[4] & 0x04) != 0);  // the frame header's checksum flag, RFC 8878 section 3.1.1.1.1
  ShardReader reader(options.out);
  Document document;
  REQUIRE(reader.next(document));
  CHECK(document.set_name == "Mine");

  options.include = {"*.txt"};
  options.exclude = {"sub/*"};
  CHECK(pack_folder(options).documents == 1);
  options.include = {"*.none"};
  CHECK_THROWS_AS(pack_folder(options), FileError);
  CHECK(texts_of(options.out).size() == 1);  // the older shard is still there
}

TEST("a share for validation is drawn once and the rest is the shard") {
  const ScratchFolder scratch;
  for (int i = 0; i < 20; ++i) write_file(scratch.file("in/" + std::to_string(i)), "text " + std::to_string(i));
  PackOptions options;
  options.folder = scratch.file("in");
  options.out = scratch.file("train.jsonl.zst");
  options.val_out = scratch.file("val.jsonl.zst");
  options.val_fraction = 0.25;
  options.shuffle_seed = 3;
  const PackReport report = pack_folder(options);
  CHECK(report.documents == 15);
  CHECK(report.val_documents == 5);
  std::vector<std::string> all = texts_of(options.out);
  CHECK(!std::is_sorted(all.begin(), all.end()));
  const std::vector<std::string> val = texts_of(options.val_out);
  pack_folder(options);
  CHECK(texts_of(options.val_out) == val);
  all.insert(all.end(), val.begin(), val.end());
  std::sort(all.begin(), all.end());
  CHECK(std::unique(all.begin(), all.end()) == all.end());
  CHECK(all.size() == 20);
  options.val_fraction = 1;
  CHECK_THROWS_AS(pack_folder(options), ValueError);
}

TEST("a check counts documents, bytes, characters and tokens, of shards and of caches") {
  const ScratchFolder scratch;
  const std::string shard = scratch.file("s.jsonl.zst"), cache = scratch.file("s.tokens");
  write_shard(shard, [](ShardWriter& writer) {
    writer.add("abc", "");
    writer.add("\xC3\xA9\xE6\x97\xA5", "");
  });
  CheckOptions options;
  ShardCount count = check_shard(shard, options);
  CHECK(count.documents == 2);
  CHECK(count.text_bytes == 8);
  CHECK(count.characters == 5);
  CHECK(count.tokens == -1);
  options.tokenizer = std::make_shared<ByteTokenizer>();
  CHECK(check_shard(shard, options).tokens == 8);
  write_token_cache(cache, {shard}, options.tokenizer, {});
  count = check_shard(cache, options);
  CHECK(count.documents == 2);
  CHECK(count.text_bytes == 8);
  CHECK(count.tokens == 8);
}

}  // namespace
}  // namespace longhand
