// Batches made of samples of a task, for training: the same Batch as for text, with a mask that counts answers only.
#pragma once
#include <optional>

#include "data/batcher.h"
#include "data/dataset.h"
#include "data/tasks/task.h"

namespace longhand {

struct TaskBatchOptions {
  Arrangement arrangement = Arrangement::packed;
  int64_t rows = 1;    // B
  int64_t length = 1;  // T
  uint64_t seed = 0;
  int threads = 1;  // that make samples; 0: no background thread
};

/// An endless stream of batches.
///   packed   row r of the run is samples (r, 0), (r, 1) ... one behind the other, T + 1 tokens; the last is cut, and nothing of it counts
///   streams  row b is samples (b, 0), (b, 1) ... without end; batch k reads tokens [k T, k T + T), and samples go on from batch to batch
///   mask     1 where the target is a token of an answer
/// holds    the batches depend on options, seed and task alone, not on threads; a stream opened at a batch's cursor_after goes on with the
///          next batch of the first one; in the packed arrangement also with another number of rows
/// errors   ConfigError if `resume_at` was made with other settings
BatchStream task_batches(const TaskBatchOptions& options, std::shared_ptr<const Task> task,
                         const std::optional<DataCursor>& resume_at = {});
/// The same of make_task(name, context).
BatchStream task_batches(const TaskBatchOptions& options, const std::string& name, const TaskContext& context,
                         const std::optional<DataCursor>& resume_at = {});

}  // namespace longhand
