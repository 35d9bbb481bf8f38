// Shards out of text; see shard_writer.h.
#include "data/shard_writer.h"

#include <fmt/format.h>
#include <fnmatch.h>
#include <zstd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "data/shuffle.h"

namespace longhand {
namespace {

constexpr std::size_t kLargestFile = std::size_t{64} << 20;  // escaped at worst sixfold, a document still fits a reader's line limit

struct EncoderFreer {
  void operator()(ZSTD_CCtx* encoder) const { ZSTD_freeCCtx(encoder); }
};

bool matches(const std::vector<std::string>& patterns, const std::filesystem::path& path) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    return ::fnmatch(pattern.c_str(), path.filename().c_str(), 0) == 0 || ::fnmatch(pattern.c_str(), path.c_str(), 0) == 0;
  });
}

// Paths below the folder, in order.
std::vector<std::filesystem::path> files_below(const PackOptions& options) {
  namespace fs = std::filesystem;
  if (!fs::is_directory(options.folder))
    throw FileError("pack: no such folder", {{"folder", options.folder}, {"try", "name a folder of text files"}});
  std::vector<fs::path> out;
  for (auto entry = fs::recursive_directory_iterator(options.folder); entry != fs::recursive_directory_iterator(); ++entry) {
    const fs::path below = entry->path().lexically_relative(options.folder);
    if (entry->path().filename().string().starts_with('.')) {
      if (entry->is_directory()) entry.disable_recursion_pending();
      continue;
    }
    std::error_code none;
    if (!entry->is_regular_file() || fs::equivalent(entry->path(), options.out, none) ||
        fs::equivalent(entry->path(), options.val_out, none))
      continue;
    if ((options.include.empty() || matches(options.include, below)) && !matches(options.exclude, below)) out.push_back(below);
  }
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace

struct ShardWriter::State {
  OutputFile& file;
  std::unique_ptr<ZSTD_CCtx, EncoderFreer> encoder{ZSTD_createCCtx()};
  std::vector<char> compressed = std::vector<char>(ZSTD_CStreamOutSize());
  int64_t documents = 0, text_bytes = 0;

  void compress(std::string_view text, ZSTD_EndDirective end) {
    ZSTD_inBuffer from{text.data(), text.size(), 0};
    while (true) {
      ZSTD_outBuffer to{compressed.data(), compressed.size(), 0};
      const std::size_t left = ZSTD_compressStream2(encoder.get(), &to, &from, end);
      if (ZSTD_isError(left)) throw FileError("shard: cannot compress", {{"reason", ZSTD_getErrorName(left)}});
      file.write(compressed.data(), to.pos);
      if (end == ZSTD_e_end ? left == 0 : from.pos == from.size) return;
    }
  }
};

ShardWriter::ShardWriter(OutputFile& file, int zstd_level) : state_(new State{file}) {
  ZSTD_CCtx_setParameter(state_->encoder.get(), ZSTD_c_compressionLevel, zstd_level);
  ZSTD_CCtx_setParameter(state_->encoder.get(), ZSTD_c_checksumFlag, 1);
}
ShardWriter::~ShardWriter() = default;

void ShardWriter::add(std::string_view text, std::string_view set_name) {
  std::string line;
  try {
    const nlohmann::ordered_json object = {{"text", text}, {"meta", {{"pile_set_name", set_name}}}};
    line = object.dump() + "\n";
  } catch (const nlohmann::json::type_error&) {
    throw ValueError("shard: a text is not valid UTF-8", {{"document", std::to_string(state_->documents + 1)}});
  }
  state_->compress(line, ZSTD_e_continue);
  ++state_->documents;
  state_->text_bytes += static_cast<int64_t>(text.size());
}

void ShardWriter::finish() {
  state_->compress("", ZSTD_e_end);
}
int64_t ShardWriter::documents() const {
  return state_->documents;
}
int64_t ShardWriter::text_bytes() const {
  return state_->text_bytes;
}

void write_shard(const std::string& path, const std::function<void(ShardWriter&)>& write, int zstd_level) {
  write_file_atomically(path, [&](OutputFile& file) {
    ShardWriter writer(file, zstd_level);
    write(writer);
    writer.finish();
  });
}

PackReport pack_folder(const PackOptions& options) {
  if (!(options.val_fraction >= 0 && options.val_fraction < 1) || (options.val_fraction > 0) == options.val_out.empty())
    throw ValueError("pack: a share for validation needs a number in (0, 1) and a file",
                     {{"val_fraction", fmt::format("{}", options.val_fraction)}, {"val_out", options.val_out}});
  const std::vector<std::filesystem::path> files = files_below(options);
  const auto count = static_cast<int64_t>(files.size());
  const uint64_t seed = options.shuffle_seed.value_or(0);
  std::vector<int64_t> order = keyed_permutation(count, philox_key(seed, hash_name("pack order")));
  if (!options.shuffle_seed) std::sort(order.begin(), order.end());

  std::set<int64_t> val;
  if (options.val_fraction > 0) {
    if (count < 2) throw FileError("pack: a share for validation needs at least two files", {{"folder", options.folder}});
    const std::vector<int64_t> drawn = keyed_permutation(count, philox_key(seed, hash_name("pack val")));
    const auto share = std::clamp<int64_t>(std::llround(options.val_fraction * static_cast<double>(count)), 1, count - 1);
    val.insert(drawn.begin(), drawn.begin() + share);
  }

  PackReport report;
  const auto write_files = [&](ShardWriter& writer, bool to_val) {
    for (const int64_t i : order) {
      if ((val.count(i) > 0) != to_val) continue;
      const std::string path = (options.folder / files[static_cast<std::size_t>(i)]).string();
      if (const auto size = std::filesystem::file_size(path); size > kLargestFile) {
        report.left_out.emplace_back(path, fmt::format("larger than {} MiB: cut it into several files", kLargestFile >> 20));
        continue;
      }
      const std::string text = read_text_file(path);
      std::string_view view = text;
      if (view.starts_with("\xEF\xBB\xBF")) view.remove_prefix(3);
      if (view.empty()) {
        report.left_out.emplace_back(path, "empty");
      } else if (view.find('\0') != std::string_view::npos) {
        report.left_out.emplace_back(path, "binary (it holds a zero byte)");
      } else {
        try {
          writer.add(view, options.set_name);
        } catch (const ValueError&) {
          report.left_out.emplace_back(path, "not UTF-8");
        }
      }
    }
    (to_val ? report.val_documents : report.documents) = writer.documents();
    (to_val ? report.val_text_bytes : report.text_bytes) = writer.text_bytes();
    if (writer.documents() == 0)
      throw FileError("pack: there is no text file to pack",
                      {{"folder", options.folder}, {"files", fmt::format("{} seen, {} left out", count, report.left_out.size())}});
  };
  write_shard(
      options.out, [&](ShardWriter& writer) { write_files(writer, false); }, options.zstd_level);
  if (!val.empty())
    write_shard(
        options.val_out, [&](ShardWriter& writer) { write_files(writer, true); }, options.zstd_level);
  return report;
}

}  // namespace longhand
