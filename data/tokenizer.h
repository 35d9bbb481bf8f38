// Text to token ids and back: the interface, and the one way to open a tokenizer.
// docs/tokenizer.md walks through the byte-level BPE behind it.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace longhand {

/// The text of the token that closes a document.
inline constexpr std::string_view kEndOfText = "<|endoftext|>";

struct TokenizerOptions {
  bool parse_special = false;  // true: "<|endoftext|>" in a text becomes its id; false: it is text like any other (safe for training data)
  bool skip_special = false;   // true: decode leaves special tokens out
};

/// A reversible map between UTF-8 text and token ids. Objects never change once opened: any number of threads may share one.
class Tokenizer {
 public:
  virtual ~Tokenizer();

  /// Appends the ids of `utf8` to `out`; adds no token at the start or the end.
  /// errors   ValueError naming the byte offset if the text is not valid UTF-8 (`out` is then as before)
  virtual void encode(std::string_view utf8, std::vector<int32_t>& out) const = 0;

  /// The text of `ids`: their bytes in a row, read as UTF-8, with U+FFFD for each part that is not (a character cut in two).
  /// holds    decode(encode(text)) is the NFC form of text (text itself for "bytes")
  /// errors   ValueError naming the position if an id stands for no token
  virtual std::string decode(std::span<const int32_t> ids) const = 0;

  /// The bytes that `id` adds to a decoded text, as they are: one character may lie across several tokens. Nothing where the id stands for
  /// no token (outside the vocabulary, or a gap in it). The view lives as long as the tokenizer.
  virtual std::optional<std::string_view> bytes_of(int32_t id) const = 0;

  /// Largest id + 1; a model's vocab_size may be padded beyond it.
  virtual int32_t vocab_size() const = 0;
  /// The id that closes a document. errors   ValueError if the tokenizer has none
  virtual int32_t end_of_text() const = 0;
  /// "bytes", "letters:N", or the name of the file the tokenizer came from.
  virtual std::string name() const = 0;
  /// Equal for two tokenizers exactly when they encode every text alike by the same definition: the key of a token cache.
  virtual std::string fingerprint() const = 0;
};

/// Equal for two tokenizers when their ids mean the same: the fingerprint without whether special tokens are parsed in texts.
std::string vocabulary_fingerprint(const std::string& fingerprint);
/// Whether ids of one tokenizer are ids of the other: what models, states and token caches are held to.
bool same_vocabulary(const std::string& fingerprint, const std::string& other);

/// Whether the name stands for a tokenizer that needs no file: "bytes", "letters:N".
bool is_built_in_tokenizer(const std::string& name);

/// Opens "bytes" (byte values as ids), "letters:N" (the alphabet of the copying task, data/tasks/letter_tokenizer.h) or a byte-level BPE
/// `tokenizer.json`.
/// errors   FileError naming the part of the file that is missing, malformed or of a kind not supported
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& name_or_path, TokenizerOptions options = {});

}  // namespace longhand
