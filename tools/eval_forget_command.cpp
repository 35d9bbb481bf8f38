// `longhand eval forget`: half-life of what each layer and head keeps.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <nlohmann/json.hpp>

#include "eval/forgetting.h"
#include "eval/plot.h"
#include "eval/position_grid.h"
#include "tools/eval_command.h"
#include "tools/eval_session.h"

namespace longhand {
namespace {

constexpr const char* kDefaultLags = "log:2";

struct ForgetOptions {
  EvalOptions eval;
  std::string lags = kDefaultLags;
};

std::string tokens_or_never(double lag, int64_t furthest) {
  return std::isfinite(lag) ? fmt::format("{:.1f}", lag) : "> " + format_count(furthest);
}

void print_summary(std::FILE* to, const Forgetting& result) {
  fmt::print(to, "{:>6}  {:>5}  {:>12}  {:>12}  {:>12}  {:>12}   tokens\n", "layer", "head", "half left", "tenth left", "50% reach",
             "90% reach");
  for (const auto& [layer, head, curve] : result.heads) {
    const int64_t furthest = curve.lags.back();
    fmt::print(to, "{:>6}  {:>5}  {:>12}  {:>12}  {:>12.1f}  {:>12.1f}\n", layer < 0 ? "mean" : std::to_string(layer),
               head < 0 ? "mean" : std::to_string(head), tokens_or_never(curve.life(0.5), furthest),
               tokens_or_never(curve.life(0.1), furthest), curve.reach(0.5), curve.reach(0.9));
  }
  std::fflush(to);
}

int run(const ForgetOptions& options) {
  const std::vector<int64_t> lags = position_grid(options.lags, options.eval.context, "--lags");
  EvalSession session(options.eval, "forget");
  const Forgetting result = forgetting(session.model(), session.next(),
                                       {.context = options.eval.context,
                                        .lags = lags,
                                        .chunk = options.eval.chunk,
                                        .batch = options.eval.batch,
                                        .progress = session.progress()});
  session.finish(result.sequences, result.tokens);
  print_summary(session.summary_stream(), result);
  session.write("forgetting half-life", options.lags == kDefaultLags ? "" : grid_tag(options.lags),
                {{forgetting_csv(result), ""}, {retention_csv(result), "curve"}}, {{"lags", options.lags}});
  return 0;
}

}  // namespace

void add_eval_forget(CLI::App& eval, std::function<int()>& action) {
  auto* command = eval.add_subcommand("forget", "How many tokens each layer and head keeps, from the decays on real text");
  auto options = std::make_shared<ForgetOptions>();
  add_eval_options(*command, options->eval, false);
  command
      ->add_option("--lags", options->lags,
                   "Lags to average over: log:N each time the lag doubles, even:N equal steps, or a list: 1,16,256")
      ->type_name("GRID")
      ->capture_default_str();
  command->callback([=, &action] { action = [=] { return run(*options); }; });
}

}  // namespace longhand
