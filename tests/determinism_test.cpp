// `longhand train --verify-determinism` as a user meets it.
#include <filesystem>
#include <fstream>

#include "tests/support/process.h"
#include "tests/support/tiny_training.h"

namespace longhand::test {
namespace {

TEST("determinism: the command says what it compared, and leaves nothing behind") {
  const ScratchFolder scratch;
  write_shard(scratch.file("shard.jsonl"));
  std::ofstream(scratch.file("tiny.toml")) << tiny_text("gla");
  const ProcessOptions here{.folder = scratch.path(), .input = {}, .environment = {}};
  const std::vector<std::string> words{LONGHAND_BINARY,
                                       "train",
                                       "tiny.toml",
                                       "--device",
                                       "cpu",
                                       "--set",
                                       "data.files=shard.jsonl",
                                       "--set",
                                       "initial_state=state-passing",
                                       "--verify-determinism",
                                       "7"};
  const ProcessResult same = run_process(words, here);
  CHECK_MESSAGE(same.code == 0, same.err);
  CHECK(same.out.starts_with("deterministic: 7 steps twice on cpu, with 1 and 3 data threads: the same bits"));
  CHECK_FALSE(std::filesystem::exists(scratch.file("runs")));
  const ProcessResult resumed = run_process({LONGHAND_BINARY, "train", "--resume", "tiny", "--verify-determinism", "7"}, here);
  CHECK(resumed.code == 1);
  CHECK(resumed.err.find("from a recipe's start") != std::string::npos);
}

}  // namespace
}  // namespace longhand::test
