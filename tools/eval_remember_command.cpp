// `longhand eval remember`: effective remembrance.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "eval/plot.h"
#include "eval/position_grid.h"
#include "eval/remembrance.h"
#include "tools/eval_command.h"
#include "tools/eval_session.h"

namespace longhand {
namespace {

constexpr const char* kDefaultStarts = "log:4";

struct RememberOptions {
  EvalOptions eval;
  std::string starts = kDefaultStarts;
  std::string distance = "tv";
};

void print_summary(std::FILE* to, const Remembrance& r, Distance distance) {
  fmt::print(to, "{:>12}  {:>12}  {:>10}  {:>10}   {}\n", "start", "tokens left", "mean", "+-", title_of(distance));
  for (std::size_t i = 0; i < r.starts.size(); ++i)
    fmt::print(to, "{:>12}  {:>12}  {:>10.5f}  {:>10.5f}\n", format_count(r.starts[i]), format_count(r.context - r.starts[i]), r.mean(i),
               r.standard_error(i));
  std::fflush(to);
}

int run(const RememberOptions& options) {
  const Distance distance = parse_distance(options.distance);
  const std::vector<int64_t> starts = start_grid(options.starts, options.eval.context, "--starts");
  EvalSession session(options.eval, "remember");
  const Remembrance result = effective_remembrance(session.model(), session.next(),
                                                   {.context = options.eval.context,
                                                    .starts = starts,
                                                    .distance = distance,
                                                    .chunk = options.eval.chunk,
                                                    .batch = options.eval.batch,
                                                    .progress = session.progress()});
  session.finish(result.sequences(), result.tokens);
  print_summary(session.summary_stream(), result, distance);
  const std::string tag = name_of(distance) + (options.starts == kDefaultStarts ? "" : "-" + grid_tag(options.starts));
  session.write("effective remembrance", tag, {{remembrance_csv(result), ""}},
                {{"distance", name_of(distance)}, {"starts", options.starts}});
  return 0;
}

}  // namespace

void add_eval_remember(CLI::App& eval, std::function<int()>& action) {
  auto* command = eval.add_subcommand("remember", "Effective remembrance: what the prediction still owes to tokens long past");
  auto options = std::make_shared<RememberOptions>();
  options->eval.batch = 32;
  add_eval_options(*command, options->eval, false);
  command
      ->add_option("--starts", options->starts,
                   "Where suffixes begin: log:N and even:N are the tokens they keep, N each time these double or N equal steps; or a list "
                   "of starts: 0,1024,2047")
      ->type_name("GRID")
      ->capture_default_str();
  command->add_option("--distance", options->distance, "tv (total variation), js (Jensen-Shannon, in bits) or cosine")
      ->type_name("CHOICE")
      ->check(CLI::IsMember({"tv", "js", "cosine"}))
      ->capture_default_str();
  command->callback([=, &action] { action = [=] { return run(*options); }; });
}

}  // namespace longhand
