// `longhand eval ppl`: loss and perplexity by position.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "eval/perplexity.h"
#include "eval/plot.h"
#include "eval/position_curve.h"
#include "tools/eval_command.h"
#include "tools/eval_session.h"
#include "tools/option_checks.h"
#include "tools/process_device.h"

namespace longhand {
namespace {

constexpr int64_t kMostPositions = 65536;  // of a table with a line a position, where nothing else is asked for
constexpr int kBinsBeyond = 1024;          // an octave, in a longer one

struct PplOptions {
  EvalOptions eval;
  int64_t bins = -1;  // an octave; 0: every position; -1: by the context
};

void print_summary(std::FILE* to, const PositionLoss& loss, int64_t train_length) {
  const std::vector<int64_t> ends = train_length > 0 ? std::vector<int64_t>{train_length} : std::vector<int64_t>{};
  fmt::print(to, "{:>23}  {:>12}  {:>10}  {:>12}  {:>9}\n", "positions", "tokens", "loss", "perplexity", "+-");
  for (const PositionBin& bin : octave_bins(position_bins(loss), 1, ends)) {
    const auto spread = std::find_if(loss.spreads.begin(), loss.spreads.end(), [&](const PositionSpread& s) {
      return s.first == bin.first && s.last == bin.last && s.sequences > 1;
    });
    const std::string error = spread == loss.spreads.end() ? "" : fmt::format("{:.3g}", spread->perplexity_standard_error());
    const std::string range = bin.first == bin.last ? format_count(bin.first) : format_count(bin.first) + " - " + format_count(bin.last);
    const bool end = bin.last == train_length && loss.positions() > train_length;
    fmt::print(to, "{:>23}  {:>12}  {:>10.5f}  {:>12.6g}  {:>9}{}\n", range, format_count(static_cast<int64_t>(bin.tokens)), bin.loss,
               bin.perplexity(), error, end ? "   <- end of the training length" : "");
  }
  fmt::print(to, "{:>23}  {:>12}  {:>10.5f}  {:>12.6g}\n", "all", format_count(loss.total_tokens()), loss.mean_loss(),
             std::exp(loss.mean_loss()));
  std::fflush(to);
}

// Replaces each number by the sum over the processes.
void sum_over(Communicator& processes, std::vector<double>& numbers) {
  const Tensor all = Tensor::from(Device::cpu(), {static_cast<int64_t>(numbers.size())}, numbers);
  processes.all_reduce_sum(all);
  numbers = all.to_vector<double>();
}

// What decides the sums, and over which ranges they are taken.
std::string description_of(const EvalOptions& options, const EvalSession& session) {
  const LanguageModel& model = session.model();
  return description_of_build() + description_of_environment() + description_of_files(options.data) + description_of_weights(model) +
         fmt::format(
             "model: {}\ncontext: {}\nsequences: {}\ndocuments: {}\ntokenizer: {}\ndtype: {}\ndevice: {}\ntraining length: {}\n"
             "skip bad lines: {}\n",
             options.model, options.context, options.sequences, options.packed ? "packed" : options.documents, options.tokenizer,
             name_of(model.compute_dtype()), model.device().is_cuda() ? model.device().description() : "cpu", session.train_length(),
             options.skip_bad_lines);
}

int measure(const PplOptions& options, Communicator& processes) {
  EvalSession session(options.eval, "ppl", &processes);
  if (!processes.alone()) require_same_everywhere(processes, description_of(options.eval, session));
  SequenceParts parts{.part = processes.rank(), .parts = processes.size()};
  if (!processes.alone()) parts.sum_over_parts = [&](std::vector<double>& numbers) { sum_over(processes, numbers); };
  const PositionLoss loss = position_loss(session.model(), session.next(),
                                          {.context = options.eval.context,
                                           .chunk = options.eval.chunk,
                                           .batch = options.eval.batch,
                                           .spread_ends = octave_ends(options.eval.context, {session.train_length()}),
                                           .progress = session.progress(),
                                           .parts = std::move(parts)});
  session.finish(loss.sequences, loss.total_tokens());
  if (!processes.leads()) return 0;
  const int bins = options.bins >= 0 ? static_cast<int>(options.bins) : loss.positions() > kMostPositions ? kBinsBeyond : 0;
  const std::string csv = position_csv(loss, bins);
  print_summary(session.summary_stream(), loss, session.train_length());
  session.write("loss by position", "", {{csv, ""}, {spread_csv(loss), "spread"}},
                {{"mean_loss", loss.mean_loss()}, {"bins_per_octave", bins}});
  return 0;
}

int run(const PplOptions& options) {
  return with_processes([&](std::unique_ptr<Communicator>& processes, const LocalPlace& place) {
    PplOptions own = options;
    if (!processes->alone())
      own.eval.device = device_of_process(own.eval.device == "auto" ? "" : own.eval.device, *processes, place).name();
    return measure(own, *processes);
  });
}

}  // namespace

void add_eval_ppl(CLI::App& eval, std::function<int()>& action) {
  auto* command =
      eval.add_subcommand("ppl", "Loss and perplexity by position, streamed: memory of the device does not grow with the context");
  auto options = std::make_shared<PplOptions>();
  add_eval_options(*command, options->eval, true);
  command
      ->add_option("--bins", options->bins,
                   "Lines of the CSV each time the position doubles; 0: one a position (default: 0 up to 65536 positions, 1024 beyond)")
      ->type_name("N")
      ->check(at_least(0));
  command->callback([=, &action] { action = [=] { return run(*options); }; });
}

}  // namespace longhand
