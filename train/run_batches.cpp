// See run_batches.h.
#include "train/run_batches.h"

#include "core/philox.h"
#include "data/tasks/task_batches.h"
#include "train/training_loop.h"

namespace longhand {
namespace {

bool is_text(const Recipe& recipe) {
  return recipe.data.task == kTextRows;
}

TaskContext context_of(const Recipe& recipe, const std::shared_ptr<const Tokenizer>& tokenizer) {
  return {.options = recipe.task, .tokenizer = tokenizer, .files = recipe.data.files, .row_tokens = recipe.train.length + 1};
}

}  // namespace

BatchStream training_batches(const Recipe& recipe, const std::shared_ptr<const Tokenizer>& tokenizer,
                             const std::optional<DataCursor>& resume_at) {
  if (is_text(recipe)) return BatchStream(training_data(recipe), tokenizer, resume_at);
  const TaskBatchOptions options{.arrangement = arrangement_from(recipe.data.arrangement),
                                 .rows = recipe.train.batch_size,
                                 .length = recipe.train.length,
                                 .seed = static_cast<uint64_t>(recipe.seed),
                                 .threads = static_cast<int>(recipe.data.threads)};
  return task_batches(options, recipe.data.task, context_of(recipe, tokenizer), resume_at);
}

bool has_validation(const Recipe& recipe) {
  return !is_text(recipe) || !recipe.data.val_files.empty();
}

std::function<BatchStream()> validation_source(const Recipe& recipe, const std::shared_ptr<const Tokenizer>& tokenizer) {
  const int64_t rows = recipe.train.batch_size / recipe.train.grad_accumulation;
  if (!is_text(recipe)) {
    const TaskBatchOptions options{.rows = rows,
                                   .length = recipe.train.length,
                                   .seed = philox_key(static_cast<uint64_t>(recipe.seed), hash_name("validation")),
                                   .threads = static_cast<int>(recipe.data.threads)};
    TaskContext context = context_of(recipe, tokenizer);
    context.held_out = true;
    const std::shared_ptr<const Task> task = make_task(recipe.data.task, context);
    return [=] { return task_batches(options, task); };
  }
  DataOptions options;
  options.files = recipe.data.val_files;
  options.tokenizer = recipe.data.tokenizer;
  options.rows = rows;
  options.length = recipe.train.length;
  options.shuffle = false;
  options.pad_tail = true;
  options.epochs = 1;
  options.threads = static_cast<int>(recipe.data.threads);
  options.skip_bad_lines = recipe.data.skip_bad_lines;
  return [=] { return BatchStream(options, tokenizer); };
}

}  // namespace longhand
