// See sentences.h.
#include "data/tasks/sentences.h"

#include <algorithm>
#include <cctype>

namespace longhand {
namespace {

constexpr std::string_view kAbbreviations[] = {
    "Mr", "Mrs", "Ms",  "Dr",  "St", "Prof", "Rev", "Hon", "Gen", "Col", "Capt", "Lieut", "Lt", "Sgt", "Maj", "Sr",  "Jr",   "Esq",   "Vol",
    "No", "Ch",  "Fig", "vol", "no", "ch",   "fig", "pp",  "p",   "vs",  "etc",  "viz",   "cf", "e.g", "i.e", "Mme", "Mlle", "Messrs"};

bool is_white(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

// Bytes of a closing quote or bracket at `at`; 0: none.
std::size_t closing(std::string_view text, std::size_t at) {
  if (at < text.size() && std::string_view("\"')]}").find(text[at]) != std::string_view::npos) return 1;
  const std::string_view three = text.substr(std::min(at, text.size()), 3);
  return three == "\xE2\x80\x99" || three == "\xE2\x80\x9D" ? 3 : 0;
}

// Whether the point at `at` belongs to the word before it.
bool is_abbreviation(std::string_view text, std::size_t at) {
  std::size_t begin = at;
  while (begin > 0 && (std::isalpha(static_cast<unsigned char>(text[begin - 1])) != 0 || text[begin - 1] == '.')) --begin;
  const std::string_view word = text.substr(begin, at - begin);
  const bool initial = word.size() == 1 && std::isupper(static_cast<unsigned char>(word[0])) != 0 && word != "I";
  return initial || std::find(std::begin(kAbbreviations), std::end(kAbbreviations), word) != std::end(kAbbreviations);
}

std::string with_single_blanks(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (!is_white(c)) out += c;
    else if (!out.empty() && out.back() != ' ') out += ' ';
  }
  if (!out.empty() && out.back() == ' ') out.pop_back();
  return out;
}

}  // namespace

std::vector<std::string> split_sentences(std::string_view text) {
  std::vector<std::string> sentences;
  std::size_t begin = 0;
  const auto cut = [&](std::size_t end) {
    if (std::string sentence = with_single_blanks(text.substr(begin, end - begin)); !sentence.empty())
      sentences.push_back(std::move(sentence));
    begin = end;
  };
  for (std::size_t at = 0; at < text.size(); ++at) {
    const char c = text[at];
    if (c == '\n') {
      std::size_t next = at + 1;
      while (next < text.size() && is_white(text[next]) && text[next] != '\n') ++next;
      if (next < text.size() && text[next] == '\n') cut(at);
      continue;
    }
    if (c != '.' && c != '!' && c != '?') continue;
    std::size_t end = at + 1;
    while (const std::size_t n = closing(text, end)) end += n;
    std::size_t next = end;
    while (next < text.size() && is_white(text[next])) ++next;
    if (next == end || (next < text.size() && std::islower(static_cast<unsigned char>(text[next])) != 0)) continue;
    if (c == '.' && is_abbreviation(text, at)) continue;
    cut(end);
    at = end - 1;
  }
  cut(text.size());
  return sentences;
}

}  // namespace longhand
