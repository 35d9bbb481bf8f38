// Text that streams: characters and stop strings across the borders of tokens.
#include "eval/text_stream.h"

#include "core/error.h"
#include "core/philox.h"
#include "data/unicode.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

using Pieces = std::vector<std::string>;

// What each piece gives out, then what the end gives out.
Pieces streamed(const Pieces& pieces, std::vector<std::string> stops = {}) {
  TextStream stream(std::move(stops));
  Pieces out;
  for (const std::string& piece : pieces) out.push_back(stream.push(piece));
  out.push_back(stream.finish());
  return out;
}

std::string joined(const Pieces& pieces) {
  std::string all;
  for (const std::string& piece : pieces) all += piece;
  return all;
}

}  // namespace

TEST("plain text comes at once") {
  CHECK(streamed({"ab", "", "c"}) == Pieces{"ab", "", "c", ""});
}

TEST("a character is held back until it is whole") {
  CHECK(streamed({"\xC3", "\xA9x"}) == Pieces{"", "\xC3\xA9x", ""});
  CHECK(streamed({"a\xE2", "\x82", "\xAC"}) == Pieces{"a", "", "\xE2\x82\xAC", ""});
  CHECK(streamed({"\xF0\x9F", "\x98", "\x80\xF0"}) == Pieces{"", "", "\xF0\x9F\x98\x80", "\xEF\xBF\xBD"});
  CHECK(streamed({"\xE2\x82"}) == Pieces{"", "\xEF\xBF\xBD"});
  CHECK(streamed({"\xE2", "x"}) == Pieces{"", "\xEF\xBF\xBDx", ""});  // the rest never came
  CHECK(streamed({"\x80", "\xFF", "\xC0"}) == Pieces{"\xEF\xBF\xBD", "\xEF\xBF\xBD", "\xEF\xBF\xBD", ""});
  CHECK(streamed({"\xF0\x80"}) == Pieces{"\xEF\xBF\xBD\xEF\xBF\xBD", ""});  // no character begins so
  CHECK(streamed({"\xED\xA0"}) == Pieces{"\xEF\xBF\xBD\xEF\xBF\xBD", ""});  // nor so: a surrogate
}

TEST("any bytes in any pieces give the text of the whole, and every piece is valid UTF-8") {
  const std::string_view alphabet[] = {"a",    "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\xE2",
                                       "\x82", "\xF0\x9F", "\xFF",         "\xED\xA0\x80"};
  for (uint64_t text = 0; text < 500; ++text) {
    std::string bytes;
    for (uint64_t i = 0; i < 12; ++i) bytes += alphabet[philox_u64(7, text, i) % std::size(alphabet)];
    for (uint64_t cut = 0; cut < 5; ++cut) {
      Pieces pieces;
      for (std::size_t at = 0; at < bytes.size();) {
        const std::size_t length = 1 + philox_u64(text, cut, at) % 4;
        pieces.push_back(bytes.substr(at, length));
        at += length;
      }
      const Pieces out = streamed(pieces);
      REQUIRE(joined(out) == replace_invalid_utf8(bytes));
      for (const std::string& piece : out) REQUIRE_FALSE(find_invalid_utf8(piece));
    }
  }
}

TEST("a stop string ends the stream wherever its borders lie, and is not given out") {
  const std::string text = "one STOP two";
  for (std::size_t a = 0; a <= text.size(); ++a)
    for (std::size_t b = a; b <= text.size(); ++b) {
      TextStream stream({"STOP"});
      std::string out;
      for (const std::string& piece : {text.substr(0, a), text.substr(a, b - a), text.substr(b)}) {
        out += stream.push(piece);
        REQUIRE(std::string("one ").starts_with(out));
      }
      CHECK(stream.stopped());
      CHECK(out == "one ");
      CHECK(stream.push("more").empty());
      CHECK(stream.finish().empty());
    }
}

TEST("text is held back only while a stop string may still come of it") {
  CHECK(streamed({"a", "b", "c"}, {"bx"}) == Pieces{"a", "", "bc", ""});
  CHECK(streamed({"aab", "aab", "x"}, {"aabaaa"}) == Pieces{"", "aab", "aabx", ""});
  CHECK(joined(streamed({"aabaab", "aaa"}, {"aabaaa"})) == "aab");
  CHECK(streamed({"x\n"}, {"\n\n"}) == Pieces{"x", "\n"});
  TextStream stream({"\n\n"});
  CHECK(stream.push("x\n") == "x");
  CHECK(stream.held() == "\n");
  CHECK_FALSE(stream.stopped());
  TextStream after({"\n\n"}, stream.held());  // as from a saved state
  CHECK(after.push("\nrest").empty());
  CHECK(after.stopped());
}

TEST("held text is searched for stop strings that its own stream did not have") {
  TextStream before({"abc"});
  CHECK(before.push("xab") == "x");
  TextStream stream({"ab"}, before.held());
  CHECK(stream.stopped());
  CHECK(stream.push("Q rest").empty());
  CHECK(stream.finish().empty());
  TextStream later({"b"}, before.held());
  CHECK(later.stopped());
  CHECK(later.finish() == "a");
  TextStream other({"bQ"}, before.held());
  CHECK_FALSE(other.stopped());
  CHECK(other.push("Q rest") == "a");
  CHECK(other.stopped());
}

TEST("of several stop strings the one that is complete first counts, of those the longest") {
  CHECK(joined(streamed({"xabcd"}, {"abcd", "bc"})) == "xa");
  CHECK(joined(streamed({"xabc"}, {"bc", "abc"})) == "x");
  CHECK(joined(streamed({"xab", "c"}, {"abc", "b"})) == "xa");
  CHECK(joined(streamed({"x\xE2", "\x82\xAC y"}, {"\xE2\x82\xAC"})) == "x");
  CHECK(joined(streamed({"x\xE2", "\x82\xAD y"}, {"\xE2\x82\xAC"})) == "x\xE2\x82\xAD y");
  CHECK_THROWS_AS(TextStream({"a", ""}), ValueError);
}
