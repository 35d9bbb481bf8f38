// A reading thread, tokenising threads and an ordered queue between them and the caller; see document_source.h.
#include "data/document_source.h"

#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "core/error.h"
#include "data/shuffle.h"
#include "data/token_cache.h"
#include "data/tokenizer.h"

namespace longhand {
namespace {

constexpr std::size_t kMostJobs = 16384;  // bounds the bookkeeping when documents are tiny

struct Part {
  std::shared_ptr<const TokenCache> cache;  // null for a shard file
  std::size_t shard = 0;                    // which of the cache's shards
};

struct Parts {
  std::vector<DataPart> list;  // what callers see
  std::vector<Part> parts;
  std::string fingerprint;  // of the tokenizer
};

Parts open_parts(const std::vector<std::string>& files, const Tokenizer* tokenizer) {
  Parts out;
  if (tokenizer) out.fingerprint = tokenizer->fingerprint();
  for (const std::string& path : expand_shards(files)) {
    if (!TokenCache::is_cache(path)) {
      if (!tokenizer)
        throw ConfigError("data: a shard needs a tokenizer", {{"file", path}, {"try", "name the tokenizer, or give token caches only"}});
      std::error_code error;
      const auto bytes = std::filesystem::file_size(path, error);
      out.list.push_back({std::filesystem::path(path).filename().string(), error ? 0 : static_cast<int64_t>(bytes), path});
      out.parts.push_back({});
      continue;
    }
    const auto cache = std::make_shared<const TokenCache>(path);
    if (out.fingerprint.empty()) out.fingerprint = cache->fingerprint();
    if (cache->fingerprint() != out.fingerprint)
      throw ConfigError("data: the token cache was made with another tokenizer",
                        {{"cache", path},
                         {"tokenizer", cache->tokenizer_name() + " " + cache->fingerprint()},
                         {"expected", (tokenizer ? tokenizer->name() + " " : "") + out.fingerprint},
                         {"try", "write the cache again with `longhand tokenize`, or name its tokenizer"}});
    for (std::size_t shard = 0; shard < cache->shards().size(); ++shard) {
      out.list.push_back({cache->shards()[shard].name, cache->shards()[shard].bytes, path});
      out.parts.push_back({cache, shard});
    }
  }
  if (out.parts.empty()) throw ConfigError("data: no files were given", {{"try", "name shards, token caches or folders of them"}});
  return out;
}

// A document on its way: read, then tokenised (at once when it comes from a cache).
struct Job {
  Document document;
  TokenDocument result;
  bool tokenised = false;
  int64_t bytes = 0;         // counted against ahead_bytes
  std::exception_ptr error;  // thrown when the job's turn comes
};

void tokenise(Job& job, const Tokenizer& tokenizer) {
  job.result.text_bytes = static_cast<int64_t>(job.document.text.size());
  job.result.set_name.swap(job.document.set_name);
  job.result.tokens.clear();
  tokenizer.encode(job.document.text, job.result.tokens);
  job.result.tokens.push_back(tokenizer.end_of_text());
  job.document.text = {};
  job.tokenised = true;
}

// The documents of one part from a line on.
class PartReader {
 public:
  PartReader(const Parts& parts, int64_t index, int64_t from_line, const ShardOptions& options)
      : part_(parts.parts[at(index)]), index_(index) {
    if (!part_.cache) {
      require_size(parts.list[at(index)]);
      reader_.emplace(parts.list[at(index)].path, options);
      skip_to(from_line);
      return;
    }
    const CachedShard& shard = part_.cache->shards()[part_.shard];
    document_ = shard.first_document;
    end_ = shard.first_document + shard.documents;
    skip_to(from_line);
  }

  // Goes on with the first document at or behind `line`.
  void skip_to(int64_t line) {
    if (reader_) return reader_->skip_to_line(line);
    int64_t end = end_;
    while (document_ < end) {
      const int64_t middle = document_ + (end - document_) / 2;
      if (part_.cache->line_of(middle) < line) document_ = middle + 1;
      else end = middle;
    }
  }

  bool next(Job& job) {
    if (reader_) {
      if (!reader_->next(job.document)) return false;
      job.result.at.line = job.document.line;
      job.bytes = static_cast<int64_t>(job.document.text.size());
    } else {
      if (document_ == end_) return false;
      part_.cache->read(document_++, job.result);
      job.tokenised = true;
      job.bytes = static_cast<int64_t>(job.result.tokens.size() * sizeof(int32_t));
    }
    job.result.at.part = index_;
    return true;
  }

 private:
  static std::size_t at(int64_t index) { return static_cast<std::size_t>(index); }
  // A shard is read again in every epoch; one that is gone is the reader's to name.
  static void require_size(const DataPart& part) {
    std::error_code gone;
    const auto bytes = static_cast<int64_t>(std::filesystem::file_size(part.path, gone));
    if (!gone && bytes != part.bytes)
      throw FileError("data: a shard changed since it was first opened",
                      {{"file", part.path},
                       {"bytes", std::to_string(bytes)},
                       {"expected", std::to_string(part.bytes)},
                       {"try", "put the file back as it was; write new data under another name"}});
  }

