// `longhand eval lambada`: the last word of passages.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <numeric>

#include "data/tasks/continuation.h"
#include "data/tasks/lambada.h"
#include "eval/continuation_score.h"
#include "tools/eval_command.h"
#include "tools/option_checks.h"
#include "tools/task_session.h"

namespace longhand {
namespace {

struct LambadaOptions {
  TaskSessionOptions session;
  std::string data;
  int64_t samples = 0;
};

int run(const LambadaOptions& options) {
  TaskSession session(options.session, "lambada");
  std::vector<ScoredRow> rows;
  for (const LambadaSample& sample : read_lambada(options.data)) {
    if (options.samples > 0 && std::ssize(rows) == options.samples) break;
    Continuation c = encode_continuation(session.tokenizer(), sample.context, sample.target);
    rows.push_back({std::move(c.context), std::move(c.target)});
  }
  std::vector<int32_t> all;
  for (const ScoredRow& row : rows) {
    all.insert(all.end(), row.context.begin(), row.context.end());
    all.push_back(-1);  // where the target begins
    all.insert(all.end(), row.target.begin(), row.target.end());
  }
  SampleLog& log = session.open_log("", {{"data", prompt_hash(all)}}, std::ssize(rows));
  std::vector<int64_t> order(rows.size());  // neighbours of about one length need little padding
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto row_of = [&](int64_t sample) -> const ScoredRow& { return rows[static_cast<std::size_t>(sample)]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row_of(a).context.size() < row_of(b).context.size(); });
  session.each_batch(order, [&](const std::vector<int64_t>& batch) {
    std::vector<ScoredRow> part;
    for (const int64_t sample : batch) part.push_back(row_of(sample));
    const auto scores = score_continuations(session.model(), part, {.chunk = session.chunk(), .progress = session.progress()});
    for (std::size_t i = 0; i < batch.size(); ++i)
      log.add(batch[i], {{"prompt", prompt_hash(part[i].context)},
                         {"tokens", part[i].context.size()},
                         {"target", session.tokenizer().decode(part[i].target)},
                         {"output", text_of(session.tokenizer(), scores[i].predicted)},
                         {"log_likelihood", scores[i].log_likelihood},
                         {"correct", scores[i].greedy}});
  });
  double hits = 0, sum = 0;
  for (int64_t i = 0; i < std::ssize(rows); ++i) {
    hits += log.result(i).at("correct").get<bool>() ? 1 : 0;
    sum += log.result(i).at("log_likelihood").get<double>();
  }
  const auto n = static_cast<double>(rows.size());
  const double accuracy = hits / n, perplexity = std::exp(-sum / n);
  session.finish(
      "lambada",
      {{"samples", "accuracy", "perplexity"}, {{std::to_string(rows.size()), share_text(accuracy), fmt::format("{:.6g}", perplexity)}}},
      {{"data_file", options.data}, {"accuracy", accuracy}, {"perplexity", perplexity}});
  return 0;
}

}  // namespace

void add_eval_lambada(CLI::App& eval, std::function<int()>& action) {
  auto* command = eval.add_subcommand("lambada", "Accuracy and perplexity of the last word of passages (OpenAI's LAMBADA file)");
  auto options = std::make_shared<LambadaOptions>();
  options->session.batch = 32;
  add_task_options(*command, options->session);
  command->add_option("--data", options->data, "lambada_test.jsonl, one {\"text\": ...} a line")->required()->type_name("FILE");
  command->add_option("--samples", options->samples, "Only the first so many passages (0: all)")
      ->type_name("N")
      ->check(at_least(0))
      ->capture_default_str();
  command->callback([=, &action] { action = [=] { return run(*options); }; });
}

}  // namespace longhand
