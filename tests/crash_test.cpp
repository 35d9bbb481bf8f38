// What a run survives: kill -9 at any moment, a full disk, a folder that may not be written, data that are gone or changed, a second
// process. Each time the run goes on, and equals the one that nothing happened to, bit for bit.
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/philox.h"
#include "tests/support/process.h"
#include "tests/support/tiny_training.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// A folder with a shard and recipes of tiny models; commands run inside it, and train on `device`.
class Site {
 public:
  explicit Site(std::string device = "cpu") : device_(std::move(device)) {
    write_shard(file("shard.jsonl"));
    for (const char* family : {"mamba2", "mamba1", "gla"}) std::ofstream(file(family) + std::string(".toml")) << tiny_text(family);
  }
  std::string file(const std::string& name) const { return folder_.file(name); }
  std::string run_folder(const std::string& run) const { return file("runs/" + run); }

  std::vector<std::string> start_words(const std::string& run, std::vector<std::string> settings,
                                       const std::string& family = "mamba2") const {
    std::vector<std::string> words{LONGHAND_BINARY, "train", family + ".toml", "--device", device_, "--name", run};
    settings.push_back("data.files=shard.jsonl");
    settings.push_back("train.log_every=1");
    for (const std::string& setting : settings) words.insert(words.end(), {"--set", setting});
    return words;
  }
  std::vector<std::string> resume_words(const std::string& run) const {
    return {LONGHAND_BINARY, "train", "--device", device_, "--resume", run};
  }
  ProcessOptions here() const { return {.folder = folder_.path(), .input = {}, .environment = {}}; }
  ProcessResult run(const std::vector<std::string>& words) const { return run_process(words, here()); }

  void must(const std::vector<std::string>& words) const {
    const ProcessResult result = run(words);
    REQUIRE_MESSAGE(result.code == 0, result.err);
  }

 private:
  ScratchFolder folder_;
  std::string device_;
};

nlohmann::json without_times(nlohmann::json row) {
  for (const char* measured : {"tokens_per_s", "elapsed_s", "mfu", "peak_memory_bytes"}) row.erase(measured);
  return row;
}

std::vector<nlohmann::json> metrics_of(const std::string& run) {
  std::ifstream in(run + "/metrics.jsonl");
  std::vector<nlohmann::json> rows;
  for (std::string line; std::getline(in, line);) rows.push_back(without_times(nlohmann::json::parse(line)));
  return rows;
}

// Every metric of every step, and every byte of the last checkpoint but for the time that it took.
void check_same(const std::string& whole, const std::string& parts, int64_t steps) {
  const auto expected = metrics_of(whole), actual = metrics_of(parts);
  REQUIRE(expected.size() == static_cast<std::size_t>(steps));
  REQUIRE(actual.size() == expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) CHECK(actual[i].dump() == expected[i].dump());
  const std::string last = "/checkpoints/step-" + std::to_string(steps);
  int files = 0;
  for (const auto& entry : fs::directory_iterator(whole + last)) {
    const std::string name = entry.path().filename().string(), other = parts + last + "/" + name;
    CAPTURE(name);
    ++files;
    if (name == "training.json") {
      CHECK(without_times(nlohmann::json::parse(text_of(other))) == without_times(nlohmann::json::parse(text_of(entry.path().string()))));
    } else {
      const bool same_bytes = text_of(other) == text_of(entry.path().string());
      CHECK(same_bytes);
    }
  }
  CHECK(files >= 4);
  for (const auto& entry : fs::directory_iterator(parts + "/checkpoints"))
    CHECK_FALSE(entry.path().filename().string().starts_with("unfinished"));
}

bool is_writing_checkpoint(const std::string& run) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(run + "/checkpoints", error))
    if (entry.path().filename().string().starts_with("unfinished")) return true;
  return false;
}

int64_t kills_wanted() {
  const char* given = std::getenv("LONGHAND_KILLS");
  return given == nullptr ? 8 : std::stoll(given);
}

