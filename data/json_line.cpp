// The strict line parser; see json_line.h. Runs of plain text are checked and copied eight bytes at a time.
#include "data/json_line.h"

#include <bit>
#include <cstdint>
#include <cstring>

namespace longhand {
namespace {

using Byte = unsigned char;

static_assert(std::endian::native == std::endian::little, "plain_bytes counts from the lowest byte of a word");

// How many of the eight bytes, from the first, are neither a quote, a backslash, a control character nor above 0x7F.
// Each term sets the high bit of the bytes it finds; a borrow can only add a false find behind a true one.
int plain_bytes(uint64_t word) {
  constexpr uint64_t kOnes = 0x0101010101010101u, kHighs = 0x8080808080808080u;
  const uint64_t quote = (word ^ (kOnes * '"')) - kOnes;
  const uint64_t backslash = (word ^ (kOnes * '\\')) - kOnes;
  const uint64_t control = word - kOnes * 0x20;
  return std::countr_zero((quote | backslash | control | word) & kHighs) / 8;
}

// Length of the well-formed UTF-8 sequence that starts at p (first byte above 0x7F), or 0.
std::size_t utf8_length(const Byte* p, const Byte* end) {
  const auto left = static_cast<std::size_t>(end - p);
  auto follows = [&](std::size_t i, int low, int high) { return i < left && p[i] >= low && p[i] <= high; };
  const Byte first = p[0];
  if (first >= 0xC2 && first <= 0xDF) return follows(1, 0x80, 0xBF) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF) {
    const int low = first == 0xE0 ? 0xA0 : 0x80;   // shorter forms exist below
    const int high = first == 0xED ? 0x9F : 0xBF;  // surrogates lie above
    return follows(1, low, high) && follows(2, 0x80, 0xBF) ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const int low = first == 0xF0 ? 0x90 : 0x80;   // shorter forms exist below
    const int high = first == 0xF4 ? 0x8F : 0xBF;  // U+10FFFF is the last code
    return follows(1, low, high) && follows(2, 0x80, 0xBF) && follows(3, 0x80, 0xBF) ? 4 : 0;
  }
  return 0;
}

std::size_t put_utf8(char* out, uint32_t code) {
  auto tail = [](uint32_t bits) { return static_cast<char>(0x80 | (bits & 0x3F)); };
  if (code < 0x80) {
    out[0] = static_cast<char>(code);
    return 1;
  }
  if (code < 0x800) {
    out[0] = static_cast<char>(0xC0 | (code >> 6));
    out[1] = tail(code);
    return 2;
  }
  if (code < 0x10000) {
    out[0] = static_cast<char>(0xE0 | (code >> 12));
    out[1] = tail(code >> 6);
    out[2] = tail(code);
    return 3;
  }
  out[0] = static_cast<char>(0xF0 | (code >> 18));
  out[1] = tail(code >> 12);
  out[2] = tail(code >> 6);
  out[3] = tail(code);
  return 4;
}

int hex_digit(Byte c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

bool is_digit(Byte c) {
  return c >= '0' && c <= '9';
}

class LineParser {
 public:
  LineParser(std::string_view line, JsonLine& out)
      : begin_(reinterpret_cast<const Byte*>(line.data())), p_(begin_), end_(begin_ + line.size()), out_(out) {}

  std::optional<JsonFault> run() {
    out_.set_name.clear();
    skip_blanks();
    if (p_ == end_ || *p_ != '{') return JsonFault{offset(), "the line is not a JSON object"};
    if (!object(Level::document, 1)) return fault_;
    skip_blanks();
    if (p_ != end_) return JsonFault{offset(), "there is more after the object"};
    if (!has_text_) return JsonFault{0, "the object has no field \"text\""};
    return std::nullopt;
  }

 private:
  enum class Level { document, meta, other };

  std::size_t offset() const { return static_cast<std::size_t>(p_ - begin_); }

  bool fail(const char* rule) { return fail_at(p_, rule); }
  bool fail_at(const Byte* where, const char* rule) {
    fault_ = {static_cast<std::size_t>(where - begin_), rule};
    return false;
  }

  void skip_blanks() {
    while (p_ != end_ && (*p_ == ' ' || *p_ == '\t' || *p_ == '\r' || *p_ == '\n')) ++p_;
  }

  bool expect(char c, const char* rule) {
    if (p_ == end_) return fail("the line ends inside the object");
    if (*p_ != static_cast<Byte>(c)) return fail(rule);
    ++p_;
    return true;
  }

  bool object(Level level, int depth) {
    if (depth > kMaxJsonNesting) return fail("objects and lists are nested too deep");
    ++p_;  // {
    skip_blanks();
    if (p_ != end_ && *p_ == '}') {
      ++p_;
      return true;
    }
    while (true) {
      skip_blanks();
      const Byte* key_at = p_;
      if (p_ == end_) return fail("the line ends inside the object");
      if (*p_ != '"') return fail(*p_ == '}' ? "a comma stands before the closing brace" : "a field name in quotes must stand here");
      if (!string(level == Level::other ? nullptr : &key_)) return false;
      skip_blanks();
      if (!expect(':', "a colon must follow the field name")) return false;
      skip_blanks();
      if (!field(level, depth, key_at)) return false;
      skip_blanks();
      if (p_ == end_) return fail("the line ends inside the object");
      if (*p_ == '}') break;
      if (!expect(',', "a comma or a closing brace must stand here")) return false;
    }
    ++p_;
    return true;
  }

  // The value of the field whose name is in key_ (levels document and meta).
  bool field(Level level, int depth, const Byte* key_at) {
    if (level == Level::document && key_ == "text") {
      if (has_text_) return fail_at(key_at, "the field \"text\" stands twice");
      has_text_ = true;
      if (p_ == end_) return fail("the line ends inside the object");
      if (*p_ != '"') return fail("the field \"text\" is not a string");
      return string(&out_.text);
    }
    if (level == Level::document && key_ == "meta") {
      if (has_meta_) return fail_at(key_at, "the field \"meta\" stands twice");
      has_meta_ = true;
      return value(Level::meta, depth + 1);
    }
    if (level == Level::meta && key_ == "pile_set_name") {
      if (has_set_name_) return fail_at(key_at, "the field \"pile_set_name\" stands twice");
      has_set_name_ = true;
      if (p_ != end_ && *p_ == '"') return string(&out_.set_name);
    }
    return value(Level::other, depth + 1);
  }

  bool value(Level level, int depth) {
    if (p_ == end_) return fail("the line ends where a value must stand");
    switch (*p_) {
      case '{':
        return object(level, depth);
      case '[':
        return list(depth);
      case '"':
        return string(nullptr);
      case 't':
        return word("true");
      case 'f':
        return word("false");
      case 'n':
        return word("null");
      default:
        return number();
    }
  }

  bool list(int depth) {
    if (depth > kMaxJsonNesting) return fail("objects and lists are nested too deep");
    ++p_;  // [
    skip_blanks();
    if (p_ != end_ && *p_ == ']') {
      ++p_;
      return true;
    }
    while (true) {
      skip_blanks();
      if (p_ != end_ && *p_ == ']') return fail("a comma stands before the closing bracket");
      if (!value(Level::other, depth + 1)) return false;
      skip_blanks();
      if (p_ == end_) return fail("the line ends inside a list");
      if (*p_ == ']') break;
      if (!expect(',', "a comma or a closing bracket must stand here")) return false;
    }
    ++p_;
    return true;
  }

  bool word(std::string_view expected) {
    if (static_cast<std::size_t>(end_ - p_) < expected.size() || std::memcmp(p_, expected.data(), expected.size()) != 0)
      return fail("a value must be a string, number, object, list, true, false or null");
    p_ += expected.size();
    return true;
  }

  bool digits() {
    if (p_ == end_ || !is_digit(*p_)) return fail("a digit must stand here");
    while (p_ != end_ && is_digit(*p_)) ++p_;
    return true;
  }

  bool number() {
    if (*p_ != '-' && !is_digit(*p_)) return fail("a value must be a string, number, object, list, true, false or null");
    if (*p_ == '-') ++p_;
    if (p_ != end_ && *p_ == '0') {
      ++p_;
      if (p_ != end_ && is_digit(*p_)) return fail("a number has a leading zero");
    } else if (!digits()) {
      return false;
    }
    if (p_ != end_ && *p_ == '.') {
      ++p_;
      if (!digits()) return false;
    }
    if (p_ != end_ && (*p_ == 'e' || *p_ == 'E')) {
      ++p_;
      if (p_ != end_ && (*p_ == '+' || *p_ == '-')) ++p_;
      if (!digits()) return false;
    }
    return true;
  }

  // At the opening quote; decodes into `out` unless it is null. A decoded string is never longer than its escaped form, so room for the
  // rest of the line is room enough.
  bool string(std::string* out) {
    const Byte* opening = p_++;
    char sink[8];
    char* put = sink;
    if (out) {
      out->resize(static_cast<std::size_t>(end_ - p_));
      put = out->data();
    }
    while (true) {
      while (end_ - p_ >= 8) {
        uint64_t eight;
        std::memcpy(&eight, p_, 8);
        std::memcpy(put, p_, 8);
        const int plain = plain_bytes(eight);
        if (plain < 8) {
          p_ += plain;
          if (out) put += plain;
          break;
        }
        p_ += 8;
        if (out) put += 8;
      }
      if (p_ == end_) return fail_at(opening, "the string never ends");
      const Byte c = *p_;
      if (c == '"') break;
      if (c == '\\') {
        const std::size_t bytes = escape(put, opening);
        if (bytes == 0) return false;
        if (out) put += bytes;
      } else if (c < 0x20) {
        return fail("a control character stands unescaped in a string");
      } else {
        const std::size_t bytes = c < 0x80 ? 1 : utf8_length(p_, end_);
        if (bytes == 0) return fail("the bytes are not well-formed UTF-8");
        for (std::size_t i = 0; i < bytes; ++i) put[i] = static_cast<char>(p_[i]);
        p_ += bytes;
        if (out) put += bytes;
      }
    }
    ++p_;  // closing quote
    if (out) out->resize(static_cast<std::size_t>(put - out->data()));
    return true;
  }

  // At a backslash; writes the character meant to `put` and returns its bytes, 0 on a fault.
  std::size_t escape(char* put, const Byte* opening) {
    if (end_ - p_ < 2) return fail_at(opening, "the string never ends"), 0;
    char plain = 0;
    switch (p_[1]) {
      case '"':
        plain = '"';
        break;
      case '\\':
        plain = '\\';
        break;
      case '/':
        plain = '/';
        break;
      case 'b':
        plain = '\b';
        break;
      case 'f':
        plain = '\f';
        break;
      case 'n':
        plain = '\n';
        break;
      case 'r':
        plain = '\r';
        break;
      case 't':
        plain = '\t';
        break;
      case 'u':
        return unicode_escape(put, opening);
      default:
        return fail("an unknown escape stands in a string"), 0;
    }
    p_ += 2;
    *put = plain;
    return 1;
  }

  // The number of \uXXXX at p, or -1.
  int32_t four_digits(const Byte* p) {
    if (end_ - p < 6 || p[0] != '\\' || p[1] != 'u') return -1;
    int32_t code = 0;
    for (int i = 2; i < 6; ++i) {
      const int digit = hex_digit(p[i]);
      if (digit < 0) return -1;
      code = code * 16 + digit;
    }
    return code;
  }

  std::size_t unicode_escape(char* put, const Byte* opening) {
    const int32_t unit = four_digits(p_);
    if (unit < 0) {
      const bool cut = end_ - p_ < 6 && std::memchr(p_, '"', static_cast<std::size_t>(end_ - p_)) == nullptr;
      return cut ? fail_at(opening, "the string never ends") : fail("a \\u escape needs four hexadecimal digits"), 0;
    }
    auto code = static_cast<uint32_t>(unit);
    if (code >= 0xDC00 && code <= 0xDFFF) return fail("a low surrogate escape stands without its partner"), 0;
    if (code >= 0xD800 && code <= 0xDBFF) {
      const int32_t low = four_digits(p_ + 6 <= end_ ? p_ + 6 : end_);
      if (low < 0xDC00 || low > 0xDFFF) return fail("a high surrogate escape stands without its partner"), 0;
      code = 0x10000 + ((code - 0xD800) << 10) + (static_cast<uint32_t>(low) - 0xDC00);
      p_ += 6;
    }
    p_ += 6;
    return put_utf8(put, code);
  }

  const Byte* begin_;
  const Byte* p_;
  const Byte* end_;
  JsonLine& out_;
  std::string key_;
  JsonFault fault_{0, ""};
  bool has_text_ = false, has_meta_ = false, has_set_name_ = false;
};

}  // namespace

std::optional<JsonFault> parse_json_line(std::string_view line, JsonLine& out) {
  return LineParser(line, out).run();
}

}  // namespace longhand
