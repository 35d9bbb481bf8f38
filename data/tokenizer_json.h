// Reads a byte-level BPE tokenizer.json (the Hugging Face tokenizers file format), strictly.
#pragma once
#include <string>

#include "data/bpe_tokenizer.h"

namespace longhand {

/// Accepts what GPT-NeoX's tokenizer is made of: normalizer NFC; pre-tokenizer, post-processor and decoder ByteLevel without a prefix
/// space; model BPE without dropout, unknown token, prefix or suffix; merges as "left right" or ["left", "right"].
/// Everything else would give other ids than the file means, so it is refused by name.
/// errors   FileError with the path and the place in the file (byte offset for malformed JSON, "model.merges[17]" and the like)
BpeDefinition read_tokenizer_json(const std::string& path);

}  // namespace longhand
