// `longhand doctor`: a sound machine passes, and what is wrong is named with what to do about it.
#include <filesystem>
#include <fstream>

#include "tests/support/process.h"
#include "tests/support/tiny_training.h"

namespace longhand::test {
namespace {

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

ProcessResult examine(const ScratchFolder& folder, std::vector<std::string> words, std::map<std::string, std::string> environment = {}) {
  words.insert(words.begin(), {LONGHAND_BINARY, "doctor", "--device", "cpu"});
  return run_process(words, {.folder = folder.path(), .input = {}, .environment = std::move(environment)});
}

TEST("doctor: a sound machine passes every check, the known answers among them") {
  const ScratchFolder scratch;
  write_shard(scratch.file("shard.jsonl"));
  const ProcessResult sound = examine(scratch, {"--data", "shard.jsonl", "--tokenizer", "bytes"});
  CHECK_MESSAGE(sound.code == 0, sound.out);
  CHECK(sound.err.empty());
  for (const char* part : {"ok     build", "zstd", "shard.jsonl: 60 documents", "12 of 12 known answers right", "all is well"})
    CHECK_MESSAGE(holds(sound.out, part), part);
  CHECK_FALSE(holds(sound.out, "WRONG"));
  CHECK(std::distance(std::filesystem::directory_iterator(scratch.path()), std::filesystem::directory_iterator()) ==
        1);  // nothing left behind
}

TEST("doctor: what is wrong is named, with what to do, and exit code 1") {
  const ScratchFolder scratch;
  std::ofstream(scratch.file("cut.jsonl")) << "{\"text\": \"a\"}\n{\"text\": \"b";
  std::ofstream(scratch.file("empty.jsonl")) << "";
  std::ofstream(scratch.file("tokenizer.json")) << "{}";
  struct Case {
    std::vector<std::string> words;
    std::map<std::string, std::string> environment;
    const char *wrong, *mend;
  };
  const std::vector<Case> cases{
      {{"--data", "cut.jsonl"}, {}, "WRONG  data", "to do: mend the line"},
      {{"--data", "empty.jsonl"}, {}, "has no documents", "leave it out"},
      {{"--data", "gone.jsonl"}, {}, "gone.jsonl", "to do: "},
      {{"--tokenizer", "tokenizer.json"}, {}, "WRONG  tokenizer", "tokenizer.json"},
      {{}, {{"LONGHAND_TRCE", "1"}}, "LONGHAND_TRCE is not a switch", "unset it"},
      {{}, {{"TMPDIR", scratch.file("gone")}}, "WRONG  files", "to do: "},
  };
  for (const Case& c : cases) {
    const ProcessResult result = examine(scratch, c.words, c.environment);
    CAPTURE(result.out);
    CHECK(result.code == 1);
    CHECK(holds(result.out, c.wrong));
    CHECK(holds(result.out, c.mend));
    CHECK(holds(result.out, " wrong\n"));
    CHECK(holds(result.out, "known answers right"));  // the other checks are done all the same
  }
}

}  // namespace
}  // namespace longhand::test
