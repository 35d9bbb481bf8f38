// `longhand eval copy`: string and character accuracy of synthetic copying by length.
#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include "core/error.h"
#include "data/tasks/copying.h"
#include "data/tasks/draws.h"
#include "data/tasks/letter_tokenizer.h"
#include "eval/continuation_score.h"
#include "tools/eval_command.h"
#include "tools/option_checks.h"
#include "tools/task_session.h"

namespace longhand {
namespace {

struct CopyCommand {
  TaskSessionOptions session;
  std::string variant = "copy";
  int64_t ngram = 3, answer_length = 0, min_length = 40, max_length = 199, every = 1, samples = 128, seed = 0;
};

int run(const CopyCommand& o) {
  if (o.min_length > o.max_length)
    throw ConfigError("eval: the least length is above the largest",
                      {{"min-length", std::to_string(o.min_length)}, {"max-length", std::to_string(o.max_length)}});
  TaskSession session(o.session, "copy");
  const auto* letters = dynamic_cast<const LetterTokenizer*>(&session.tokenizer());
  if (letters == nullptr)
    throw ConfigError("eval: copying is a task for models of letters",
                      {{"tokenizer", session.tokenizer().name()}, {"expected", "letters:1 to letters:26"}});
  const CopyOptions copying{
      .variant = copy_variant_from(o.variant), .alphabet = letters->letters(), .ngram = o.ngram, .answer_length = o.answer_length};
  std::vector<int64_t> lengths;
  for (int64_t length = o.min_length; length <= o.max_length; length += o.every) lengths.push_back(length);
  const std::string tag = fmt::format("{}-{}-{}-every-{}-a{}-g{}-n{}-seed-{}", o.variant, o.min_length, o.max_length, o.every,
                                      o.answer_length, o.ngram, o.samples, o.seed);
  const auto example_of = [&](int64_t i) {
    return copy_example(copying, lengths[static_cast<std::size_t>(i / o.samples)],
                        sample_key(static_cast<uint64_t>(o.seed), "copy evaluation", static_cast<uint64_t>(i)));
  };
  const int64_t last = std::ssize(lengths) - 1;
  SampleLog& log =
      session.open_log(tag,
                       {{"variant", o.variant},
                        {"alphabet", copying.alphabet},
                        {"ngram", o.ngram},
                        {"answer_length", o.answer_length},
                        {"lengths", lengths},
                        {"samples_per_length", o.samples},
                        {"seed", o.seed},
                        {"first_prompts", {prompt_hash(example_of(0).tokens), prompt_hash(example_of(last * o.samples).tokens)}}},
                       std::ssize(lengths) * o.samples);
  session.each_batch([&](const std::vector<int64_t>& batch) {
    std::vector<ScoredRow> rows;
    for (const int64_t i : batch) {
      const CopyExample e = example_of(i);
      const auto cut = e.tokens.begin() + e.prompt;
      rows.push_back({{e.tokens.begin(), cut}, {cut, e.tokens.end() - 1}});  // the end token does not count
    }
    const auto scores = score_continuations(session.model(), rows, {.chunk = session.chunk(), .progress = session.progress()});
    for (std::size_t k = 0; k < batch.size(); ++k) {
      int64_t right = 0;
      for (std::size_t j = 0; j < rows[k].target.size(); ++j) right += scores[k].predicted[j] == rows[k].target[j] ? 1 : 0;
      log.add(batch[k], {{"length", lengths[static_cast<std::size_t>(batch[k] / o.samples)]},
                         {"prompt", prompt_hash(rows[k].context)},
                         {"target", letters->decode(rows[k].target)},
                         {"output", text_of(*letters, scores[k].predicted)},
                         {"letters", rows[k].target.size()},
                         {"letters_right", right},
                         {"correct", scores[k].greedy}});
    }
  });
  TaskSession::Table table{{"length", "samples", "string_accuracy", "character_accuracy"}, {}};
  double all_strings = 0, all_characters = 0;
  for (std::size_t l = 0; l < lengths.size(); ++l) {
    double strings = 0, characters = 0;
    for (int64_t i = 0; i < o.samples; ++i) {
      const auto& line = log.result(static_cast<int64_t>(l) * o.samples + i);
      strings += line.at("correct").get<bool>() ? 1 : 0;
      characters += line.at("letters_right").get<double>() / line.at("letters").get<double>();
    }
    const auto n = static_cast<double>(o.samples);
    all_strings += strings, all_characters += characters;
    table.rows.push_back({std::to_string(lengths[l]), std::to_string(o.samples), share_text(strings / n), share_text(characters / n)});
  }
  const auto n = static_cast<double>(std::ssize(lengths) * o.samples);
  session.finish("synthetic copying", table, {{"string_accuracy", all_strings / n}, {"character_accuracy", all_characters / n}});
  return 0;
}

}  // namespace

void add_eval_copy(CLI::App& eval, std::function<int()>& action) {
  auto* command = eval.add_subcommand("copy", "String and character accuracy of synthetic copying, by length");
  auto options = std::make_shared<CopyCommand>();
  options->session.batch = 128;
  add_task_options(*command, options->session);
  command->add_option("--variant", options->variant, "What is asked for")
      ->check(CLI::IsMember({"copy", "prefix-ngram", "suffix-ngram", "duplicate-ngram"}))
      ->type_name("CHOICE")
      ->capture_default_str();
  const auto count = [&](const char* name, int64_t& value, const char* meaning, int64_t least) {
    command->add_option(name, value, meaning)->type_name("N")->check(at_least(least))->capture_default_str();
  };
  count("--min-length", options->min_length, "Letters of the shortest words", 1);
  count("--max-length", options->max_length, "Letters of the longest words", 1);
  count("--every", options->every, "Step between lengths", 1);
  count("--samples", options->samples, "Words of each length", 1);
  count("--ngram", options->ngram, "Letters of the n-grams, of all variants but copy", 1);
  count("--answer-length", options->answer_length, "Letters of the answer (0: all)", 0);
  count("--seed", options->seed, "Of the words", 0);
  command->callback([=, &action] {
    const bool ngram_given = command->count("--ngram") > 0;
    action = [=] {
      if (ngram_given && options->variant == "copy")
        throw ConfigError("eval: copying whole words has no n-grams", {{"try", "--variant prefix-ngram, or leave --ngram out"}});
      return run(*options);
    };
  });
}

}  // namespace longhand
