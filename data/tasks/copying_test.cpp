// The four variants of synthetic copying, and the alphabet.
#include "data/tasks/copying.h"

#include <algorithm>
#include <map>

#include "core/error.h"
#include "data/tasks/letter_tokenizer.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

std::string text_of(const CopyExample& example, int64_t alphabet) {
  return LetterTokenizer(alphabet).decode(example.tokens);
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST("copying: letters, then $ | . *") {
  const LetterTokenizer letters(10);
  std::vector<int32_t> ids;
  letters.encode("$aj|.*", ids);
  CHECK(ids == std::vector<int32_t>{10, 0, 9, 11, 12, 13});
  CHECK(letters.decode(ids) == "$aj|.*");
  CHECK(letters.vocab_size() == 14);
  CHECK(letters.end_of_text() == 12);
  CHECK_THROWS_AS(letters.encode("k", ids), ValueError);
  CHECK_THROWS_AS(letters.decode(std::vector<int32_t>{14}), ValueError);
  CHECK(open_tokenizer("letters:26")->vocab_size() == 30);
  CHECK_THROWS_AS(open_tokenizer("letters:27"), ConfigError);
  CHECK_THROWS_AS(open_tokenizer("letters:1x"), ConfigError);
}

TEST("copying: copy is $ w | w . and an answer can be cut") {
  const CopyOptions options{.alphabet = 4};
  for (int64_t length = 1; length < 40; ++length) {
    const CopyExample e = copy_example(options, length, static_cast<uint64_t>(length));
    CHECK(std::ssize(e.word) == length);
    CHECK(text_of(e, 4) == "$" + e.word + "|" + e.word + ".");
    CHECK(e.prompt == length + 2);  // the mask is 0 for so many tokens
    CHECK(e.letters() == length);
    CHECK(std::ssize(e.tokens) == longest_copy_example(options, length));
  }
  const CopyExample cut = copy_example({.alphabet = 26, .answer_length = 3}, 20, 5);
  CHECK(text_of(cut, 26) == "$" + cut.word + "|" + cut.word.substr(0, 3) + ".");
}

TEST("copying: letters are uniform over the alphabet, and keys give different words") {
  std::map<char, int> seen;
  const std::string word = copy_example({.alphabet = 10}, 20000, 1).word;
  for (const char c : word) ++seen[c];
  CHECK(seen.size() == 10);
  for (const auto& [letter, n] : seen) CHECK(std::abs(n - 2000) < 200);  // deviation 42
  CHECK(word != copy_example({.alphabet = 10}, 20000, 2).word);
  CHECK(word == copy_example({.alphabet = 10}, 20000, 1).word);
  CHECK(copy_example({.alphabet = 26}, 12, 1).word == "wxslovwqdakz");  // in every version
}

TEST("copying: prefix and suffix n-grams stand once in w, and the answer is what follows") {
  for (const CopyVariant variant : {CopyVariant::prefix_ngram, CopyVariant::suffix_ngram})
    for (const int64_t answer : {0, 2})
      for (uint64_t key = 0; key < 200; ++key) {
        const CopyOptions options{.variant = variant, .alphabet = 3, .ngram = 3, .answer_length = answer};
        const CopyExample e = copy_example(options, 12, key);
        const std::string text = text_of(e, 3), given = text.substr(0, static_cast<std::size_t>(e.prompt));
        const bool prefix = variant == CopyVariant::prefix_ngram;
        const std::string g = prefix ? text.substr(1, 3) : given.substr(given.size() - 3);
        CHECK(count(e.word, g) == 1);
        std::string expected = e.word.substr(e.word.find(g) + 3);
        if (answer > 0) {
          CHECK(expected.size() >= 2);
          expected.resize(2);
        }
        CHECK_FALSE(expected.empty());
        CHECK(given == (prefix ? "$" + g + "|" + e.word + "|" : "$" + e.word + "|" + g));
        CHECK(text == given + expected + ".");
        CHECK(e.letters() == std::ssize(expected));
        CHECK(std::ssize(e.tokens) <= longest_copy_example(options, 12));
      }
}

TEST("copying: the duplicate variant has an n-gram twice, and is a copy otherwise") {
  for (uint64_t key = 0; key < 100; ++key) {
    const CopyExample e = copy_example({.variant = CopyVariant::duplicate_ngram, .alphabet = 26, .ngram = 4}, 11, key);
    CHECK(text_of(e, 26) == "$" + e.word + "|" + e.word + ".");
    bool twice = false;
    for (std::size_t at = 0; at + 4 <= 11; ++at) twice = twice || e.word.find(e.word.substr(at, 4), at + 4) != std::string::npos;
    CHECK(twice);
  }
}

TEST("copying: options that cannot be followed are refused") {
  CHECK_THROWS_AS(copy_example({.alphabet = 27}, 8, 0), ValueError);
  CHECK_THROWS_AS(copy_example({}, 0, 0), ValueError);
  CHECK_THROWS_AS(copy_example({.variant = CopyVariant::prefix_ngram, .ngram = 8}, 8, 0), ValueError);
  CHECK_THROWS_AS(copy_example({.variant = CopyVariant::prefix_ngram, .alphabet = 1}, 8, 0), ValueError);  // no n-gram stands once
  CHECK_THROWS_AS(copy_example({.variant = CopyVariant::duplicate_ngram}, 7, 0), ValueError);
  CHECK(copy_variant_from("suffix-ngram") == CopyVariant::suffix_ngram);
  CHECK_THROWS_AS(copy_variant_from("suffix"), ConfigError);
}

}  // namespace
}  // namespace longhand
