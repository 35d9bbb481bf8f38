// UTF-8, character kinds, NFC and the word pattern, each against an independent implementation.
#include "data/unicode.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <utf8proc.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "core/error.h"
#include "data/word_splitter.h"
#include "tests/support/check.h"

using namespace longhand;

namespace {

std::string utf8(std::initializer_list<char32_t> codes) {
  std::string text;
  for (char32_t code : codes) append_utf8(code, text);
  return text;
}

// A pattern run by PCRE2 with Unicode classes.
class Pattern {
 public:
  explicit Pattern(const char* pattern) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP | PCRE2_DOTALL, &error,
                              &offset, nullptr));
    REQUIRE(code_ != nullptr);
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
    match_.reset(pcre2_match_data_create_from_pattern(code_.get(), nullptr));
  }

  // The number of the group that matched at text[from], and the end of the match.
  struct Match {
    int group;
    std::size_t end;
  };
  Match at(std::string_view text, std::size_t from) {
    const int groups = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                   PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, match_.get(), nullptr);
    REQUIRE(groups > 0);
    return {groups - 1, pcre2_get_ovector_pointer(match_.get())[1]};
  }

 private:
  struct Free {
    void operator()(pcre2_code* p) const { pcre2_code_free(p); }
    void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  };
  std::unique_ptr<pcre2_code, Free> code_;
  std::unique_ptr<pcre2_match_data, Free> match_;
};

// Code points that PCRE2 knows, apart from surrogates; both libraries agree on these (checked below).
const std::vector<char32_t>& assigned_codes() {
  static const auto codes = [] {
    Pattern unassigned(R"((\p{Cn})|(.))");
    std::vector<char32_t> known;
    for (char32_t code = 0; code < 0x110000; ++code)
      if ((code < 0xD800 || code > 0xDFFF) && unassigned.at(utf8({code}), 0).group == 2 &&
          utf8proc_category(static_cast<utf8proc_int32_t>(code)) != UTF8PROC_CATEGORY_CN)
        known.push_back(code);
    return known;
  }();
  return codes;
}

// Text that dwells on what is hard: spaces, apostrophes, marks, Hangul, and any other character now and then.
std::string random_text(std::mt19937& random) {
  static const std::vector<std::string> kPieces = {" ", "  ", "\n", "\t ", "'", "'s", "'ll", "'r", "'re", " '", "a", "Z", "1", "!", "_"};
  static const std::vector<char32_t> kCodes = {0x85,   0xA0,  0x1680, 0x180E, 0x2000, 0x200B,  0x2028, 0x202F, 0x3000,
                                               0xFEFF, 0xE9,  0x301,  0x323,  0x1161, 0x11A8,  0x1100, 0xAC00, 0x212B,
                                               0x958,  0x9C7, 0x9BE,  0xB2,   0x2160, 0x1D15E, 0x344,  0x37E};
  const auto& any = assigned_codes();
  const auto pick = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  std::string text;
  for (std::size_t n = pick(30) + 1; n > 0; --n) {
    const std::size_t what = pick(4);
    if (what < 2) text += kPieces[pick(kPieces.size())];
    else append_utf8(what == 2 ? kCodes[pick(kCodes.size())] : any[pick(any.size())], text);
  }
  return text;
}

// The pattern with \s spelled out as White_Space: PCRE2's own \s also takes U+180E, which left White_Space in Unicode 6.3.
constexpr const char* kWordPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+)";

// True when WordSplitter and PCRE2 cut `text` alike.
bool splits_like(Pattern& pattern, const std::string& text) {
  WordSplitter words(text);
  for (std::size_t pos = 0; pos < text.size();) {
    const std::size_t end = pattern.at(text, pos).end;
    if (words.next() != std::string_view(text).substr(pos, end - pos)) return false;
    pos = end;
  }
  return words.next().empty();
}

std::vector<std::string> words_of(std::string_view text) {
  std::vector<std::string> words;
  WordSplitter splitter(text);
  for (auto word = splitter.next(); !word.empty(); word = splitter.next()) words.emplace_back(word);
  return words;
}

}  // namespace

TEST("UTF-8 of every code point is written and read back, and invalid forms are refused") {
  for (char32_t code = 0; code < 0x110000; ++code) {
    if (code >= 0xD800 && code <= 0xDFFF) continue;
    const std::string text = utf8({code});
    const Utf8Step step = read_utf8(text, 0);
    if (!step.valid || step.code != code || step.length != text.size()) FAIL("code point ", static_cast<uint32_t>(code));
  }
  struct Case {
    std::string bytes;
    std::size_t offset;
    std::string replaced;  // one mark for each longest beginning of a character
  };
  const std::string mark = utf8({0xFFFD});
  for (const auto& [bytes, offset, replaced] : std::vector<Case>{
           {"ab\xFFz", 2, "ab" + mark + "z"},
           {"\x80", 0, mark},
           {"a\xC0\x80", 1, "a" + mark + mark},  // overlong NUL
           {"\xE2\x82", 0, mark},                // cut short
           {"\xE2\x82z", 0, mark + "z"},
           {"\xE0\x9F\xBF", 0, mark + mark + mark},  // overlong
           {"\xED\xA0\x80", 0, mark + mark + mark},  // a surrogate
           {"\xF0\x9F\x98", 0, mark},
           {"\xF4\x90\x80\x80", 0, mark + mark + mark + mark},  // above U+10FFFF
           {"\xF0\x9F\xF0\x9F\x98\x80", 0, mark + utf8({0x1F600})},
           {std::string("\xC3\0", 2), 0, mark + std::string(1, '\0')},
       }) {
    CHECK(find_invalid_utf8(bytes) == offset);
    CHECK(replace_invalid_utf8(bytes) == replaced);
  }
  CHECK(!find_invalid_utf8("plain ASCII longer than eight bytes"));
  CHECK_THROWS_WITH_AS(require_utf8("here", "0123456789\xFF"), doctest::Contains("byte offset  10"), ValueError);
}

