// Files: memory-mapped reading, and writing that never leaves a half-written file under its final name.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace longhand {

/// A whole file, mapped read-only; pages are loaded when touched. Copies share the mapping.
/// errors  FileError when the file cannot be opened or is not a regular file
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_.get(), size_}; }
  std::size_t size() const { return size_; }

  /// Takes the whole pages between `begin` and `begin` + `bytes` out of this process's memory, as far as they belong to this file; they
  /// are read again when touched. So a file larger than the memory can be walked through once.
  void release_pages(const std::byte* begin, std::size_t bytes) const;

  /// Copies `bytes` bytes from `offset` on through the system's read, not through the mapping: a file cut behind our back or a failing disk
  /// is an error here, where touching the mapping would end the process.
  /// errors  FileError with the byte and the reason
  void read_at(std::size_t offset, void* to, std::size_t bytes) const;

 private:
  std::string path_;
  int descriptor_ = -1;  // open as long as data_ is held
  std::shared_ptr<const std::byte> data_;
  std::size_t size_ = 0;
};

/// The whole content of a (small) file.
/// errors  FileError when it cannot be read or is larger than `limit_bytes`
std::string read_text_file(const std::string& path, std::size_t limit_bytes = std::size_t{256} << 20);

/// Writes `path` so that it holds either its old content or all of the new one: `write` fills a temporary file in the same folder,
/// which is synced and renamed. If `write` throws, the temporary file is removed.
/// errors  FileError naming the path and the system's reason
class OutputFile;
void write_file_atomically(const std::string& path, const std::function<void(OutputFile&)>& write);
void write_file_atomically(const std::string& path, std::string_view content);

/// Makes a folder that appears whole or not at all: `fill` writes into a new folder beside `path`, which is synced and renamed.
/// errors  FileError when `path` is there and is anything but an empty folder; if `fill` throws, nothing is left behind
void write_folder_atomically(const std::string& path, const std::function<void(const std::string& folder)>& fill);

/// A file being written; every failed write throws (a full disk is never silent).
class OutputFile {
 public:
  void write(const void* data, std::size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  int64_t position() const { return position_; }

 private:
  friend void write_file_atomically(const std::string&, const std::function<void(OutputFile&)>&);
  OutputFile(int descriptor, std::string path) : descriptor_(descriptor), path_(std::move(path)) {}
  int descriptor_;
  std::string path_;
  int64_t position_ = 0;
};

/// Makes a rename or a new file in `folder` durable (fsync of the folder itself).
void sync_folder(const std::string& folder);

}  // namespace longhand
