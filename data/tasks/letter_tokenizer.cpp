// See letter_tokenizer.h.
#include "data/tasks/letter_tokenizer.h"

#include <charconv>

#include "core/error.h"

namespace longhand {

LetterTokenizer::LetterTokenizer(int64_t letters) : letters_(letters) {
  if (letters < 1 || letters > kMostLetters)
    throw ValueError("tokenizer letters: an alphabet of 1 to 26 letters", {{"letters", std::to_string(letters)}});
  for (int64_t i = 0; i < letters; ++i) symbols_ += static_cast<char>('a' + i);
  symbols_ += "$|.*";
}

std::unique_ptr<LetterTokenizer> LetterTokenizer::from_name(const std::string& name) {
  constexpr std::string_view kPrefix = "letters:";
  if (!name.starts_with(kPrefix)) return nullptr;
  int64_t letters = 0;
  const char *begin = name.data() + kPrefix.size(), *end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(begin, end, letters);
  if (error != std::errc() || stop != end || letters < 1 || letters > kMostLetters)
    throw ConfigError("tokenizer: an alphabet that there is not", {{"given", name}, {"expected", "letters:1 to letters:26"}});
  return std::make_unique<LetterTokenizer>(letters);
}

void LetterTokenizer::encode(std::string_view utf8, std::vector<int32_t>& out) const {
  for (std::size_t i = 0; i < utf8.size(); ++i) {
    const auto id = symbols_.find(utf8[i]);
    if (id == std::string::npos)
      throw ValueError(
          "tokenizer " + name() + ": a character that has no id",
          {{"byte", std::to_string(i)}, {"expected", "one of " + symbols_}, {"try", "a text of the copying task, such as $abc|"}});
    out.push_back(static_cast<int32_t>(id));
  }
}

std::string LetterTokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const auto piece = bytes_of(ids[i]);
    if (!piece)
      throw ValueError("tokenizer " + name() + ": an id stands for no token",
                       {{"id", std::to_string(ids[i])}, {"position", std::to_string(i)}});
    text += *piece;
  }
  return text;
}

std::optional<std::string_view> LetterTokenizer::bytes_of(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return std::nullopt;
  return std::string_view(symbols_).substr(static_cast<std::size_t>(id), 1);
}

}  // namespace longhand
