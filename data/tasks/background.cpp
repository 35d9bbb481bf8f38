// See background.h.
#include "data/tasks/background.h"

#include <algorithm>

#include "core/error.h"
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

}  // namespace

Background::Background(const BackgroundOptions& options) {
  int64_t bytes = 0;
  for (const std::string& file : expand_shards(options.files)) {
    ShardReader reader(file);
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
}

std::string Background::fingerprint() const {
  constexpr std::size_t kEnds = 256;
  std::string ends;
  for (const std::string& book : books_)
    ends += std::to_string(book.size()) + book.substr(0, kEnds) + book.substr(book.size() - std::min(kEnds, book.size()));
  return std::to_string(books_.size()) + "-" + std::to_string(hash_name(ends.c_str()));
}

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
