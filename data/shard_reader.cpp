// Lines out of a byte stream, documents out of lines; see shard_reader.h.
#include "data/shard_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string_view>

#include "core/error.h"
#include "data/json_line.h"

namespace longhand {
namespace {

constexpr std::size_t kFirstBufferBytes = std::size_t{1} << 20;

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

// The bytes around a fault, fit for a terminal.
std::string excerpt(std::string_view line, std::size_t at) {
  constexpr std::size_t kBefore = 24, kAfter = 24;
  const std::size_t from = at > kBefore ? at - kBefore : 0;
  std::string out = from > 0 ? "..." : "";
  for (const char c : line.substr(from, at - from + kAfter)) {
    const auto byte = static_cast<unsigned char>(c);
    out += byte >= 0x20 && byte < 0x7F ? std::string(1, c) : fmt::format("<{:02X}>", byte);
  }
  return out + (from + kBefore + kAfter < line.size() ? "..." : "");
}

}  // namespace

void BadLines::add(const std::string& message) {
  const std::lock_guard lock(mutex_);
  if (++count_ <= kKept) first_.push_back(message);
}

int64_t BadLines::count() const {
  const std::lock_guard lock(mutex_);
  return count_;
}

std::vector<std::string> BadLines::first() const {
  const std::lock_guard lock(mutex_);
  return first_;
}

struct ShardReader::State {
  State(std::string p, ShardOptions o) : path(std::move(p)), options(o), source(path, o.source) {}

  std::string path;
  ShardOptions options;
  ByteSource source;
  std::vector<char> buffer = std::vector<char>(kFirstBufferBytes);  // text not used yet: [begin, end); [begin, scanned) has no newline
  std::size_t begin = 0, end = 0, scanned = 0;
  int64_t line = 0;         // lines taken so far
  int64_t byte_offset = 0;  // where the text at `begin` stands in the whole
  bool source_done = false;
  JsonLine parsed;

  // Brings more text behind `end`; false when there is no more.
  bool refill() {
    if (source_done) return false;
    if (begin > 0) {
      std::memmove(buffer.data(), buffer.data() + begin, end - begin);
      end -= begin;
      scanned -= begin;
      begin = 0;
    }
    if (end == buffer.size()) {
      const auto limit = static_cast<std::size_t>(longest_line());
      if (end >= limit) refuse_long_line();
      buffer.resize(std::min(2 * buffer.size(), std::max(limit, buffer.size() + 1)));
    }
    const std::size_t n = source.read(buffer.data() + end, buffer.size() - end);
    end += n;
    source_done = n == 0;
    return n > 0;
  }

  // The next line without its newline, valid until the next call; nothing at the end.
  std::optional<std::string_view> next_line(int64_t& starts_at) {
    while (true) {
      const char* from = buffer.data() + scanned;
      if (const void* newline = std::memchr(from, '\n', end - scanned)) {
        const auto length = static_cast<std::size_t>(static_cast<const char*>(newline) - (buffer.data() + begin));
        return take(length, length + 1, starts_at);
      }
      scanned = end;
      if (!refill()) break;
    }
    if (begin == end) return std::nullopt;
    return take(end - begin, end - begin, starts_at);
  }

  std::string_view take(std::size_t length, std::size_t with_newline, int64_t& starts_at) {
    if (length > static_cast<std::size_t>(longest_line())) refuse_long_line();
    std::string_view text(buffer.data() + begin, length);
    starts_at = byte_offset;
    begin += with_newline;
    scanned = begin;
    byte_offset += static_cast<int64_t>(with_newline);
    if (++line == 1 && text.starts_with("\xEF\xBB\xBF")) {  // a byte order mark is no part of the first line
      text.remove_prefix(3);
      starts_at += 3;
    }
    return text;
  }

  int64_t longest_line() const { return std::min(options.max_line_bytes, source.may_hold()); }

