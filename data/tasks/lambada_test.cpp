// LAMBADA's cut, and the tokens of a continuation.
#include "data/tasks/lambada.h"

#include <fstream>

#include "core/error.h"
#include "data/tasks/continuation.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

TEST("lambada: cut at the last blank") {
  const LambadaSample s = split_last_word("\"I know,\"\n\nsaid  Ann");
  CHECK(s.context == "\"I know,\"\n\nsaid ");
  CHECK(s.target == " Ann");
  for (const char* text : {"", "word", " word", "ends ", "  word", " \n word", "\xC2\xA0 word"})
    CHECK_THROWS_AS(split_last_word(text), ValueError);
}

TEST("lambada: a line without a last word is named, and so is a file without any") {
  const test::ScratchFolder scratch;
  std::ofstream(scratch.file("none.jsonl")) << "\n";
  CHECK_THROWS_AS(read_lambada(scratch.file("none.jsonl")), FileError);
  std::ofstream(scratch.file("x.jsonl")) << "{\"text\": \"a b\"}\n{\"text\": \"ab\"}\n";
  try {
    read_lambada(scratch.file("x.jsonl"));
    FAIL("accepted");
  } catch (const FileError& error) {
    CHECK(std::string(error.what()).find("line  2") != std::string::npos);
  }
}

TEST("continuation: white space at the end of the context goes to the target") {
  const auto bytes = open_tokenizer("bytes");
  const Continuation c = encode_continuation(*bytes, "ab \n", " cd");
  CHECK(bytes->decode(c.context) == "ab");
  CHECK(bytes->decode(c.target) == " \n cd");
  for (const char* white : {"\xC2\xA0", "\xE2\x80\xA8", "\x1F", "\t \xE3\x80\x80"}) {  // as Python's rstrip() does
    const Continuation u = encode_continuation(*bytes, std::string("ab") + white, " c");
    CHECK(bytes->decode(u.context) == "ab");
    CHECK(bytes->decode(u.target) == std::string(white) + " c");
  }
  CHECK(bytes->decode(encode_continuation(*bytes, "ab\xE2\x80\x8B", "c").context) == "ab\xE2\x80\x8B");  // a zero-width space is none
  CHECK(encode_continuation(*bytes, "", "x").context.empty());
  CHECK(encode_continuation(*bytes, "  ", "x").target.size() == 3);
}

TEST("lambada: the published file has 5153 passages, and every target is one blank and a word") {
  const auto folder = test::folder_from("LONGHAND_DATA");
  if (!folder) SKIP("LONGHAND_DATA is not set");
  const auto samples = read_lambada(*folder + "/lambada/lambada_test.jsonl");
  CHECK(samples.size() == 5153);
  CHECK(samples[0].target == " signs");
  CHECK(samples[0].context.ends_with("I don't care about"));
  const auto bpe = open_tokenizer(*folder + "/tokenizer/20B_tokenizer.json");
  const Continuation first = encode_continuation(*bpe, samples[0].context, samples[0].target);
  CHECK(first.target.size() == 1);
  CHECK(bpe->decode(first.target) == " signs");
  for (const LambadaSample& s : samples) {
    CHECK(s.target.size() > 1);
    CHECK(s.target.rfind(' ') == 0);
  }
}

}  // namespace
}  // namespace longhand
