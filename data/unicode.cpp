// UTF-8, character kinds and NFC; see unicode.h.
#include "data/unicode.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/error.h"

namespace longhand {
namespace {

constexpr char32_t kCodePoints = 0x110000;
constexpr uint8_t kMayChange = 4;

// The number of ASCII bytes at text[pos...], eight at a time.
std::size_t ascii_run(std::string_view text, std::size_t pos) {
  std::size_t end = pos;
  for (uint64_t eight = 0; end + 8 <= text.size(); end += 8) {
    std::memcpy(&eight, text.data() + end, 8);
    if ((eight & 0x8080808080808080ull) != 0) break;
  }
  while (end < text.size() && static_cast<unsigned char>(text[end]) < 0x80) ++end;
  return end - pos;
}

CharKind kind_from_category(char32_t code) {
  const bool control_space = (code >= 0x09 && code <= 0x0D) || code == 0x85;  // White_Space outside the separator categories
  if (control_space) return CharKind::space;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(code))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return CharKind::letter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return CharKind::number;
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return CharKind::space;
    default:
      return CharKind::other;
  }
}

constexpr utf8proc_option_t kCanonical = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
constexpr utf8proc_option_t kCompose = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);

// Appends the full canonical decomposition of one code point.
void append_decomposed(char32_t code, std::vector<utf8proc_int32_t>& out) {
  constexpr int kLongest = 8;  // the longest canonical decomposition has 4 code points
  utf8proc_int32_t parts[kLongest];
  int boundary_class = 0;
  const utf8proc_ssize_t n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(code), parts, kLongest, kCanonical, &boundary_class);
  if (n < 0 || n > kLongest) throw ValueError(fmt::format("unicode: no canonical decomposition of U+{:04X}", static_cast<uint32_t>(code)));
  out.insert(out.end(), parts, parts + n);
}

utf8proc_propval_t combining_class(utf8proc_int32_t code) {
  return utf8proc_get_property(code)->combining_class;
}

// Sorts every run of combining marks by class, equal classes in their order. A stable sort, because a run may be megabytes long.
void order_marks(std::vector<utf8proc_int32_t>& codes) {
  const auto is_mark = [](utf8proc_int32_t code) { return combining_class(code) != 0; };
  for (auto begin = codes.begin(); begin != codes.end();) {
    begin = std::find_if(begin, codes.end(), is_mark);
    const auto end = std::find_if_not(begin, codes.end(), is_mark);
    if (end - begin > 1) std::stable_sort(begin, end, [](auto a, auto b) { return combining_class(a) < combining_class(b); });
    begin = end;
  }
}

// Decomposes, orders the marks, composes: NFC of a stretch that the table could not wave through.
void append_nfc(std::string_view text, std::string& out) {
  std::vector<utf8proc_int32_t> codes;
  for (std::size_t pos = 0; pos < text.size();) {
    const Utf8Step step = read_valid_utf8(text, pos);
    append_decomposed(step.code, codes);
    pos += step.length;
  }
  order_marks(codes);
  const auto length = utf8proc_normalize_utf32(codes.data(), static_cast<utf8proc_ssize_t>(codes.size()), kCompose);
  if (length < 0) throw ValueError(fmt::format("unicode: composing failed: {}", utf8proc_errmsg(length)));
  for (utf8proc_ssize_t i = 0; i < length; ++i) append_utf8(static_cast<char32_t>(codes[static_cast<std::size_t>(i)]), out);
}

std::vector<uint8_t> make_table() {
  std::vector<uint8_t> bits(kCodePoints);
  std::vector<utf8proc_int32_t> parts;
  for (char32_t code = 0; code < kCodePoints; ++code) {
    const auto signed_code = static_cast<utf8proc_int32_t>(code);
    bits[code] |= static_cast<uint8_t>(kind_from_category(code));
    if (combining_class(signed_code) != 0) bits[code] |= kMayChange;
    if (code < 0x80 || utf8proc_category(signed_code) == UTF8PROC_CATEGORY_CN || (code >= 0xD800 && code < 0xE000)) continue;
    parts.clear();
    append_decomposed(code, parts);
    if (parts.size() == 1 && parts[0] == signed_code) continue;
    const auto last = static_cast<char32_t>(parts.back());
    const bool starts_with_mark = combining_class(parts[0]) != 0;
    const auto composed = utf8proc_normalize_utf32(parts.data(), static_cast<utf8proc_ssize_t>(parts.size()), kCompose);
    if (composed == 1 && parts[0] == signed_code && !starts_with_mark)
      bits[last] |= kMayChange;     // `last` is what joins the text before it to make `code`
    else bits[code] |= kMayChange;  // NFC replaces `code` itself
  }
  return bits;
}

}  // namespace

