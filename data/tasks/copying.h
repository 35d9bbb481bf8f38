// Synthetic copying: a string of random letters is read and must be written again, whole or from a given place on.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longhand {

enum class CopyVariant {
  copy,             // $ w | w .
  prefix_ngram,     // $ g | w | a .   a: what follows the n-gram g in w
  suffix_ngram,     // $ w | g a .
  duplicate_ngram,  // $ w | w .       where one n-gram stands twice in w; for evaluation
};
CopyVariant copy_variant_from(const std::string& name);  // "copy", "prefix-ngram", ...    errors  ConfigError for other names
const char* name_of(CopyVariant variant);

struct CopyOptions {
  CopyVariant variant = CopyVariant::copy;
  int64_t alphabet = 10;      // letters; 1 to 26
  int64_t ngram = 3;          // letters of g, and of what stands twice
  int64_t answer_length = 0;  // only so many letters of the answer; 0: all
};

struct CopyExample {
  std::vector<int32_t> tokens;  // ids as LetterTokenizer has them
  int64_t prompt = 0;           // the first so many are given; behind them the answer and the closing "."
  std::string word;             // w
  int64_t letters() const { return static_cast<int64_t>(tokens.size()) - prompt - 1; }  // of the answer
};

/// The example drawn from `key` with a word of `length` letters, each uniform.
/// g        uniform among the n-grams of w that stand there once and have the answer's letters (at least one) behind them; w is drawn again
///          where there is none. duplicate_ngram: one n-gram of w is written over another that does not touch it, both uniform
/// errors   ValueError for options out of range, a word too short for its n-grams, or an alphabet so small that no word was found
/// source   Jelassi et al. 2024, arXiv:2402.01032; ids and layout as in its experiments' code
CopyExample copy_example(const CopyOptions& options, int64_t length, uint64_t key);

/// Tokens of the longest example with words of up to `length` letters.
int64_t longest_copy_example(const CopyOptions& options, int64_t length);

}  // namespace longhand
