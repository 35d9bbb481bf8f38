// `longhand eval passkey`: accuracy by length and depth.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "core/error.h"
#include "data/tasks/passkey.h"
#include "data/tasks/task.h"
#include "eval/answer_metrics.h"
#include "eval/greedy_answers.h"
#include "tools/eval_command.h"
#include "tools/option_checks.h"
#include "tools/task_session.h"

namespace longhand {
namespace {

constexpr int64_t kAnswerTokens = 10;  // as published; more where a key of so many digits may need them

struct PasskeyCommand {
  TaskSessionOptions session;
  std::vector<std::string> lengths{"2k", "4k", "8k", "16k", "32k", "64k"};
  std::vector<double> depths{0.1, 0.5, 0.9};
  std::string unit = "tokens";
  int64_t prompts = 50, digits = 5, seed = 0;
  bool any_depth = false;
};

int run(const PasskeyCommand& o) {
  const bool tokens = o.unit == "tokens";
  std::vector<int64_t> wanted;
  for (const std::string& length : o.lengths)
    wanted.push_back(parse_length(length, tokens ? 1024 : 1000));  // as models' lengths are counted
  require_each_once("--lengths", wanted);
  require_each_once("--depths", o.depths);
  std::vector<PasskeyOptions> cells;  // length by length, depth by depth
  for (const int64_t length : wanted)
    for (std::size_t d = 0; d < (o.any_depth ? 1 : o.depths.size()); ++d)
      cells.push_back({.unit = tokens ? PasskeyUnit::tokens : PasskeyUnit::characters,
                       .length = length,
                       .depth = o.any_depth ? std::nullopt : std::optional(o.depths[d]),
                       .digits = o.digits,
                       .seed = static_cast<uint64_t>(o.seed)});
  TaskSession session(o.session, "passkey");
  const int64_t least = tokens ? least_passkey_tokens(session.tokenizer(), o.digits) : 0;
  for (const PasskeyOptions& cell : cells)
    if (cell.length < least)
      throw ConfigError("eval: a length that leaves no room for every key",
                        {{"length", std::to_string(cell.length)}, {"expected", "at least " + std::to_string(least) + " tokens"}});
  nlohmann::ordered_json lengths = nlohmann::ordered_json::array(), depths = nlohmann::ordered_json::array(), first_prompts = lengths;
  for (std::size_t c = 0; c < cells.size(); ++c)
    first_prompts.push_back(prompt_hash(passkey_sample(cells[c], session.tokenizer(), c * static_cast<uint64_t>(o.prompts)).prompt));
  for (const PasskeyOptions& cell : cells)
    lengths.push_back(cell.length), depths.push_back(cell.depth ? fmt::format("{}", *cell.depth) : "any");
  const std::string tag = fmt::format("{}-{}-{}{}-d{}-n{}-seed-{}", o.lengths.front(), o.lengths.back(), o.unit, o.any_depth ? "-any" : "",
                                      o.digits, o.prompts, o.seed);
  SampleLog& log = session.open_log(tag,
                                    {{"unit", o.unit},
                                     {"lengths", lengths},
                                     {"depths", depths},
                                     {"digits", o.digits},
                                     {"prompts", o.prompts},
                                     {"seed", o.seed},
                                     {"first_prompts", first_prompts}},
                                    std::ssize(cells) * o.prompts);
  const int64_t answer_tokens = std::max(kAnswerTokens, o.digits + 2);  // a blank, a token a digit, and what ends the number
  session.each_batch([&](const std::vector<int64_t>& batch) {
    std::vector<PasskeySample> samples;
    std::vector<std::vector<int32_t>> prompts;
    for (const int64_t i : batch) {
      const PasskeyOptions& cell = cells[static_cast<std::size_t>(i / o.prompts)];
      samples.push_back(passkey_sample(cell, session.tokenizer(), static_cast<uint64_t>(i)));
      prompts.push_back(std::move(samples.back().prompt));
    }
    const auto answers = greedy_answers(session.model(), prompts, session.tokenizer(),
                                        {.max_tokens = answer_tokens, .chunk = session.chunk(), .progress = session.progress()});
    for (std::size_t k = 0; k < batch.size(); ++k) {
      const PasskeyOptions& cell = cells[static_cast<std::size_t>(batch[k] / o.prompts)];
      nlohmann::ordered_json line{{"length", cell.length}};
      if (cell.depth) line["depth"] = *cell.depth;
      line.update({{"before", samples[k].before},
                   {"after", samples[k].after},
                   {"tokens", prompts[k].size()},
                   {"prompt", prompt_hash(prompts[k])},
                   {"target", samples[k].key},
                   {"output", answers[k]},
                   {"correct", passkey_correct(answers[k], samples[k].key)}});
      log.add(batch[k], line);
    }
  });
  TaskSession::Table table{{"length", "depth", "samples", "accuracy"}, {}};
  double all = 0;
  for (std::size_t c = 0; c < cells.size(); ++c) {
    double correct = 0;
    for (int64_t i = 0; i < o.prompts; ++i)
      correct += log.result(static_cast<int64_t>(c) * o.prompts + i).at("correct").get<bool>() ? 1 : 0;
    all += correct;
    table.rows.push_back({std::to_string(cells[c].length), depths[c].get<std::string>(), std::to_string(o.prompts),
                          share_text(correct / static_cast<double>(o.prompts))});
  }
  session.finish("passkey", table, {{"accuracy", all / static_cast<double>(std::ssize(cells) * o.prompts)}});
  return 0;
}

}  // namespace

void add_eval_passkey(CLI::App& eval, std::function<int()>& action) {
  auto* command = eval.add_subcommand("passkey", "Retrieval of a number hidden in a long text, by length and depth");
  auto options = std::make_shared<PasskeyCommand>();
  add_task_options(*command, options->session);
  command->add_option("--lengths", options->lengths, "Lengths, such as 2k,64k; k is 1024 tokens or 1000 characters")
      ->delimiter(',')
      ->type_name("LIST")
      ->capture_default_str();
  auto* depths = command->add_option("--depths", options->depths, "Shares of the filler that stand before the key")
                     ->delimiter(',')
                     ->type_name("LIST")
                     ->check(CLI::Range(0.0, 1.0))
                     ->capture_default_str();
  command->add_flag("--any-depth", options->any_depth, "Uniform depths, as published")->excludes(depths);
  command->add_option("--unit", options->unit, "tokens: of the whole prompt; characters: of the filler, as published")
      ->check(CLI::IsMember({"tokens", "characters"}))
      ->type_name("CHOICE")
      ->capture_default_str();
  command->add_option("--prompts", options->prompts, "Prompts of each length and depth")
      ->type_name("N")
      ->check(at_least(1))
      ->capture_default_str();
  command->add_option("--digits", options->digits, "Of the key; 0: a number from 1 to 50000, as published")
      ->type_name("N")
      ->check(CLI::Range(0, 18))
      ->capture_default_str();
  command->add_option("--seed", options->seed, "Of keys and depths")->type_name("N")->check(at_least(0))->capture_default_str();
  command->callback([=, &action] { action = [=] { return run(*options); }; });
}

}  // namespace longhand
