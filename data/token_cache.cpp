// Writing and mapping token caches; see token_cache.h, and data/README.md for the format.
#include "data/token_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/strict_json.h"
#include "data/document_source.h"
#include "data/tokenizer.h"

namespace longhand {
namespace {

static_assert(std::endian::native == std::endian::little, "the cache is written in the machine's byte order, which must be little-endian");

constexpr std::array<char, 16> kMagic = {'l', 'o', 'n', 'g', 'h', 'a', 'n', 'd', '-', 't', 'o', 'k', 'e', 'n', 's', '\n'};
constexpr uint64_t kVersion = 1;
constexpr int64_t kTokensAt = sizeof(kMagic);

// One document in the table; tokens run to the start of the next one.
struct DocumentRow {
  uint64_t first_token;
  uint64_t line;
  uint32_t text_bytes;
  uint32_t set;  // index into the description's "sets"
};
static_assert(sizeof(DocumentRow) == 24);

// The last bytes of the file.
struct Tail {
  uint64_t version, token_bytes, tokens, documents, documents_at, description_at, description_bytes, tokens_checksum, tables_checksum;
  std::array<char, 16> magic;
};
static_assert(sizeof(Tail) == 88);

int64_t round_up_8(int64_t n) {
  return (n + 7) / 8 * 8;
}

// A 64-bit checksum over 8-byte words in the manner of FNV-1a; the last word is filled up with zeros. Sees every change of one word.
class Checksum {
 public:
  void add(const void* data, std::size_t bytes) {
    const char* p = static_cast<const char*>(data);
    for (; bytes > 0 && held_ > 0; --bytes) add_byte(*p++);
    for (; bytes >= 8; bytes -= 8, p += 8) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      add_word(word);
    }
    for (; bytes > 0; --bytes) add_byte(*p++);
  }
  uint64_t value() {
    while (held_ > 0) add_byte(0);
    return hash_;
  }

 private:
  void add_word(uint64_t word) {
    hash_ = (hash_ ^ word) * 0x100000001b3u;
    hash_ ^= hash_ >> 29;  // lets high bits reach the low ones
  }
  void add_byte(char c) {
    word_ |= uint64_t{static_cast<unsigned char>(c)} << (8 * held_);
    if (++held_ < 8) return;
    add_word(word_);
    word_ = 0;
    held_ = 0;
  }
  uint64_t hash_ = 0xcbf29ce484222325u, word_ = 0;
  int held_ = 0;
};

[[noreturn]] void refuse(const std::string& path, const std::string& sentence, const std::string& reason) {
  throw FileError(
      "token cache: " + sentence,
      {{"file", path}, {"reason", reason}, {"try", "write it again with `longhand tokenize --tokenizer FILE --out CACHE SHARD...`"}});
}

// Collects small writes into large ones.
class BufferedOutput {
 public:
  explicit BufferedOutput(OutputFile& file) : file_(file) { buffer_.reserve(kBytes); }
  void write(const void* data, std::size_t bytes) {
    const char* p = static_cast<const char*>(data);
    buffer_.insert(buffer_.end(), p, p + bytes);
    position_ += static_cast<int64_t>(bytes);
    if (buffer_.size() >= kBytes) flush();
  }
  void flush() {
    file_.write(buffer_.data(), buffer_.size());
    buffer_.clear();
  }
  int64_t position() const { return position_; }

 private:
  static constexpr std::size_t kBytes = std::size_t{1} << 20;
  OutputFile& file_;
  std::vector<char> buffer_;
  int64_t position_ = 0;
};

// The table of documents while it grows: on disk, so that memory does not.
class SpilledRows {
 public:
  SpilledRows() : file_(std::tmpfile()) {
    if (!file_)
      throw FileError("token cache: no temporary file for the table of documents", {{"try", "set TMPDIR to a folder with space"}});
  }
  ~SpilledRows() { std::fclose(file_); }
  SpilledRows(const SpilledRows&) = delete;
  SpilledRows& operator=(const SpilledRows&) = delete;

