// tools/laboratory.sh with a stand-in for longhand, which writes tables of known numbers: what is trained from what, on which device, with
// which settings; that nothing is done twice; and the table of ratios at the end.
#include <algorithm>
#include <filesystem>

#include "core/files.h"
#include "tests/support/check.h"
#include "tests/support/command_help.h"

namespace longhand::test {
namespace {

namespace fs = std::filesystem;

// Perplexities over 1-128, 129-256, at 32 T and 64 T: 40, 20, 30, 50 of a base, and 30, 10, 9, 8 of a run that was started from one.
constexpr const char* kStandIn = R"sh(#!/usr/bin/env bash
echo "$*" >>calls
value() { local name=$1; shift; while [ $# -gt 1 ]; do [ "$1" != "$name" ] || { echo "$2"; return; }; shift; done; }
case $1 in
  train)
    [ "${FAIL:-}" != "$(value --name "$@")" ] || { echo "no such data" >&2; exit 1; }
    run=runs/$(value --name "$@"); mkdir -p "$run/checkpoints"; printf '[train]\nlength = 256\n' >"$run/config.toml" ;;
  eval)
    out=$(value --out "$@"); touch "$out"
    case $2 in
      ppl)
        p=(3.68888 2.99573 3.4012 3.91202)
        case $out in *-state-passing/* | *-random-noise/*) p=(3.4012 2.30259 2.19722 2.07944) ;; esac
        printf 'first,last,sequences,loss,standard_error\n' >"${out%.csv}.spread.csv"
        printf '1,128,4,%s,0\n129,256,4,%s,0\n4097,8192,4,%s,0\n8193,16384,4,%s,0\n' "${p[@]}" >>"${out%.csv}.spread.csv" ;;
      remember) printf 'start,lag,sequences,mean,standard_error\n0,1024,4,0,0\n768,256,4,0.125,0\n' >"$out" ;;
      state) printf 'position,tensor,layer,head,sequences,mean,std\n256,ssm,0,all,4,0,9\n256,ssm,all,all,4,0,0.5\n16384,ssm,all,all,4,0,2.5\n' >"$out" ;;
    esac ;;
  report) touch "$(value --out "$@")" ;;
esac
)sh";

struct Laboratory {
  ScratchFolder scratch;

  Laboratory() {
    write_file_atomically(scratch.file("longhand"), kStandIn);
    fs::permissions(scratch.file("longhand"), fs::perms::owner_all);
  }
  ProcessResult run(const std::vector<std::string>& names, std::map<std::string, std::string> settings) {
    settings.insert({{"LONGHAND", "./longhand"}, {"DEVICES", "cuda:0 cuda:1"}});
    std::vector<std::string> words{"/bin/bash", std::string(LONGHAND_SOURCE_DIR) + "/tools/laboratory.sh", "train", "val", "tokenizer"};
    words.insert(words.end(), names.begin(), names.end());
    fs::remove(scratch.file("calls"));
    return run_process(words, {.folder = scratch.path(), .input = "", .environment = settings});
  }
  // The lines of the stand-in's calls that hold all of these.
  std::vector<std::string> calls(const std::vector<std::string>& parts) const {
    std::vector<std::string> found;
    for (const std::string& line : split_at(read_text_file(scratch.file("calls")), '\n'))
      if (!line.empty() && std::all_of(parts.begin(), parts.end(), [&](const auto& p) { return line.find(p) != std::string::npos; }))
        found.push_back(line);
    return found;
  }
};

TEST("laboratory: each base is trained once, and its initial states from it; the table has what stands beside what") {
  Laboratory laboratory;
  const ProcessResult done =
      laboratory.run({"lab-mamba1", "lab-mamba2"}, {{"STATES", "zero random-noise state-passing"}, {"POST", "train.steps=7"}});
  CHECK_MESSAGE(done.code == 0, done.err);
  CHECK(laboratory.calls({"train "}).size() == 2 * (1 + 3));
  CHECK(laboratory.calls({"eval "}).size() == 2 * (1 + 3) * 4);
  for (const char* run : {"lab-mamba1", "lab-mamba2"}) {  // each is measured where it was trained
    CAPTURE(run);
    std::string device = "--device cuda:0";
    if (laboratory.calls({"train ", std::string("--name ") + run + " ", device}).empty()) device = "--device cuda:1";
    CHECK(laboratory.calls({"train ", std::string("--name ") + run + " ", device}).size() == 1);
    CHECK(laboratory.calls({"eval ", std::string("--model runs/") + run + " ", device}).size() == 4);
  }
  const std::size_t on_first = laboratory.calls({"train ", "--device cuda:0"}).size();
  const std::size_t on_second = laboratory.calls({"train ", "--device cuda:1"}).size();
  CHECK(on_first > 0);
  CHECK(on_second > 0);
  CHECK(on_first + on_second == 2 * (1 + 3));
  CHECK(laboratory.calls({"train ", "recipes/lab-mamba1.toml", "--name lab-mamba1 ", "seed=1"}).size() == 1);
  CHECK(laboratory
            .calls({"train ", "lab-post.toml", "--name lab-mamba2-state-passing", "--init-from runs/lab-mamba2",
                    "initial_state=state-passing", "train.length=256", "seed=101", "train.steps=7"})
            .size() == 1);
  CHECK(laboratory.calls({"train ", "random-noise", "sigma=0.5"}).size() == 2);  // the base's deviation at T
  CHECK(laboratory.calls({"report", "runs/lab-mamba1 runs/lab-mamba1-zero runs/lab-mamba1-random-noise runs/lab-mamba1-state-passing"})
            .size() == 1);
  CHECK(
      laboratory
          .calls({"report",
                  "runs/lab-mamba1 runs/lab-mamba1-state-passing runs/lab-mamba2 runs/lab-mamba2-state-passing --out runs/laboratory.html"})
          .size() == 1);
  const std::string table = read_text_file(laboratory.scratch.file("runs/laboratory.md"));
  // 1 to T: sqrt(40 * 20) and sqrt(30 * 10); 32 T / T, 64 T / T; beside its base; EffRem with T left; deviations
  CHECK(table.find("| lab-mamba1 | 28.28 | 20.00 | 30.00 | 50.00 | 1.500 | 2.500 | 1.000 | 1.000 | 0.125 | 0.5 | 2.5 |") !=
        std::string::npos);
  CHECK(table.find("| lab-mamba1-state-passing | 17.32 | 10.00 | 9.00 | 8.00 | 0.900 | 0.800 | 0.612 | 0.500 | 0.125 | 0.5 | 2.5 |") !=
        std::string::npos);
  CHECK(done.out.find(table) != std::string::npos);

  // What is there is not done again; seeds get names and seeds of their own.
  const ProcessResult more = laboratory.run({"lab-mamba1"}, {{"STATES", "zero tbtt"}, {"SEEDS", "1 3"}, {"PAGE", "more"}});
  CHECK_MESSAGE(more.code == 0, more.err);
  CHECK(laboratory.calls({"train "}).size() == 4);
  CHECK(laboratory.calls({"train ", "--name lab-mamba1-tbtt", "data.arrangement=streams", "seed=101"}).size() == 1);
  CHECK(laboratory.calls({"train ", "--name lab-mamba1-seed3 ", "seed=3"}).size() == 1);
  CHECK(laboratory.calls({"train ", "--name lab-mamba1-seed3-tbtt", "--init-from runs/lab-mamba1-seed3 ", "seed=103"}).size() == 1);
  CHECK(fs::exists(laboratory.scratch.file("runs/more.md")));
}

TEST("laboratory: bases alone; a training that fails ends it with its message") {
  Laboratory laboratory;
  const ProcessResult bases = laboratory.run({"lab-gla"}, {{"STATES", " "}});
  CHECK_MESSAGE(bases.code == 0, bases.err);
  CHECK(laboratory.calls({"train "}).size() == 1);
  const ProcessResult failed = laboratory.run({"lab-gla"}, {{"STATES", "zero"}, {"FAIL", "lab-gla-zero"}});
  CHECK(failed.code != 0);
  CHECK(failed.err.find("laboratory: failed: flock runs/.cuda:") != std::string::npos);
  CHECK(failed.err.find("no such data") != std::string::npos);
  CHECK(laboratory.run({}, {}).code == 2);
}

}  // namespace
}  // namespace longhand::test
