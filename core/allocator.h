// A caching allocator: freed blocks are kept by size class and handed out again, so that after the first step nothing reaches the
// system. Each device has one stream of work, so a freed block may be reused at once: the next user's work is ordered after the last's.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace longhand {

struct MemoryUse {
  int64_t live_bytes = 0, peak_bytes = 0;     // in use by tensors, in size classes
  int64_t reserved_bytes = 0;                 // taken from the system
  int64_t system_allocations = 0;             // how often the system was asked
  std::map<std::string, int64_t> live_by_op;  // only with LONGHAND_MEMORY=1
  std::map<std::string, int64_t> peak_by_op;  // live_by_op at the moment of the peak
};

/// A table for people: live, peak and reserved bytes, and with LONGHAND_MEMORY=1 the ops whose tensors were alive at the peak.
std::string memory_report(const MemoryUse& use);

class CachingAllocator {
 public:
  virtual ~CachingAllocator() = default;

  /// A block of at least `bytes` bytes, aligned to 256. With LONGHAND_POISON=1 every byte is 0xFF (NaN in every float type).
  /// errors  MemoryError saying what was asked, what is live and what the device has
  void* allocate(std::size_t bytes);
  void release(void* block) noexcept;

  MemoryUse use() const;
  void reset_peak();
  void release_cached();  // gives unused blocks back to the system

 protected:
  virtual void* system_allocate(std::size_t bytes) = 0;  // nullptr when there is no room
  virtual void system_release(void* block) noexcept = 0;
  virtual void fill_bytes(void* block, int value, std::size_t bytes) = 0;
  virtual std::string description() const = 0;

 private:
  struct Block {
    std::size_t bytes = 0;
    bool counted = false;  // in live_by_op, under `op`
    std::string op;
  };
  mutable std::mutex mutex_;
  std::map<std::size_t, std::vector<void*>> free_;  // by size class
  std::map<void*, Block> live_;
  MemoryUse use_;
  void release_cached_locked();
};

}  // namespace longhand
