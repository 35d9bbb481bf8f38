// The two arrangements; see batcher.h.
#include "data/batcher.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/error.h"
#include "data/shuffle.h"

namespace longhand {
namespace {

constexpr int64_t kShuffleTokens = int64_t{1} << 22;  // 16 MiB of ids
constexpr int64_t kMostShuffleRows = 16384;

std::size_t index(int64_t i) {
  return static_cast<std::size_t>(i);
}

void resize(Batch& batch, int64_t rows, int64_t length) {
  batch.rows = rows;
  batch.length = length;
  batch.tokens.resize(index(rows * length));
  batch.targets.resize(index(rows * length));
  batch.mask.resize(index(rows * length));
  batch.resets.resize(index(rows));
  batch.row_ids.resize(index(rows));
}

// Row b from up to length + 1 tokens in a row; what they do not fill is padding.
void put_row(Batch& batch, int64_t b, std::span<const int32_t> run) {
  const auto valid = std::min(run.empty() ? std::size_t{0} : run.size() - 1, index(batch.length));
  auto fill = [&](std::vector<int32_t>& to, std::size_t shift) {
    const auto row = to.begin() + b * batch.length;
    std::copy_n(run.begin() + static_cast<std::ptrdiff_t>(shift), valid, row);
    std::fill(row + static_cast<std::ptrdiff_t>(valid), row + batch.length, 0);
  };
  if (valid > 0) {
    fill(batch.tokens, 0);
    fill(batch.targets, 1);
  } else {
    std::fill_n(batch.tokens.begin() + b * batch.length, batch.length, 0);
    std::fill_n(batch.targets.begin() + b * batch.length, batch.length, 0);
  }
  const auto mask = batch.mask.begin() + b * batch.length;
  std::fill_n(mask, valid, uint8_t{1});
  std::fill(mask + static_cast<std::ptrdiff_t>(valid), mask + batch.length, uint8_t{0});
}

class PackedBatcher : public Batcher {
 public:
  PackedBatcher(const BatcherOptions& options, DocumentSource source, const DataCursor& cursor)
      : options_(options), source_(std::move(source)), cursor_(cursor), epoch_(cursor.next.epoch), resume_token_(cursor.next.token) {
    if (options_.shuffle_rows <= 0) options_.shuffle_rows = std::clamp(kShuffleTokens / options_.length, int64_t{1}, kMostShuffleRows);
    next_block_ = cursor.block;
    next_first_row_ = cursor.first_row;
  }

  bool next(Batch& batch) override {
    resize(batch, options_.rows, options_.length);
    int64_t b = 0;
    for (; b < options_.rows; ++b) {
      if ((!loaded_any_ || cursor_.used_rows == block_rows_) && !load_block()) break;
      const int64_t row = order_[index(cursor_.used_rows++)];
      const auto from = index(row * options_.length);
      put_row(batch, b, std::span(block_).subspan(from, std::min(index(options_.length + 1), block_.size() - from)));
      batch.resets[index(b)] = 1;
      batch.row_ids[index(b)] = cursor_.first_row + row;
    }
    if (b == 0) return false;
    resize(batch, b, options_.length);
    ++cursor_.batches;
    batch.cursor_after = cursor_;
    return true;
  }

 private:
  // Fills block_ with the next rows of the epoch's text; false at the end of the last epoch.
  bool load_block() {
    const int64_t already_used = loaded_any_ ? 0 : cursor_.used_rows;
    DocumentPosition begins_at;
    while (true) {
      if (!document_ && !pull()) return false;
      if (document_->at.epoch != epoch_) {
        epoch_ = document_->at.epoch;
        next_block_ = 0;
      }
      begins_at = document_->at;
      begins_at.token = static_cast<int64_t>(offset_);
      block_.clear();
      const auto whole = index(options_.shuffle_rows * options_.length + 1);
      bool epoch_over = false;
      while (block_.size() < whole) {
        if (offset_ == document_->tokens.size()) {
          epoch_over = !pull() || document_->at.epoch != epoch_;
          if (epoch_over) break;
        }
        const auto n = std::min(whole - block_.size(), document_->tokens.size() - offset_);
        const auto from = document_->tokens.begin() + static_cast<std::ptrdiff_t>(offset_);
        block_.insert(block_.end(), from, from + static_cast<std::ptrdiff_t>(n));
        offset_ += n;
      }
      if (!epoch_over) --offset_;  // the last token is also the first of the next block
      const auto targets = static_cast<int64_t>(block_.size()) - 1;
      block_rows_ = targets / options_.length;
      if (options_.tail == Tail::pad && targets % options_.length != 0) ++block_rows_;
      if (block_rows_ > 0) break;
      if (next_block_ == 0)
        throw FileError("data: an epoch holds fewer tokens than one row needs",
                        {{"tokens", std::to_string(block_.size())},
                         {"expected", fmt::format("at least {} (length + 1)", options_.length + 1)},
                         {"try", "give more data or a smaller length"}});
    }
    cursor_.next = begins_at;
    cursor_.block = next_block_++;
    cursor_.first_row = next_first_row_;
    next_first_row_ += block_rows_;
    cursor_.used_rows = already_used;
    loaded_any_ = true;
    if (already_used > block_rows_)
      throw FileError("data: the block that the cursor names is shorter now", {{"rows", std::to_string(block_rows_)},
                                                                               {"used", std::to_string(already_used)},
                                                                               {"try", "resume with the data the run was started with"}});
    order_ = block_order();
    return already_used < block_rows_ || load_block();
  }

