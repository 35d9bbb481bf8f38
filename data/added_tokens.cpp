// Trie of added tokens; see added_tokens.h.
#include "data/added_tokens.h"

namespace longhand {

void AddedTokenTrie::add(std::string_view content, int32_t id) {
  std::size_t node = 0;
  for (char c : content) {
    const auto byte = static_cast<unsigned char>(c);
    if (nodes_[node].next[byte] == 0) {
      nodes_[node].next[byte] = static_cast<int32_t>(nodes_.size());
      nodes_.emplace_back();
    }
    node = static_cast<std::size_t>(nodes_[node].next[byte]);
  }
  nodes_[node].id = id;
}

AddedTokenTrie::Match AddedTokenTrie::find(std::string_view text, std::size_t from) const {
  if (empty()) return {text.size(), text.size(), kNoToken};
  for (std::size_t begin = from; begin < text.size(); ++begin) {
    Match longest{begin, begin, kNoToken};
    std::size_t node = 0;
    for (std::size_t pos = begin; pos < text.size(); ++pos) {
      node = static_cast<std::size_t>(nodes_[node].next[static_cast<unsigned char>(text[pos])]);
      if (node == 0) break;
      if (nodes_[node].id != kNoToken) longest = {begin, pos + 1, nodes_[node].id};
    }
    if (longest.id != kNoToken) return longest;
  }
  return {text.size(), text.size(), kNoToken};
}

}  // namespace longhand
