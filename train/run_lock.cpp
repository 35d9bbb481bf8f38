// flock(2) on a file of the run folder; see run_lock.h.
#include "train/run_lock.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "core/files.h"

namespace longhand {
namespace {

// "process 123 on host": what the holder wrote, or "another process".
std::string holder(const std::string& path) {
  try {
    std::string text = read_text_file(path, 4096);
    while (!text.empty() && text.back() == '\n') text.pop_back();
    if (!text.empty()) return text;
  } catch (const FileError&) {  // it ended just now
  }
  return "another process";
}

}  // namespace

RunLock::RunLock(const std::string& folder) {
  const std::string path = folder + "/" + kFile;
  do {
    if (descriptor_ >= 0) ::close(descriptor_);
    take(folder, path);
  } while (!is_named(path));  // the folder was removed, or made again, between open and flock: what is locked is nobody's any more
  char host[256] = "";
  ::gethostname(host, sizeof host - 1);
  const std::string text = fmt::format("process {} on {}\n", ::getpid(), host);
  if (::ftruncate(descriptor_, 0) != 0 || ::pwrite(descriptor_, text.data(), text.size(), 0) < 0) {
  }  // the text only helps a reader: a full disk must not keep a run from going on
}

void RunLock::take(const std::string& folder, const std::string& path) {
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
  if (descriptor_ < 0)
    throw FileError("run: the run folder cannot be written to",
                    {{"file", path}, {"reason", std::strerror(errno)}, {"try", "another folder or disk, or change its permissions"}});
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) == 0) return;
  const int reason = errno;
  if (reason == EWOULDBLOCK) {
    ::close(descriptor_);
    throw FileError("run: another process works on this run",
                    {{"folder", folder}, {"process", holder(path)}, {"try", "wait for its end, stop it, or train under another --name"}});
  }
  fmt::print(stderr, "warning: {} cannot be locked ({}): see to it yourself that only one process works on this run\n", path,
             std::strerror(reason));
}

bool RunLock::is_named(const std::string& path) const {
  struct stat held {
  }, named{};
  return ::fstat(descriptor_, &held) == 0 && ::stat(path.c_str(), &named) == 0 && held.st_ino == named.st_ino &&
         held.st_dev == named.st_dev;
}

RunLock::~RunLock() {
  ::close(descriptor_);
}

}  // namespace longhand
