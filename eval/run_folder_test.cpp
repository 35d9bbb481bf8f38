// Finding models and records in run folders.
#include "eval/run_folder.h"

#include <filesystem>

#include "core/error.h"
#include "core/files.h"
#include "tests/support/check.h"

using namespace longhand;
using longhand::test::ScratchFolder;

namespace {

namespace fs = std::filesystem;

void add_checkpoint(const std::string& run, int step) {
  const std::string folder = run + "/checkpoints/step-" + std::to_string(step);
  fs::create_directories(folder);
  write_file_atomically(folder + "/config.json", "{}");
}

}  // namespace

TEST("a flat config keeps order, sections, strings and values") {
  const FlatConfig config = parse_flat_config("a = 1 # one\n\n[x.y]\nb = \"q\\\"#\" # two\nc = 'raw\\n'\nd = [1, 2]\nlost line\n");
  CHECK(config.values ==
        std::vector<std::pair<std::string, std::string>>{{"a", "1"}, {"x.y.b", "q\"#"}, {"x.y.c", "raw\\n"}, {"x.y.d", "[1, 2]"}});
  CHECK(config.lines_left_out == 1);
  CHECK(config.get("x.y.d") == "[1, 2]");
  CHECK(!config.get("b"));
}

TEST("the record of a run gives tokenizer, fingerprint and training length") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("run");
  add_checkpoint(run, 7);
  CHECK(!read_run_record(find_model(run)).tokenizer);
  write_file_atomically(run + "/checkpoints/step-7/training.json", R"({"tokenizer": {"name": "bytes", "fingerprint": "f1"}})");
  CHECK(read_run_record(find_model(run)).tokenizer == "bytes");
  CHECK(read_run_record(find_model(run)).fingerprint == "f1");
  write_file_atomically(run + "/config.toml", "[data]\ntokenizer = \"some/tokenizer.json\"\n[train]\nlength = 2_048\n");
  CHECK(read_run_record(find_model(run)).tokenizer == "some/tokenizer.json");
  CHECK(read_run_record(find_model(run)).train_length == 2048);
  write_file_atomically(run + "/checkpoints/step-7/training.json", "{");
  CHECK_THROWS_AS(read_run_record(find_model(run)), FileError);
}

TEST("a folder's name is its last component") {
  CHECK(folder_name("runs/small-sp/") == "small-sp");
  CHECK(folder_name("runs/small-sp") == "small-sp");
  CHECK(folder_name("/a/b/../c/.") == "c");
}