  Part part_;
  int64_t index_;
  std::optional<ShardReader> reader_;
  int64_t document_ = 0, end_ = 0;
};

// Walks through epochs and parts in order.
class Walker {
 public:
  Walker(const Parts& parts, const SourceOptions& options, DocumentPosition start)
      : parts_(parts), options_(options), start_(start), epoch_(start.epoch) {
    shard_options_.skip_bad_lines = options.skip_bad_lines;
    order_ = epoch_order();
  }

  bool next(Job& job) {
    if (std::exchange(at_start_, false) && start_.part >= 0) enter_part_way();
    while (options_.epochs == 0 || epoch_ < options_.epochs) {
      if (place_ == order_.size()) {
        if (options_.epochs == 0 && found_ == 0 && !in_part_way_)
          throw FileError("data: there is no document in the files",
                          {{"files", std::to_string(order_.size())}, {"first", parts_.list[0].path}});
        ++epoch_;
        place_ = 0;
        found_ = 0;
        in_part_way_ = false;
        order_ = epoch_order();
        continue;
      }
      if (!reader_) reader_.emplace(parts_, order_[place_], std::exchange(first_line_, 0), shard_options_);
      if (reader_->next(job)) {
        job.result.at.epoch = epoch_;
        ++found_;
        return true;
      }
      reader_.reset();
      ++place_;
    }
    return false;
  }

 private:
  void enter_part_way() {
    const auto found = std::find(order_.begin(), order_.end(), start_.part);
    if (found == order_.end())
      throw FileError("data: the place to start from lies in a part that is not there",
                      {{"part", std::to_string(start_.part)}, {"parts", std::to_string(order_.size())}});
    place_ = static_cast<std::size_t>(found - order_.begin());
    first_line_ = start_.line;
    in_part_way_ = true;
  }

  std::vector<int64_t> epoch_order() const {
    const auto size = static_cast<int64_t>(parts_.parts.size());
    const uint64_t key = philox_key(philox_key(options_.seed, hash_name("parts")), static_cast<uint64_t>(epoch_));
    if (options_.shuffle_parts) return keyed_permutation(size, key);
    std::vector<int64_t> order(static_cast<std::size_t>(size));
    std::iota(order.begin(), order.end(), int64_t{0});
    return order;
  }

  const Parts& parts_;
  const SourceOptions& options_;
  const DocumentPosition start_;
  ShardOptions shard_options_;
  bool at_start_ = true;
  int64_t epoch_ = 0, first_line_ = 0, found_ = 0;
  bool in_part_way_ = false;  // the epoch was entered behind its beginning
  std::vector<int64_t> order_;
  std::size_t place_ = 0;  // index into order_
  std::optional<PartReader> reader_;
};

}  // namespace

struct DocumentSource::State {
  SourceOptions options;
  std::shared_ptr<const Tokenizer> tokenizer;
  Parts parts;
  Walker walker;
  std::exception_ptr failure;  // the caller's thread only

  // Everything below is guarded by the mutex, except that a job belongs to its worker between leaving to_tokenise and being done.
  struct Slot {
    Job job;
    bool done = false;
  };
  std::mutex mutex;
  std::condition_variable room, work, ready;
  std::deque<std::shared_ptr<Slot>> in_order;     // what the caller gets next, in order
  std::deque<std::shared_ptr<Slot>> to_tokenise;  // those of them that no worker took yet
  int64_t bytes_ahead = 0;
  bool reading_done = false, stop = false;
  std::vector<std::thread> threads;

  State(SourceOptions o, std::shared_ptr<const Tokenizer> t, DocumentPosition start)
      : options(std::move(o)), tokenizer(std::move(t)), parts(open_parts(options.files, tokenizer.get())), walker(parts, options, start) {
    if (options.threads <= 0) return;
    try {
      threads.emplace_back([this] { read_ahead(); });
      for (int i = 0; i < options.threads; ++i) threads.emplace_back([this] { tokenise_jobs(); });
    } catch (const std::system_error& problem) {
      shut_down();
      throw ConfigError("data: the system starts no more threads",
                        {{"threads", std::to_string(options.threads)}, {"reason", problem.what()}, {"try", "a smaller number of threads"}});
    }
  }

  ~State() { shut_down(); }

