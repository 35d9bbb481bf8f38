// The data commands; see data_commands.h.
#include "tools/data_commands.h"

#include <fmt/format.h>

#include <chrono>
#include <cstdio>
#include <memory>

#include "core/error.h"
#include "data/byte_source.h"
#include "data/dataset.h"
#include "data/shard_check.h"
#include "data/token_cache.h"
#include "data/tokenizer.h"

namespace longhand {
namespace {

void report_bad_lines(const BadLines& bad_lines) {
  if (bad_lines.count() == 0) return;
  fmt::print(stderr, "{} bad lines were left out; the first:\n", bad_lines.count());
  for (const std::string& message : bad_lines.first()) fmt::print(stderr, "{}\n", message);
}

std::string number_or_dash(int64_t value) {
  return value < 0 ? "-" : std::to_string(value);
}

// Adds, where -1 stands for "not known".
void add(int64_t& sum, int64_t value) {
  sum = sum < 0 || value < 0 ? -1 : sum + value;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void print_speed(const std::string& what, double seconds, int64_t text_bytes, const std::string& remark) {
  fmt::print("{:<34} {:>9.1f} {:>10.2f} {:>13}  {}\n", what, static_cast<double>(text_bytes) / 1e6 / seconds, seconds, text_bytes, remark);
}

}  // namespace

int run_data_check(const DataCheckOptions& options) {
  CheckOptions check;
  if (!options.tokenizer.empty()) check.tokenizer = open_tokenizer(options.tokenizer);
  check.skip_bad_lines = options.skip_bad_lines;
  check.threads = options.threads;

  const auto print_row = [&](const ShardCount& count, const std::string& name) {
    fmt::print("{:>10} {:>15} {:>15} {:>13} {:>9}  {}\n", count.documents, count.text_bytes, number_or_dash(count.characters),
               number_or_dash(count.tokens), count.bad_lines, name);
    std::fflush(stdout);
  };
  const std::vector<std::string> paths = expand_shards(options.files);
  fmt::print("{:>10} {:>15} {:>15} {:>13} {:>9}  file\n", "documents", "text bytes", "characters", "tokens", "bad lines");
  ShardCount sum{0, 0, 0, 0, 0};
  int64_t sound = 0, faults = 0;
  for (const std::string& path : paths) {
    try {
      const ShardCount count = check_shard(path, check);
      print_row(count, path);
      ++sound;
      sum.documents += count.documents;
      sum.text_bytes += count.text_bytes;
      add(sum.characters, count.characters);
      add(sum.tokens, count.tokens);
      sum.bad_lines += count.bad_lines;
    } catch (const Error& error) {
      ++faults;
      fmt::print("{:>10} {:>15} {:>15} {:>13} {:>9}  {}\n", "fault", "-", "-", "-", "-", path);
      std::fflush(stdout);
      fmt::print(stderr, "{}\n", error.what());
    }
  }
  print_row(sum, fmt::format("sum of {} sound file{}", sound, sound == 1 ? "" : "s"));
  if (faults > 0) fmt::print(stderr, "data check: {} of {} files have a fault\n", faults, sound + faults);
  return faults > 0 ? 1 : 0;
}

int run_data_pack(const PackOptions& options) {
  const PackReport report = pack_folder(options);
  for (const auto& [path, reason] : report.left_out) fmt::print(stderr, "left out: {}: {}\n", path, reason);
  fmt::print("{} documents, {} bytes of text  {}\n", report.documents, report.text_bytes, options.out);
  if (!options.val_out.empty())
    fmt::print("{} documents, {} bytes of text  {}\n", report.val_documents, report.val_text_bytes, options.val_out);
  return 0;
}

int run_tokenize_cache(const TokenCacheOptions& options) {
  BadLines bad_lines;
  CacheOptions cache;
  cache.threads = options.threads;
  cache.skip_bad_lines = options.skip_bad_lines ? &bad_lines : nullptr;
  const auto start = std::chrono::steady_clock::now();
  const CacheSummary summary = write_token_cache(options.out, options.files, open_tokenizer(options.tokenizer), cache);
  const double seconds = seconds_since(start);
  report_bad_lines(bad_lines);
  fmt::print("{} shards, {} documents, {} bytes of text, {} tokens, {} bytes  {}\n", summary.shards, summary.documents, summary.text_bytes,
             summary.tokens, summary.file_bytes, options.out);
  fmt::print(stderr, "{:.1f} s, {:.1f} MB/s of text\n", seconds, static_cast<double>(summary.text_bytes) / 1e6 / seconds);
  return 0;
}

int run_bench_data(const BenchDataOptions& options) {
  std::vector<std::string> files;
  for (const std::string& path : expand_shards(options.files))
    if (!TokenCache::is_cache(path)) files.push_back(path);
  if (files.empty()) throw ConfigError("bench data: no shard was given", {{"try", "name *.jsonl.zst files or a folder of them"}});
  const std::shared_ptr<const Tokenizer> tokenizer = open_tokenizer(options.tokenizer);
  fmt::print("{:<34} {:>9} {:>10} {:>13}\n", "stage", "MB/s", "seconds", "text bytes");

  auto start = std::chrono::steady_clock::now();
  int64_t line_bytes = 0;
  std::vector<char> buffer(std::size_t{1} << 20);
  for (const std::string& file : files) {
    ByteSource source(file);
    while (const std::size_t n = source.read(buffer.data(), buffer.size())) line_bytes += static_cast<int64_t>(n);
  }
  print_speed("read (decompress), 1 thread", seconds_since(start), line_bytes, "bytes of the JSON lines");

  start = std::chrono::steady_clock::now();
  int64_t text_bytes = 0, documents = 0;
  for (const std::string& file : files) {
    ShardReader reader(file);
    for (Document document; reader.next(document); ++documents) text_bytes += static_cast<int64_t>(document.text.size());
  }
  print_speed("read and parse, 1 thread", seconds_since(start), text_bytes, fmt::format("{} documents", documents));

  double seconds = 0;
  int64_t tokenized_bytes = 0, tokens = 0;
  std::vector<int32_t> ids;
  for (const std::string& file : files) {
    ShardReader reader(file);
    for (Document document; tokenized_bytes < options.tokenize_bytes && reader.next(document);) {
      ids.clear();
      start = std::chrono::steady_clock::now();
      tokenizer->encode(document.text, ids);
      seconds += seconds_since(start);
      tokenized_bytes += static_cast<int64_t>(document.text.size());
      tokens += static_cast<int64_t>(ids.size());
    }
  }
  print_speed("tokenize, 1 thread", seconds, tokenized_bytes,
              fmt::format("{} tokens, {:.2f} Mtok/s", tokens, static_cast<double>(tokens) / 1e6 / seconds));

  DataOptions data;
  data.files = files;
  data.threads = options.threads;
  data.rows = 16;
  data.length = 2048;
  data.epochs = 1;
  start = std::chrono::steady_clock::now();
  BatchStream stream(data, tokenizer);
  tokens = 0;
  for (Batch batch; stream.next(batch);) tokens += batch.rows * batch.length;
  seconds = seconds_since(start);
  print_speed(fmt::format("batches, {} tokenizing threads", options.threads), seconds, text_bytes,
              fmt::format("{} tokens, {:.2f} Mtok/s", tokens, static_cast<double>(tokens) / 1e6 / seconds));
  return 0;
}

}  // namespace longhand
