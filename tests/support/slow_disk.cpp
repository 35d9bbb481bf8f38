// A slow disk that hands out little at a time, loaded before a program (LD_PRELOAD): every read of the C library is late by a pseudo-random
// time up to SLOW_DISK_US microseconds, and a read without buffer returns at most 61 bytes.
#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr std::size_t kMostBytes = 61;

template <class F>
F* real(const char* name) {
  return reinterpret_cast<F*>(::dlsym(RTLD_NEXT, name));
}

void be_late() {
  static const char* given = std::getenv("SLOW_DISK_US");
  static const auto longest = static_cast<uint64_t>(given == nullptr ? 0 : std::atoll(given));
  static std::atomic<uint64_t> calls{0};
  if (longest > 0) ::usleep(static_cast<useconds_t>(++calls * 0x9E3779B97F4A7C15u % (longest + 1)));
}

}  // namespace

extern "C" {

std::size_t fread(void* to, std::size_t size, std::size_t count, std::FILE* file) {
  static auto* const next = real<std::size_t(void*, std::size_t, std::size_t, std::FILE*)>("fread");
  be_late();
  return next(to, size, count, file);
}

ssize_t read(int fd, void* to, std::size_t bytes) {
  static auto* const next = real<ssize_t(int, void*, std::size_t)>("read");
  be_late();
  return next(fd, to, std::min(bytes, kMostBytes));
}

ssize_t pread(int fd, void* to, std::size_t bytes, off_t offset) {
  static auto* const next = real<ssize_t(int, void*, std::size_t, off_t)>("pread");
  be_late();
  return next(fd, to, std::min(bytes, kMostBytes), offset);
}
}
