// Byte-level byte-pair encoding, as GPT-NeoX uses it. docs/tokenizer.md teaches it with a worked example.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "data/added_tokens.h"
#include "data/tokenizer.h"

namespace longhand {

/// What a tokenizer.json says, checked and with names turned into ids (tokenizer_json.h reads it).
struct BpeDefinition {
  struct Merge {
    int32_t left, right;  // two neighbouring tokens ...
    int32_t result;       // ... become this one
  };
  struct AddedToken {
    int32_t id;
    std::string content;  // as it stands in a text
    bool special;         // found in a text only with TokenizerOptions::parse_special
    bool normalized;      // found after NFC instead of before it
  };
  std::string name;
  std::vector<std::string> tokens;    // by id, in byte symbols; empty where an id has no token
  std::array<int32_t, 256> byte_ids;  // the token of each single byte; -1 where there is none
  std::vector<Merge> merges;          // by rank: earlier merges go first
  std::vector<AddedToken> added;
};

/// The character that stands for a byte in the vocabulary: itself for visible Latin-1 characters, U+0100 + k for the k-th other byte.
char32_t byte_symbol(uint8_t byte);

/// The bytes a token stands for: those of its byte symbols, or its own UTF-8 if a character in it is no byte symbol.
std::string token_bytes(std::string_view token);

/// From a pair of tokens to the rank of the merge that joins them: a flat hash table with linear probing.
class MergeRanks {
 public:
  static constexpr int32_t kNone = INT32_MAX;  // "no such merge", and larger than every rank

  explicit MergeRanks(const std::vector<BpeDefinition::Merge>& merges);
  int32_t find(int32_t left, int32_t right) const;

 private:
  struct Slot {
    int32_t left = -1, right = -1, rank = kNone;
  };
  std::size_t first_slot(int32_t left, int32_t right) const;

  std::vector<Slot> slots_;
  int shift_;
};

class BpeTokenizer : public Tokenizer {
 public:
  BpeTokenizer(BpeDefinition definition, TokenizerOptions options);

  void encode(std::string_view utf8, std::vector<int32_t>& out) const override;
  std::string decode(std::span<const int32_t> ids) const override;
  std::optional<std::string_view> bytes_of(int32_t id) const override;
  int32_t vocab_size() const override { return static_cast<int32_t>(definition_.tokens.size()); }
  int32_t end_of_text() const override;
  std::string name() const override { return definition_.name; }
  std::string fingerprint() const override { return fingerprint_; }

 private:
  void encode_words(std::string_view text, std::vector<int32_t>& out) const;
  void encode_word(std::string_view word, std::vector<int32_t>& out) const;
  void merge_short_word(std::vector<int32_t>& symbols) const;
  void merge_long_word(std::vector<int32_t>& symbols) const;

  BpeDefinition definition_;
  MergeRanks ranks_;
  AddedTokenTrie raw_tokens_;         // looked for in the text as given
  AddedTokenTrie normalized_tokens_;  // looked for after NFC
  std::vector<std::string> bytes_;    // by id: what decode writes; empty for ids without a token and for skipped special tokens
  uint32_t serial_;                   // tells this tokenizer's words from another's in a thread's cache
  std::string fingerprint_;
};

}  // namespace longhand