// Where the runs that are killed compute.
std::string crash_device() {
  const char* given = std::getenv("LONGHAND_CRASH_DEVICE");
  return given == nullptr ? "cpu" : given;
}

// --- killed -------------------------------------------------------------------------------------------------------

struct Killed {
  int64_t kills = 0, in_checkpoint = 0, before_first = 0;
};

// Starts the run, kills it at a random moment, and resumes it, until it comes to its end or `most` kills are done.
void kill_and_resume(const Site& site, const std::vector<std::string>& start, const std::string& run, std::chrono::microseconds span,
                     int64_t most, Killed& count) {
  const std::string folder = site.run_folder(run);
  for (const int64_t until = count.kills + most; count.kills < until;) {
    const auto key = static_cast<uint64_t>(count.kills);
    const bool begun = fs::exists(folder + "/config.toml");
    std::optional<ProcessResult> ended;
    {
      Process process(begun ? site.resume_words(run) : start, site.here());
      // Every other kill aims at a checkpoint, in turn at any and at one behind the first; every fourth at the start; the others fall
      // anywhere.
      if (key % 2 == 1)
        process.wait_until([&] { return is_writing_checkpoint(folder) && (key % 4 == 1 || fs::exists(folder + "/checkpoints/latest")); });
      const uint64_t range = key % 2 == 1 ? 3000 : key % 4 == 0 ? 25000 : static_cast<uint64_t>(span.count());
      const auto moment = Clock::now() + std::chrono::microseconds(philox_u64(7, key) % range);
      if (!process.wait_until([&] { return Clock::now() >= moment; })) ended = process.finish();
    }  // the end of `process` is a kill -9
    if (ended) {
      REQUIRE_MESSAGE(ended->code == 0, ended->err);
      return;
    }
    ++count.kills;
    count.in_checkpoint += is_writing_checkpoint(folder) ? 1 : 0;
    count.before_first += fs::exists(folder + "/checkpoints/latest") ? 0 : 1;
  }
  const ProcessResult rest = site.run(fs::exists(folder + "/config.toml") ? site.resume_words(run) : start);
  REQUIRE_MESSAGE(rest.code == 0, rest.err);
}

TEST("crash: a run killed again and again, also while it writes checkpoints, equals an uninterrupted one bit for bit") {
  struct Case {
    std::string family;
    std::vector<std::string> settings;
  };
  const std::vector<Case> cases{
      {"mamba2", {"initial_state=state-passing"}},
      {"gla", {"initial_state=fitted-noise"}},
      {"mamba1", {"initial_state=tbtt", "data.arrangement=streams", "data.threads=2"}},
  };
  constexpr int64_t kSteps = 200;
  const int64_t wanted = kills_wanted();
  const Site site(crash_device());
  Killed count;
  int64_t runs = 0;
  std::vector<std::chrono::microseconds> spans;
  while (count.kills < wanted) {
    const Case& c = cases[static_cast<std::size_t>(runs) % cases.size()];
    auto settings = c.settings;
    settings.push_back("train.steps=" + std::to_string(kSteps));
    settings.push_back("train.checkpoint_every=2");
    const std::string whole = "whole-" + c.family, parts = "parts-" + std::to_string(runs);
    if (!fs::exists(site.run_folder(whole))) {
      const auto begin = Clock::now();
      site.must(site.start_words(whole, settings, c.family));
      spans.push_back(std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begin));
    }
    const std::chrono::microseconds span = spans[static_cast<std::size_t>(runs) % cases.size()] / 2;
    kill_and_resume(site, site.start_words(parts, settings, c.family), parts, span, std::min<int64_t>(3, wanted - count.kills), count);
    check_same(site.run_folder(whole), site.run_folder(parts), kSteps);
    ++runs;
  }
  MESSAGE(count.kills << " kills in " << runs << " runs on " << crash_device() << ": " << count.in_checkpoint << " inside a checkpoint, "
                      << count.before_first << " before the first");
  CHECK(count.in_checkpoint > 0);
}

