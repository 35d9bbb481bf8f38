// A thread that prepares batches ahead of the caller; see dataset.h.
#include "data/dataset.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <thread>

namespace longhand {
namespace {

constexpr std::size_t kBatchesAhead = 4;

SourceOptions source_options(const DataOptions& options, BadLines* bad_lines) {
  SourceOptions out;
  out.files = options.files;
  out.seed = options.seed;
  out.shuffle_parts = options.shuffle;
  out.epochs = options.epochs;
  out.threads = options.threads;
  out.skip_bad_lines = options.skip_bad_lines ? bad_lines : nullptr;
  return out;
}

BatcherOptions batcher_options(const DataOptions& options) {
  BatcherOptions out;
  out.arrangement = arrangement_from(options.arrangement);
  out.stream_unit = stream_unit_from(options.stream_unit);
  out.rows = options.rows;
  out.length = options.length;
  out.seed = options.seed;
  out.shuffle = options.shuffle;
  out.shuffle_rows = options.shuffle_rows;
  out.tail = options.pad_tail ? Tail::pad : Tail::drop;
  return out;
}

// What decides the batches. A packed run may go on with another number of rows: its rows come in the same order.
std::vector<std::pair<std::string, std::string>> made_with(const DataOptions& options, const DocumentSource& source) {
  auto yes_no = [](bool value) { return std::string(value ? "yes" : "no"); };
  std::vector<std::pair<std::string, std::string>> out{{"arrangement", options.arrangement},
                                                       {"length", std::to_string(options.length)},
                                                       {"seed", std::to_string(options.seed)},
                                                       {"shuffle", yes_no(options.shuffle)}};
  if (options.arrangement == "packed") {
    out.emplace_back("shuffle_rows", std::to_string(options.shuffle_rows));
    out.emplace_back("pad_tail", yes_no(options.pad_tail));
  } else {
    out.emplace_back("rows", std::to_string(options.rows));
    out.emplace_back("stream_unit", options.stream_unit);
  }
  out.emplace_back("tokenizer", source.tokenizer_fingerprint());
  out.emplace_back("files", source.parts_signature());
  return out;
}

}  // namespace

struct BatchStream::State {
  BadLines bad_lines;
  DataCursor cursor;
  std::unique_ptr<Batcher> batcher;
  std::exception_ptr failure;  // stays once thrown

  std::mutex mutex;
  std::condition_variable room, ready;
  std::deque<Batch> batches;
  bool done = false, stop = false;
  std::exception_ptr background_failure;
  std::thread thread;

  State(const DataOptions& options, std::shared_ptr<const Tokenizer> tokenizer, const std::optional<DataCursor>& resume_at) {
    const BatcherOptions shape = batcher_options(options);
    if (resume_at) cursor = *resume_at;
    DocumentSource source(source_options(options, &bad_lines), std::move(tokenizer), start_of(cursor));
    auto settings = made_with(options, source);
    if (resume_at) require_made_with(*resume_at, settings);
    cursor.made_with = std::move(settings);
    batcher = make_batcher(shape, std::move(source), cursor);
    if (options.threads > 0) thread = std::thread([this] { prepare(); });
  }

  State(std::unique_ptr<Batcher> batches_of, const DataCursor& start, bool in_background) : cursor(start), batcher(std::move(batches_of)) {
    if (in_background) thread = std::thread([this] { prepare(); });
  }

  ~State() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
    }
    room.notify_all();
    if (thread.joinable()) thread.join();
  }

  void prepare() {
    while (true) {
      Batch batch;
      bool more = false;
      std::exception_ptr error;
      try {
        more = batcher->next(batch);
      } catch (...) {
        error = std::current_exception();
      }
      std::unique_lock lock(mutex);
      room.wait(lock, [&] { return stop || batches.size() < kBatchesAhead; });
      if (stop) return;
      if (more) batches.push_back(std::move(batch));
      done = !more;
      background_failure = error;
      ready.notify_one();
      if (done) return;
    }
  }

  bool take(Batch& batch) {
    if (!thread.joinable()) return batcher->next(batch);
    {
      std::unique_lock lock(mutex);
      ready.wait(lock, [&] { return !batches.empty() || done; });
      if (batches.empty()) {
        if (background_failure) std::rethrow_exception(background_failure);
        return false;
      }
      batch = std::move(batches.front());
      batches.pop_front();
    }
    room.notify_one();
    return true;
  }

  bool next(Batch& batch) {
    if (failure) std::rethrow_exception(failure);
    try {
      if (!take(batch)) return false;
    } catch (...) {
      failure = std::current_exception();
      throw;
    }
    cursor = batch.cursor_after;
    return true;
  }
};

BatchStream::BatchStream(const DataOptions& options, std::shared_ptr<const Tokenizer> tokenizer, const std::optional<DataCursor>& resume_at)
    : state_(std::make_unique<State>(options, std::move(tokenizer), resume_at)) {}
BatchStream::BatchStream(std::unique_ptr<Batcher> batcher, const DataCursor& start, bool in_background)
    : state_(std::make_unique<State>(std::move(batcher), start, in_background)) {}
BatchStream::~BatchStream() = default;
BatchStream::BatchStream(BatchStream&&) noexcept = default;
BatchStream& BatchStream::operator=(BatchStream&&) noexcept = default;

bool BatchStream::next(Batch& batch) {
  return state_->next(batch);
}
const DataCursor& BatchStream::cursor() const {
  return state_->cursor;
}
const BadLines& BatchStream::bad_lines() const {
  return state_->bad_lines;
}

namespace {

SourceOptions source_options(const DocumentTokens::Options& options, BadLines* bad_lines) {
  SourceOptions out;
  out.files = options.files;
  out.threads = options.threads;
  out.skip_bad_lines = options.skip_bad_lines ? bad_lines : nullptr;
  return out;
}

}  // namespace

DocumentTokens::DocumentTokens(const Options& options, std::shared_ptr<const Tokenizer> tokenizer)
    : options_(options),
      bad_lines_(std::make_unique<BadLines>()),
      source_(source_options(options, bad_lines_.get()), std::move(tokenizer)) {}

bool DocumentTokens::next(TokenDocument& document) {
  if (options_.most_documents > 0 && handed_out_ == options_.most_documents) return false;
  while (source_.next(document)) {
    if (static_cast<int64_t>(document.tokens.size()) < options_.min_tokens) continue;
    ++handed_out_;
    return true;
  }
  return false;
}

}  // namespace longhand
