// `longhand eval state`: statistics of the recurrent state by position.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "eval/plot.h"
#include "eval/position_grid.h"
#include "eval/state_statistics.h"
#include "tools/eval_command.h"
#include "tools/eval_session.h"

namespace longhand {
namespace {

constexpr const char* kDefaultPositions = "log:4";

struct StateOptions {
  EvalOptions eval;
  std::string positions = kDefaultPositions;
  std::string histograms;
  bool conv_windows = false;
};

// One line for each position near a power of two, and for the training length: the whole state.
void print_summary(std::FILE* to, const StateCurve& curve, int64_t train_length) {
  fmt::print(to, "{:>12}  {:>7}  {:>11}  {:>11}  {:>11}  {:>11}\n", "position", "tensor", "std", "mean", "norm", "largest");
  int64_t next = 1;
  for (std::size_t i = 0; i < curve.lines.size(); ++i) {
    const StateLine& line = curve.lines[i];
    if (line.layer != kAllLayers) continue;
    const bool last = line.position == curve.lines.back().position, trained = line.position == train_length && !last;
    if (line.position < next && !last && !trained) continue;
    if (i + 1 == curve.lines.size() || curve.lines[i + 1].position != line.position)
      while (next <= line.position) next *= 2;
    fmt::print(to, "{:>12}  {:>7}  {:>11.5g}  {:>11.3g}  {:>11.5g}  {:>11.5g}{}\n", format_count(line.position), line.tensor, line.std,
               line.mean, line.norm, line.max_abs, trained ? "   <- end of the training length" : "");
  }
  std::fflush(to);
}

int run(const StateOptions& options) {
  const int64_t context = options.eval.context;
  std::vector<int64_t> positions = position_grid(options.positions, context, "--positions"), histograms;
  if (!options.histograms.empty()) histograms = position_grid(options.histograms, context, "--histograms");
  EvalSession session(options.eval, "state");
  if (const int64_t T = session.train_length(); T > 0 && T <= context && !std::binary_search(positions.begin(), positions.end(), T))
    positions.insert(std::lower_bound(positions.begin(), positions.end(), T), T);
  const StateCurve curve = state_curve(session.model(), session.next(),
                                       {.context = context,
                                        .positions = positions,
                                        .histograms = histograms,
                                        .conv_windows = options.conv_windows,
                                        .chunk = options.eval.chunk,
                                        .batch = options.eval.batch,
                                        .progress = session.progress()});
  session.finish(curve.sequences, curve.tokens);
  print_summary(session.summary_stream(), curve, session.train_length());
  std::vector<EvalSession::Result> results{{state_csv(curve), ""}};
  if (!histograms.empty()) results.push_back({state_histogram_csv(curve), "histogram"});
  std::string tag = options.conv_windows ? "conv" : "";
  if (options.positions != kDefaultPositions) tag += (tag.empty() ? "" : "-") + grid_tag(options.positions);
  session.write("recurrent state by position", tag, results,
                {{"positions", options.positions}, {"histograms", options.histograms}, {"conv_windows", options.conv_windows}});
  return 0;
}

}  // namespace

void add_eval_state(CLI::App& eval, std::function<int()>& action) {
  auto* command = eval.add_subcommand("state", "Size of the recurrent state by position, per layer and head");
  auto options = std::make_shared<StateOptions>();
  add_eval_options(*command, options->eval, false);
  command
      ->add_option("--positions", options->positions,
                   "Where to look: log:N each time the position doubles, even:N equal steps, or a list: 1,2048,8192; the training length "
                   "is added")
      ->type_name("GRID")
      ->capture_default_str();
  command->add_option("--histograms", options->histograms, "Positions at which magnitudes are counted, in the same form (default: none)")
      ->type_name("GRID");
  command->add_flag("--conv", options->conv_windows, "The convolutions' windows too");
  command->callback([=, &action] { action = [=] { return run(*options); }; });
}

}  // namespace longhand