// --- two at once --------------------------------------------------------------------------------------------------

TEST("crash: a second process on a run is refused, and the run is free as soon as the first is killed") {
  const Site site;
  const std::vector<std::string> settings{"train.steps=4000", "train.checkpoint_every=20"};
  std::string holder;
  {
    Process first(site.start_words("run", settings), site.here());
    REQUIRE(first.wait_until([&] { return fs::exists(site.run_folder("run") + "/checkpoints/latest/training.json"); }));
    holder = text_of(site.run_folder("run") + "/lock");
    const ProcessResult second = site.run(site.resume_words("run"));
    CHECK(second.code == 1);
    CHECK(holds(second.err, "another process works on this run"));
    CHECK(holds(second.err, holder.substr(0, holder.size() - 1)));
    const ProcessResult third = site.run(site.start_words("run", settings));
    CHECK(third.code == 1);
    CHECK(holds(third.err, "exists already"));
  }
  auto words = site.resume_words("run");
  const int64_t last = std::stoll(fs::canonical(site.run_folder("run") + "/checkpoints/latest").filename().string().substr(5));
  words.insert(words.end(), {"--set", "train.steps=" + std::to_string(last + 1)});
  site.must(words);
}

// --- no room ------------------------------------------------------------------------------------------------------

// longhand's words behind a shell that lets no file become larger than this.
std::vector<std::string> with_file_limit(int64_t bytes, const std::vector<std::string>& words) {
  std::vector<std::string> out{"/bin/sh", "-c", "trap '' XFSZ; ulimit -f " + std::to_string(bytes / 512) + "; exec \"$0\" \"$@\""};
  out.insert(out.end(), words.begin(), words.end());
  return out;
}

TEST("crash: a write that the system cuts short ends the run with its reason, and the run goes on once there is room") {
  const Site site;
  const std::vector<std::string> settings{"initial_state=state-passing"};
  site.must(site.start_words("whole", settings));
  const ProcessResult cut = site.run(with_file_limit(20 << 10, site.start_words("parts", settings)));
  CHECK(cut.code == 1);
  for (const char* part : {"the checkpoint of step 5 cannot be written", "File too large", ".safetensors", "none yet", "--resume"})
    CHECK_MESSAGE(holds(cut.err, part), part << " in " << cut.err);
  CHECK_FALSE(is_writing_checkpoint(site.run_folder("parts")));
  site.must(site.resume_words("parts"));
  check_same(site.run_folder("whole"), site.run_folder("parts"), 12);
}