TEST("the kind of every code point is PCRE2's, apart from those that one of the two libraries does not know") {
  Pattern kinds(R"((\p{L})|(\p{N})|(\p{White_Space})|(\p{Cn})|(.))");
  int wrong = 0;
  for (char32_t code = 0; code < 0x110000; ++code) {
    if (code >= 0xD800 && code <= 0xDFFF) continue;
    const int group = kinds.at(utf8({code}), 0).group;
    if (group == 4 || utf8proc_category(static_cast<utf8proc_int32_t>(code)) == UTF8PROC_CATEGORY_CN) continue;
    const CharKind expected = group == 1   ? CharKind::letter
                              : group == 2 ? CharKind::number
                              : group == 3 ? CharKind::space
                                           : CharKind::other;
    wrong += CharTable::instance().kind(code) == expected ? 0 : 1;
  }
  CHECK(wrong == 0);
}

TEST("white space is the 25 characters of Unicode's White_Space") {
  int spaces = 0;
  for (char32_t code = 0; code < 0x110000; ++code) spaces += CharTable::instance().kind(code) == CharKind::space ? 1 : 0;
  CHECK(spaces == 25);
}

TEST("NFC by hand") {
  std::string buffer;
  CHECK(to_nfc("plain", buffer) == "plain");
  CHECK(to_nfc(utf8({'e', 0x301}), buffer) == utf8({0xE9}));
  CHECK(to_nfc(utf8({'x', 'e', 0x301, 'y'}), buffer) == utf8({'x', 0xE9, 'y'}));
  CHECK(to_nfc(utf8({0x1EA1, 0x306}), buffer) == utf8({0x1EB7}));                 // a with dot below, then breve: taken apart, put together
  CHECK(to_nfc(utf8({'q', 0x307, 0x323}), buffer) == utf8({'q', 0x323, 0x307}));  // marks in the order of their classes
  CHECK(to_nfc(utf8({0x212B, ' ', 0x2126}), buffer) == utf8({0xC5, ' ', 0x3A9}));  // Angstrom and Ohm signs
  CHECK(to_nfc(utf8({0x1100, 0x1161, 0x11A8}), buffer) == utf8({0xAC01}));         // Hangul jamo
  CHECK(to_nfc(utf8({0x958}), buffer) == utf8({0x915, 0x93C}));                    // excluded from composition
  CHECK(to_nfc(utf8({0x301}), buffer) == utf8({0x301}));
}

TEST("NFC equals utf8proc's on random text and on long runs of marks") {
  static const std::vector<char32_t> kMarks = {0x300, 0x301, 0x323, 0x327, 0x331};
  std::mt19937 random(1);
  std::string buffer;
  for (int i = 0; i < 20000; ++i) {
    std::string text = random_text(random);
    if (i % 100 == 0)
      for (int marks = 0; marks < 100; ++marks) append_utf8(kMarks[random() % kMarks.size()], text);
    utf8proc_uint8_t* expected = nullptr;
    const auto length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                                     &expected, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    REQUIRE(length >= 0);
    const std::string whole(reinterpret_cast<const char*>(expected), static_cast<std::size_t>(length));
    std::free(expected);
    CHECK(to_nfc(text, buffer) == whole);
  }
}

TEST("a megabyte of combining marks is normalised in n log n") {
  std::string text = "a";
  while (text.size() < 1'000'000) text += utf8({0x301, 0x323});
  std::string buffer;
  const auto normalised = to_nfc(text, buffer);
  CHECK(read_utf8(normalised, 0).code == 0x1EA1);  // the first dot below joins the letter
  CHECK(normalised.size() == text.size());         // two bytes of a mark and one of the letter became three
}

TEST("words by hand") {
  using Words = std::vector<std::string>;
  CHECK(words_of("Hello world") == Words{"Hello", " world"});
  CHECK(words_of("I'm can't WE'LL") == Words{"I", "'m", " can", "'t", " WE", "'", "LL"});
  CHECK(words_of("a  b") == Words{"a", " ", " b"});
  CHECK(words_of("a \n b") == Words{"a", " \n", " b"});
  CHECK(words_of("a\n\n\nb") == Words{"a", "\n\n", "\n", "b"});
  CHECK(words_of("a\nb ") == Words{"a", "\n", "b", " "});
  CHECK(words_of("x1 22!? '") == Words{"x", "1", " 22", "!?", " '"});
  CHECK(words_of("''s") == Words{"''", "s"});
  CHECK(words_of(utf8({'a', 0x3000, 0xA0, 'b'})) == Words{"a", utf8({0x3000}), utf8({0xA0}), "b"});
  CHECK(words_of("").empty());
}

TEST("words are those of PCRE2 on random text") {
  Pattern pattern(kWordPattern);
  std::mt19937 random(2);
  for (int i = 0; i < 20000; ++i) {
    const std::string text = random_text(random);
    CHECK_MESSAGE(splits_like(pattern, text), text);
  }
}

TEST("words are those of PCRE2 on real text") {
  const auto data = test::folder_from("LONGHAND_DATA");
  if (!data) SKIP("LONGHAND_DATA names no folder");
  Pattern pattern(kWordPattern);
  std::ifstream file(*data + "/lambada/lambada_test.jsonl");
  std::string line;
  int texts = 0;
  for (; std::getline(file, line); ++texts) CHECK(splits_like(pattern, nlohmann::json::parse(line).at("text")));
  CHECK(texts > 5000);
}
