// See passkey.h.
#include "data/tasks/passkey.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "data/tasks/continuation.h"
#include "data/tasks/draws.h"

namespace longhand {
namespace {

constexpr const char* kTask =
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important "
    "information there.";
constexpr std::string_view kFiller = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
constexpr const char* kQuestion = "What is the pass key? The pass key is";
constexpr int64_t kLargestKey = 50000;
constexpr int64_t kMostDigits = 18;

// The line of the key is these with " KEY" between them.
constexpr const char* kKeyLine[] = {"The pass key is", ". Remember it.", " is the pass key."};

std::string key_line(const std::string& key) {
  return kKeyLine[0] + (" " + key) + kKeyLine[1] + " " + key + kKeyLine[2];
}

std::string draw_key(Draws& draws, int64_t digits) {
  if (digits == 0) return std::to_string(draws.between(1, kLargestKey));
  int64_t low = 1;
  for (int64_t i = 1; i < digits; ++i) low *= 10;
  return std::to_string(draws.between(low, 10 * low - 1));
}

// The first `count` units of "filler filler filler ...": `first`, then `next` again and again.
template <class Units>
Units repeated(const Units& first, const Units& next, int64_t count) {
  Units out;
  const auto size = static_cast<std::size_t>(count);
  out.reserve(size + next.size());
  out.insert(out.end(), first.begin(), first.end());
  while (out.size() < size) out.insert(out.end(), next.begin(), next.end());
  out.resize(size);
  return out;
}

void append(std::vector<int32_t>& to, const std::vector<int32_t>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

void require(const PasskeyOptions& o) {
  if (o.depth && !(*o.depth >= 0 && *o.depth <= 1))
    throw ValueError("passkey: a depth outside 0 to 1", {{"depth", std::to_string(*o.depth)}});
  if (o.digits < 0 || o.digits > kMostDigits)
    throw ValueError("passkey: a number of digits outside 0 to 18", {{"digits", std::to_string(o.digits)}});
  if (o.length < 0) throw ValueError("passkey: a length below 0", {{"length", std::to_string(o.length)}});
}

// The parts of a prompt in tokens, each encoded on its own.
struct Parts {
  std::vector<int32_t> head, key, tail;
  int64_t size() const { return std::ssize(head) + std::ssize(key) + std::ssize(tail); }
};

Parts parts_of(const Tokenizer& tokenizer, const std::string& key) {
  return {encoded(tokenizer, std::string(kTask) + "\n"), encoded(tokenizer, "\n" + key_line(key) + "\n"),
          encoded(tokenizer, std::string("\n") + kQuestion)};
}

}  // namespace

int64_t units_before(double depth, int64_t length) {
  return std::clamp(std::llround(depth * static_cast<double>(length)), 0LL, static_cast<long long>(length));
}

int64_t least_passkey_tokens(const Tokenizer& tokenizer, int64_t digits) {
  const auto size = [&](const std::string& text) { return std::ssize(encoded(tokenizer, text)); };
  const int64_t key = 1 + (digits == 0 ? std::ssize(std::to_string(kLargestKey)) : digits);
  return size(std::string(kTask) + "\n") + size(std::string("\n") + kKeyLine[0]) + key + size(kKeyLine[1]) + key +
         size(std::string(kKeyLine[2]) + "\n") + size(std::string("\n") + kQuestion);
}

std::string passkey_key(const PasskeyOptions& options, uint64_t index) {
  Draws draws(sample_key(options.seed, "passkey", index));
  return draw_key(draws, options.digits);
}

PasskeySample passkey_sample(const PasskeyOptions& options, const Tokenizer& tokenizer, uint64_t index) {
  require(options);
  Draws draws(sample_key(options.seed, "passkey", index));
  PasskeySample sample;
  sample.key = draw_key(draws, options.digits);
  const auto place = [&](int64_t filler) {
    sample.before = options.depth ? units_before(*options.depth, filler) : draws.between(0, filler);
    sample.after = filler - sample.before;
  };
  const std::string first(kFiller), next = " " + first;
  if (options.unit == PasskeyUnit::characters) {
    place(options.length);
    sample.prompt = encoded(tokenizer, kTask + ("\n" + repeated(first, next, sample.before)) + "\n" + key_line(sample.key) + "\n" +
                                           repeated(first, next, sample.after) + "\n" + kQuestion);
    return sample;
  }
  const Parts parts = parts_of(tokenizer, sample.key);
  if (options.length < parts.size())
    throw ValueError("passkey: the length leaves no room for the text around the filler",
                     {{"length", std::to_string(options.length) + " tokens"},
                      {"expected", std::to_string(least_passkey_tokens(tokenizer, options.digits)) + " tokens leave room for every key"}});
  place(options.length - parts.size());
  const std::vector<int32_t> first_ids = encoded(tokenizer, first), next_ids = encoded(tokenizer, next);
  append(sample.prompt, parts.head);
  append(sample.prompt, repeated(first_ids, next_ids, sample.before));
  append(sample.prompt, parts.key);
  append(sample.prompt, repeated(first_ids, next_ids, sample.after));
  append(sample.prompt, parts.tail);
  return sample;
}

std::vector<int32_t> passkey_answer(const Tokenizer& tokenizer, const std::string& key) {
  return encoded(tokenizer, " " + key + ".");
}

}  // namespace longhand
