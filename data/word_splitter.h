// Cuts text into the words that BPE works on, by the rules of this pattern:
//
//   's|'t|'re|'ve|'m|'ll|'d | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ |\s+(?!\S)|\s+
//
// Alternatives are tried in order, letters are case-sensitive, classes are Unicode's. In words: a contraction's ending; or a run of
// letters, of digits or of other signs, with one space before it if there is one; or white space, which leaves its last character
// to the word that follows. Every byte of the text is in exactly one word.
#pragma once
#include <string_view>

#include "data/unicode.h"

namespace longhand {

/// Walks over the words of a text of valid UTF-8.
class WordSplitter {
 public:
  explicit WordSplitter(std::string_view text) : text_(text) {}

  /// The next word, a view into the text; empty at the end.
  std::string_view next();

 private:
  CharKind kind_at(std::size_t pos) const;
  std::size_t end_of_run(std::size_t pos, CharKind kind) const;
  std::size_t end_of_space(std::size_t pos) const;

  const CharTable& table_ = CharTable::instance();
  std::string_view text_;
  std::size_t pos_ = 0;
};

}  // namespace longhand