  void add(const DocumentRow& row) {
    if (std::fwrite(&row, sizeof row, 1, file_) != 1) throw FileError("token cache: the temporary folder is full");
  }
  template <typename Take>
  void read_back(Take take) {
    std::rewind(file_);
    std::vector<char> chunk(std::size_t{1} << 20);
    while (const std::size_t n = std::fread(chunk.data(), 1, chunk.size(), file_)) take(chunk.data(), n);
  }

 private:
  std::FILE* file_;
};

class CacheWriter {
 public:
  CacheWriter(OutputFile& file, const Tokenizer& tokenizer) : out_(file), tokenizer_(tokenizer) {
    tail_.token_bytes = tokenizer.vocab_size() <= 65536 ? 2 : 4;
    out_.write(kMagic.data(), kMagic.size());
  }

  void add(const TokenDocument& document) {
    rows_.add(
        {tail_.tokens, static_cast<uint64_t>(document.at.line), static_cast<uint32_t>(document.text_bytes), set_index(document.set_name)});
    if (tail_.token_bytes == 2) {
      narrow_.assign(document.tokens.size(), 0);
      std::transform(document.tokens.begin(), document.tokens.end(), narrow_.begin(), [](int32_t id) { return static_cast<uint16_t>(id); });
      write_tokens(narrow_.data(), narrow_.size() * 2);
    } else {
      write_tokens(document.tokens.data(), document.tokens.size() * 4);
    }
    tail_.tokens += document.tokens.size();
    ++tail_.documents;
  }

  // Writes what follows the tokens. `shards` is the description's list.
  void finish(nlohmann::json shards) {
    tail_.tokens_checksum = tokens_checksum_.value();
    const char zeros[8] = {};
    out_.write(zeros, static_cast<std::size_t>(round_up_8(out_.position()) - out_.position()));
    Checksum tables;
    tail_.documents_at = static_cast<uint64_t>(out_.position());
    rows_.read_back([&](const char* data, std::size_t bytes) {
      tables.add(data, bytes);
      out_.write(data, bytes);
    });
    const nlohmann::json description = {{"tokenizer", tokenizer_.name()},
                                        {"fingerprint", tokenizer_.fingerprint()},
                                        {"vocab_size", tokenizer_.vocab_size()},
                                        {"sets", sets_},
                                        {"shards", std::move(shards)}};
    const std::string text = description.dump();
    tables.add(text.data(), text.size());
    tail_.version = kVersion;
    tail_.description_at = static_cast<uint64_t>(out_.position());
    tail_.description_bytes = text.size();
    out_.write(text.data(), text.size());
    tables.add(&tail_, offsetof(Tail, tables_checksum));
    tail_.tables_checksum = tables.value();
    tail_.magic = kMagic;
    out_.write(&tail_, sizeof tail_);
    out_.flush();
  }

  int64_t position() const { return out_.position(); }

 private:
  void write_tokens(const void* data, std::size_t bytes) {
    tokens_checksum_.add(data, bytes);
    out_.write(data, bytes);
  }

  uint32_t set_index(const std::string& name) {
    const auto found = std::find(sets_.begin(), sets_.end(), name);
    if (found != sets_.end()) return static_cast<uint32_t>(found - sets_.begin());
    sets_.push_back(name);
    return static_cast<uint32_t>(sets_.size() - 1);
  }

  BufferedOutput out_;
  const Tokenizer& tokenizer_;
  SpilledRows rows_;
  std::vector<uint16_t> narrow_;
  std::vector<std::string> sets_;
  Checksum tokens_checksum_;
  Tail tail_{};
};

// Rows `document` and, when `count` is 2, the one behind it.
std::array<DocumentRow, 2> rows_at(const MappedFile& file, int64_t documents_at, int64_t document, std::size_t count) {
  std::array<DocumentRow, 2> rows{};
  file.read_at(static_cast<std::size_t>(documents_at) + static_cast<std::size_t>(document) * sizeof(DocumentRow), rows.data(),
               count * sizeof(DocumentRow));
  return rows;
}

}  // namespace

