// Bytes as tokens; see byte_tokenizer.h.
#include "data/byte_tokenizer.h"

#include "core/error.h"
#include "data/unicode.h"

namespace longhand {

void ByteTokenizer::encode(std::string_view utf8, std::vector<int32_t>& out) const {
  require_utf8("tokenizer bytes", utf8);
  while (!utf8.empty()) {
    const std::size_t special = options_.parse_special ? utf8.find(kEndOfText) : std::string_view::npos;
    for (char byte : utf8.substr(0, special)) out.push_back(static_cast<unsigned char>(byte));
    if (special == std::string_view::npos) break;
    out.push_back(end_of_text());
    utf8.remove_prefix(special + kEndOfText.size());
  }
}

std::string ByteTokenizer::decode(std::span<const int32_t> ids) const {
  std::string bytes;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size())
      throw ValueError("tokenizer bytes: an id stands for no token",
                       {{"id", std::to_string(ids[i])}, {"position", std::to_string(i)}, {"expected", "ids 0 to 256"}});
    if (ids[i] < end_of_text()) bytes.push_back(static_cast<char>(ids[i]));
    else if (!options_.skip_special) bytes += kEndOfText;
  }
  return replace_invalid_utf8(bytes);
}

}  // namespace longhand
