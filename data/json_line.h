// A strict parser for one line of a shard: {"text": "...", "meta": {"pile_set_name": "..."}} and whatever else the object holds.
// One pass, no tree: two strings are decoded, everything else is only checked.
#pragma once
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace longhand {

/// The two strings that a shard's line carries.
struct JsonLine {
  std::string text;      // decoded UTF-8; may hold U+0000
  std::string set_name;  // meta.pile_set_name, or "" when the line has none
};

/// Where a line breaks a rule, and which.
struct JsonFault {
  std::size_t byte;  // offset in the line, from 0
  const char* rule;  // a phrase such as "the string never ends"
};

/// Objects and lists may stand inside one another this deep, the line's own object included.
inline constexpr int kMaxJsonNesting = 128;

/// Parses one line (no newline in it) as exactly one JSON object with one string `text`.
/// strict   RFC 8259: no trailing commas, comments, NaN, leading zeros, raw control characters; UTF-8 well-formed (no overlong form, no
///          surrogate, nothing above U+10FFFF); \u escapes of surrogates only in pairs; only blanks after the object
/// stricter a second `text`, `meta` or `meta.pile_set_name` is refused, so that the document is never a matter of the reader;
///          nesting ends at kMaxJsonNesting
/// returns  nothing when the line is sound, else its first fault; `out` is then unspecified
/// source   RFC 8259 for JSON, Unicode 15 table 3-7 for well-formed UTF-8
std::optional<JsonFault> parse_json_line(std::string_view line, JsonLine& out);

}  // namespace longhand