bool TokenCache::is_cache(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) return false;
  std::array<char, 16> head{};
  const std::size_t n = std::fread(head.data(), 1, head.size(), file);
  std::fclose(file);
  return n == head.size() && head == kMagic;
}

TokenCache::TokenCache(const std::string& path) : file_(path) {
  const auto size = static_cast<int64_t>(file_.size());
  const std::byte* bytes = file_.bytes().data();
  if (size < kTokensAt + static_cast<int64_t>(sizeof(Tail)) || std::memcmp(bytes, kMagic.data(), kMagic.size()) != 0)
    refuse(path, "the file is not a token cache", fmt::format("{} bytes that do not begin as one", size));
  Tail tail;
  std::memcpy(&tail, bytes + size - static_cast<int64_t>(sizeof tail), sizeof tail);
  if (tail.magic != kMagic) refuse(path, "the file is cut", fmt::format("its end is missing after byte {}", size));
  if (tail.version != kVersion)
    refuse(path, "the file has another version", fmt::format("version {}, expected {}", tail.version, kVersion));

  // Sizes first: every offset below lies in the file once these hold.
  const auto limit = static_cast<uint64_t>(size);
  const bool plausible = (tail.token_bytes == 2 || tail.token_bytes == 4) && tail.tokens <= limit && tail.documents <= limit &&
                         tail.description_bytes <= limit;
  tokens_ = plausible ? static_cast<int64_t>(tail.tokens) : 0;
  documents_ = plausible ? static_cast<int64_t>(tail.documents) : 0;
  token_bytes_ = plausible ? static_cast<int64_t>(tail.token_bytes) : 2;
  documents_at_ = round_up_8(kTokensAt + tokens_ * token_bytes_);
  const int64_t description_at = documents_at_ + documents_ * static_cast<int64_t>(sizeof(DocumentRow));
  const auto description_bytes = plausible ? static_cast<int64_t>(tail.description_bytes) : 0;
  if (!plausible || static_cast<int64_t>(tail.documents_at) != documents_at_ ||
      static_cast<int64_t>(tail.description_at) != description_at ||
      description_at + description_bytes + static_cast<int64_t>(sizeof tail) != size)
    refuse(path, "the sizes in the file do not add up",
           fmt::format("{} tokens of {} bytes, {} documents and {} bytes of description in {} bytes", tail.tokens, tail.token_bytes,
                       tail.documents, tail.description_bytes, size));
  Checksum tables;
  tables.add(bytes + documents_at_, static_cast<std::size_t>(description_at + description_bytes - documents_at_));
  tables.add(&tail, offsetof(Tail, tables_checksum));
  if (tables.value() != tail.tables_checksum)
    refuse(path, "the table of documents changed after it was written", fmt::format("checksum over bytes {} to {}", documents_at_, size));

  tokens_checksum_ = tail.tokens_checksum;
  try {
    const auto description = nlohmann::json::parse(
        std::string_view(reinterpret_cast<const char*>(bytes) + description_at, static_cast<std::size_t>(description_bytes)));
    tokenizer_name_ = description.at("tokenizer").get<std::string>();
    fingerprint_ = description.at("fingerprint").get<std::string>();
    vocab_size_ = whole_number(description.at("vocab_size"));
    set_names_ = description.at("sets").get<std::vector<std::string>>();
    int64_t first = 0;
    for (const auto& shard : description.at("shards")) {
      shards_.push_back({shard.at("name").get<std::string>(), whole_number(shard.at("bytes")), first, whole_number(shard.at("documents")),
                         whole_number(shard.at("text_bytes"))});
      if (shards_.back().documents < 0 || shards_.back().documents > documents_ - first)
        refuse(path, "the description does not match the table", fmt::format("a shard of {} documents", shards_.back().documents));
      first += shards_.back().documents;
    }
    if (first != documents_)
      refuse(path, "the description does not match the table", fmt::format("{} documents against {}", first, documents_));
  } catch (const nlohmann::json::exception& error) {
    refuse(path, "the description cannot be read", error.what());
  }
}

