// See task_batches.h.
#include "data/tasks/task_batches.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

#include "core/error.h"
#include "data/tasks/draws.h"

namespace longhand {
namespace {

std::size_t index(int64_t i) {
  return static_cast<std::size_t>(i);
}

// A place among the samples of a row: sample `number`, token `token` of it.
struct Place {
  int64_t number = 0, token = 0;
};

class TaskBatcher : public Batcher {
 public:
  TaskBatcher(const TaskBatchOptions& options, std::shared_ptr<const Task> task, const DataCursor& cursor)
      : options_(options), task_(std::move(task)), cursor_(cursor) {
    if (!streams()) return;
    if (cursor_.streams.empty()) cursor_.streams.resize(index(options_.rows));
    if (cursor_.streams.size() != index(options_.rows))
      throw FileError("task: the cursor has another number of streams than the batch has rows",
                      {{"cursor", std::to_string(cursor_.streams.size())}, {"rows", std::to_string(options_.rows)}});
  }

  bool next(Batch& batch) override {
    const int64_t B = options_.rows, T = options_.length;
    batch.rows = B, batch.length = T;
    batch.tokens.assign(index(B * T), 0);
    batch.targets.assign(index(B * T), 0);
    batch.mask.assign(index(B * T), 0);
    batch.resets.assign(index(B), streams() && cursor_.batches > 0 ? 0 : 1);
    batch.row_ids.resize(index(B));
    for (int64_t b = 0; b < B; ++b) batch.row_ids[index(b)] = cursor_.first_row + b;
    fill_rows(batch);
    ++cursor_.batches;
    cursor_.first_row += B;
    batch.cursor_after = cursor_;
    return true;
  }

 private:
  bool streams() const { return options_.arrangement == Arrangement::streams; }

  void fill_rows(Batch& batch) {
    const auto threads = std::min<int64_t>(options_.threads, options_.rows);
    if (threads <= 1) {
      for (int64_t b = 0; b < options_.rows; ++b) fill_row(batch, b);
      return;
    }
    std::atomic<int64_t> next_row = 0;
    std::vector<std::exception_ptr> failures(index(threads));
    std::vector<std::thread> workers;
    for (int64_t i = 0; i < threads; ++i)
      workers.emplace_back([&, i] {
        try {
          for (int64_t b = next_row++; b < options_.rows; b = next_row++) fill_row(batch, b);
        } catch (...) {
          failures[index(i)] = std::current_exception();
        }
      });
    for (std::thread& worker : workers) worker.join();
    for (const std::exception_ptr& failure : failures)
      if (failure) std::rethrow_exception(failure);
  }

  void fill_row(Batch& batch, int64_t b) {
    Place place;
    if (streams()) place = {cursor_.streams[index(b)].at.line, cursor_.streams[index(b)].at.token};
    const uint64_t row = static_cast<uint64_t>(streams() ? b : batch.row_ids[index(b)]);
    const uint64_t row_key = sample_key(options_.seed, "task", row);
    // Token i of the row is tokens[i] and targets[i - 1]; the last one is a target only, and the first of the next row of a stream.
    const int64_t T = options_.length, first = b * T;
    for (int64_t i = 0; i <= T;) {
      const TaskSample sample = task_->sample(philox_key(row_key, static_cast<uint64_t>(place.number)));
      const int64_t size = std::ssize(sample.tokens);
      if (place.token >= size && place.token > 0)
        throw FileError(
            "task: a sample that the cursor names is shorter now",
            {{"sample", std::to_string(place.number)}, {"tokens", std::to_string(size)}, {"token", std::to_string(place.token)}});
      const int64_t taken = std::min(size - place.token, T + 1 - i);
      const bool cut = place.token + taken < size, counts = streams() || !cut;
      for (int64_t j = place.token; j < place.token + taken; ++j, ++i) {
        if (i < T) batch.tokens[index(first + i)] = sample.tokens[index(j)];
        if (i == 0) continue;
        batch.targets[index(first + i - 1)] = sample.tokens[index(j)];
        batch.mask[index(first + i - 1)] = counts && j >= sample.prompt ? 1 : 0;
      }
      place = i > T ? Place{place.number, place.token + taken - 1} : Place{place.number + 1, 0};
    }
    if (streams()) {
      StreamPosition& at = cursor_.streams[index(b)];
      at.started = at.in_document = true;
      at.at.line = place.number, at.at.token = place.token;
    }
  }

  TaskBatchOptions options_;
  std::shared_ptr<const Task> task_;
  DataCursor cursor_;
};

}  // namespace

BatchStream task_batches(const TaskBatchOptions& options, const std::string& name, const TaskContext& context,
                         const std::optional<DataCursor>& resume_at) {
  return task_batches(options, std::shared_ptr<const Task>(make_task(name, context)), resume_at);
}

BatchStream task_batches(const TaskBatchOptions& options, std::shared_ptr<const Task> task, const std::optional<DataCursor>& resume_at) {
  std::vector<std::pair<std::string, std::string>> settings{
      {"arrangement", options.arrangement == Arrangement::streams ? "streams" : "packed"},
      {"length", std::to_string(options.length)},
      {"seed", std::to_string(options.seed)}};
  if (options.arrangement == Arrangement::streams) settings.emplace_back("rows", std::to_string(options.rows));
  for (const auto& setting : task->made_with()) settings.push_back(setting);
  DataCursor cursor;
  if (resume_at) {
    require_made_with(*resume_at, settings);
    cursor = *resume_at;
  }
  cursor.made_with = std::move(settings);
  auto batcher = std::make_unique<TaskBatcher>(options, std::move(task), cursor);
  return BatchStream(std::move(batcher), cursor, options.threads > 0);
}

}  // namespace longhand