  void shut_down() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
    }
    room.notify_all();
    work.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  void read_ahead() {
    while (true) {
      auto slot = std::make_shared<Slot>();
      bool more = false;
      try {
        more = walker.next(slot->job);
      } catch (...) {
        slot->job.error = std::current_exception();
      }
      const bool failed = slot->job.error != nullptr;
      std::unique_lock lock(mutex);
      room.wait(lock, [&] { return stop || in_order.empty() || (bytes_ahead < options.ahead_bytes && in_order.size() < kMostJobs); });
      if (stop) return;
      if (more || failed) {
        slot->done = failed || slot->job.tokenised;
        bytes_ahead += slot->job.bytes;
        in_order.push_back(slot);
        if (!slot->done) {
          to_tokenise.push_back(std::move(slot));
          work.notify_one();
        }
      }
      if (!more) reading_done = true;
      ready.notify_one();
      if (!more) return;
    }
  }

  void tokenise_jobs() {
    while (true) {
      std::shared_ptr<Slot> slot;
      {
        std::unique_lock lock(mutex);
        work.wait(lock, [&] { return stop || !to_tokenise.empty(); });
        if (stop) return;
        slot = std::move(to_tokenise.front());
        to_tokenise.pop_front();
      }
      try {
        tokenise(slot->job, *tokenizer);
      } catch (...) {
        slot->job.error = std::current_exception();
      }
      const std::lock_guard lock(mutex);
      const auto bytes = static_cast<int64_t>(slot->job.result.tokens.size() * sizeof(int32_t));
      bytes_ahead += bytes - std::exchange(slot->job.bytes, bytes);  // the text is gone, its ids are there
      slot->done = true;
      ready.notify_one();
    }
  }

  // An error stays: whoever asks again gets it again, never the documents behind it.
  bool next(TokenDocument& document) {
    if (failure) std::rethrow_exception(failure);
    try {
      return take(document);
    } catch (...) {
      failure = std::current_exception();
      throw;
    }
  }

  bool take(TokenDocument& document) {
    if (threads.empty()) {
      Job job;
      if (!walker.next(job)) return false;
      if (!job.tokenised) tokenise(job, *tokenizer);
      document = std::move(job.result);
      return true;
    }
    std::shared_ptr<Slot> slot;
    {
      std::unique_lock lock(mutex);
      ready.wait(lock, [&] { return in_order.empty() ? reading_done : in_order.front()->done; });
      if (in_order.empty()) return false;
      slot = std::move(in_order.front());
      in_order.pop_front();
      bytes_ahead -= slot->job.bytes;
    }
    room.notify_one();
    if (slot->job.error) std::rethrow_exception(slot->job.error);
    document = std::move(slot->job.result);
    return true;
  }
};

DocumentSource::DocumentSource(SourceOptions options, std::shared_ptr<const Tokenizer> tokenizer, DocumentPosition start)
    : state_(std::make_unique<State>(std::move(options), std::move(tokenizer), start)) {}
DocumentSource::~DocumentSource() = default;
DocumentSource::DocumentSource(DocumentSource&&) noexcept = default;
DocumentSource& DocumentSource::operator=(DocumentSource&&) noexcept = default;

bool DocumentSource::next(TokenDocument& document) {
  return state_->next(document);
}

std::vector<TokenDocument> DocumentSource::fetch(const std::vector<DocumentPosition>& places) const {
  std::map<std::pair<int64_t, int64_t>, std::vector<std::size_t>> wanted;  // (part, line) in order -> where they go
  for (std::size_t i = 0; i < places.size(); ++i) wanted[{places[i].part, places[i].line}].push_back(i);
  std::vector<TokenDocument> out(places.size());
  std::optional<PartReader> reader;
  int64_t open_part = -1;
  BadLines passed_over;  // lines between the wanted ones are not parsed, so nothing is counted twice
  ShardOptions shard_options;
  shard_options.skip_bad_lines = &passed_over;
  for (const auto& [place, targets] : wanted) {
    const auto [part, line] = place;
    if (part < 0 || part >= static_cast<int64_t>(state_->parts.parts.size()))
      throw FileError("data: a place in the cursor lies in a part that is not there", {{"part", std::to_string(part)}});
    if (part != open_part) reader.emplace(state_->parts, part, line, shard_options);
    open_part = part;
    reader->skip_to(line);
    Job job;
    if (!reader->next(job) || job.result.at.line != line)
      throw FileError("data: a document that the cursor names is not there any more",
                      {{"file", state_->parts.list[static_cast<std::size_t>(part)].path},
                       {"line", std::to_string(line)},
                       {"try", "resume with the data the run was started with"}});
    if (!job.tokenised) tokenise(job, *state_->tokenizer);
    for (const std::size_t target : targets) {
      out[target] = job.result;
      out[target].at = {places[target].epoch, part, line, 0};
    }
  }
  return out;
}

const std::vector<DataPart>& DocumentSource::parts() const {
  return state_->parts.list;
}

std::string DocumentSource::parts_signature() const {
  std::string out;
  for (const DataPart& part : state_->parts.list) out += fmt::format("{}{}:{}", out.empty() ? "" : " ", part.name, part.bytes);
  return out;
}

std::string DocumentSource::tokenizer_fingerprint() const {
  return state_->parts.fingerprint;
}

}  // namespace longhand
