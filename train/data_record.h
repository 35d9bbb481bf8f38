// What the files of a run's data were when its checkpoint was written, so that a resumed run does not go on over others without a word.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longhand {

/// One shard or token cache.
struct DataFileRecord {
  std::string file;
  int64_t bytes = 0;
  uint32_t check = 0;  // CRC-32 of the whole file, or of kSampledBlocks blocks spread evenly over a file larger than they are
  bool operator==(const DataFileRecord&) const = default;
};

inline constexpr int64_t kSampledBlocks = 64, kSampledBlockBytes = int64_t{256} << 10;  // at most 16 MiB of a file are read

/// The files that `paths` name (folders become their shards), in order.
/// holds    a change of length is always seen, and any change of a file of up to 16 MiB; in a larger one a change that keeps the length
///          and misses all samples is left to the checksums inside the shards
/// errors   FileError when a file is missing or cannot be read
std::vector<DataFileRecord> record_data(const std::vector<std::string>& paths);

/// errors  FileError naming the first file that differs, with both states
void require_same_data(const std::vector<DataFileRecord>& checkpoint, const std::vector<DataFileRecord>& now);

}  // namespace longhand
