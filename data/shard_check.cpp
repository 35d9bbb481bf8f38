// Counting; see shard_check.h.
#include "data/shard_check.h"

#include <algorithm>

#include "data/document_source.h"
#include "data/token_cache.h"

namespace longhand {
namespace {

int64_t count_characters(const std::string& utf8) {
  return std::count_if(utf8.begin(), utf8.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

ShardCount check_cache(const std::string& path) {
  const TokenCache cache(path);
  cache.verify();
  ShardCount out;
  out.documents = cache.documents();
  out.tokens = cache.tokens() - cache.documents();  // one end-of-text id a document
  for (const CachedShard& shard : cache.shards()) out.text_bytes += shard.text_bytes;
  TokenDocument document;
  for (int64_t i = 0; i < cache.documents(); ++i) cache.read(i, document);  // every id inside the vocabulary
  return out;
}

}  // namespace

ShardCount check_shard(const std::string& path, const CheckOptions& options) {
  if (TokenCache::is_cache(path)) return check_cache(path);
  ShardCount out;
  out.characters = 0;
  BadLines bad_lines;
  ShardOptions shard_options;
  shard_options.skip_bad_lines = options.skip_bad_lines ? &bad_lines : nullptr;
  ShardReader reader(path, shard_options);
  for (Document document; reader.next(document);) {
    ++out.documents;
    out.text_bytes += static_cast<int64_t>(document.text.size());
    out.characters += count_characters(document.text);
  }
  out.bad_lines = bad_lines.count();
  if (!options.tokenizer) return out;

  SourceOptions source_options;
  source_options.files = {path};
  source_options.threads = options.threads;
  source_options.skip_bad_lines = shard_options.skip_bad_lines;
  DocumentSource source(source_options, options.tokenizer);
  out.tokens = 0;
  for (TokenDocument document; source.next(document);) out.tokens += static_cast<int64_t>(document.tokens.size()) - 1;
  return out;
}

}  // namespace longhand
