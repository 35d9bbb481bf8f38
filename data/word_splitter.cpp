// The word pattern, written out by hand; see word_splitter.h. The test compares it with PCRE2 running the pattern itself.
#include "data/word_splitter.h"

namespace longhand {
namespace {

// Length of 's, 't, 're, 've, 'm, 'll or 'd at the start of `text`, else 0.
std::size_t contraction_length(std::string_view text) {
  if (text.size() < 2 || text[0] != '\'') return 0;
  switch (text[1]) {
    case 's':
    case 't':
    case 'm':
    case 'd':
      return 2;
    case 'r':
    case 'v':
      return text.size() > 2 && text[2] == 'e' ? 3 : 0;
    case 'l':
      return text.size() > 2 && text[2] == 'l' ? 3 : 0;
    default:
      return 0;
  }
}

}  // namespace

CharKind WordSplitter::kind_at(std::size_t pos) const {
  return table_.kind(read_valid_utf8(text_, pos).code);
}

std::size_t WordSplitter::end_of_run(std::size_t pos, CharKind kind) const {
  while (pos < text_.size()) {
    const Utf8Step step = read_valid_utf8(text_, pos);
    if (table_.kind(step.code) != kind) break;
    pos += step.length;
  }
  return pos;
}

// \s+(?!\S)|\s+ : all of the run at the end of the text; else all but its last character; but at least one.
std::size_t WordSplitter::end_of_space(std::size_t pos) const {
  const std::size_t first = pos + read_valid_utf8(text_, pos).length;
  const std::size_t end = end_of_run(first, CharKind::space);
  if (end == text_.size() || end == first) return end;
  std::size_t last = end - 1;
  while ((static_cast<unsigned char>(text_[last]) & 0xC0) == 0x80) --last;  // back to the first byte of the last character
  return last;
}

std::string_view WordSplitter::next() {
  if (pos_ == text_.size()) return {};
  const std::size_t begin = pos_;
  if (const std::size_t length = contraction_length(text_.substr(begin)); length > 0) {
    pos_ += length;
    return text_.substr(begin, length);
  }
  const std::size_t body = begin + (text_[begin] == ' ' && begin + 1 < text_.size() ? 1 : 0);
  const CharKind kind = kind_at(body);
  pos_ = kind == CharKind::space ? end_of_space(begin) : end_of_run(body, kind);
  return text_.substr(begin, pos_ - begin);
}

}  // namespace longhand
