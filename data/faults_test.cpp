// Faults of the disk while data are read: short reads, errors, files cut or replaced in the middle of an epoch. Each is refused by name;
// none ends the reading early without a word, and none ends the process.
#include <sys/stat.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>

#include "core/error.h"
#include "data/byte_tokenizer.h"
#include "data/document_source.h"
#include "data/shard_reader.h"
#include "data/shard_writer.h"
#include "data/token_cache.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using test::ScratchFolder;

const auto kBytes = std::make_shared<const ByteTokenizer>();

// Documents of 1000 letters: `count` of them are larger than what a reader takes at once.
void write_lines(const std::string& path, int count, std::ios::openmode mode = std::ios::trunc) {
  std::ofstream out(path, std::ios::binary | mode);
  for (int i = 0; i < count; ++i) out << R"({"text": ")" << std::string(1000, static_cast<char>('a' + i % 26)) << "\"}\n";
}

std::vector<std::string> texts_of(const std::string& path) {
  ShardReader reader(path);
  std::vector<std::string> out;
  for (Document document; reader.next(document);) out.push_back(document.text);
  return out;
}

// The error that `read` ends with, or "".
template <class F>
std::string error_of(F&& read) {
  try {
    read();
  } catch (const FileError& error) {
    return error.what();
  }
  return "";
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST("a file that comes in pieces of a few bytes, slowly, gives the same documents") {
  const ScratchFolder scratch;
  write_lines(scratch.file("plain.jsonl"), 20);
  write_shard(scratch.file("packed.jsonl.zst"), [&](ShardWriter& writer) {
    for (int i = 0; i < 300; ++i) writer.add(std::string(static_cast<std::size_t>(i % 50), static_cast<char>('a' + i % 26)) + "\n", "Test");
  });
  for (const char* name : {"plain.jsonl", "packed.jsonl.zst"}) {
    const auto expected = texts_of(scratch.file(name));
    const std::string pipe = scratch.file(std::string("pipe-") + name);
    REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
    std::thread writer([&] {
      std::ifstream in(scratch.file(name), std::ios::binary);
      const std::string bytes(std::istreambuf_iterator<char>(in), {});
      std::ofstream out(pipe, std::ios::binary);
      for (std::size_t at = 0, piece = 1; at < bytes.size(); at += piece, piece = piece % 7 + 1) {
        out << bytes.substr(at, piece) << std::flush;
        if (at % 97 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    });
    const auto actual = texts_of(pipe);
    writer.join();
    CHECK(!expected.empty());
    CHECK(actual == expected);
  }
}

TEST("a disk that fails is named with the system's reason") {
  const std::string error = error_of([] { texts_of("/proc/self/mem"); });  // its first byte cannot be read
  CHECK_MESSAGE(holds(error, "the file cannot be read"), error);
  CHECK_MESSAGE(holds(error, "Input/output error"), error);
}

TEST("a shard cut or added to while it is read is refused, also where the cut leaves whole lines and whole frames") {
  const ScratchFolder scratch;
  for (const bool packed : {false, true})
    for (const bool cut : {true, false}) {
      CAPTURE(packed);
      CAPTURE(cut);
      const std::string path = scratch.file(packed ? "x.jsonl.zst" : "x.jsonl");
      std::uintmax_t kept = 0;
      if (packed) {  // thirty frames of their own
        std::mt19937 random(7);
        std::ofstream(path, std::ios::trunc);
        for (int i = 0; i < 30; ++i) {
          write_shard(scratch.file("frame.zst"), [&](ShardWriter& writer) {
            std::string text(20'000, ' ');
            for (char& c : text) c = static_cast<char>('a' + random() % 26);
            writer.add(text, "");
          });
          std::ifstream in(scratch.file("frame.zst"), std::ios::binary);
          std::ofstream(path, std::ios::binary | std::ios::app) << in.rdbuf();
          if (i == 27) kept = fs::file_size(path);
        }
      } else {
        write_lines(path, 1000);
        kept = fs::file_size(path) / 10 * 9 / 1013 * 1013;  // whole lines
      }
      int documents = 0;
      const std::string error = error_of([&] {
        ShardReader reader(path);
        Document document;
        REQUIRE(reader.next(document));
        if (cut) fs::resize_file(path, kept);
        else std::ofstream(path, std::ios::binary | std::ios::app) << (packed ? std::string("\x50\x2A\x4D\x18\0\0\0\0", 8) : "\n");
        for (++documents; reader.next(document); ++documents) {
        }
      });
      if (cut) CHECK(documents < (packed ? 30 : 1000));
      CHECK_MESSAGE(holds(error, "the file changed while it was read"), error);
    }
}

TEST("a shard that changed its length, or is gone, when its next epoch comes is named") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("x.jsonl");
  for (const int threads : {0, 2})
    for (const bool gone : {false, true}) {
      CAPTURE(threads);
      CAPTURE(gone);
      write_lines(path, 50);
      SourceOptions options;
      options.files = {path};
      options.epochs = 0;
      options.threads = threads;
      options.ahead_bytes = 1;
      DocumentSource source(options, kBytes);
      int documents = 0;
      const std::string error = error_of([&] {
        TokenDocument document;
        REQUIRE(source.next(document));
        if (gone) fs::remove(path);
        else {
          fs::rename(path, scratch.file("old"));  // what is open stays readable
          write_lines(path, 49);
        }
        for (++documents; documents < 500 && source.next(document); ++documents) {
        }
      });
      CHECK(documents == 50);
      CHECK_MESSAGE(holds(error, gone ? "no such file" : "a shard changed since it was first opened"), error);
    }
}

TEST("a token cache cut while it is in use is an error, not the end of the process") {
  const ScratchFolder scratch;
  write_lines(scratch.file("x.jsonl"), 300);
  for (const int threads : {0, 2}) {
    CAPTURE(threads);
    const std::string path = scratch.file("x.tokens");
    write_token_cache(path, {scratch.file("x.jsonl")}, kBytes, {});
    SourceOptions options;
    options.files = {path};
    options.threads = threads;
    options.ahead_bytes = 1;
    DocumentSource source(options, nullptr);
    TokenDocument document;
    REQUIRE(source.next(document));
    CHECK(document.tokens.size() == 1001);
    fs::resize_file(path, 100'000);  // the table of documents is gone with the rest
    const std::string error = error_of([&] {
      while (source.next(document)) {
      }
    });
    CHECK_MESSAGE(holds(error, "the file was cut after it was opened"), error);
    CHECK(holds(error, "x.tokens"));
  }
}

}  // namespace
}  // namespace longhand
