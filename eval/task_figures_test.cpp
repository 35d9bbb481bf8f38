// Figures of tasks: results with the same settings share one, others do not, and what cannot be read is said.
#include "eval/task_figures.h"

#include <filesystem>
#include <fstream>

#include "tests/support/check.h"

namespace longhand {
namespace {

using test::ScratchFolder;

RunData run_with(const ScratchFolder& scratch, const std::string& name, const std::string& file, const std::string& csv,
                 const std::string& json) {
  RunData run;
  run.name = name;
  run.folder = scratch.file(name);
  std::filesystem::create_directories(run.folder + "/eval");
  std::ofstream(run.folder + "/eval/" + file + ".csv") << csv;
  std::ofstream(run.folder + "/eval/" + file + ".json") << json;
  return run;
}

constexpr const char* kPasskeyCsv = "length,depth,samples,accuracy\n2048,0.1,50,0.5\n2048,0.9,50,1\n4096,0.1,50,0\n4096,0.9,50,0.25\n";

TEST("task figures: passkey of two runs is one heat map, a row for each run and depth") {
  const ScratchFolder scratch;
  std::vector<RunData> runs{run_with(scratch, "a", "passkey-x", kPasskeyCsv, R"({"digits": 5, "step": 10, "weights": "1"})"),
                            run_with(scratch, "b", "passkey-y", kPasskeyCsv, R"({"digits": 5, "step": 20, "weights": "2"})"),
                            run_with(scratch, "c", "passkey-z", kPasskeyCsv, R"({"digits": 0})")};
  for (RunData& run : runs) read_task_results(run);
  std::vector<Figure> figures;
  add_passkey_figures(runs, figures);
  REQUIRE(figures.size() == 2);
  const Figure& shared = figures[figures[0].table.rows.size() == 4 ? 0 : 1];
  CHECK(shared.table.header == std::vector<std::string>{"depth", "2,048", "4,096"});
  REQUIRE(shared.table.rows.size() == 4);
  CHECK(shared.table.rows[0] == std::vector<std::string>{"a, depth 0.1", "50.0%", "0.0%"});
  CHECK(shared.table.rows[3] == std::vector<std::string>{"b, depth 0.9", "100.0%", "25.0%"});
  CHECK(shared.caption.find("50 samples in each cell") != std::string::npos);
}

TEST("task figures: copying and babilong, and several steps of a run") {
  const ScratchFolder scratch;
  const std::string csv = "length,samples,string_accuracy,character_accuracy\n40,8,0.5,0.9\n50,8,0,0.3\n";
  RunData run = run_with(scratch, "a", "copy-1", csv, R"({"variant": "copy", "step": 1})");
  run_with(scratch, "a", "copy-2", csv, R"({"variant": "copy", "step": 2})");
  run_with(scratch, "a", "babilong-1", "task,length,samples,accuracy\nqa1,0,4,0.75\nqa1,4000,4,0.5\n", "{}");
  run_with(scratch, "a", "copy-3", "length,samples\n1,2\n", "{}");
  read_task_results(run);
  CHECK(run.problems.size() == 1);
  std::vector<Figure> figures;
  add_copy_figures({run}, figures);
  REQUIRE(figures.size() == 1);
  CHECK(figures[0].table.header[1] == "a, step 1: characters");
  CHECK(figures[0].table.rows[1] == std::vector<std::string>{"50", "30.0%", "0.0%", "30.0%", "0.0%"});
  add_babilong_figures({run}, figures);
  REQUIRE(figures.size() == 2);
  CHECK(figures[1].table.rows[0] == std::vector<std::string>{"qa1", "75.0%", "50.0%"});
  std::vector<Figure> none;
  add_passkey_figures({run}, none);
  CHECK(none.empty());
}

}  // namespace
}  // namespace longhand
