// Byte-level byte-pair encoding. From text to ids in five steps, each a few lines below:
//
//   encode        1  cut out the added tokens that stand in the text as given        "<|endoftext|>"
//                 2  bring the rest to Normalization Form C                           "e" + U+0301 becomes U+00E9
//                 3  cut out the added tokens that stand in normalised text           "    " (a run of spaces)
//   encode_words  4  cut the rest into words                                          "Hello world" -> "Hello", " world"
//   encode_word   5  start from the word's bytes and merge neighbours, best rank first
//
// Step 5 is the algorithm. A merge is a pair of tokens that became one when the vocabulary was learnt; its rank is the order in which
// that happened. Encoding replays history: among all neighbouring pairs take the one of lowest rank (the leftmost, if it is there
// several times), join it, and go on until no pair has a merge. Words never join, so each is worked out once and then remembered.
// source   Sennrich, Haddow & Birch 2016, arXiv:1508.07909 (BPE); Radford et al. 2019 (GPT-2: on bytes, with a word pattern)
#include "data/bpe_tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <queue>

#include "core/error.h"
#include "data/unicode.h"
#include "data/word_cache.h"
#include "data/word_splitter.h"

namespace longhand {
namespace {

// Up to here a scan for the best pair beats a heap.
constexpr std::size_t kShortWord = 48;

// Calls on_text(piece) and on_token(id) in turn over `text`.
template <class OnText, class OnToken>
void split_at_tokens(const AddedTokenTrie& tokens, std::string_view text, OnText on_text, OnToken on_token) {
  for (std::size_t pos = 0; pos < text.size();) {
    const auto match = tokens.find(text, pos);
    if (match.begin > pos) on_text(text.substr(pos, match.begin - pos));
    if (match.begin == text.size()) break;
    on_token(match.id);
    pos = match.end;
  }
}

uint32_t next_serial() {
  static std::atomic<uint32_t> last{0};
  return ++last;
}

// 64-bit FNV-1a over everything that decides an encoding.
std::string fingerprint_of(const BpeDefinition& definition, bool parse_special) {
  uint64_t hash = 0xCBF29CE484222325ull;
  const auto add_byte = [&](unsigned char byte) { hash = (hash ^ byte) * 0x100000001B3ull; };
  const auto add_number = [&](uint64_t number) {
    for (int shift = 0; shift < 64; shift += 8) add_byte(static_cast<unsigned char>(number >> shift));
  };
  const auto add_text = [&](const std::string& text) {
    add_number(text.size());
    for (char c : text) add_byte(static_cast<unsigned char>(c));
  };
  add_number(definition.tokens.size());
  for (const auto& token : definition.tokens) add_text(token);
  add_number(definition.merges.size());
  for (const auto& merge : definition.merges)
    for (int32_t id : {merge.left, merge.right, merge.result}) add_number(static_cast<uint64_t>(id));
  add_number(definition.added.size());
  for (const auto& token : definition.added) {
    add_number(static_cast<uint64_t>(token.id));
    add_text(token.content);
    add_number(token.special ? 1 : 0);
    add_number(token.normalized ? 1 : 0);
  }
  return fmt::format("bpe-{}-{:016x}{}", definition.tokens.size(), hash, parse_special ? "+special" : "");
}

// Bytes with a visible Latin-1 character stand for themselves.
bool is_own_symbol(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
}

constexpr char32_t kLastSymbol = 0xFF + 68;  // 68 bytes have a borrowed symbol, U+0100 to U+0143

// By symbol: its byte, or -1.
std::array<int, kLastSymbol + 1> make_symbol_table() {
  std::array<int, kLastSymbol + 1> bytes;
  bytes.fill(-1);
  for (unsigned byte = 0; byte < 256; ++byte) bytes[byte_symbol(static_cast<uint8_t>(byte))] = static_cast<int>(byte);
  return bytes;
}

}  // namespace

char32_t byte_symbol(uint8_t byte) {
  if (is_own_symbol(byte)) return byte;
  char32_t borrowed = 0x100;
  for (unsigned before = 0; before < byte; ++before) borrowed += is_own_symbol(before) ? 0 : 1;
  return borrowed;
}

std::string token_bytes(std::string_view token) {
  static const auto symbol_table = make_symbol_table();
  std::string bytes;
  for (std::size_t pos = 0; pos < token.size();) {
    const Utf8Step step = read_utf8(token, pos);
    const int byte = step.code <= kLastSymbol ? symbol_table[step.code] : -1;
    if (byte < 0) return std::string(token);
    bytes.push_back(static_cast<char>(byte));
    pos += step.length;
  }
  return bytes;
}

MergeRanks::MergeRanks(const std::vector<BpeDefinition::Merge>& merges) {
  const std::size_t size = std::bit_ceil(2 * merges.size() + 2);  // at most half full, so a search ends soon
  slots_.resize(size);
  shift_ = 64 - std::countr_zero(size);
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    std::size_t i = first_slot(merges[rank].left, merges[rank].right);
    while (slots_[i].left >= 0) i = (i + 1) & (size - 1);
    slots_[i] = {merges[rank].left, merges[rank].right, static_cast<int32_t>(rank)};
  }
}

