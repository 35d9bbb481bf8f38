// A caching allocator: freed memory is kept and handed out again (free_memory.h says how), so that after the first step nothing reaches the
// system. Each device has one stream of work, so a freed block may be reused at once: the next user's work is ordered after the last's.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/free_memory.h"

namespace longhand {

struct MemoryUse {
  int64_t live_bytes = 0, peak_bytes = 0;     // in use by tensors, with what rounding adds, and by recorded graphs
  int64_t reserved_bytes = 0;                 // taken from the system
  int64_t system_allocations = 0;             // how often the system was asked
  std::map<std::string, int64_t> live_by_op;  // only with LONGHAND_MEMORY=1
  std::map<std::string, int64_t> peak_by_op;  // live_by_op at the moment of the peak
};

/// A table for people: live, peak and reserved bytes, and with LONGHAND_MEMORY=1 the ops whose tensors were alive at the peak.
std::string memory_report(const MemoryUse& use);

/// What CachingAllocator::end_reserving() keeps for recorded work: stretches of memory, with their sizes.
struct ReservedBlocks {
  using Stretches = std::vector<std::pair<void*, std::size_t>>;
  Stretches handed_out;  // while it was recorded
  Stretches released;    // exact blocks that were released meanwhile: recorded work may have read them
};

class CachingAllocator {
 public:
  explicit CachingAllocator(std::unique_ptr<FreeMemory> free) : free_(std::move(free)) {}
  virtual ~CachingAllocator() = default;

  /// A block of at least `bytes` bytes, aligned to 256. With LONGHAND_POISON=1 every byte is 0xFF (NaN in every float type). With
  /// LONGHAND_EXACT=1 it has exactly that many bytes, comes from the system and goes back to it when released, and is not poisoned: what
  /// nobody wrote is then for the memory checker to see.
  /// errors  MemoryError saying what was asked, what is live and what the device has
  void* allocate(std::size_t bytes);
  void release(void* block) noexcept;

  /// From now on there is room for `bytes` live bytes and no more, as if the device had only that; 0: for as many as it has.
  void set_limit(int64_t bytes);

  MemoryUse use() const;
  void reset_peak();
  void release_cached();  // gives unused blocks back to the system

  /// Between the two calls it is noted which memory is handed out; afterwards nobody else is given it until give_back(). It counts as
  /// live: recorded work writes into it at any time. What a tensor still holds joins when it lets go. give_back() is due once.
  void begin_reserving();
  ReservedBlocks end_reserving();
  void give_back(const ReservedBlocks& blocks);

 protected:
  virtual void* system_allocate(std::size_t bytes) = 0;  // of an exact block; nullptr when there is no room
  virtual void system_release(void* block) noexcept = 0;
  virtual void fill_bytes(void* block, int value, std::size_t bytes) = 0;
  virtual std::string description() const = 0;

 private:
  struct Block {
    std::size_t bytes = 0;
    bool counted = false;   // in live_by_op, under `op`
    bool reserved = false;  // is not free when released
    bool exact = false;     // of its own; goes back to the system
    std::string op;
  };
  mutable std::mutex mutex_;
  std::unique_ptr<FreeMemory> free_;
  std::map<void*, Block> live_;
  bool reserving_ = false;
  std::map<char*, std::size_t> noted_;  // handed out while reserving
  ReservedBlocks::Stretches late_;      // exact blocks that were released while reserving
  MemoryUse use_;
  int64_t limit_ = 0;
  void note(void* block, std::size_t size);
  /// The live blocks within [begin, begin + size), and what is between them, in order.
  template <class LiveBlock, class Rest>
  void visit(char* begin, std::size_t size, LiveBlock&& live_block, Rest&& rest);
};

}  // namespace longhand
