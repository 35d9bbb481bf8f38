// The batches of a run, whatever its rows are made of: text or samples of a task.
#pragma once
#include <functional>
#include <memory>
#include <optional>

#include "data/dataset.h"
#include "train/recipe.h"

namespace longhand {

class Tokenizer;

/// What recipe.data.task says: rows of the documents of data.files (training_data), or samples of a task (data/tasks/task_batches.h).
/// errors  ConfigError for a task whose settings do not fit, or a cursor made with others
BatchStream training_batches(const Recipe& recipe, const std::shared_ptr<const Tokenizer>& tokenizer,
                             const std::optional<DataCursor>& resume_at = {});

/// Whether there is something to validate on: val_files, or a task.
bool has_validation(const Recipe& recipe);

/// One pass over the held-out text, rows in its order; or the same task without end: babilong with the stories that training leaves out,
/// the others with samples drawn from another seed. Batches have the rows of one micro-batch.
/// returns  what begins that stream, again at every call; what it needs is read once
std::function<BatchStream()> validation_source(const Recipe& recipe, const std::shared_ptr<const Tokenizer>& tokenizer);

}  // namespace longhand