std::size_t MergeRanks::first_slot(int32_t left, int32_t right) const {
  const uint64_t pair = static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  return (pair * 0x9E3779B97F4A7C15ull) >> shift_;  // multiplicative hashing: the top bits of pair * 2^64 / golden ratio
}

int32_t MergeRanks::find(int32_t left, int32_t right) const {
  for (std::size_t i = first_slot(left, right);; i = (i + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[i];
    if (slot.left == left && slot.right == right) return slot.rank;
    if (slot.left < 0) return kNone;
  }
}

BpeTokenizer::BpeTokenizer(BpeDefinition definition, TokenizerOptions options)
    : definition_(std::move(definition)),
      ranks_(definition_.merges),
      serial_(next_serial()),
      fingerprint_(fingerprint_of(definition_, options.parse_special)) {
  for (const auto& token : definition_.tokens) bytes_.push_back(token_bytes(token));
  std::string buffer;
  for (const auto& token : definition_.added) {
    if (options.skip_special && token.special) bytes_[static_cast<std::size_t>(token.id)].clear();
    if (token.special && !options.parse_special) continue;
    if (token.normalized) normalized_tokens_.add(to_nfc(token.content, buffer), token.id);
    else raw_tokens_.add(token.content, token.id);
  }
}

void BpeTokenizer::encode(std::string_view utf8, std::vector<int32_t>& out) const {
  require_utf8("tokenizer " + definition_.name, utf8);
  std::string buffer;
  const auto push_id = [&](int32_t id) { out.push_back(id); };
  const auto on_words = [&](std::string_view text) { encode_words(text, out); };
  const auto on_raw_text = [&](std::string_view text) { split_at_tokens(normalized_tokens_, to_nfc(text, buffer), on_words, push_id); };
  split_at_tokens(raw_tokens_, utf8, on_raw_text, push_id);
}

void BpeTokenizer::encode_words(std::string_view text, std::vector<int32_t>& out) const {
  WordCache& cache = WordCache::of_this_thread();
  WordSplitter words(text);
  for (std::string_view word = words.next(); !word.empty(); word = words.next()) {
    if (!WordCache::takes(word)) {
      encode_word(word, out);
      continue;
    }
    const WordCache::Key key(word, serial_);
    if (const auto known = cache.find(key); !known.empty()) {
      out.insert(out.end(), known.begin(), known.end());
      continue;
    }
    const std::size_t before = out.size();
    encode_word(word, out);
    cache.put(key, std::span(out).subspan(before));
  }
}

void BpeTokenizer::encode_word(std::string_view word, std::vector<int32_t>& out) const {
  std::vector<int32_t> symbols;
  symbols.reserve(word.size());
  for (char c : word) {
    const int32_t id = definition_.byte_ids[static_cast<unsigned char>(c)];
    if (id >= 0) symbols.push_back(id);  // a byte without a token is left out: the vocabulary has no unknown token
  }
  if (symbols.size() <= kShortWord) merge_short_word(symbols);
  else merge_long_word(symbols);
  out.insert(out.end(), symbols.begin(), symbols.end());
}

// The algorithm as it is told: find the best pair by looking at all of them, join it, repeat. Quadratic, but short words are short.
void BpeTokenizer::merge_short_word(std::vector<int32_t>& symbols) const {
  std::array<int32_t, kShortWord> rank;  // rank[i]: of the merge of symbols i and i + 1
  std::size_t pairs = symbols.empty() ? 0 : symbols.size() - 1;
  for (std::size_t i = 0; i < pairs; ++i) rank[i] = ranks_.find(symbols[i], symbols[i + 1]);
  while (pairs > 0) {
    const auto best = std::min_element(rank.begin(), rank.begin() + static_cast<std::ptrdiff_t>(pairs));  // the leftmost, if several
    if (*best == MergeRanks::kNone) break;
    const auto i = static_cast<std::size_t>(best - rank.begin());
    symbols[i] = definition_.merges[static_cast<std::size_t>(*best)].result;
    std::copy(symbols.begin() + static_cast<std::ptrdiff_t>(i) + 2, symbols.end(), symbols.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    symbols.pop_back();
    std::copy(best + 1, rank.begin() + static_cast<std::ptrdiff_t>(pairs), best);
    --pairs;
    if (i > 0) rank[i - 1] = ranks_.find(symbols[i - 1], symbols[i]);  // the joined symbol has new neighbours on both sides
    if (i < pairs) rank[i] = ranks_.find(symbols[i], symbols[i + 1]);
  }
}

// The same for a word of any length, n log n: a linked list of symbols, and a heap of candidate merges ordered by (rank, position).
// Candidates are not taken back when a neighbour changes; an outdated one is recognised when it comes up, and dropped.
void BpeTokenizer::merge_long_word(std::vector<int32_t>& symbols) const {
  constexpr int32_t kJoined = -1;  // the symbol went into its left neighbour
  const auto n = symbols.size();
  if (n >= UINT32_MAX) throw ValueError("tokenizer " + definition_.name + ": a word is too long", {{"bytes", std::to_string(n)}});
  std::vector<uint32_t> next(n), previous(n);
  using Candidate = uint64_t;  // rank << 32 | position of the left symbol
  std::vector<Candidate> candidates;
  const auto candidate = [&](uint32_t left, uint32_t right, std::vector<Candidate>& into) {
    const int32_t rank = ranks_.find(symbols[left], symbols[right]);
    if (rank != MergeRanks::kNone) into.push_back(static_cast<uint64_t>(rank) << 32 | left);
  };
  for (uint32_t i = 0; i < n; ++i) next[i] = i + 1, previous[i] = i - 1;  // previous[0] is never read
  for (uint32_t i = 0; i + 1 < n; ++i) candidate(i, i + 1, candidates);
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap(std::greater<>(), std::move(candidates));

  std::vector<Candidate> fresh;
  while (!heap.empty()) {
    const auto left = static_cast<uint32_t>(heap.top());
    const auto& merge = definition_.merges[heap.top() >> 32];
    heap.pop();
    const uint32_t right = next[left];
    if (symbols[left] != merge.left || right == n || symbols[right] != merge.right) continue;  // outdated
    symbols[left] = merge.result;
    symbols[right] = kJoined;
    next[left] = next[right];
    if (next[left] < n) previous[next[left]] = left;
    fresh.clear();
    if (left > 0) candidate(previous[left], left, fresh);
    if (next[left] < n) candidate(left, next[left], fresh);
    for (Candidate c : fresh) heap.push(c);
  }
  std::erase(symbols, kJoined);
}

std::string BpeTokenizer::decode(std::span<const int32_t> ids) const {
  std::string bytes;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const auto piece = bytes_of(ids[i]);
    if (!piece)
      throw ValueError("tokenizer " + definition_.name + ": an id stands for no token",
                       {{"id", std::to_string(ids[i])},
                        {"position", std::to_string(i)},
                        {"expected", "an id of the vocabulary, below " + std::to_string(vocab_size())},
                        {"try", "a model's vocab_size may be padded: sample among the first " + std::to_string(vocab_size()) + " only"}});
    bytes += *piece;
  }
  return replace_invalid_utf8(bytes);
}

std::optional<std::string_view> BpeTokenizer::bytes_of(int32_t id) const {
  const auto i = static_cast<std::size_t>(id);
  if (id < 0 || i >= bytes_.size() || definition_.tokens[i].empty()) return std::nullopt;
  return bytes_[i];
}

int32_t BpeTokenizer::end_of_text() const {
  for (const auto& token : definition_.added)
    if (token.content == kEndOfText) return token.id;
  throw ValueError("tokenizer " + definition_.name + ": it has no token that ends a document",
                   {{"expected", "an added token " + std::string(kEndOfText)}});
}

}  // namespace longhand
