// Finding models and checkpoints.
#include "models/model_place.h"

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

TEST("a latest that names nothing stands for the largest step: a folder, as copies have it whose links were followed, or a torn file") {
  const ScratchFolder scratch;
  const std::string run = scratch.file("run"), latest = run + "/checkpoints/latest";
  CHECK(!latest_checkpoint(run));
  CHECK(checkpoint_steps(run).empty());
  for (const int step : {4, 6}) add_checkpoint(run, step);
  fs::copy(checkpoint_folder(run, 4), latest, fs::copy_options::recursive);
  CHECK(latest_checkpoint(run) == 6);
  CHECK(checkpoint_steps(run) == std::vector<int64_t>{4, 6});
  fs::remove_all(latest);
  for (const char* text : {"", "step-", "step-5\n", "step-4x"}) {
    write_file_atomically(latest, text);
    CHECK(latest_checkpoint(run) == 6);
  }
  fs::remove(latest);
  fs::create_directory_symlink("step-5", latest);  // to nothing
  CHECK(latest_checkpoint(run) == 6);
  fs::remove(checkpoint_folder(run, 6) + "/config.json");
  CHECK_THROWS_WITH_AS(find_model(run), doctest::Contains("step-6 without a config.json"), FileError);

  const std::string alone = scratch.file("alone");
  add_checkpoint(alone, 3);
  fs::rename(checkpoint_folder(alone, 3), alone + "/checkpoints/latest");
  CHECK_THROWS_WITH_AS(latest_checkpoint(alone), doctest::Contains("no step-N beside it"), FileError);
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