int64_t TokenCache::line_of(int64_t document) const {
  return static_cast<int64_t>(rows_at(file_, documents_at_, document, 1)[0].line);
}

void TokenCache::read(int64_t document, TokenDocument& out) const {
  const bool last_document = document + 1 == documents_;
  const auto [row, row_behind] = rows_at(file_, documents_at_, document, last_document ? 1 : 2);
  const auto first = static_cast<int64_t>(row.first_token);
  const int64_t last = last_document ? tokens_ : static_cast<int64_t>(row_behind.first_token);
  if (first < 0 || first > last || last > tokens_ || row.set >= set_names_.size())
    refuse(path(), "the table of documents is damaged", fmt::format("document {} has tokens {} to {}", document, first, last));
  out.at.line = static_cast<int64_t>(row.line);
  out.at.token = 0;
  out.text_bytes = row.text_bytes;
  out.set_name = set_names_[row.set];
  const auto count = static_cast<std::size_t>(last - first);
  out.tokens.resize(count);
  const auto from = static_cast<std::size_t>(kTokensAt + first * token_bytes_);
  file_.read_at(from, out.tokens.data(), count * static_cast<std::size_t>(token_bytes_));
  if (token_bytes_ == 2) {  // spread from the end on, so that no id is overwritten before it is read
    const char* narrow = reinterpret_cast<const char*>(out.tokens.data());
    for (std::size_t i = count; i-- > 0;) {
      uint16_t id;
      std::memcpy(&id, narrow + 2 * i, 2);
      out.tokens[i] = id;
    }
  }
  const auto bad = std::find_if(out.tokens.begin(), out.tokens.end(), [&](int32_t id) { return id < 0 || id >= vocab_size_; });
  if (bad != out.tokens.end())
    refuse(path(), "a token is outside the vocabulary",
           fmt::format("token {} at byte {}, the vocabulary has {}", *bad, kTokensAt + (first + (bad - out.tokens.begin())) * token_bytes_,
                       vocab_size_));
}

void TokenCache::verify() const {
  Checksum checksum;
  checksum.add(file_.bytes().data() + kTokensAt, static_cast<std::size_t>(tokens_ * token_bytes_));
  if (checksum.value() != tokens_checksum_)
    refuse(path(), "the tokens changed after they were written", fmt::format("checksum over {} tokens from byte {}", tokens_, kTokensAt));
}

CacheSummary write_token_cache(const std::string& out, const std::vector<std::string>& files, std::shared_ptr<const Tokenizer> tokenizer,
                               const CacheOptions& options) {
  SourceOptions source_options;
  source_options.files = files;
  source_options.threads = options.threads;
  source_options.skip_bad_lines = options.skip_bad_lines;
  DocumentSource source(source_options, tokenizer);
  CacheSummary summary;
  std::vector<CachedShard> shards;
  for (const DataPart& part : source.parts()) shards.push_back({part.name, part.bytes});
  write_file_atomically(out, [&](OutputFile& file) {
    CacheWriter writer(file, *tokenizer);
    for (TokenDocument document; source.next(document);) {
      writer.add(document);
      CachedShard& shard = shards[static_cast<std::size_t>(document.at.part)];
      ++shard.documents;
      shard.text_bytes += document.text_bytes;
      summary.tokens += static_cast<int64_t>(document.tokens.size());
    }
    auto list = nlohmann::json::array();
    for (const CachedShard& shard : shards) {
      list.push_back({{"name", shard.name}, {"bytes", shard.bytes}, {"documents", shard.documents}, {"text_bytes", shard.text_bytes}});
      summary.documents += shard.documents;
      summary.text_bytes += shard.text_bytes;
    }
    writer.finish(std::move(list));
    summary.shards = static_cast<int64_t>(shards.size());
    summary.file_bytes = writer.position();
  });
  return summary;
}

}  // namespace longhand
