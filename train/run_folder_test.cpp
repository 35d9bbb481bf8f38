// Run folders: who may work on one, which checkpoints stay, and what a failed or killed writer leaves.
#include "train/run_folder.h"

#include <atomic>
#include <barrier>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <thread>

#include "core/error.h"
#include "core/files.h"
#include "tests/support/check.h"
#include "train/data_record.h"
#include "train/progress.h"
#include "train/run_lock.h"

namespace longhand {
namespace {

namespace fs = std::filesystem;
using namespace test;

void write_checkpoint(const RunFolder& run, int64_t step, const KeptCheckpoints& keep = {}) {
  run.write_checkpoint(step, keep, [](const std::string& folder) { std::ofstream(folder + "/model") << "weights"; });
}

std::set<std::string> checkpoints_of(const RunFolder& run) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(run.file("checkpoints"))) names.insert(entry.path().filename().string());
  return names;
}

TEST("run folder: a second one on the same run is refused while the first lives, and names its process") {
  const ScratchFolder scratch;
  std::optional<RunFolder> first = RunFolder::create(scratch.path(), "run");
  std::ofstream(first->file("config.toml")) << "";
  const std::string process = "process " + std::to_string(::getpid()) + " on ";
  CHECK_THROWS_WITH_AS(RunFolder::open(scratch.path(), "run"), doctest::Contains("another process works on this run"), FileError);
  CHECK_THROWS_WITH_AS(RunFolder::open(scratch.path(), "run"), doctest::Contains(process.c_str()), FileError);
  std::optional<RunFolder> copy = first;
  first.reset();
  CHECK_THROWS_AS(RunFolder::open(scratch.path(), "run"), FileError);  // the copy holds it
  copy.reset();
  CHECK(RunFolder::open(scratch.path(), "run").name() == "run");
}

TEST("run folder: what a killed start left is taken over, a run is not") {
  const ScratchFolder scratch;
  fs::create_directories(scratch.file("run/checkpoints"));
  std::ofstream(scratch.file("run/lock")) << "process 1 on nowhere\n";
  std::ofstream(scratch.file("run/config.toml.tmp-1")) << "half";
  const RunFolder run = RunFolder::create(scratch.path(), "run");
  CHECK_FALSE(fs::exists(scratch.file("run/config.toml.tmp-1")));
  fs::create_directories(scratch.file("other"));
  std::ofstream(scratch.file("other/thesis.txt")) << "somebody's work";
  CHECK_THROWS_WITH_AS(RunFolder::create(scratch.path(), "other"), doctest::Contains("exists already"), FileError);
  CHECK(fs::exists(scratch.file("other/thesis.txt")));
  CHECK_FALSE(fs::exists(scratch.file("other/lock")));
}

TEST("run folder: of several starts under one name at once, one gets it, also when it ends before the others look") {
  const ScratchFolder scratch;
  for (int round = 0; round < 300; ++round) {
    const std::string name = "run-" + std::to_string(round);
    std::atomic<int> begun = 0, refused = 0;
    std::barrier together(4);
    std::vector<std::thread> starts;
    for (int i = 0; i < 4; ++i)
      starts.emplace_back([&] {
        together.arrive_and_wait();
        try {
          const RunFolder run = RunFolder::create(scratch.path(), name);
          std::ofstream(run.file("config.toml")) << "";
          ++begun;
        } catch (const FileError&) {
          ++refused;
        }
      });
    for (std::thread& start : starts) start.join();
    CHECK(begun == 1);
    CHECK(refused == 3);
  }
}

TEST("run folder: a lock is never held on a folder that was removed while it was taken") {
  const ScratchFolder scratch;
  const std::string folder = scratch.file("run");
  std::atomic<int> lost = 0, held = 0;
  std::vector<std::thread> processes;  // each makes the folder, has it for itself, and removes it
  for (int process = 0; process < 4; ++process)
    processes.emplace_back([&] {
      for (int i = 0; i < 10'000; ++i) {
        try {
          fs::create_directories(folder);
          const RunLock lock(folder);
          if (!fs::exists(folder + "/lock")) ++lost;  // nobody but the holder removes it
          ++held;
          fs::remove_all(folder);
        } catch (const FileError&) {  // the others have it, or are removing it
        } catch (const fs::filesystem_error&) {
        }
      }
    });
  for (std::thread& process : processes) process.join();
  CHECK(held > 0);
  CHECK(lost == 0);
}

TEST("run folder: links in a folder that somebody else made lead to no file outside it") {
  const ScratchFolder scratch;
  const std::string outside = scratch.file("outside.txt");
  write_file_atomically(outside, "somebody's work");
  fs::create_directories(scratch.file("run"));
  std::ofstream(scratch.file("run/config.toml")) << "";
  fs::create_symlink(outside, scratch.file("run/lock"));
  CHECK_THROWS_WITH_AS(RunFolder::open(scratch.path(), "run"), doctest::Contains("the run folder cannot be written to"), FileError);
  fs::remove(scratch.file("run/lock"));
  fs::create_symlink(outside, scratch.file("run/metrics.jsonl"));
  const RunFolder run = RunFolder::open(scratch.path(), "run");
  CHECK_THROWS_WITH_AS(MetricsFile(run.file("metrics.jsonl")), doctest::Contains("metrics: cannot open"), FileError);
  CHECK(read_text_file(outside) == "somebody's work");
}