// A file system of its own, for as long as the object lives.
class SmallDisk {
 public:
  explicit SmallDisk(const std::string& folder) : folder_(folder) {
    fs::create_directories(folder);
    mounted_ = ::geteuid() == 0 && fs::exists("/bin/mount") &&
               run_process({"/bin/mount", "-t", "tmpfs", "-o", "size=300k", "longhand-test", folder}).code == 0;
  }
  ~SmallDisk() {
    if (mounted_) run_process({"/bin/umount", folder_});
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  bool mounted() const { return mounted_; }
  bool change(const std::string& option) const { return run_process({"/bin/mount", "-o", "remount," + option, folder_}).code == 0; }

 private:
  std::string folder_;
  bool mounted_;
};

TEST("crash: a disk that fills up, or becomes read-only, costs nothing but the steps since the last checkpoint") {
  const Site site;
  const SmallDisk disk(site.file("runs"));
  if (!disk.mounted()) SKIP("no file system can be mounted here (not root, or not allowed)");
  const std::vector<std::string> settings{"initial_state=state-passing", "train.checkpoint_every=1", "train.keep_last=0"};
  const ProcessResult full = site.run(site.start_words("parts", settings));
  CHECK(full.code == 1);
  CHECK_MESSAGE(holds(full.err, "No space left on device"), full.err);
  CHECK(holds(full.err, " is the latest still"));
  CHECK_FALSE(is_writing_checkpoint(site.run_folder("parts")));
  const std::string latest = fs::canonical(site.run_folder("parts") + "/checkpoints/latest").string();
  const ProcessResult again = site.run(site.resume_words("parts"));  // still no room
  CHECK(again.code == 1);
  CHECK(fs::canonical(site.run_folder("parts") + "/checkpoints/latest").string() == latest);

  REQUIRE(disk.change("ro"));
  for (const auto& words : {site.resume_words("parts"), site.start_words("other", settings)}) {
    const ProcessResult refused = site.run(words);
    CHECK(refused.code == 1);
    CHECK_MESSAGE(holds(refused.err, "the run folder cannot be written to"), refused.err);
    CHECK(holds(refused.err, "Read-only file system"));
  }
  REQUIRE(disk.change("rw,size=20m"));
  site.must(site.start_words("whole", settings));
  site.must(site.resume_words("parts"));
  check_same(site.run_folder("whole"), site.run_folder("parts"), 12);
}

TEST("crash: a folder without permission to write is named, with the reason") {
  const Site site;
  fs::create_directories(site.file("runs"));
  std::vector<std::string> words = site.start_words("run", {});
  if (::geteuid() == 0) {  // root may write anywhere: be somebody else
    if (!fs::exists("/usr/bin/setpriv")) SKIP("root without setpriv");
    fs::permissions(site.file("."), fs::perms(0755));
    words.insert(words.begin(), {"/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"});
    if (run_process({words[0], words[1], words[2], words[3], LONGHAND_BINARY, "--version"}).code != 0)
      SKIP("another user may not run longhand here");
  } else {
    fs::permissions(site.file("runs"), fs::perms(0555));
  }
  const ProcessResult refused = site.run(words);
  fs::permissions(site.file("runs"), fs::perms(0755));
  CHECK(refused.code == 1);
  CHECK_MESSAGE(holds(refused.err, "the run folder cannot be written to"), refused.err);
  CHECK(holds(refused.err, "Permission denied"));
  CHECK(fs::is_empty(site.file("runs")));
}

// --- data ---------------------------------------------------------------------------------------------------------

TEST("crash: data that are gone or changed since the checkpoint are named, and put back the run goes on") {
  const Site site;
  site.must(site.start_words("whole", {}));
  const std::string shard = site.file("shard.jsonl"), sound = text_of(shard);
  Process first(with_file_limit(20 << 10, site.start_words("none", {})), site.here());  // ends before its first checkpoint
  CHECK(first.finish().code == 1);
  site.must(site.start_words("parts", {"train.steps=5"}));
  auto words = site.resume_words("parts");
  words.insert(words.end(), {"--set", "train.steps=12"});

  fs::remove(shard);
  const ProcessResult gone = site.run(words);
  CHECK(gone.code == 1);
  CHECK(holds(gone.err, "a file is not there"));
  CHECK(holds(gone.err, "shard.jsonl"));
  std::string changed = sound;
  changed[changed.find("\"text\":\"") + 12] ^= 1;  // the same length, other words
  for (const std::string& other : {changed, sound.substr(0, sound.size() / 2), sound + sound}) {
    write_file_atomically(shard, other);
    const ProcessResult refused = site.run(words);
    CHECK(refused.code == 1);
    CHECK_MESSAGE(holds(refused.err, "the data have changed since the checkpoint"), refused.err);
    CHECK(holds(refused.err, "shard.jsonl"));
    CHECK(fs::exists(site.run_folder("parts") + "/checkpoints/step-5"));
    CHECK(metrics_of(site.run_folder("parts")).size() == 5);
  }
  write_file_atomically(shard, sound);
  site.must(words);
  CHECK(metrics_of(site.run_folder("parts")).size() == 12);
}

}  // namespace
}  // namespace longhand::test