  [[noreturn]] void refuse_long_line() const {
    if (source.may_hold() < options.max_line_bytes) {
      std::vector<ErrorRow> rows = source.rows_of_may_hold();
      rows.insert(rows.begin() + 1, {"line", fmt::format("{}, begins at byte {} of the text", line + 1, byte_offset)});
      throw FileError("shard: a line is longer than a file of this size may hold", std::move(rows));
    }
    throw FileError("shard: a line is longer than the limit",
                    {{"file", path},
                     {"line", fmt::format("{}, begins at byte {} of the text", line + 1, byte_offset)},
                     {"limit", fmt::format("{} bytes", options.max_line_bytes)},
                     {"try", "the newlines may be missing; cut the document into several lines"}});
  }

  FileError bad_line(std::string_view text, int64_t starts_at, const JsonFault& fault) const {
    const bool cut =
        source_done && begin == end && fault.byte <= text.size() && text.size() == static_cast<std::size_t>(byte_offset - starts_at);
    std::vector<ErrorRow> rows{
        {"file", path},
        {"line", std::to_string(line)},
        {"byte", fmt::format("{} of the line, {} of the text", fault.byte, starts_at + static_cast<int64_t>(fault.byte))},
        {"rule", fault.rule},
        {"near", excerpt(text, fault.byte)}};
    if (cut) rows.push_back({"note", "this is the last line and it has no newline: the file may have been cut"});
    rows.push_back({"try", "mend the line, or pass --skip-bad-lines to leave such lines out and count them"});
    return FileError(fmt::format("shard: line {} is not a document", line), std::move(rows));
  }

  bool next(Document& document) {
    int64_t starts_at = 0;
    while (const auto text = next_line(starts_at)) {
      if (is_blank(*text)) continue;
      if (const auto fault = parse_json_line(*text, parsed)) {
        const FileError error = bad_line(*text, starts_at, *fault);
        if (!options.skip_bad_lines) throw error;
        options.skip_bad_lines->add(error.what());
        continue;
      }
      document.text.swap(parsed.text);
      document.set_name.swap(parsed.set_name);
      document.line = line;
      document.byte_offset = starts_at;
      return true;
    }
    return false;
  }
};

ShardReader::ShardReader(const std::string& path, ShardOptions options) : state_(std::make_unique<State>(path, options)) {}
ShardReader::~ShardReader() = default;
ShardReader::ShardReader(ShardReader&&) noexcept = default;
ShardReader& ShardReader::operator=(ShardReader&&) noexcept = default;

bool ShardReader::next(Document& document) {
  return state_->next(document);
}

void ShardReader::skip_to_line(int64_t line) {
  int64_t starts_at = 0;
  while (state_->line + 1 < line && state_->next_line(starts_at)) {
  }
}

const std::string& ShardReader::path() const {
  return state_->path;
}

std::vector<std::string> expand_shards(const std::vector<std::string>& paths) {
  namespace fs = std::filesystem;
  std::vector<std::string> out;
  for (const std::string& path : paths) {
    std::error_code error;
    const auto kind = fs::status(path, error);
    if (!fs::exists(kind))
      throw FileError("data: no such file or folder", {{"path", path}, {"try", "check the name and the folder it is looked up from"}});
    if (!fs::is_directory(kind)) {
      out.push_back(path);
      continue;
    }
    std::vector<std::string> shards, caches;
    for (const auto& entry : fs::directory_iterator(path)) {
      if (!entry.is_regular_file() || entry.path().filename().string().starts_with('.')) continue;
      const std::string name = entry.path().string();
      if (name.ends_with(".jsonl.zst") || name.ends_with(".jsonl")) shards.push_back(name);
      if (name.ends_with(".tokens")) caches.push_back(name);
    }
    if (shards.empty()) shards.swap(caches);
    if (shards.empty())
      throw FileError("data: the folder holds no shards", {{"folder", path}, {"expected", "*.jsonl.zst, *.jsonl or *.tokens files in it"}});
    std::sort(shards.begin(), shards.end());
    out.insert(out.end(), shards.begin(), shards.end());
  }
  return out;
}

}  // namespace longhand
