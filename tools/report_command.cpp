// The report on the command line; see report_command.h.
#include "tools/report_command.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <ctime>
#include <filesystem>

#include "core/error.h"
#include "core/files.h"
#include "eval/report.h"

namespace longhand {

int run_report(const ReportOptions& options) {
  if (options.runs.empty()) throw ConfigError("report: no run was named", {{"try", "longhand report runs/NAME"}});
  const std::vector<RunData> runs = read_runs(options.runs);
  for (const RunData& run : runs)
    for (const std::string& problem : run.problems) fmt::print(stderr, "report: {}: {}\n", run.name, problem);
  const std::filesystem::path out =
      options.out.empty() ? std::filesystem::path(options.runs.front()) / "report.html" : std::filesystem::path(options.out);
  if (out.has_parent_path()) std::filesystem::create_directories(out.parent_path());
  write_file_atomically(out.string(), report_html(runs, fmt::format("{:%Y-%m-%d %H:%M} UTC", fmt::gmtime(std::time(nullptr)))));
  fmt::print("{}\n", out.string());
  return 0;
}

}  // namespace longhand
