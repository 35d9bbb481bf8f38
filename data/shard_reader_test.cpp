// Shards made here, and the folder of damaged ones.
#include "data/shard_reader.h"

#include <fmt/format.h>
#include <malloc.h>
#include <sys/resource.h>
#include <zstd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>

#include "core/error.h"
#include "data/shard_writer.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

using test::ScratchFolder;

void write_file(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

std::string frame(const std::string& text) {
  std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> encoder(ZSTD_createCCtx(), &ZSTD_freeCCtx);
  ZSTD_CCtx_setParameter(encoder.get(), ZSTD_c_checksumFlag, 1);
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress2(encoder.get(), out.data(), out.size(), text.data(), text.size()));
  return out;
}

std::string skippable_frame(const std::string& content) {
  std::string out = {'\x5A', '\x2A', '\x4D', '\x18'};
  for (int byte = 0; byte < 4; ++byte) out += static_cast<char>(content.size() >> 8 * byte);
  return out + content;
}

struct Reading {
  std::vector<Document> documents;
  std::string error;  // "" when the file was read to its end
};

Reading read_all(const std::string& path, ShardOptions options = {}) {
  Reading out;
  try {
    for (const std::string& file : expand_shards({path})) {
      ShardReader reader(file, options);
      for (Document document; reader.next(document);) out.documents.push_back(document);
    }
  } catch (const FileError& error) {
    out.error = error.what();
  }
  return out;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

const std::string kTwoLines = "{\"text\": \"first\"}\n{\"text\": \"second\", \"meta\": {\"pile_set_name\": \"S\"}}\n";

TEST("plain, compressed, several frames, skippable frames and a line across frames read alike") {
  const ScratchFolder scratch;
  const std::string half = kTwoLines.substr(0, 25), rest = kTwoLines.substr(25);
  const std::map<std::string, std::string> files = {
      {"plain.jsonl", kTwoLines},
      {"one.jsonl.zst", frame(kTwoLines)},
      {"across.jsonl.zst", frame(half) + frame(rest)},
      {"skippable.jsonl.zst", skippable_frame("hello") + frame(half) + skippable_frame("") + frame("") + frame(rest)},
      {"crlf.jsonl", "{\"text\": \"first\"}\r\n{\"text\": \"second\", \"meta\": {\"pile_set_name\": \"S\"}}"},
      {"zstd-without-the-name.jsonl", frame(kTwoLines)},
  };
  for (const auto& [name, content] : files) {
    write_file(scratch.file(name), content);
    const Reading reading = read_all(scratch.file(name));
    CHECK_MESSAGE(reading.error.empty(), name, ": ", reading.error);
    REQUIRE_MESSAGE(reading.documents.size() == 2, name);
    CHECK(reading.documents[0].text == "first");
    CHECK(reading.documents[1].text == "second");
    CHECK(reading.documents[1].set_name == "S");
    CHECK(reading.documents[1].line == 2);
    CHECK(reading.documents[1].byte_offset == (name == "crlf.jsonl" ? 19 : 18));
  }
}

TEST("a shard cut at any byte ends in an error, except between two frames") {
  const ScratchFolder scratch;
  const std::string first = frame("{\"text\": \"a\"}\n"), both = first + frame("{\"text\": \"b\"}\n");
  for (std::size_t size = 0; size <= both.size(); ++size) {
    write_file(scratch.file("cut.jsonl.zst"), both.substr(0, size));
    const Reading reading = read_all(scratch.file("cut.jsonl.zst"));
    const bool whole = size == first.size() || size == both.size();
    CHECK_MESSAGE(reading.error.empty() == whole, size, " bytes");
    if (whole) CHECK(reading.documents.size() == (size == first.size() ? 1u : 2u));
  }
}

TEST("a flipped bit gives an error or changes nothing") {
  const ScratchFolder scratch;
  std::string text;
  for (int i = 0; i < 40; ++i) text += fmt::format("{{\"text\": \"document number {} of a small shard, {}\"}}\n", i, i * 7919);
  const std::string sound = frame(text);
  int errors = 0;
  for (std::size_t byte = 0; byte < sound.size(); ++byte) {
    std::string damaged = sound;
    damaged[byte] = static_cast<char>(damaged[byte] ^ (1 << (byte % 8)));
    write_file(scratch.file("flip.jsonl.zst"), damaged);
    const Reading reading = read_all(scratch.file("flip.jsonl.zst"));
    errors += !reading.error.empty();
    if (!reading.error.empty()) continue;
    REQUIRE_MESSAGE(reading.documents.size() == 40, "byte ", byte);  // a bit that the format leaves unused
    for (int i = 0; i < 40; ++i) CHECK(contains(reading.documents[static_cast<std::size_t>(i)].text, fmt::format("number {} of", i)));
  }
  CHECK(errors > static_cast<int>(sound.size() * 9 / 10));
}

TEST("a line longer than the buffer reads, one longer than the limit is refused by its number") {
  const ScratchFolder scratch;
  const std::string big(5000000, 'x');
  write_file(scratch.file("long.jsonl"), "{\"text\": \"a\"}\n{\"text\": \"" + big + "\"}\n{\"text\": \"b\"}\n");
  const Reading reading = read_all(scratch.file("long.jsonl"));
  REQUIRE(reading.documents.size() == 3);
  CHECK(reading.documents[1].text == big);
  CHECK(reading.documents[2].text == "b");
  ShardOptions options;
  for (const int64_t limit : {int64_t{100}, int64_t{2000000}}) {
    options.max_line_bytes = limit;
    const Reading refused = read_all(scratch.file("long.jsonl"), options);
    CHECK(refused.documents.size() == 1);
    CHECK_MESSAGE(contains(refused.error, "longer than the limit"), refused.error);
    CHECK(contains(refused.error, "2, begins at byte 14"));
  }
}

TEST("a line over the limit is refused before the rest of it is read, and also when it fits the buffer") {
  const ScratchFolder scratch;
  write_file(scratch.file("endless.jsonl.zst"), frame("{\"text\": \"" + std::string(8000000, 'x')) + "bytes that begin no frame");
  ShardOptions options;
  options.max_line_bytes = 2000000;
  CHECK(contains(read_all(scratch.file("endless.jsonl.zst"), options).error, "longer than the limit"));
  CHECK(contains(read_all(scratch.file("endless.jsonl.zst")).error, "begin no zstd frame"));
  write_file(scratch.file("short.jsonl"), "{\"text\": \"" + std::string(500, 'x') + "\"}\n");
  options.max_line_bytes = 400;
  CHECK(contains(read_all(scratch.file("short.jsonl"), options).error, "longer than the limit"));
}

// A frame whose header has no size of the text, and a window of 2^window_log bytes.
std::string frame_with_window(const std::string& text, int window_log) {
  std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> encoder(ZSTD_createCCtx(), &ZSTD_freeCCtx);
  ZSTD_CCtx_setParameter(encoder.get(), ZSTD_c_checksumFlag, 1);
  ZSTD_CCtx_setParameter(encoder.get(), ZSTD_c_windowLog, window_log);
  std::string out(ZSTD_compressBound(text.size()), '\0');
  ZSTD_inBuffer from{text.data(), text.size(), 0};
  ZSTD_outBuffer to{out.data(), out.size(), 0};
  REQUIRE(ZSTD_compressStream2(encoder.get(), &to, &from, ZSTD_e_flush) == 0);
  REQUIRE(ZSTD_compressStream2(encoder.get(), &to, &from, ZSTD_e_end) == 0);
  out.resize(to.pos);
  return out;
}

// What malloc has handed out; 0 where a sanitizer took its place.
std::size_t bytes_held() {
  const struct mallinfo2 now = ::mallinfo2();
  return now.uordblks + now.hblkhd;
}

std::string lines_of(int64_t bytes) {
  const std::string line = "{\"text\": \"" + std::string(1000, 'x') + "\"}\n";
  std::string out;
  while (std::ssize(out) < bytes) out += line;
  return out;
}

TEST("a line of a compressed shard may be as long as the shard's size allows") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("tiny.jsonl.zst"), sentence = "a line is longer than a file of this size may hold";
  const auto long_line = [](int64_t bytes) { return "{\"text\": \"" + std::string(static_cast<std::size_t>(bytes), 'x') + "\"}\n"; };
  const std::string start = frame("{\"text\": \"a\"}\n");
  write_file(path, start + frame(long_line(kAlwaysHeld - 100)));
  CHECK(read_all(path).documents.size() == 2);
  write_file(path, start + frame(long_line(kAlwaysHeld)));
  const Reading refused = read_all(path);
  CHECK(refused.documents.size() == 1);
  for (const std::string& part :
       {sentence, path, std::string("2, begins at byte 14"), std::string("8388608 bytes at once"), std::string("zstd -d")})
    CHECK_MESSAGE(contains(refused.error, part), refused.error);
  BadLines bad_lines;  // this is no line to be left out: the rest of it would have to be read
  CHECK(contains(read_all(path, {.skip_bad_lines = &bad_lines}).error, sentence));
  write_file(scratch.file("tiny.jsonl"), long_line(kAlwaysHeld));
  CHECK(read_all(scratch.file("tiny.jsonl")).documents.size() == 1);
  // 200,000 bytes that cannot be compressed allow a line of 12.8 million.
  write_file(path, start + skippable_frame(std::string(200'000, 'x')) + frame(long_line(12'000'000)));
  CHECK(read_all(path).documents.size() == 2);
  write_file(path, start + skippable_frame(std::string(100'000, 'x')) + frame(long_line(12'000'000)));
  CHECK(contains(read_all(path).error, sentence));
}

TEST("a small shard may ask for a large window, and has it only where its size allows") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("wide.jsonl.zst"), sentence = "frame 2 unpacks to more than a file of this size may hold at once";
  const std::string start = frame("{\"text\": \"a\"}\n");
  const auto documents_of = [](const std::string& text) { return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n')); };
  const std::string much = lines_of(20'000'000), some = lines_of(7'000'000);
  write_file(path, start + frame_with_window(some, 27));
  const Reading reading = read_all(path);
  CHECK(reading.error.empty());
  CHECK(reading.documents.size() == 1 + documents_of(some));
  {
    const std::size_t before = bytes_held();
    ShardReader reader(path);
    Document document;
    for (int i = 0; i < 2; ++i) REQUIRE(reader.next(document));
    CHECK(bytes_held() - before < 24 << 20);  // of 128 MiB
  }
  write_file(path, start + frame_with_window(much, 27));
  const Reading refused = read_all(path);
  CHECK_MESSAGE(contains(refused.error, sentence), refused.error);
  CHECK(refused.documents.size() > documents_of(some));
  write_file(path, start + frame_with_window(much, 23));  // 8 MiB, what zstd takes when nobody asks for more
  CHECK(read_all(path).documents.size() == 1 + documents_of(much));
  write_file(path, start + skippable_frame(std::string(400'000, 'x')) + frame_with_window(much, 27));
  CHECK(read_all(path).documents.size() == 1 + documents_of(much));
  // A frame that says how much text it has, and has it in one piece.
  std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> encoder(ZSTD_createCCtx(), &ZSTD_freeCCtx);
  ZSTD_CCtx_setParameter(encoder.get(), ZSTD_c_windowLog, 27);
  std::string whole(ZSTD_compressBound(much.size()), '\0');
  whole.resize(ZSTD_compress2(encoder.get(), whole.data(), whole.size(), much.data(), much.size()));
  write_file(path, start + whole);
  CHECK(contains(read_all(path).error, sentence));
}

TEST("the header of a frame is found wherever a piece of the file ends") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("pieces.jsonl.zst"), too_much = frame_with_window(lines_of(9'000'000), 27);
  const auto piece = static_cast<int64_t>(ZSTD_DStreamInSize());
  for (int64_t before = -20; before <= 2; ++before) {
    write_file(path, skippable_frame(std::string(static_cast<std::size_t>(piece - 8 + before), 'x')) + too_much);
    const Reading reading = read_all(path);
    CHECK_MESSAGE(contains(reading.error, "frame 2 unpacks to more"), before, ": ", reading.error);
    CHECK(reading.documents.size() > 7000);
  }
}

TEST("a bad line stops the reader or, when asked, is left out and counted") {
  const ScratchFolder scratch;
  write_file(scratch.file("bad.jsonl"), "{\"text\": \"a\"}\n{\"text\": }\n\n{\"text\": \"b\"}\n{\"txt\": 1}\n");
  const Reading stopped = read_all(scratch.file("bad.jsonl"));
  CHECK(stopped.documents.size() == 1);
  CHECK(contains(stopped.error, "line 2 is not a document"));
  CHECK(contains(stopped.error, "9 of the line, 23 of the text"));
  CHECK(contains(stopped.error, scratch.file("bad.jsonl")));
  BadLines bad_lines;
  ShardOptions options;
  options.skip_bad_lines = &bad_lines;
  const Reading skipped = read_all(scratch.file("bad.jsonl"), options);
  CHECK(skipped.error.empty());
  REQUIRE(skipped.documents.size() == 2);
  CHECK(skipped.documents[1].line == 4);
  CHECK(bad_lines.count() == 2);
  CHECK(contains(bad_lines.first().at(1), "line 5"));
}

TEST("skip_to_line goes on with the first document at or behind the line") {
  const ScratchFolder scratch;
  write_file(scratch.file("s.jsonl"), "{\"text\": \"1\"}\nnot parsed\n\n{\"text\": \"4\"}\n{\"text\": \"5\"}\n");
  for (const auto& [line, text] : std::map<int64_t, std::string>{{0, "1"}, {1, "1"}, {3, "4"}, {4, "4"}, {5, "5"}}) {
    ShardReader reader(scratch.file("s.jsonl"));
    reader.skip_to_line(line);
    Document document;
    REQUIRE(reader.next(document));
    CHECK(document.text == text);
  }
}

TEST("folders become the shards in them, and what is not there is said") {
  const ScratchFolder scratch;
  for (const char* name : {"b.jsonl", "a.jsonl.zst", "x.txt", "c.tokens", ".hidden.jsonl"}) write_file(scratch.file(name), "");
  CHECK(expand_shards({scratch.path()}) == std::vector<std::string>{scratch.file("a.jsonl.zst"), scratch.file("b.jsonl")});
  const ScratchFolder empty;
  CHECK_THROWS_AS(expand_shards({empty.path()}), FileError);
  CHECK_THROWS_AS(expand_shards({scratch.file("none")}), FileError);
  CHECK_THROWS_AS(ShardReader(scratch.file("none")), FileError);
}

TEST("memory does not grow with the size of a shard") {
  const ScratchFolder scratch;
  const std::string text(100000, 'a');
  write_shard(
      scratch.file("big.jsonl.zst"),
      [&](ShardWriter& writer) {
        for (int i = 0; i < 2000; ++i) writer.add(text, "Big");
      },
      1);
  const auto peak_bytes = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return int64_t{usage.ru_maxrss} * 1024;
  };
  const int64_t before = peak_bytes();
  ShardReader reader(scratch.file("big.jsonl.zst"));
  int64_t bytes = 0;
  for (Document document; reader.next(document);) bytes += static_cast<int64_t>(document.text.size());
  CHECK(bytes == 200000000);
  CHECK(peak_bytes() - before < 32 << 20);
}

struct Expected {
  int documents;      // read in all, or before the fault
  std::string fault;  // part of the message; "" for a sound file
  int left = -1;      // documents read with skip_bad_lines; -1: the container itself is damaged
};

TEST("every file of the damaged-inputs folder behaves as its README says") {
  const auto data = test::folder_from("LONGHAND_DATA");
  if (!data) SKIP("LONGHAND_DATA is not set");
  const std::map<std::string, Expected> table = {
      {"truncated.jsonl.zst", {-1, "the file is truncated"}},
      {"truncated-in-header.jsonl.zst", {0, "the file is truncated"}},
      {"bitflip-checksum.jsonl.zst", {-1, "the checksum of a zstd frame does not match"}},
      {"bitflip-in-checksum.jsonl.zst", {-1, "the checksum of a zstd frame does not match"}},
      {"bad-magic.jsonl.zst", {0, "the file is not zstd"}},
      {"trailing-garbage.jsonl.zst", {40, "24 bytes from stored byte 6555"}},
      {"second-frame-truncated.jsonl.zst", {20, "the file is truncated"}},
      {"gzip-not-zstd.jsonl.zst", {0, "the file is gzip, not zstd"}},
      {"plain-not-zstd.jsonl.zst", {0, "plain text under a .zst name"}},
      {"empty-file.jsonl.zst", {0, "the file is empty"}},
      {"window-2gib.jsonl.zst", {0, "a window of more than 128 MiB"}},
      {"zero-documents.jsonl.zst", {0, ""}},
      {"blank-lines-only.jsonl.zst", {0, ""}},
      {"bad-json-line-6.jsonl.zst", {5, "line 6 ", 10}},
      {"bad-json-line-6.jsonl", {5, "line 6 ", 10}},
      {"bad-json-trailing-comma.jsonl.zst", {3, "line 4 ", 5}},
      {"last-line-cut.jsonl.zst", {5, "line 6 ", 5}},
      {"no-text-field.jsonl.zst", {3, "line 4 ", 5}},
      {"text-not-string.jsonl.zst", {2, "line 3 ", 4}},
      {"line-not-object.jsonl.zst", {2, "line 3 ", 4}},
      {"invalid-utf8.jsonl.zst", {3, "line 4 ", 5}},
      {"overlong-utf8.jsonl.zst", {2, "line 3 ", 4}},
      {"lone-surrogate-escape.jsonl.zst", {2, "line 3 ", 4}},
      {"bad-escape.jsonl.zst", {2, "line 3 ", 4}},
      {"raw-control-in-string.jsonl.zst", {2, "line 3 ", 4}},
      {"deep-nesting.jsonl.zst", {2, "line 3 ", 4}},
      {"line-3mb.jsonl.zst", {5, ""}},
      {"no-newline-3mb.jsonl.zst", {0, "line 1 ", 0}},
      {"ok.jsonl.zst", {40, ""}},
      {"valid-two-frames.jsonl.zst", {40, ""}},
      {"valid-line-across-frames.jsonl.zst", {40, ""}},
      {"valid-skippable-frame.jsonl.zst", {40, ""}},
      {"valid-no-checksum-no-size.jsonl.zst", {40, ""}},
      {"valid-crlf.jsonl.zst", {6, ""}},
      {"valid-no-final-newline.jsonl.zst", {6, ""}},
      {"valid-blank-lines-between.jsonl.zst", {6, ""}},
      {"valid-utf8-bom.jsonl.zst", {4, ""}},
      {"valid-no-meta.jsonl.zst", {4, ""}},
      {"valid-extra-fields.jsonl.zst", {4, ""}},
      {"valid-escapes.jsonl.zst", {2, ""}},
      {"valid-empty-text.jsonl.zst", {4, ""}},
      {"valid-eot-in-text.jsonl.zst", {3, ""}},
      {"valid name with space ünï 日本.jsonl.zst", {6, ""}},
      {"a directory ünï 日本.jsonl.zst", {6, ""}},
  };
  const std::string folder = *data + "/corrupt/";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name != "README.md") CHECK_MESSAGE(table.count(name) == 1, name, " is not in the table");
  }
  const Reading ok = read_all(folder + "ok.jsonl.zst");
  for (const auto& [name, expected] : table) {
    const Reading reading = read_all(folder + name);
    if (expected.documents >= 0) CHECK_MESSAGE(static_cast<int>(reading.documents.size()) == expected.documents, name);
    CHECK_MESSAGE(reading.error.empty() == expected.fault.empty(), name, ": ", reading.error);
    CHECK_MESSAGE(contains(reading.error, expected.fault), name, ": ", reading.error);
    if (!expected.fault.empty()) CHECK_MESSAGE(contains(reading.error, folder + name), reading.error);
    if (!expected.fault.empty()) CHECK_MESSAGE(contains(reading.error, "byte"), reading.error);
    if (expected.fault.empty() && expected.documents == 40)
      for (std::size_t i = 0; i < 40; ++i) CHECK_MESSAGE(reading.documents[i].text == ok.documents[i].text, name);

    BadLines bad_lines;
    ShardOptions options;
    options.skip_bad_lines = &bad_lines;
    const Reading skipped = read_all(folder + name, options);
    const bool container_fault = !expected.fault.empty() && expected.left < 0;
    CHECK_MESSAGE(skipped.error.empty() == !container_fault, name);
    if (expected.left >= 0) CHECK_MESSAGE(static_cast<int>(skipped.documents.size()) == expected.left, name);
    CHECK((bad_lines.count() > 0) == (expected.left >= 0));
  }
  CHECK(read_all(folder + "valid-extra-fields.jsonl.zst").documents[0].text.find("not the document") == std::string::npos);
  CHECK(read_all(folder + "valid-escapes.jsonl.zst").documents[0].text.find('\0') != std::string::npos);
}

TEST("the small and the large sample shards have the documents and bytes that SOURCES.md lists") {
  const auto data = test::folder_from("LONGHAND_DATA");
  if (!data) SKIP("LONGHAND_DATA is not set");
  const std::vector<std::tuple<std::string, int64_t, int64_t>> table = {{"/minipile/val.jsonl.zst", 136, 3488692},
                                                                        {"/minipile/test.jsonl.zst", 127, 3683344},
                                                                        {"/minipile/train-03.jsonl.zst", 823, 21471308}};
  for (const auto& [name, documents, bytes] : table) {
    ShardReader reader(*data + name);
    int64_t count = 0, sum = 0;
    for (Document document; reader.next(document); ++count) sum += static_cast<int64_t>(document.text.size());
    CHECK(count == documents);
    CHECK(sum == bytes);
  }
}

}  // namespace
}  // namespace longhand
