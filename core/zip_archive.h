// Zip archives without compression, as torch writes them. Reading trusts the central directory alone and refuses whatever two readers could
// understand differently.
#pragma once
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/files.h"

namespace longhand {

struct ZipEntry {
  uint64_t begin = 0, size = 0;  // the data, from the beginning of the file
  uint32_t crc = 0;              // as stored; 0 where the writer left it unset
};

/// The entries of an archive.
/// errors  FileError naming file, entry and rule: no end record, several disks, encryption, compression, names that leave the folder or
/// stand
///         twice, local headers of another name, entries that overlap or reach outside the file, ZIP64 fields that are missing or disagree
/// source  PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5
class ZipArchive {
 public:
  explicit ZipArchive(const MappedFile& file);

  const MappedFile& file() const { return file_; }
  const std::map<std::string, ZipEntry>& entries() const { return entries_; }
  std::span<const std::byte> bytes(const ZipEntry& entry) const;

  /// Compares the data with the stored checksum; one of 0 counts as unset.
  /// errors  FileError naming the entry and both values
  void verify(const std::string& name) const;

 private:
  struct Directory {
    uint64_t begin, size, entries;
  };
  struct Span {
    uint64_t begin, end;
    std::string name;
  };
  [[noreturn]] void refuse(const std::string& rule, std::vector<std::pair<std::string, std::string>> rows = {}) const;
  uint64_t number(uint64_t at, int bytes) const;  // little-endian; refuses to read outside the file
  std::string_view text(uint64_t at, uint64_t size) const;
  Directory find_directory() const;
  uint64_t read_entry(uint64_t at, const Directory& directory, std::vector<Span>& spans);  // returns where the next record begins
  void require_name(std::string_view name) const;

  MappedFile file_;
  std::map<std::string, ZipEntry> entries_;
};

/// Writes stored entries whose data begin at multiples of 64, with the field "FB" as padding, as torch does; ZIP64 where sizes need it.
class ZipWriter {
 public:
  /// zip64_from  sizes and offsets of at least this take ZIP64 fields
  explicit ZipWriter(OutputFile& out, uint64_t zip64_from = 0xFFFFFFFF) : out_(out), zip64_from_(zip64_from) {}

  void add(const std::string& name, const void* data, std::size_t bytes);
  void add(const std::string& name, std::string_view text) { add(name, text.data(), text.size()); }
  void finish();  // the central directory; nothing may be added afterwards

 private:
  struct Written {
    std::string name;
    uint64_t header, size;
    uint32_t crc;
  };
  OutputFile& out_;
  uint64_t zip64_from_;
  std::vector<Written> written_;
};

}  // namespace longhand
