// Chooses the tokenizer; see tokenizer.h.
#include "data/tokenizer.h"

#include "data/bpe_tokenizer.h"
#include "data/byte_tokenizer.h"
#include "data/tasks/letter_tokenizer.h"
#include "data/tokenizer_json.h"

namespace longhand {

Tokenizer::~Tokenizer() = default;

std::string vocabulary_fingerprint(const std::string& fingerprint) {
  constexpr std::string_view kSpecial = "+special";  // what the tokenizers append with TokenizerOptions::parse_special
  return fingerprint.substr(0, fingerprint.size() - (fingerprint.ends_with(kSpecial) ? kSpecial.size() : 0));
}

bool same_vocabulary(const std::string& fingerprint, const std::string& other) {
  return vocabulary_fingerprint(fingerprint) == vocabulary_fingerprint(other);
}

bool is_built_in_tokenizer(const std::string& name) {
  return name == "bytes" || name.starts_with("letters:");
}

std::unique_ptr<Tokenizer> open_tokenizer(const std::string& name_or_path, TokenizerOptions options) {
  if (name_or_path == "bytes") return std::make_unique<ByteTokenizer>(options);
  if (auto letters = LetterTokenizer::from_name(name_or_path)) return letters;
  return std::make_unique<BpeTokenizer>(read_tokenizer_json(name_or_path), options);
}

}  // namespace longhand
