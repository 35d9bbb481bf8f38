// Finds added tokens ("<|endoftext|>", runs of spaces) in a text: leftmost first, longest among those that start there.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace longhand {

/// A trie over bytes. Node 0 is the root; an edge 0 means "none", since nothing leads back to the root.
class AddedTokenTrie {
 public:
  struct Match {
    std::size_t begin, end;  // the token is text[begin, end); begin == text.size() when there is none
    int32_t id;
  };

  /// `content` must not be empty.
  void add(std::string_view content, int32_t id);

  /// The first match at or after `from`.
  Match find(std::string_view text, std::size_t from) const;

  bool empty() const { return nodes_.size() == 1; }

 private:
  static constexpr int32_t kNoToken = -1;
  struct Node {
    std::array<int32_t, 256> next{};
    int32_t id = kNoToken;
  };
  std::vector<Node> nodes_{1};
};

}  // namespace longhand
