// The figures of a report that come from tasks: heat maps by length for passkey and BABILong, curves by length for copying, tables of
// LAMBADA and of multiple choice.
#pragma once
#include <vector>

#include "eval/report.h"

namespace longhand {

// Each appends one figure for every group of results with the same settings, all runs in it, or nothing when no run has the task. Titles
// name the settings in which the groups of a task differ.
void add_passkey_figures(const std::vector<RunData>& runs, std::vector<Figure>& figures);
void add_copy_figures(const std::vector<RunData>& runs, std::vector<Figure>& figures);
void add_babilong_figures(const std::vector<RunData>& runs, std::vector<Figure>& figures);
void add_lambada_tables(const std::vector<RunData>& runs, std::vector<Figure>& figures);
void add_choices_tables(const std::vector<RunData>& runs, std::vector<Figure>& figures);

/// Reads every RUN/eval/TASK-*.csv of these tasks into the run, newest step last; what cannot be read becomes an entry of `problems`.
void read_task_results(RunData& run);

}  // namespace longhand