  std::vector<int64_t> block_order() const {
    if (options_.shuffle) {
      uint64_t key = philox_key(options_.seed, hash_name("rows"));
      key = philox_key(key, static_cast<uint64_t>(epoch_));
      return keyed_permutation(block_rows_, philox_key(key, static_cast<uint64_t>(cursor_.block)));
    }
    std::vector<int64_t> order(index(block_rows_));
    std::iota(order.begin(), order.end(), int64_t{0});
    return order;
  }

  // The next document becomes the current one.
  bool pull() {
    TokenDocument next;
    if (!source_.next(next)) {
      document_.reset();
      return false;
    }
    offset_ = 0;
    if (const int64_t token = std::exchange(resume_token_, 0); token > 0) {
      if (next.at.part != cursor_.next.part || next.at.line != cursor_.next.line || index(token) >= next.tokens.size())
        throw FileError("data: the document that the cursor names is not there any more",
                        {{"line", std::to_string(cursor_.next.line)}, {"try", "resume with the data the run was started with"}});
      offset_ = index(token);
    }
    document_ = std::move(next);
    return true;
  }

  BatcherOptions options_;
  DocumentSource source_;
  DataCursor cursor_;                      // of the rows handed out
  std::optional<TokenDocument> document_;  // the document being cut, from offset_ on
  std::size_t offset_ = 0;
  std::vector<int32_t> block_;  // block_rows_ * length + 1 tokens (fewer when the last row is padded)
  std::vector<int64_t> order_;  // rows of the block in the order they are handed out
  int64_t block_rows_ = 0, next_block_ = 0, next_first_row_ = 0, epoch_, resume_token_;
  bool loaded_any_ = false;
};

class StreamsBatcher : public Batcher {
 public:
  StreamsBatcher(const BatcherOptions& options, DocumentSource source, const DataCursor& cursor)
      : options_(options), source_(std::move(source)), cursor_(cursor), rows_(index(options.rows)) {
    if (cursor_.streams.empty()) cursor_.streams.resize(rows_.size());
    if (cursor_.streams.size() != rows_.size())
      throw FileError("data: the cursor has another number of streams than the batch has rows",
                      {{"cursor", std::to_string(cursor_.streams.size())}, {"rows", std::to_string(rows_.size())}});
    std::vector<DocumentPosition> places;
    for (const StreamPosition& stream : cursor_.streams)
      if (stream.in_document) places.push_back(stream.at);
    std::vector<TokenDocument> documents = places.empty() ? std::vector<TokenDocument>{} : source_.fetch(places);
    auto document = documents.begin();
    for (std::size_t b = 0; b < rows_.size(); ++b) {
      const StreamPosition& stream = cursor_.streams[b];
      rows_[b].started = stream.started;
      if (!stream.in_document) continue;
      rows_[b].document = std::move(*document++);
      rows_[b].offset = index(stream.at.token);
      if (rows_[b].offset >= rows_[b].document->tokens.size())
        throw FileError("data: a document that the cursor names is shorter now",
                        {{"line", std::to_string(stream.at.line)}, {"try", "resume with the data the run was started with"}});
    }
  }

  bool next(Batch& batch) override {
    resize(batch, options_.rows, options_.length);
    bool any = false;
    for (int64_t b = 0; b < options_.rows; ++b) {
      Row& row = rows_[index(b)];
      run_.clear();
      const bool begins = options_.stream_unit == StreamUnit::packed ? fill_packed(row) : fill_document(row);
      put_row(batch, b, run_);
      batch.resets[index(b)] = begins ? 1 : 0;
      batch.row_ids[index(b)] = cursor_.batches * options_.rows + b;
      any = any || run_.size() > 1;
      StreamPosition& stream = cursor_.streams[index(b)];
      stream = {row.started, row.document.has_value(), {}};
      if (row.document) {
        stream.at = row.document->at;
        stream.at.token = static_cast<int64_t>(row.offset);
      }
    }
    if (!any) return false;
    ++cursor_.batches;
    batch.cursor_after = cursor_;
    return true;
  }

