// See shared_output_file.h.
#include "core/shared_output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace longhand {

SharedOutputFile::SharedOutputFile(const std::string& path, int64_t bytes, bool make)
    : path_(path), descriptor_(::open(path.c_str(), (make ? O_CREAT | O_TRUNC : 0) | O_WRONLY | O_CLOEXEC, 0644)) {
  if (descriptor_ < 0) throw FileError("file: cannot create", {{"file", path}, {"reason", std::string(std::strerror(errno))}});
  struct stat info {};
  const bool failed = make ? ::ftruncate(descriptor_, bytes) != 0 : ::fstat(descriptor_, &info) != 0;
  const std::string reason = failed                           ? std::string(std::strerror(errno))
                             : info.st_size != bytes && !make ? "another size than the others see"
                                                              : "";
  if (reason.empty()) return;
  ::close(descriptor_);
  throw FileError("file: cannot be shared", {{"file", path}, {"reason", reason}});
}

SharedOutputFile::~SharedOutputFile() {
  ::close(descriptor_);
}

namespace {

// A client of a network file system writes whole pages back, its neighbour's bytes as it last saw them; a lock on the pages makes it read
// them anew and write them at once. Where files cannot be locked (local disks aside) the file system keeps its clients coherent by itself.
class PageLock {
 public:
  PageLock(int descriptor, int64_t offset, std::size_t bytes) : descriptor_(descriptor) {
    constexpr int64_t kPage = 1 << 16;  // the largest of today's machines
    range_.l_type = F_WRLCK;
    range_.l_whence = SEEK_SET;
    range_.l_start = offset / kPage * kPage;
    range_.l_len = (offset + static_cast<int64_t>(bytes) + kPage - 1) / kPage * kPage - range_.l_start;
    locked_ = ::fcntl(descriptor_, F_OFD_SETLKW, &range_) == 0;
  }
  ~PageLock() {
    range_.l_type = F_UNLCK;
    if (locked_) ::fcntl(descriptor_, F_OFD_SETLK, &range_);
  }
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;

 private:
  int descriptor_;
  struct flock range_ {};
  bool locked_;
};

}  // namespace

void SharedOutputFile::write_at(int64_t offset, const void* data, std::size_t bytes) {
  if (bytes == 0) return;
  const PageLock lock(descriptor_, offset, bytes);
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t n = ::pwrite(descriptor_, static_cast<const char*>(data) + done, bytes - done, offset + static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      throw FileError("file: cannot write", {{"file", path_},
                                             {"at byte", std::to_string(offset + static_cast<int64_t>(done))},
                                             {"reason", std::string(std::strerror(errno))}});
    done += static_cast<std::size_t>(n);
  }
}

void SharedOutputFile::sync() {
  if (::fsync(descriptor_) != 0) throw FileError("file: cannot sync", {{"file", path_}, {"reason", std::string(std::strerror(errno))}});
}

}  // namespace longhand
