// A text and what may follow it, in tokens.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace longhand {

/// The ids of a text.
inline std::vector<int32_t> encoded(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<int32_t> ids;
  tokenizer.encode(text, ids);
  return ids;
}

/// Bytes of a text without the white space at its end: what Python's rstrip() leaves, so Unicode's White_Space and U+001C .. U+001F.
std::size_t size_without_white_end(std::string_view text);

struct Continuation {
  std::vector<int32_t> context, target;
};

/// ids = encode(context + target), cut behind as many as encode(context) has: the target's first token may begin inside a word.
/// White space at the end of the context (of Unicode, not only blanks) is moved to the target first.
/// source  EleutherAI/lm-evaluation-harness
Continuation encode_continuation(const Tokenizer& tokenizer, std::string context, std::string target);

}  // namespace longhand
