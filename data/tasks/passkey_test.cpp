// Prompts of passkey retrieval against the published layout, letter by letter.
#include "data/tasks/passkey.h"

#include <set>

#include "core/error.h"
#include "data/tasks/continuation.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

const std::unique_ptr<Tokenizer>& bytes() {
  static const auto tokenizer = open_tokenizer("bytes");
  return tokenizer;
}

constexpr const char* kHead =
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important "
    "information there.";

TEST("passkey: the published prompt, filler counted in characters") {
  const PasskeySample s =
      passkey_sample({.unit = PasskeyUnit::characters, .length = 104, .depth = 0.125, .digits = 5, .seed = 3}, *bytes(), 7);
  CHECK(s.key.size() == 5);
  CHECK(s.before == 13);
  CHECK(s.after == 91);
  const std::string filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. T";
  CHECK(bytes()->decode(s.prompt) == std::string(kHead) + "\nThe grass is \nThe pass key is " + s.key + ". Remember it. " + s.key +
                                         " is the pass key.\n" + filler + "\nWhat is the pass key? The pass key is");
}

TEST("passkey: without filler two lines are empty; depth 0 and 1 put it all on one side") {
  const PasskeySample none = passkey_sample({.unit = PasskeyUnit::characters, .length = 0}, *bytes(), 0);
  CHECK(bytes()->decode(none.prompt).find("there.\n\nThe pass key is " + none.key) != std::string::npos);
  CHECK(bytes()->decode(none.prompt).find("is the pass key.\n\nWhat is") != std::string::npos);
  for (const double depth : {0.0, 1.0}) {
    const PasskeySample s = passkey_sample({.length = 1000, .depth = depth}, *bytes(), 0);
    CHECK((depth == 0 ? s.before : s.after) == 0);
    CHECK((depth == 0 ? s.after : s.before) > 600);
  }
}

TEST("passkey: lengths in tokens are met exactly, at every depth, and bytes give the same text either way") {
  for (const int64_t length : {300, 1000, 4097})
    for (const double depth : {0.1, 0.5, 0.9}) {
      const PasskeySample s = passkey_sample({.length = length, .depth = depth, .digits = 5}, *bytes(), 1);
      CHECK(std::ssize(s.prompt) == length);
      CHECK(s.before == units_before(depth, s.before + s.after));
      const PasskeySample same =
          passkey_sample({.unit = PasskeyUnit::characters, .length = s.before + s.after, .depth = depth, .digits = 5}, *bytes(), 1);
      CHECK(s.prompt == same.prompt);
    }
}

TEST("passkey: tokens of a byte-pair tokenizer spell the same prompt") {
  const auto folder = test::folder_from("LONGHAND_DATA");
  if (!folder) SKIP("LONGHAND_DATA is not set");
  const auto bpe = open_tokenizer(*folder + "/tokenizer/20B_tokenizer.json");
  const PasskeySample s = passkey_sample({.length = 512, .depth = 0.5, .digits = 5}, *bpe, 0);
  CHECK(s.prompt.size() == 512);
  const std::string text = bpe->decode(s.prompt);
  CHECK(text.starts_with(std::string(kHead) + "\nThe grass is green. The sky is blue. "));
  CHECK(text.find("\nThe pass key is " + s.key + ". Remember it. " + s.key + " is the pass key.\nThe grass is green. The") !=
        std::string::npos);
  CHECK(text.ends_with("\nWhat is the pass key? The pass key is"));
  CHECK(bpe->decode(passkey_answer(*bpe, s.key)) == " " + s.key + ".");
  for (const int64_t digits : {0, 5, 9, 12, 18}) {
    const int64_t least = least_passkey_tokens(*bpe, digits);  // room for every key, whatever tokens its digits make
    for (uint64_t i = 0; i < 400; ++i)
      CHECK_NOTHROW(passkey_sample({.unit = PasskeyUnit::tokens, .length = least, .digits = digits}, *bpe, i));
  }
}

TEST("passkey: keys have the digits asked for, and spread over their range; depths without a setting too") {
  std::set<std::string> keys;
  int64_t least = 1'000'000, most = 0, first_half = 0;
  for (uint64_t i = 0; i < 400; ++i) {
    const PasskeySample five = passkey_sample({.length = 600, .digits = 5}, *bytes(), i);
    CHECK(five.key.size() == 5);
    CHECK(five.key == passkey_key({.digits = 5}, i));
    keys.insert(five.key);
    CHECK(passkey_key({.digits = 1}, i).find_first_of("123456789") == 0);
    CHECK(passkey_key({.digits = 1}, i).size() == 1);
    first_half += five.before < five.after ? 1 : 0;
    const int64_t published = std::stoll(passkey_key({}, i));
    least = std::min(least, published), most = std::max(most, published);
  }
  CHECK(keys.size() > 390);
  CHECK(least >= 1);
  CHECK(least < 1000);
  CHECK(most <= 50000);
  CHECK(most > 49000);
  CHECK(first_half > 160);
  CHECK(first_half < 240);
  CHECK(passkey_key({.seed = 1}, 0) != passkey_key({.seed = 2}, 0));
  CHECK(passkey_key({.digits = 5}, 0) == "33669");  // in every version
}

TEST("passkey: what cannot be made is refused with the least length") {
  CHECK_THROWS_AS(passkey_sample({.length = 2000, .depth = 1.5}, *bytes(), 0), ValueError);
  CHECK_THROWS_AS(passkey_sample({.length = 2000, .digits = 19}, *bytes(), 0), ValueError);
  const int64_t least = least_passkey_tokens(*bytes(), 5);
  CHECK(passkey_sample({.length = least, .digits = 5}, *bytes(), 0).prompt.size() == static_cast<std::size_t>(least));
  CHECK_THROWS_AS(passkey_sample({.length = least - 1, .digits = 5}, *bytes(), 0), ValueError);
  for (const int64_t digits : {10, 18}) {  // of bytes the least length is met exactly
    const int64_t exact = least_passkey_tokens(*bytes(), digits);
    CHECK_NOTHROW(passkey_sample({.length = exact, .digits = digits}, *bytes(), 0));
    CHECK_THROWS_AS(passkey_sample({.length = exact - 1, .digits = digits}, *bytes(), 0), ValueError);
  }
}

}  // namespace
}  // namespace longhand
