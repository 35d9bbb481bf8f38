// The smallest tokenizer: ids 0..255 are the bytes of the text, 256 ends a document.
#pragma once
#include "data/tokenizer.h"

namespace longhand {

class ByteTokenizer : public Tokenizer {
 public:
  explicit ByteTokenizer(TokenizerOptions options = {}) : options_(options) {}

  void encode(std::string_view utf8, std::vector<int32_t>& out) const override;
  std::string decode(std::span<const int32_t> ids) const override;
  std::optional<std::string_view> bytes_of(int32_t id) const override;
  int32_t vocab_size() const override { return 257; }
  int32_t end_of_text() const override { return 256; }
  std::string name() const override { return "bytes"; }
  std::string fingerprint() const override { return options_.parse_special ? "bytes+special" : "bytes"; }

 private:
  TokenizerOptions options_;
};

}  // namespace longhand
