// `longhand eval choices`: multiple choice by likelihood, on the user's own questions.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "core/files.h"
#include "core/strict_json.h"
#include "data/tasks/continuation.h"
#include "eval/continuation_score.h"
#include "tools/eval_command.h"
#include "tools/option_checks.h"
#include "tools/task_session.h"

namespace longhand {
namespace {

struct ChoicesCommand {
  TaskSessionOptions session;
  std::string data, delimiter = " ";
  int64_t samples = 0;
};

struct Question {
  std::vector<ScoredRow> rows;     // a choice each
  std::vector<double> characters;  // of each choice, without what stands before it
  std::optional<int64_t> label;
};

double characters_of(const std::string& text) {
  return static_cast<double>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

Question read_question(std::string_view line, int64_t number, const ChoicesCommand& o, const Tokenizer& tokenizer) {
  const auto refuse = [&](const char* reason) {
    throw FileError("eval: a line that is no question", {{"file", o.data},
                                                         {"line", std::to_string(number)},
                                                         {"reason", reason},
                                                         {"expected", R"({"context": "...", "choices": ["...", ...], "label": 0})"}});
  };
  const auto json = parse_strict_json(line, "eval: line " + std::to_string(number), o.data);
  const auto context = json.find("context"), choices = json.find("choices"), label = json.find("label");
  if (context == json.end() || !context->is_string()) refuse("context is no text");
  if (choices == json.end() || !choices->is_array() || choices->empty()) refuse("choices is no list of texts");
  Question question;
  for (const auto& choice : *choices) {
    if (!choice.is_string() || choice.get<std::string>().empty()) refuse("choices is no list of texts");
    const std::string text = choice.get<std::string>(), before = context->get<std::string>();
    Continuation c = encode_continuation(tokenizer, before, (before.empty() ? "" : o.delimiter) + text);
    if (c.context.empty()) c.context = {tokenizer.end_of_text()};
    if (c.target.empty()) refuse("a choice without tokens");
    question.rows.push_back({std::move(c.context), std::move(c.target)});
    question.characters.push_back(characters_of(text));
  }
  if (label == json.end()) return question;
  if (!label->is_number_integer() || label->get<int64_t>() < 0 || label->get<int64_t>() >= std::ssize(*choices))
    refuse("label is not the number of a choice, from 0");
  question.label = label->get<int64_t>();
  return question;
}

std::vector<Question> read_questions(const ChoicesCommand& o, const Tokenizer& tokenizer) {
  const std::string text = read_text_file(o.data);
  std::vector<Question> questions;
  int64_t number = 0;
  for (std::string_view rest = text; !rest.empty() && (o.samples == 0 || std::ssize(questions) < o.samples);) {
    const auto end = std::min(rest.find('\n'), rest.size());
    ++number;
    if (rest.substr(0, end).find_first_not_of(" \t\r") != std::string_view::npos)
      questions.push_back(read_question(rest.substr(0, end), number, o, tokenizer));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  if (questions.empty()) throw FileError("eval: a file without questions", {{"file", o.data}});
  return questions;
}

template <class Values>
int64_t best(const Values& values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

int run(const ChoicesCommand& o) {
  TaskSession session(o.session, "choices");
  const std::vector<Question> questions = read_questions(o, session.tokenizer());
  std::vector<int32_t> all;
  for (const Question& question : questions) {
    for (std::size_t c = 0; c < question.rows.size(); ++c) {
      const ScoredRow& row = question.rows[c];
      all.insert(all.end(), row.context.begin(), row.context.end());
      all.push_back(-2);  // where the choice begins; behind it, its characters
      all.insert(all.end(), row.target.begin(), row.target.end());
      all.push_back(-3 - static_cast<int32_t>(question.characters[c]));
    }
    all.push_back(static_cast<int32_t>(question.label.value_or(-1)));
  }
  const std::string stem = folder_name(o.data).substr(0, folder_name(o.data).find('.'));
  SampleLog& log = session.open_log(stem, {{"data", prompt_hash(all)}}, std::ssize(questions));
  std::vector<int64_t> order(questions.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto question_of = [&](int64_t i) -> const Question& { return questions[static_cast<std::size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return question_of(a).rows.front().context.size() < question_of(b).rows.front().context.size();
  });
  session.each_batch(order, [&](const std::vector<int64_t>& batch) {
    std::vector<ScoredRow> rows;
    for (const int64_t i : batch) rows.insert(rows.end(), question_of(i).rows.begin(), question_of(i).rows.end());
    std::vector<ContinuationScore> scores;
    for (std::size_t from = 0; from < rows.size(); from += static_cast<std::size_t>(session.batch())) {
      const auto to = std::min(rows.size(), from + static_cast<std::size_t>(session.batch()));
      const std::vector<ScoredRow> part(rows.begin() + static_cast<std::ptrdiff_t>(from), rows.begin() + static_cast<std::ptrdiff_t>(to));
      for (auto& score : score_continuations(session.model(), part, {.chunk = session.chunk(), .progress = session.progress()}))
        scores.push_back(std::move(score));
    }
    auto score = scores.begin();
    for (const int64_t i : batch) {
      const Question& question = question_of(i);
      std::vector<double> sums, per_character, per_token;
      std::vector<bool> greedy;
      for (std::size_t c = 0; c < question.rows.size(); ++c, ++score) {
        sums.push_back(score->log_likelihood);
        per_character.push_back(score->log_likelihood / question.characters[c]);
        per_token.push_back(score->log_likelihood / static_cast<double>(question.rows[c].target.size()));
        greedy.push_back(score->greedy);
      }
      nlohmann::ordered_json line{{"prompt", prompt_hash(question.rows.front().context)},
                                  {"log_likelihood", sums},
                                  {"per_character", per_character},
                                  {"per_token", per_token},
                                  {"greedy", greedy},
                                  {"output", best(sums)}};
      if (question.label)
        line.update({{"target", *question.label},
                     {"correct", best(sums) == *question.label},
                     {"correct_per_character", best(per_character) == *question.label},
                     {"correct_per_token", best(per_token) == *question.label}});
      log.add(i, line);
    }
  });
  double labelled = 0, sum = 0, per_character = 0, per_token = 0, greedy = 0;
  for (int64_t i = 0; i < std::ssize(questions); ++i) {
    const auto& line = log.result(i);
    if (!line.contains("target")) continue;
    const auto one = [&](const char* key) { return line.at(key).get<bool>() ? 1.0 : 0.0; };
    labelled += 1, sum += one("correct"), per_character += one("correct_per_character"), per_token += one("correct_per_token");
    greedy += line.at("greedy").at(line.at("target").get<std::size_t>()).get<bool>() ? 1 : 0;
  }
  const auto share = [&](double n) { return labelled > 0 ? share_text(n / labelled) : std::string("nan"); };
  session.finish("choices",
                 {{"questions", "labelled", "accuracy", "accuracy_per_character", "accuracy_per_token", "greedy"},
                  {{std::to_string(questions.size()), fmt::format("{}", labelled), share(sum), share(per_character), share(per_token),
                    share(greedy)}}},
                 {{"data_file", o.data}, {"delimiter", o.delimiter}});
  return 0;
}

}  // namespace

void add_eval_choices(CLI::App& eval, std::function<int()>& action) {
  auto* command = eval.add_subcommand("choices", "Multiple choice by likelihood, on questions in a file of JSON lines");
  auto options = std::make_shared<ChoicesCommand>();
  add_task_options(*command, options->session);
  command
      ->add_option("--data", options->data,
                   R"(Questions: {"context": "...", "choices": ["...", ...], "label": 0} a line; label may be absent)")
      ->required()
      ->type_name("FILE.jsonl");
  command->add_option("--delimiter", options->delimiter, "What stands between a context and a choice (default: a blank)")
      ->type_name("TEXT");
  command->add_option("--samples", options->samples, "Only the first so many questions (0: all)")
      ->type_name("N")
      ->check(at_least(0))
      ->capture_default_str();
  command->callback([=, &action] { action = [=] { return run(*options); }; });
}

}  // namespace longhand
