// See copying.h.
#include "data/tasks/copying.h"

#include <algorithm>

#include "core/error.h"
#include "core/nearest.h"
#include "data/tasks/continuation.h"
#include "data/tasks/draws.h"
#include "data/tasks/letter_tokenizer.h"

namespace longhand {
namespace {

constexpr int64_t kMostTries = 1000;
constexpr const char* kNames[] = {"copy", "prefix-ngram", "suffix-ngram", "duplicate-ngram"};

std::string draw_word(const CopyOptions& o, int64_t length, Draws& draws) {
  std::string word(static_cast<std::size_t>(length), 'a');
  for (char& letter : word) letter = static_cast<char>('a' + draws.below(o.alphabet));
  return word;
}

bool stands_once(const std::string& word, const std::string& part) {
  const auto first = word.find(part);
  return word.find(part, first + 1) == std::string::npos;
}

// Where the n-grams begin that can be asked for.
std::vector<int64_t> askable(const CopyOptions& o, const std::string& word) {
  std::vector<int64_t> places;
  const int64_t behind = std::max<int64_t>(1, o.answer_length);
  for (int64_t at = 0; at + o.ngram + behind <= std::ssize(word); ++at)
    if (stands_once(word, word.substr(static_cast<std::size_t>(at), static_cast<std::size_t>(o.ngram)))) places.push_back(at);
  return places;
}

// One n-gram of the word over another that does not touch it.
void duplicate(const CopyOptions& o, std::string& word, Draws& draws) {
  const int64_t places = std::ssize(word) - o.ngram + 1;
  const int64_t from = draws.below(places);
  int64_t to = from;
  while (std::abs(to - from) < o.ngram) to = draws.below(places);
  word.replace(static_cast<std::size_t>(to), static_cast<std::size_t>(o.ngram), word, static_cast<std::size_t>(from),
               static_cast<std::size_t>(o.ngram));
}

void require(const CopyOptions& o, int64_t length) {
  if (o.alphabet < 1 || o.alphabet > LetterTokenizer::kMostLetters)
    throw ValueError("copying: an alphabet of 1 to 26 letters", {{"alphabet", std::to_string(o.alphabet)}});
  if (o.answer_length < 0) throw ValueError("copying: an answer length below 0", {{"answer_length", std::to_string(o.answer_length)}});
  if (length < 1) throw ValueError("copying: a word without letters", {{"length", std::to_string(length)}});
  if (o.variant == CopyVariant::copy) return;
  // Two n-grams side by side always leave a place for the second, wherever the first is, from 3n - 1 letters on.
  const int64_t least = o.variant == CopyVariant::duplicate_ngram ? 3 * o.ngram - 1 : o.ngram + std::max<int64_t>(1, o.answer_length);
  if (o.ngram < 1 || length < least)
    throw ValueError(
        "copying: a word too short for its n-grams",
        {{"length", std::to_string(length)}, {"ngram", std::to_string(o.ngram)}, {"expected", "at least " + std::to_string(least)}});
}

}  // namespace

CopyVariant copy_variant_from(const std::string& name) {
  for (std::size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return static_cast<CopyVariant>(i);
  throw ConfigError("copying: unknown variant", {{"given", name}, {"nearest", nearest_name(name, {std::begin(kNames), std::end(kNames)})}});
}

const char* name_of(CopyVariant variant) {
  return kNames[static_cast<std::size_t>(variant)];
}

CopyExample copy_example(const CopyOptions& options, int64_t length, uint64_t key) {
  require(options, length);
  Draws draws(key);
  CopyExample example;
  std::string& word = example.word;
  std::vector<int64_t> places;
  const bool asks = options.variant == CopyVariant::prefix_ngram || options.variant == CopyVariant::suffix_ngram;
  for (int64_t tries = 0; word.empty() || (asks && places.empty()); ++tries) {
    if (tries == kMostTries)
      throw ValueError("copying: no word with an n-gram that stands there once was found",
                       {{"alphabet", std::to_string(options.alphabet)},
                        {"ngram", std::to_string(options.ngram)},
                        {"length", std::to_string(length)},
                        {"try", "a larger alphabet, longer n-grams or shorter words"}});
    word = draw_word(options, length, draws);
    if (asks) places = askable(options, word);
  }
  if (options.variant == CopyVariant::duplicate_ngram) duplicate(options, word, draws);

  std::string before, answer = word;
  if (asks) {
    const auto at = static_cast<std::size_t>(places[static_cast<std::size_t>(draws.below(std::ssize(places)))]);
    const auto n = static_cast<std::size_t>(options.ngram);
    const std::string g = word.substr(at, n);
    answer = word.substr(at + n);
    before = options.variant == CopyVariant::prefix_ngram ? "$" + g + "|" + word + "|" : "$" + word + "|" + g;
  } else {
    before = "$" + word + "|";
  }
  if (options.answer_length > 0 && std::ssize(answer) > options.answer_length)
    answer.resize(static_cast<std::size_t>(options.answer_length));
  example.tokens = encoded(LetterTokenizer(options.alphabet), before + answer + ".");
  example.prompt = std::ssize(before);
  return example;
}

int64_t longest_copy_example(const CopyOptions& options, int64_t length) {
  const bool asks = options.variant == CopyVariant::prefix_ngram || options.variant == CopyVariant::suffix_ngram;
  const int64_t g = asks ? options.ngram : 0, marks = options.variant == CopyVariant::prefix_ngram ? 4 : 3;
  const int64_t answer = options.answer_length > 0 ? std::min(options.answer_length, length - g) : length - g;
  return length + g + answer + marks;
}

}  // namespace longhand
