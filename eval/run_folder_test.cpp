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

TEST("a run folder stands for its latest checkpoint, however latest is kept") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("run");
  for (const int step : {9, 99, 200, 300, 400, 500, 600, 900, 1000}) {  // 99 is less than 200, though not as text
    add_checkpoint(run, step);
    CHECK(find_model(run).step == step);
  }
  CHECK(find_model(run).run_folder == run);
  write_file_atomically(run + "/checkpoints/latest", "step-200\n");
  CHECK(find_model(run).step == 200);
  fs::remove(run + "/checkpoints/latest");
  fs::create_directory_symlink("step-900", run + "/checkpoints/latest");
  CHECK(find_model(run).step == 900);
  CHECK(find_model(run + "/checkpoints/latest").step == 900);
}

TEST("a checkpoint belongs to its run; any other model folder to none") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("run");
  add_checkpoint(run, 7);
  const ModelPlace checkpoint = find_model(run + "/checkpoints/step-7/");
  CHECK(checkpoint.step == 7);
  CHECK(fs::equivalent(checkpoint.run_folder, run));
  fs::create_directories(scratch.file("model"));
  CHECK_THROWS_WITH_AS(find_model(scratch.file("model")), doctest::Contains("model: the folder holds neither"), FileError);
  write_file_atomically(scratch.file("model/config.json"), "{}");
  CHECK(find_model(scratch.file("model")).run_folder.empty());
  CHECK(find_model(scratch.file("model")).step == -1);
  CHECK_THROWS_WITH_AS(find_model(scratch.file("nothing")), doctest::Contains("model: there is no such folder"), FileError);
}

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