 private:
  struct Row {
    std::optional<TokenDocument> document;  // the document it is in, from offset on
    std::size_t offset = 0;
    bool started = false;
  };

  bool pull(Row& row) {
    TokenDocument next;
    row.offset = 0;
    if (!source_.next(next)) {
      row.document.reset();
      return false;
    }
    cursor_.next = next.at;
    ++cursor_.next.line;
    row.document = std::move(next);
    return true;
  }

  // Moves up to length + 1 - run_.size() tokens of the row's document to run_.
  void take(Row& row) {
    const auto n = std::min(index(options_.length + 1) - run_.size(), row.document->tokens.size() - row.offset);
    const auto from = row.document->tokens.begin() + static_cast<std::ptrdiff_t>(row.offset);
    run_.insert(run_.end(), from, from + static_cast<std::ptrdiff_t>(n));
    row.offset += n;
  }

  // Documents one after the other. Returns true if the row begins a sequence.
  bool fill_packed(Row& row) {
    while (run_.size() < index(options_.length + 1)) {
      if (!row.document || row.offset == row.document->tokens.size()) {
        if (!pull(row)) break;
      }
      take(row);
    }
    if (row.document) --row.offset;  // the last token is also the first of the next row; a document just taken from has it
    return !std::exchange(row.started, true);
  }

  // At most one document.
  bool fill_document(Row& row) {
    bool begins = false;
    int64_t first_epoch = -1;
    while (!row.document) {
      begins = true;
      if (!pull(row)) return true;
      if (row.document->tokens.size() >= 2) break;
      const int64_t epoch = row.document->at.epoch;
      row.document.reset();  // nothing to predict in an empty text
      if (first_epoch < 0) first_epoch = epoch;
      if (epoch > first_epoch + 1)  // a whole epoch has gone by
        throw FileError("data: an epoch holds no document with a text", {{"try", "give data with text"}});
    }
    take(row);
    --row.offset;
    if (row.offset + 1 == row.document->tokens.size()) row.document.reset();
    row.started = true;
    return begins;
  }

  BatcherOptions options_;
  DocumentSource source_;
  DataCursor cursor_;
  std::vector<Row> rows_;
  std::vector<int32_t> run_;  // the tokens of the row being filled
};

}  // namespace

Batcher::~Batcher() = default;

Batch rows_of(const Batch& batch, int64_t begin, int64_t end) {
  if (begin < 0 || begin > end || end > batch.rows)
    throw ValueError("rows_of: rows outside the batch",
                     {{"rows", fmt::format("{} to {}", begin, end)}, {"batch", fmt::format("{} rows", batch.rows)}});
  Batch out;
  resize(out, end - begin, batch.length);
  auto copy = [&](const auto& from, auto& to, int64_t width) {
    std::copy(from.begin() + begin * width, from.begin() + end * width, to.begin());
  };
  copy(batch.tokens, out.tokens, batch.length);
  copy(batch.targets, out.targets, batch.length);
  copy(batch.mask, out.mask, batch.length);
  copy(batch.resets, out.resets, 1);
  copy(batch.row_ids, out.row_ids, 1);
  out.cursor_after = batch.cursor_after;
  return out;
}

Arrangement arrangement_from(const std::string& name) {
  if (name == "packed") return Arrangement::packed;
  if (name == "streams") return Arrangement::streams;
  throw ConfigError("data: unknown arrangement", {{"arrangement", name}, {"expected", "packed or streams"}});
}

StreamUnit stream_unit_from(const std::string& name) {
  if (name == "packed") return StreamUnit::packed;
  if (name == "document") return StreamUnit::document;
  throw ConfigError("data: unknown unit of a stream", {{"stream_unit", name}, {"expected", "packed or document"}});
}

std::unique_ptr<Batcher> make_batcher(const BatcherOptions& options, DocumentSource source, const DataCursor& cursor) {
  if (options.rows < 1 || options.length < 1)
    throw ValueError("data: a batch needs at least one row and one token",
                     {{"rows", std::to_string(options.rows)}, {"length", std::to_string(options.length)}});
  if (options.arrangement == Arrangement::packed) return std::make_unique<PackedBatcher>(options, std::move(source), cursor);
  return std::make_unique<StreamsBatcher>(options, std::move(source), cursor);
}

}  // namespace longhand
