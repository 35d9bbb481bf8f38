// `longhand report RUN... [--out FILE.html]`: one page with the curves of one or several runs.
#pragma once
#include <string>
#include <vector>

namespace longhand {

struct ReportOptions {
  std::vector<std::string> runs;  // run folders
  std::string out;                // "": report.html in the first run
};

/// Writes the page, prints its path on stdout and, on stderr, what is missing or cannot be read in the runs.
/// returns  0
/// errors   FileError for a run that does not exist or has nothing to show, or a page that cannot be written
int run_report(const ReportOptions& options);

}  // namespace longhand
