// See data_record.h.
#include "train/data_record.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "core/crc32.h"
#include "core/error.h"
#include "data/shard_reader.h"

namespace longhand {
namespace {

struct Closer {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

[[noreturn]] void refuse(const std::string& path, const std::string& reason) {
  throw FileError("train: a data file cannot be read", {{"file", path}, {"reason", reason}});
}

DataFileRecord record_file(const std::string& path) {
  const std::unique_ptr<std::FILE, Closer> file(std::fopen(path.c_str(), "rbe"));
  if (!file || ::fseeko(file.get(), 0, SEEK_END) != 0) refuse(path, std::strerror(errno));
  DataFileRecord record{path, ::ftello(file.get()), 0};
  const bool whole = record.bytes <= kSampledBlocks * kSampledBlockBytes;
  const int64_t blocks = whole ? (record.bytes + kSampledBlockBytes - 1) / kSampledBlockBytes : kSampledBlocks;
  std::vector<char> block(static_cast<std::size_t>(kSampledBlockBytes));
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = whole ? i * kSampledBlockBytes : (record.bytes - kSampledBlockBytes) * i / (kSampledBlocks - 1);
    const auto wanted = static_cast<std::size_t>(std::min(kSampledBlockBytes, record.bytes - begin));
    if (::fseeko(file.get(), begin, SEEK_SET) != 0 || std::fread(block.data(), 1, wanted, file.get()) != wanted)
      refuse(path, std::ferror(file.get()) != 0 ? std::strerror(errno) : "it became shorter while it was read");
    record.check = crc32(block.data(), wanted, record.check);
  }
  return record;
}

std::string state_of(const DataFileRecord& record) {
  return fmt::format("{} bytes, check {:08x}", record.bytes, record.check);
}

}  // namespace

std::vector<DataFileRecord> record_data(const std::vector<std::string>& paths) {
  std::vector<DataFileRecord> records;
  for (const std::string& path : expand_shards(paths)) records.push_back(record_file(path));
  return records;
}

void require_same_data(const std::vector<DataFileRecord>& checkpoint, const std::vector<DataFileRecord>& now) {
  const std::string way_out = "put the file back as it was, or start another run from the checkpoint with --init-from";
  for (std::size_t i = 0; i < std::max(checkpoint.size(), now.size()); ++i) {
    if (i < checkpoint.size() && i < now.size() && checkpoint[i] == now[i]) continue;
    const bool gone = i >= now.size(), added = i >= checkpoint.size();
    throw FileError("train: the data have changed since the checkpoint",
                    {{"file", added ? now[i].file : checkpoint[i].file},
                     {"checkpoint", added ? "no such file" : state_of(checkpoint[i])},
                     {"now", gone                                ? "no such file"
                             : added                             ? state_of(now[i])
                             : now[i].file != checkpoint[i].file ? now[i].file + " stands in its place"
                                                                 : state_of(now[i])},
                     {"try", way_out}});
  }
}

}  // namespace longhand
