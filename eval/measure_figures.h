// The figures of a report that come from evaluations: one group of curves for the same data, documents and context of all runs.
#pragma once
#include <vector>

#include "eval/report.h"

namespace longhand {

// Each appends its figures, or nothing when no run has the measure.
void add_generalisation_tables(const std::vector<RunData>& runs, std::vector<Figure>& figures);  // the page's result, in a few numbers
void add_perplexity_figures(const std::vector<RunData>& runs, std::vector<Figure>& figures);
void add_remembrance_figures(const std::vector<RunData>& runs, std::vector<Figure>& figures);
void add_state_figures(const std::vector<RunData>& runs, std::vector<Figure>& figures);
void add_forgetting_figures(const std::vector<RunData>& runs, std::vector<Figure>& figures);

/// Reads every RUN/eval/MEASURE-*.csv into the run, newest step last; what cannot be read becomes an entry of `problems`.
void read_measurements(RunData& run);

}  // namespace longhand
