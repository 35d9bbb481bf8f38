// `longhand eval babilong`: accuracy by task and length.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <set>

#include "core/error.h"
#include "data/tasks/babilong.h"
#include "data/tasks/continuation.h"
#include "data/tasks/draws.h"
#include "data/tasks/task.h"
#include "eval/answer_metrics.h"
#include "eval/greedy_answers.h"
#include "tools/eval_command.h"
#include "tools/option_checks.h"
#include "tools/task_session.h"

namespace longhand {
namespace {

constexpr int64_t kAnswerTokens = 20;

struct BabilongCommand {
  TaskSessionOptions session;
  std::vector<std::string> babi, books, lengths{"0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k"};
  std::string prompts, book_set;
  int64_t samples = 100, seed = 0;
  double facts_from = 0, facts_to = 1;
};

// One bAbI file at one length.
struct Cell {
  std::string task;
  int64_t length;
  std::vector<BabiSample> stories;  // as many as samples
  std::vector<std::string> labels;
  BabilongPrompt around;
};

std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

std::vector<Cell> cells_of(const BabilongCommand& o) {
  const auto prompts = o.prompts.empty() ? std::map<std::string, BabilongPrompt>() : read_babilong_prompts(o.prompts);
  std::vector<int64_t> lengths;
  for (const std::string& length : o.lengths) lengths.push_back(parse_length(length));
  require_each_once("--lengths", lengths);
  std::vector<Cell> cells;
  for (const std::string& file : o.babi) {
    const std::string task = babi_task_of(file);
    if (std::any_of(cells.begin(), cells.end(), [&](const Cell& cell) { return cell.task == task; }))
      throw ConfigError("eval: two bAbI files of one task", {{"file", file}, {"task", task}, {"try", "one file of each task"}});
    if (!o.prompts.empty() && !prompts.contains(task))
      throw ConfigError("eval: the file of prompts has none for a task", {{"prompts", o.prompts}, {"task", task}});
    const std::vector<std::string> published = babilong_labels(task);
    std::set<std::string> labels(published.begin(), published.end());
    for (const BabiSample& story : read_babi(file))
      for (const std::string& part : babilong_parts(story.answer)) labels.insert(part);
    for (const std::string& label : labels)
      for (const std::string& other : labels)
        if (label != other && lower(other).find(lower(label)) != std::string::npos)
          fmt::print(stderr,
                     "{}: the label \"{}\" is part of \"{}\": an answer that holds the longer one counts as both, and so as wrong\n", task,
                     label, other);
    for (const int64_t length : lengths) {
      std::vector<BabiSample> stories = read_babi(file, most_babi_lines(length));
      if (std::ssize(stories) < o.samples)
        throw ConfigError("eval: the bAbI file has too few questions", {{"file", file},
                                                                        {"questions that fit", std::to_string(stories.size())},
                                                                        {"length", std::to_string(length)},
                                                                        {"samples", std::to_string(o.samples)}});
      // Questions that follow each other belong to one story: take them from all over the file.
      for (std::size_t i = 0, n = stories.size(), k = static_cast<std::size_t>(o.samples); i < k; ++i)
        if (i * n / k != i) stories[i] = stories[i * n / k];
      stories.resize(static_cast<std::size_t>(o.samples));
      cells.push_back({task, length, std::move(stories), {labels.begin(), labels.end()}, {}});
      if (!o.prompts.empty()) cells.back().around = prompts.at(task);
    }
  }
  return cells;
}

int run(const BabilongCommand& o) {
  const std::vector<Cell> cells = cells_of(o);
  const bool needs_books = std::any_of(cells.begin(), cells.end(), [](const Cell& cell) { return cell.length > 0; });
  if (needs_books && o.books.empty())
    throw ConfigError("eval: these lengths need a background", {{"try", "--books with shards that hold books, or --lengths 0k"}});
  if (!needs_books && (o.facts_from > 0 || o.facts_to < 1))
    throw ConfigError("eval: length 0 is the facts alone, and has no part for them to stand in",
                      {{"try", "leave --facts-from and --facts-to out, or add a length"}});
  if (!needs_books && !o.books.empty()) fmt::print(stderr, "the books are not read: length 0 is the facts alone\n");
  TaskSession session(o.session, "babilong");
  const Background background = needs_books ? Background(BackgroundOptions{.files = o.books, .set_name = o.book_set}) : Background();
  std::string tasks;
  std::vector<int32_t> all;  // of facts, questions and answers, for the settings
  const auto sample_text = [&](const Cell& cell, const BabiSample& story, int64_t i) {
    const std::string text =
        babilong_text(story, background, {.length = cell.length, .facts_from = o.facts_from, .facts_to = o.facts_to}, session.tokenizer(),
                      sample_key(static_cast<uint64_t>(o.seed), "babilong", static_cast<uint64_t>(i)));
    return encoded(session.tokenizer(), babilong_prompt(cell.around, text, story.question));
  };
  nlohmann::ordered_json first_prompts = nlohmann::ordered_json::array(), labels;
  for (std::size_t c = 0; c < cells.size(); ++c) {
    const Cell& cell = cells[c];
    if (c == 0 || cells[c - 1].task != cell.task) tasks += (tasks.empty() ? "" : "+") + cell.task;
    for (const BabiSample& story : cell.stories) {
      for (const std::string& fact : story.facts) session.tokenizer().encode(fact + "\n", all);
      session.tokenizer().encode(story.question + "\t" + story.answer + "\n", all);
    }
    labels[cell.task] = cell.labels;
    first_prompts.push_back(prompt_hash(sample_text(cell, cell.stories.front(), static_cast<int64_t>(c) * o.samples)));
  }
  const std::string tag = fmt::format("{}-{}-{}{}-n{}-seed-{}", tasks, o.lengths.front(), o.lengths.back(),
                                      o.prompts.empty() ? "" : "-few-shot", o.samples, o.seed);
  nlohmann::ordered_json prompts = nlohmann::ordered_json::array();
  for (const Cell& cell : cells) prompts.push_back(cell.around.instruction + cell.around.examples + cell.around.post_prompt);
  SampleLog& log = session.open_log(tag,
                                    {{"tasks", tasks},
                                     {"lengths", o.lengths},
                                     {"samples_per_length", o.samples},
                                     {"books", background.fingerprint()},
                                     {"book_set", o.book_set},
                                     {"facts_from", o.facts_from},
                                     {"facts_to", o.facts_to},
                                     {"seed", o.seed},
                                     {"questions", prompt_hash(all)},
                                     {"labels", labels},
                                     {"first_prompts", first_prompts},
                                     {"prompts", prompt_hash(encoded(session.tokenizer(), prompts.dump()))}},
                                    std::ssize(cells) * o.samples);
  const auto cell_of = [&](int64_t i) -> const Cell& { return cells[static_cast<std::size_t>(i / o.samples)]; };
  const auto story_of = [&](int64_t i) -> const BabiSample& { return cell_of(i).stories[static_cast<std::size_t>(i % o.samples)]; };
  session.each_batch([&](const std::vector<int64_t>& batch) {
    std::vector<std::vector<int32_t>> read;
    for (const int64_t i : batch) {
      read.push_back(sample_text(cell_of(i), story_of(i), i));
    }
    const auto answers = greedy_answers(session.model(), read, session.tokenizer(),
                                        {.max_tokens = kAnswerTokens, .chunk = session.chunk(), .progress = session.progress()});
    for (std::size_t k = 0; k < batch.size(); ++k) {
      const Cell& cell = cell_of(batch[k]);
      const BabiSample& story = story_of(batch[k]);
      log.add(batch[k], {{"task", cell.task},
                         {"length", cell.length},
                         {"tokens", read[k].size()},
                         {"prompt", prompt_hash(read[k])},
                         {"question", story.question},
                         {"target", story.answer},
                         {"output", answers[k]},
                         {"correct", babilong_correct(answers[k], story.question, story.answer, cell.labels)}});
    }
  });
  TaskSession::Table table{{"task", "length", "samples", "accuracy"}, {}};
  double all_correct = 0;
  for (std::size_t c = 0; c < cells.size(); ++c) {
    double correct = 0;
    for (int64_t i = 0; i < o.samples; ++i)
      correct += log.result(static_cast<int64_t>(c) * o.samples + i).at("correct").get<bool>() ? 1 : 0;
    all_correct += correct;
    table.rows.push_back(
        {cells[c].task, std::to_string(cells[c].length), std::to_string(o.samples), share_text(correct / static_cast<double>(o.samples))});
  }
  session.finish("babilong", table,
                 {{"babi_files", o.babi},
                  {"book_files", o.books},
                  {"prompts_file", o.prompts},
                  {"accuracy", all_correct / static_cast<double>(std::ssize(cells) * o.samples)}});
  return 0;
}

}  // namespace

void add_eval_babilong(CLI::App& eval, std::function<int()>& action) {
  auto* command = eval.add_subcommand("babilong", "Questions about facts scattered over pages of a book, by task and length");
  auto options = std::make_shared<BabilongCommand>();
  options->session.batch = 8;
  add_task_options(*command, options->session);
  command->add_option("--babi", options->babi, "bAbI files, named qaN_..., plain or .zst")->required()->type_name("FILE");
  auto* books = command->add_option("--books", options->books, "Shards whose long documents are the background (not needed for length 0k)")
                    ->type_name("FILE");
  command->add_option("--book-set", options->book_set, "Only documents of this meta.pile_set_name")->type_name("NAME")->needs(books);
  command->add_option("--lengths", options->lengths, "Lengths in tokens, such as 0k,16k,1M; k is 1000")
      ->delimiter(',')
      ->type_name("LIST")
      ->capture_default_str();
  command->add_option("--samples", options->samples, "Questions of each task and length, evenly from all over the file")
      ->type_name("N")
      ->check(at_least(1))
      ->capture_default_str();
  command
      ->add_option("--prompts", options->prompts,
                   "Instructions and examples by task, as data/tasks/babilong_prompts.json has them (default: none)")
      ->type_name("FILE.json");
  command->add_option("--facts-from", options->facts_from, "Share of the text from which on facts may stand")
      ->check(CLI::Range(0.0, 1.0))
      ->type_name("X")
      ->capture_default_str();
  command->add_option("--facts-to", options->facts_to, "Share of the text up to which facts may stand")
      ->check(CLI::Range(0.0, 1.0))
      ->type_name("X")
      ->capture_default_str();
  command->add_option("--seed", options->seed, "Of backgrounds and places")->type_name("N")->check(at_least(0))->capture_default_str();
  command->callback([=, &action] { action = [=] { return run(*options); }; });
}

}  // namespace longhand
