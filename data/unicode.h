// The little of Unicode that a tokenizer needs: UTF-8, the four kinds of character the word pattern tells apart, and NFC.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace longhand {

/// One step through UTF-8: the code point and its length in bytes. Where no valid character starts, `valid` is false and `length`
/// counts the bytes that belong together in one replacement character (the longest proper beginning of a character, at least 1).
struct Utf8Step {
  char32_t code;
  uint32_t length;
  bool valid;
};

/// Reads the character at text[pos]; pos < text.size().
/// source   The Unicode Standard, Table 3-7 (well-formed byte sequences) and section 3.9 (maximal subparts)
Utf8Step read_utf8(std::string_view text, std::size_t pos);

/// The byte offset of the first invalid sequence, or nothing when all of `text` is UTF-8.
std::optional<std::size_t> find_invalid_utf8(std::string_view text);

/// errors   ValueError "<who>: the text is not valid UTF-8" with byte offset and bytes
void require_utf8(const std::string& who, std::string_view text);

/// `bytes` with U+FFFD in place of each maximal invalid part.
std::string replace_invalid_utf8(std::string_view bytes);

void append_utf8(char32_t code, std::string& out);

/// The kinds the word pattern tells apart; every code point has exactly one.
enum class CharKind : uint8_t { other, letter, number, space };  // \p{L}: Lu Ll Lt Lm Lo; \p{N}: Nd Nl No; \s: White_Space

/// One byte for each of the 0x110000 code points, computed once from utf8proc's categories and decompositions.
class CharTable {
 public:
  static const CharTable& instance();

  CharKind kind(char32_t code) const { return static_cast<CharKind>(bits_[code] & 3); }
  /// False for a character that NFC leaves alone and that cannot join the text before it: text made only of these is NFC already,
  /// and NFC(a + b) = NFC(a) + NFC(b) when b starts with one.
  bool may_change_in_nfc(char32_t code) const { return (bits_[code] & 4) != 0; }

 private:
  CharTable();
  const uint8_t* bits_;  // lives as long as the program
};

/// The character at text[pos] of text known to be valid UTF-8.
inline Utf8Step read_valid_utf8(std::string_view text, std::size_t pos) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[pos + i]); };
  const auto tail = [&](std::size_t i) { return static_cast<char32_t>(byte(i) & 0x3F); };
  const char32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true};
  if (lead < 0xE0) return {(lead & 0x1F) << 6 | tail(1), 2, true};
  if (lead < 0xF0) return {(lead & 0x0F) << 12 | tail(1) << 6 | tail(2), 3, true};
  return {(lead & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4, true};
}

/// Normalization Form C of valid UTF-8. Returns `text` itself when it is NFC already, else a view of `buffer`.
/// Time grows as n log n even for long runs of combining marks.
/// source   Unicode Standard Annex 15
std::string_view to_nfc(std::string_view text, std::string& buffer);

}  // namespace longhand
