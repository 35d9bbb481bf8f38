// The table of tasks; see task.h.
#include "data/tasks/task.h"

#include <charconv>

#include "core/error.h"
#include "core/nearest.h"

namespace longhand {

std::unique_ptr<Task> make_copy_task(const TaskContext&);
std::unique_ptr<Task> make_passkey_task(const TaskContext&);
std::unique_ptr<Task> make_babilong_task(const TaskContext&);

namespace {

constexpr TaskKind kTasks[] = {
    {"copy", "strings of random letters are written again (data.tokenizer is letters:N)",
     " min_length max_length variant ngram answer_length ", false, &make_copy_task},
    {"passkey", "a number in a repetitive text is asked for at its end", " min_length max_length digits ", false, &make_passkey_task},
    {"babilong", "questions about facts scattered over pages of a book (data.files are the books)", " babi lengths book_set ", true,
     &make_babilong_task},
};

}  // namespace

Task::~Task() = default;

std::span<const TaskKind> task_kinds() {
  return kTasks;
}

std::unique_ptr<Task> make_task(const std::string& name, const TaskContext& context) {
  std::vector<std::string> names;
  for (const TaskKind& kind : kTasks) {
    if (kind.name == name) return kind.make(context);
    names.emplace_back(kind.name);
  }
  throw ConfigError("task: unknown task", {{"given", name}, {"nearest", nearest_name(name, names)}});
}

int64_t parse_length(const std::string& text, int64_t k) {
  int64_t number = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  const std::string unit(stop, end);
  const int64_t factor = unit.empty() ? 1 : unit == "k" ? k : unit == "M" ? k * k : 0;
  if (error != std::errc() || factor == 0 || number < 0 || number > int64_t{1'000'000'000'000} / factor)
    throw ConfigError("task: a length that is not understood", {{"given", text}, {"expected", "a number such as 0k, 16k, 1M or 512"}});
  return number * factor;
}

}  // namespace longhand
