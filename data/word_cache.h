// Remembers the ids of words already merged: most words of a text are among the few thousand common ones.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

namespace longhand {

/// Fixed size (2 MiB), one cache line per entry, no chaining: a word has one possible place, and a newcomer takes it over.
/// Each thread has its own, so nothing is locked; each entry names the tokenizer it belongs to, so several may share it.
class WordCache {
 public:
  static constexpr std::size_t kMaxWordBytes = 24;
  static constexpr std::size_t kMaxIds = 8;

  /// The words' bytes, padded with zeros. `length` tells "a" from "a\0".
  struct Key {
    std::array<uint64_t, kMaxWordBytes / 8> bytes{};
    uint32_t owner;
    uint8_t length;

    Key(std::string_view word, uint32_t tokenizer) : owner(tokenizer), length(static_cast<uint8_t>(word.size())) {
      std::memcpy(bytes.data(), word.data(), word.size());
    }
  };

  /// True for a word short enough to be looked up and remembered.
  static bool takes(std::string_view word) { return word.size() <= kMaxWordBytes; }

  /// The ids of the word, or an empty span when it is not there. A word always has at least one id.
  std::span<const int32_t> find(const Key& key) const {
    const Entry& entry = entries_[place(key)];
    const bool same = entry.owner == key.owner && entry.length == key.length && entry.bytes == key.bytes;
    return same ? std::span(entry.ids.data(), entry.count) : std::span<const int32_t>();
  }

  void put(const Key& key, std::span<const int32_t> ids) {
    if (ids.size() > kMaxIds) return;
    Entry& entry = entries_[place(key)];
    entry.owner = key.owner;
    entry.length = key.length;
    entry.count = static_cast<uint8_t>(ids.size());
    entry.bytes = key.bytes;
    std::memcpy(entry.ids.data(), ids.data(), ids.size_bytes());
  }

  /// The cache of the calling thread.
  static WordCache& of_this_thread() {
    thread_local WordCache cache;
    return cache;
  }

 private:
  static constexpr int kPlacesLog2 = 15;

  struct alignas(64) Entry {
    std::array<uint64_t, kMaxWordBytes / 8> bytes{};
    std::array<int32_t, kMaxIds> ids{};
    uint32_t owner = 0;  // 0: no entry
    uint8_t length = 0;
    uint8_t count = 0;
  };
  static_assert(sizeof(Entry) == 64);

  static std::size_t place(const Key& key) {
    uint64_t hash = key.owner;
    for (uint64_t eight : key.bytes) {
      hash = (hash ^ eight) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 32;
    }
    return (hash * 0x9E3779B97F4A7C15ull) >> (64 - kPlacesLog2);
  }

  std::vector<Entry> entries_ = std::vector<Entry>(std::size_t{1} << kPlacesLog2);
};

}  // namespace longhand