CharTable::CharTable() {
  static const std::vector<uint8_t> bits = make_table();
  bits_ = bits.data();
}

const CharTable& CharTable::instance() {
  static const CharTable table;
  return table;
}

Utf8Step read_utf8(std::string_view text, std::size_t pos) {
  const auto byte = [&](std::size_t i) -> unsigned { return pos + i < text.size() ? static_cast<unsigned char>(text[pos + i]) : 0u; };
  const unsigned lead = byte(0);
  if (lead < 0x80) return {lead, 1, true};
  if (lead < 0xC2 || lead > 0xF4) return {0xFFFD, 1, false};
  const uint32_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte has a narrower range after four leads: no overlong forms, no surrogates, nothing above U+10FFFF.
  const unsigned low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  if (byte(1) < low || byte(1) > high) return {0xFFFD, 1, false};
  for (uint32_t i = 2; i < length; ++i)
    if ((byte(i) & 0xC0) != 0x80) return {0xFFFD, i, false};
  return {read_valid_utf8(text, pos).code, length, true};
}

std::optional<std::size_t> find_invalid_utf8(std::string_view text) {
  for (std::size_t pos = 0; pos < text.size();) {
    if (static_cast<unsigned char>(text[pos]) < 0x80) {
      pos += ascii_run(text, pos);
      continue;
    }
    const Utf8Step step = read_utf8(text, pos);
    if (!step.valid) return pos;
    pos += step.length;
  }
  return std::nullopt;
}

void require_utf8(const std::string& who, std::string_view text) {
  const auto offset = find_invalid_utf8(text);
  if (!offset) return;
  std::string bytes;
  for (std::size_t i = *offset; i < std::min(*offset + 4, text.size()); ++i)
    bytes += fmt::format("{}{:02X}", bytes.empty() ? "" : " ", static_cast<unsigned char>(text[i]));
  throw ValueError(who + ": the text is not valid UTF-8", {{"byte offset", std::to_string(*offset)},
                                                           {"bytes", bytes},
                                                           {"expected", "UTF-8"},
                                                           {"try", "convert the text to UTF-8 first, for example with iconv"}});
}

std::string replace_invalid_utf8(std::string_view bytes) {
  if (!find_invalid_utf8(bytes)) return std::string(bytes);
  std::string out;
  for (std::size_t pos = 0; pos < bytes.size();) {
    const Utf8Step step = read_utf8(bytes, pos);
    if (step.valid) out += bytes.substr(pos, step.length);
    else append_utf8(0xFFFD, out);
    pos += step.length;
  }
  return out;
}

void append_utf8(char32_t code, std::string& out) {
  const auto push = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  const auto tail = [&](int shift) { push(0x80 | (code >> shift & 0x3F)); };
  if (code < 0x80) {
    push(code);
  } else if (code < 0x800) {
    push(0xC0 | code >> 6), tail(0);
  } else if (code < 0x10000) {
    push(0xE0 | code >> 12), tail(6), tail(0);
  } else {
    push(0xF0 | code >> 18), tail(12), tail(6), tail(0);
  }
}

std::string_view to_nfc(std::string_view text, std::string& buffer) {
  const CharTable& table = CharTable::instance();
  buffer.clear();
  std::size_t written = 0;    // text[0, written) is in the buffer, normalised
  std::size_t last_safe = 0;  // start of the latest character that NFC leaves alone
  for (std::size_t pos = 0; pos < text.size();) {
    if (static_cast<unsigned char>(text[pos]) < 0x80) {
      pos += ascii_run(text, pos);
      last_safe = pos - 1;
      continue;
    }
    Utf8Step step = read_valid_utf8(text, pos);
    if (!table.may_change_in_nfc(step.code)) {
      last_safe = pos;
      pos += step.length;
      continue;
    }
    // A stretch to normalise: from the safe character before (which may take the marks in) to the next safe one.
    const std::size_t begin = std::max(last_safe, written);
    std::size_t end = pos;
    while (end < text.size()) {
      step = read_valid_utf8(text, end);
      if (!table.may_change_in_nfc(step.code)) break;
      end += step.length;
    }
    buffer += text.substr(written, begin - written);
    append_nfc(text.substr(begin, end - begin), buffer);
    written = pos = last_safe = end;
  }
  if (written == 0) return text;
  buffer += text.substr(written);
  return buffer;
}

}  // namespace longhand
