// The alphabet of synthetic copying as a tokenizer: one id for each character.
#pragma once
#include <optional>

#include "data/tokenizer.h"

namespace longhand {

/// ids 0 .. A-1 are the first A small letters; then "$" = A (begins an example), "|" = A + 1 (separates), "." = A + 2 (ends it, and is the
/// token that closes a document), "*" = A + 3 (padding).
class LetterTokenizer : public Tokenizer {
 public:
  static constexpr int64_t kMostLetters = 26;

  /// errors  ValueError unless 1 <= letters <= 26
  explicit LetterTokenizer(int64_t letters);
  /// "letters:10"; null for a name that is no "letters:...".
  /// errors  ConfigError for another number
  static std::unique_ptr<LetterTokenizer> from_name(const std::string& name);

  int64_t letters() const { return letters_; }

  /// errors  ValueError naming the position of a character that has no id
  void encode(std::string_view utf8, std::vector<int32_t>& out) const override;
  std::string decode(std::span<const int32_t> ids) const override;
  std::optional<std::string_view> bytes_of(int32_t id) const override;
  int32_t vocab_size() const override { return static_cast<int32_t>(letters_) + 4; }
  int32_t end_of_text() const override { return static_cast<int32_t>(letters_) + 2; }
  std::string name() const override { return "letters:" + std::to_string(letters_); }
  std::string fingerprint() const override { return name(); }

 private:
  int64_t letters_;
  std::string symbols_;  // by id
};

}  // namespace longhand