TEST("run folder: zeros that a power failure left behind the metrics of a checkpoint are cut off") {
  const ScratchFolder scratch;
  const RunFolder run = RunFolder::create(scratch.path(), "run");
  const std::string sound = "{\"step\":1}\n{\"step\":2}\n";
  std::ofstream(run.file("metrics.jsonl")) << sound << "{\"step\":3}\n{\"st" << std::string(4096, '\0') << "\":5}\n{\"step\":6}\n";
  run.truncate_metrics(2);
  CHECK(read_text_file(run.file("metrics.jsonl")) == sound);
  std::ofstream(run.file("metrics.jsonl")) << "{\"step\":1}\nnonsense\n{\"step\":2}\n";
  CHECK_THROWS_WITH_AS(run.truncate_metrics(2), doctest::Contains("byte  11"), FileError);
}

TEST("run folder: the last checkpoints and every so many steps are kept") {
  const ScratchFolder scratch;
  const RunFolder run = RunFolder::create(scratch.path(), "run");
  for (int64_t step = 5; step <= 60; step += 5) write_checkpoint(run, step, {.last = 2, .every = 20});
  CHECK(checkpoints_of(run) == std::set<std::string>{"latest", "step-20", "step-40", "step-55", "step-60"});
  write_checkpoint(run, 65, {.last = 1, .every = 0});
  CHECK(checkpoints_of(run) == std::set<std::string>{"latest", "step-65"});
  write_checkpoint(run, 70, {.last = 0, .every = 0});
  CHECK(checkpoints_of(run) == std::set<std::string>{"latest", "step-65", "step-70"});
}

TEST("run folder: a checkpoint that cannot be written leaves the one before, says why, and gives its space back") {
  const ScratchFolder scratch;
  const RunFolder run = RunFolder::create(scratch.path(), "run");
  const auto fail = [](const std::string& folder) {
    std::ofstream(folder + "/model") << "half";
    throw FileError("file: cannot write", {{"file", folder + "/model"}, {"reason", "No space left on device"}, {"try", "nothing"}});
  };
  CHECK_THROWS_WITH_AS(run.write_checkpoint(1, {}, fail), doctest::Contains("none yet"), FileError);
  write_checkpoint(run, 2);
  for (const char* part : {"the checkpoint of step 3 cannot be written", "file: cannot write", "No space left on device",
                           "step-2 is the latest still", "longhand train --resume"})
    CHECK_THROWS_WITH_AS(run.write_checkpoint(3, {}, fail), doctest::Contains(part), FileError);
  CHECK(checkpoints_of(run) == std::set<std::string>{"latest", "step-2"});
  CHECK(run.latest_step() == 2);
  write_checkpoint(run, 3);
  CHECK(run.latest_step() == 3);
}

TEST("run folder: a step that is written again replaces what a cut off run had left") {
  const ScratchFolder scratch;
  const RunFolder run = RunFolder::create(scratch.path(), "run");
  write_checkpoint(run, 2);
  fs::create_directories(run.checkpoint(4));  // renamed, but `latest` never moved
  std::ofstream(run.checkpoint(4) + "/stale") << "";
  CHECK(run.latest_step() == 2);
  write_checkpoint(run, 4);
  CHECK(run.latest_step() == 4);
  CHECK_FALSE(fs::exists(run.checkpoint(4) + "/stale"));
  CHECK(fs::exists(run.checkpoint(4) + "/model"));
}

TEST("run folder: in a copy whose links were followed, and where latest is a file, the latest is found and gives way to the next") {
  const ScratchFolder scratch;
  const RunFolder run = RunFolder::create(scratch.path(), "run");
  write_checkpoint(run, 2);
  write_checkpoint(run, 6);
  const std::string latest = run.path() + "/checkpoints/latest";
  fs::remove(latest);
  fs::copy(run.checkpoint(6), latest, fs::copy_options::recursive);
  CHECK(run.latest_step() == 6);
  write_checkpoint(run, 8);
  CHECK(fs::read_symlink(latest) == "step-8");
  CHECK(checkpoints_of(run) == std::set<std::string>{"latest", "step-2", "step-6", "step-8"});

  fs::remove(latest);
  write_file_atomically(latest, "step-6\n");
  CHECK(run.latest_step() == 6);
  write_checkpoint(run, 10);
  CHECK(fs::read_symlink(latest) == "step-10");
}

TEST("data record: any change of a small file is seen, and of a large one in what is sampled") {
  const ScratchFolder scratch;
  const std::string small = scratch.file("a.jsonl"), large = scratch.file("b.jsonl");
  const auto size = static_cast<std::size_t>(2 * kSampledBlocks * kSampledBlockBytes + 7);
  std::string text(size, 'x');
  write_file_atomically(small, "0123456789");
  write_file_atomically(large, text);
  const auto before = record_data({scratch.path()});
  REQUIRE(before.size() == 2);
  CHECK(before[0] == DataFileRecord{small, 10, 0xA684C7C6});  // CRC-32 of the ten digits
  CHECK(before[1].bytes == static_cast<int64_t>(size));
  CHECK_NOTHROW(require_same_data(before, record_data({small, large})));
  for (std::size_t at : {std::size_t{0}, size - 1}) {  // both ends are sampled
    std::string changed = text;
    changed[at] = 'y';
    write_file_atomically(large, changed);
    CHECK_THROWS_WITH_AS(require_same_data(before, record_data({small, large})), doctest::Contains("b.jsonl"), FileError);
  }
  write_file_atomically(large, text + "x");
  CHECK_THROWS_WITH_AS(require_same_data(before, record_data({small, large})), doctest::Contains("33554440 bytes"), FileError);
  write_file_atomically(small, "0123456780");
  CHECK_THROWS_WITH_AS(require_same_data(before, record_data({small})), doctest::Contains("a.jsonl"), FileError);
  write_file_atomically(small, "0123456789");
  CHECK_THROWS_WITH_AS(require_same_data(before, record_data({small})), doctest::Contains("no such file"), FileError);
}

}  // namespace
}  // namespace longhand
