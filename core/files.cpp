// POSIX files; see files.h.
#include "core/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "core/error.h"

namespace longhand {
namespace {

std::string system_reason() {
  return std::strerror(errno);
}

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

struct stat stat_of(const Descriptor& file, const std::string& path) {
  if (file.fd < 0) throw FileError("file: cannot open", {{"file", path}, {"reason", system_reason()}});
  struct stat info {};
  if (::fstat(file.fd, &info) != 0) throw FileError("file: cannot read its size", {{"file", path}, {"reason", system_reason()}});
  if (!S_ISREG(info.st_mode)) throw FileError("file: not a regular file", {{"file", path}});
  return info;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  size_ = static_cast<std::size_t>(stat_of(file, path).st_size);
  if (size_ == 0) return;
  void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (mapped == MAP_FAILED) throw FileError("file: cannot map into memory", {{"file", path}, {"reason", system_reason()}});
  descriptor_ = std::exchange(file.fd, -1);
  data_ = std::shared_ptr<const std::byte>(static_cast<const std::byte*>(mapped), [size = size_, fd = descriptor_](const std::byte* p) {
    ::munmap(const_cast<std::byte*>(p), size);
    ::close(fd);
  });
}

void MappedFile::read_at(std::size_t offset, void* to, std::size_t bytes) const {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t n = ::pread(descriptor_, static_cast<std::byte*>(to) + done, bytes - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      throw FileError("file: cannot read", {{"file", path_},
                                            {"at byte", std::to_string(offset + done)},
                                            {"reason", n == 0 ? "the file was cut after it was opened" : system_reason()},
                                            {"try", "copy the file again"}});
    done += static_cast<std::size_t>(n);
  }
}

void MappedFile::release_pages(const std::byte* begin, std::size_t bytes) const {
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto address = [](const std::byte* p) { return reinterpret_cast<std::uintptr_t>(p); };
  const std::uintptr_t file_begin = address(data_.get()), file_end = file_begin + size_;
  const std::uintptr_t first = (std::max(address(begin), file_begin) + page - 1) / page * page;
  const std::uintptr_t last = std::min(address(begin) + bytes, file_end) / page * page;
  if (size_ == 0 || first >= last) return;
  ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);  // advice: what the system makes of it changes no result
}

std::string read_text_file(const std::string& path, std::size_t limit_bytes) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  const auto size = static_cast<std::size_t>(stat_of(file, path).st_size);
  if (size > limit_bytes)
    throw FileError("file: larger than expected for its kind",
                    {{"file", path}, {"bytes", std::to_string(size)}, {"limit", std::to_string(limit_bytes)}});
  std::string text(size, '\0');
  for (std::size_t done = 0; done < size;) {
    const ssize_t n = ::read(file.fd, text.data() + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw FileError("file: cannot read", {{"file", path}, {"reason", n == 0 ? "shorter than its size" : system_reason()}});
    done += static_cast<std::size_t>(n);
  }
  return text;
}

void OutputFile::write(const void* data, std::size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::write(descriptor_, p, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      throw FileError("file: cannot write", {{"file", path_}, {"at byte", std::to_string(position_)}, {"reason", system_reason()}});
    p += n;
    bytes -= static_cast<std::size_t>(n);
    position_ += n;
  }
}

void sync_folder(const std::string& folder) {
  const Descriptor file{::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (file.fd < 0 || ::fsync(file.fd) != 0)
    throw FileError("file: cannot sync the folder", {{"folder", folder}, {"reason", system_reason()}});
}

void write_file_atomically(const std::string& path, const std::function<void(OutputFile&)>& write) {
  const std::string temporary = path + ".tmp-" + std::to_string(::getpid());
  {
    const Descriptor file{::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)};
    if (file.fd < 0) throw FileError("file: cannot create", {{"file", temporary}, {"reason", system_reason()}});
    try {
      OutputFile out(file.fd, temporary);
      write(out);
      if (::fsync(file.fd) != 0) throw FileError("file: cannot sync", {{"file", temporary}, {"reason", system_reason()}});
    } catch (...) {
      ::unlink(temporary.c_str());
      throw;
    }
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    const std::string reason = system_reason();
    ::unlink(temporary.c_str());
    throw FileError("file: cannot rename", {{"from", temporary}, {"to", path}, {"reason", reason}});
  }
  sync_folder(std::filesystem::path(path).parent_path().string());
}

void write_file_atomically(const std::string& path, std::string_view content) {
  write_file_atomically(path, [&](OutputFile& out) { out.write(content); });
}

void write_folder_atomically(const std::string& path, const std::function<void(const std::string& folder)>& fill) {
  namespace fs = std::filesystem;
  fs::path target = fs::absolute(path).lexically_normal();
  if (!target.has_filename()) target = target.parent_path();  // "folder/"
  if (fs::exists(target) && !(fs::is_directory(target) && fs::is_empty(target)))
    throw FileError("file: the folder to write is there already, and not empty", {{"folder", path}, {"try", "another name"}});
  fs::create_directories(target.parent_path());
  const std::string unfinished = target.string() + ".unfinished-" + std::to_string(::getpid());
  fs::remove_all(unfinished);
  fs::create_directory(unfinished);
  try {
    fill(unfinished);
    sync_folder(unfinished);
    fs::rename(unfinished, target);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(unfinished, ignored);
    throw;
  }
  sync_folder(target.parent_path().string());
}

}  // namespace longhand
