// See continuation.h.
#include "data/tasks/continuation.h"

#include <algorithm>

#include "data/unicode.h"

namespace longhand {

std::size_t size_without_white_end(std::string_view text) {
  std::size_t kept = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = read_utf8(text, at);
    at += step.length;
    const bool white = step.valid && (CharTable::instance().kind(step.code) == CharKind::space || (step.code >= 0x1C && step.code <= 0x1F));
    if (!white) kept = at;
  }
  return kept;
}

Continuation encode_continuation(const Tokenizer& tokenizer, std::string context, std::string target) {
  const std::size_t kept = size_without_white_end(context);
  target = context.substr(kept) + target;
  context.resize(kept);
  const std::vector<int32_t> ids = encoded(tokenizer, context + target);
  const auto cut = ids.begin() + std::min(std::ssize(ids), std::ssize(encoded(tokenizer, context)));
  return {{ids.begin(), cut}, {cut, ids.end()}};
}

}  // namespace longhand
