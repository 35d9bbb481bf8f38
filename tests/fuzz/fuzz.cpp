// One libFuzzer program for all readers:
//   longhand_fuzz --reader=NAME [libFuzzer's options] CORPUS      fuzz one of them
//   longhand_fuzz --write-corpus=DIR                              DIR/NAME/ with sound files of every kind
// What a reader refuses is fine; a crash, a sanitizer's report, another exception than longhand's or too much memory ends the program.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "tests/fuzz/readers.h"

namespace {

namespace fs = std::filesystem;
using namespace longhand::test;

const Reader* chosen = nullptr;
std::string scratch;

void write_corpus(const std::string& folder) {
  for (const Reader& reader : readers()) {
    const std::string here = folder + "/" + reader.name;
    fs::create_directories(here);
    int number = 0;
    for (const std::string& sample : samples_of(reader, scratch))
      std::ofstream(here + "/sound-" + std::to_string(number++), std::ios::binary) << sample;
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  std::string pattern = fs::exists("/dev/shm") ? "/dev/shm/longhand-fuzz-XXXXXX" : "/tmp/longhand-fuzz-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) return 1;
  scratch = pattern;
  std::atexit([] { fs::remove_all(scratch); });
  for (int i = 1; i < *argc; ++i) {
    const std::string word = (*argv)[i];
    if (word.starts_with("--write-corpus=")) {
      write_corpus(word.substr(15));
      std::exit(0);
    }
    if (!word.starts_with("--reader=")) continue;
    for (const Reader& reader : readers())
      if (word.substr(9) == reader.name) chosen = &reader;
  }
  if (chosen != nullptr) return 0;
  std::fprintf(stderr, "usage: longhand_fuzz --reader=NAME CORPUS, or --write-corpus=DIR\nreaders:");
  for (const Reader& reader : readers()) std::fprintf(stderr, " %s", reader.name);
  std::fprintf(stderr, "\n");
  std::exit(2);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  read_bytes(*chosen, scratch, {reinterpret_cast<const char*>(data), size});
  return 0;
}
