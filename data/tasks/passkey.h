// Passkey retrieval: a number hidden at some depth of a repetitive text is asked for at its end.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/tokenizer.h"

namespace longhand {

enum class PasskeyUnit {
  tokens,      // of the whole prompt
  characters,  // of the filler alone, as published
};

struct PasskeyOptions {
  PasskeyUnit unit = PasskeyUnit::tokens;
  int64_t length = 2048;             // in that unit
  std::optional<double> depth = {};  // share of the filler that stands before the key; absent: uniform
  int64_t digits = 0;                // of the key, the first not 0; 0: a number in 1 .. 50000, as published
  uint64_t seed = 0;
};

struct PasskeySample {
  std::vector<int32_t> prompt;
  std::string key;     // "41522"
  int64_t before = 0;  // units of filler before the key ...
  int64_t after = 0;   // ... and behind it
};

/// A share, as a number of units out of `length`: the nearest whole one.
int64_t units_before(double depth, int64_t length);

/// Sample `index` of the task, five lines:
///   what to do / the first p units of the filler / the line with the key / the first q units of the filler / the question
///   p = depth * (p + q), or uniform in 0 .. p + q
/// unit     characters: p + q = length, and the text is encoded as a whole
///          tokens: the lines of the text and the filler are encoded each on its own, p and q count tokens, and the prompt has exactly
///          `length` of them
/// holds    a function of (seed, index) and the options alone
/// errors   ValueError for a length that leaves no room (naming the least), a depth outside [0, 1], digits outside 0 .. 18
/// source   Mohtashami & Jaggi 2023, arXiv:2305.16300; token lengths and depths as in Buitrago Ruiz & Gu 2025, arXiv:2507.02782
PasskeySample passkey_sample(const PasskeyOptions& options, const Tokenizer& tokenizer, uint64_t index);

/// The key of sample `index`.
std::string passkey_key(const PasskeyOptions& options, uint64_t index);

/// A length of the token unit that leaves room for every key: tokens of a prompt without filler, where each of the two keys has a token for
/// its blank and for each of its digits. No tokenizer that cuts texts into words makes more; with bytes these are the tokens themselves.
int64_t least_passkey_tokens(const Tokenizer& tokenizer, int64_t digits);

/// What training adds behind a prompt: " 41522." (the point ends the run of digits).
std::vector<int32_t> passkey_answer(const Tokenizer& tokenizer, const std::string& key);

}  // namespace longhand
