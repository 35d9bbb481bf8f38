// Bytes as tokens; see byte_tokenizer.h.
#include "data/byte_tokenizer.h"

#include <array>

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
    const auto piece = bytes_of(ids[i]);
    if (!piece)
      throw ValueError("tokenizer bytes: an id stands for no token",
                       {{"id", std::to_string(ids[i])}, {"position", std::to_string(i)}, {"expected", "ids 0 to 256"}});
    bytes += *piece;
  }
  return replace_invalid_utf8(bytes);
}

std::optional<std::string_view> ByteTokenizer::bytes_of(int32_t id) const {
  static const std::array<char, 256> bytes = [] {
    std::array<char, 256> all{};
    for (int i = 0; i < 256; ++i) all[static_cast<std::size_t>(i)] = static_cast<char>(i);
    return all;
  }();
  if (id < 0 || id >= vocab_size()) return std::nullopt;
  if (id == end_of_text()) return options_.skip_special ? std::string_view() : kEndOfText;
  return std::string_view(&bytes[static_cast<std::size_t>(id)], 1);
}

}  // namespace longhand
