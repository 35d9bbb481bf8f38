// See continuation.h.
#include "data/tasks/continuation.h"

#include <algorithm>

namespace longhand {

Continuation encode_continuation(const Tokenizer& tokenizer, std::string context, std::string target) {
  const auto end = context.find_last_not_of(" \t\n\r\v\f");
  const std::size_t kept = end == std::string::npos ? 0 : end + 1;
  target = context.substr(kept) + target;
  context.resize(kept);
  const std::vector<int32_t> ids = encoded(tokenizer, context + target);
  const auto cut = ids.begin() + std::min(std::ssize(ids), std::ssize(encoded(tokenizer, context)));
  return {{ids.begin(), cut}, {cut, ids.end()}};
}

}  // namespace longhand
