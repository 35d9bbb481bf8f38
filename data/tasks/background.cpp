// See background.h.
#include "data/tasks/background.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/error.h"
#include "core/philox.h"
#include "data/shard_reader.h"
#include "data/tasks/draws.h"
#include "data/tasks/sentences.h"

namespace longhand {
namespace {

// The next place at or behind `at` where a character begins.
std::size_t character_at(const std::string& text, std::size_t at) {
  while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) ++at;
  return at;
}

// FNV-1a of the books, each behind its size.
std::string fingerprint_of(const std::vector<std::string>& books) {
  uint64_t hash = hash_name("books");
  const auto add = [&](std::string_view text) {
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  };
  for (const std::string& book : books) add(std::to_string(book.size()) + ":"), add(book);
  return fmt::format("{}-{:016x}", books.size(), hash);
}

}  // namespace

Background::Background(const BackgroundOptions& options) {
  int64_t bytes = 0;
  for (const std::string& file : expand_shards(options.files)) {
    ShardReader reader(file, {.source = {.held_whole = true}});
    for (Document document; bytes < options.most_bytes && reader.next(document);) {
      if (std::ssize(document.text) < options.min_bytes) continue;
      if (!options.set_name.empty() && document.set_name != options.set_name) continue;
      bytes += std::ssize(document.text);
      books_.push_back(std::move(document.text));
    }
  }
  if (books_.empty())
    throw FileError("babilong: no document can be a background",
                    {{"files", options.files.empty() ? "none" : options.files.front()},
                     {"set", options.set_name.empty() ? "any" : options.set_name},
                     {"expected", "at least one of " + std::to_string(options.min_bytes) + " bytes"}});
  fingerprint_ = fingerprint_of(books_);
}

Background::Background(std::vector<std::string> books) : books_(std::move(books)), fingerprint_(fingerprint_of(books_)) {}

std::vector<std::string> Background::window(Draws& draws, int64_t bytes) const {
  const std::string& book = books_[static_cast<std::size_t>(draws.below(std::ssize(books_)))];
  const std::size_t begin = character_at(book, static_cast<std::size_t>(draws.below(std::max<int64_t>(1, std::ssize(book)))));
  const std::size_t end = character_at(book, std::min(book.size(), begin + static_cast<std::size_t>(bytes)));
  std::vector<std::string> sentences = split_sentences(std::string_view(book).substr(begin, end - begin));
  if (sentences.size() < 3) return {};
  sentences.erase(sentences.begin());
  sentences.pop_back();
  return sentences;
}

}  // namespace longhand
