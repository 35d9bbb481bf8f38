// A file of which several processes write parts.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace longhand {

class SharedOutputFile {
 public:
  /// make    of the process that makes the file, with its final size, before the others open it
  /// errors  FileError, also when the file that is opened has another size
  SharedOutputFile(const std::string& path, int64_t bytes, bool make);
  ~SharedOutputFile();
  SharedOutputFile(const SharedOutputFile&) = delete;
  SharedOutputFile& operator=(const SharedOutputFile&) = delete;

  void write_at(int64_t offset, const void* data, std::size_t bytes);
  void sync();

 private:
  std::string path_;
  int descriptor_;
};

}  // namespace longhand
