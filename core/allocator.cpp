// See allocator.h.
#include "core/allocator.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/op_scope.h"
#include "core/switches.h"

namespace longhand {
std::string memory_report(const MemoryUse& use) {
  auto mib = [](int64_t bytes) { return fmt::format("{:10.1f} MiB", static_cast<double>(bytes) / (1 << 20)); };
  std::string text = fmt::format("memory  live {}  peak {}  reserved {}  taken from the system {} times\n", mib(use.live_bytes),
                                 mib(use.peak_bytes), mib(use.reserved_bytes), use.system_allocations);
  std::vector<std::pair<int64_t, std::string>> at_peak;
  for (const auto& [op, bytes] : use.peak_by_op)
    if (bytes > 0) at_peak.emplace_back(bytes, op.empty() ? "(outside any op)" : op);
  std::sort(at_peak.rbegin(), at_peak.rend());
  if (!at_peak.empty()) text += "memory  alive at the peak, by the op that made it:\n";
  for (const auto& [bytes, op] : at_peak) text += fmt::format("memory  {}  {}\n", mib(bytes), op);
  return text;
}

void* CachingAllocator::allocate(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const bool exact = switches().exact && !reserving_;         // a graph's memory outlives its tensors
  const std::size_t least = std::max<std::size_t>(bytes, 1);  // no bytes have a place of their own, too: blocks are told apart by address
  const std::size_t size = exact ? least : free_->block_size(least);
  const auto no_room = [&] {
    return MemoryError(
        "memory: no room for a new tensor",
        {{"device", description()},
         {"asked", std::to_string(size) + " bytes"},
         {"live", std::to_string(use_.live_bytes) + " bytes" + (limit_ > 0 ? fmt::format(", of {} that may be", limit_) : std::string())},
         {"op", current_op_path()},
         {"try", "a smaller batch or a shorter chunk"}});
  };
  if (limit_ > 0 && use_.live_bytes + static_cast<int64_t>(size) > limit_) throw no_room();
  void* block = exact ? nullptr : free_->take(size);
  if (block == nullptr) {
    auto from_system = [&]() -> std::size_t {
      if (!exact) return free_->grow(size);
      block = system_allocate(size);
      return block != nullptr ? size : 0;
    };
    std::size_t taken = from_system();
    if (taken == 0 && !reserving_) {  // else recorded work may use what is free now
      use_.reserved_bytes -= static_cast<int64_t>(free_->release());
      taken = from_system();
    }
    if (taken == 0) throw no_room();
    use_.reserved_bytes += static_cast<int64_t>(taken);
    ++use_.system_allocations;
    if (!exact) block = free_->take(size);
  }
  const auto signed_size = static_cast<int64_t>(size);
  Block& entry = live_[block];
  entry.bytes = size;
  entry.exact = exact;
  if (reserving_) note(block, size);
  use_.live_bytes += signed_size;
  if (switches().memory) {
    entry.op = current_op_path();
    entry.counted = true;
    use_.live_by_op[entry.op] += signed_size;
  }
  if (use_.live_bytes > use_.peak_bytes) {
    use_.peak_bytes = use_.live_bytes;
    if (switches().memory) use_.peak_by_op = use_.live_by_op;
  }
  if (switches().poison && !exact) fill_bytes(block, 0xFF, size);
  return block;
}

void CachingAllocator::release(void* block) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = live_.find(block);
  if (found == live_.end()) return;
  const auto signed_size = static_cast<int64_t>(found->second.bytes);
  if (found->second.counted) use_.live_by_op[found->second.op] -= signed_size;
  if (!found->second.reserved) {
    use_.live_bytes -= signed_size;
    if (found->second.exact && reserving_) {
      late_.emplace_back(block, found->second.bytes);  // goes with the recorded work, which may have read it
    } else if (found->second.exact) {
      system_release(block);
      use_.reserved_bytes -= signed_size;
    } else {
      free_->give_back(block, found->second.bytes);
    }
  }
  live_.erase(found);
}

void CachingAllocator::set_limit(int64_t bytes) {
  const std::lock_guard lock(mutex_);
  limit_ = bytes;
}

MemoryUse CachingAllocator::use() const {
  const std::lock_guard lock(mutex_);
  return use_;
}

void CachingAllocator::reset_peak() {
  const std::lock_guard lock(mutex_);
  use_.peak_bytes = use_.live_bytes;
  use_.peak_by_op = use_.live_by_op;
}

void CachingAllocator::release_cached() {
  const std::lock_guard lock(mutex_);
  use_.reserved_bytes -= static_cast<int64_t>(free_->release());
}

void CachingAllocator::begin_reserving() {
  const std::lock_guard lock(mutex_);
  reserving_ = true;
  noted_.clear();
}

// Blocks may have lain in each other's places one after the other: they become one stretch.
void CachingAllocator::note(void* block, std::size_t size) {
  char* begin = static_cast<char*>(block);
  char* end = begin + size;
  auto stretch = noted_.upper_bound(begin);
  if (stretch != noted_.begin() && std::prev(stretch)->first + std::prev(stretch)->second > begin) --stretch;
  while (stretch != noted_.end() && stretch->first < end) {
    begin = std::min(begin, stretch->first);
    end = std::max(end, stretch->first + stretch->second);
    stretch = noted_.erase(stretch);
  }
  noted_[begin] = static_cast<std::size_t>(end - begin);
}

template <class LiveBlock, class Rest>
void CachingAllocator::visit(char* begin, std::size_t size, LiveBlock&& live_block, Rest&& rest) {
  char* const end = begin + size;
  for (auto held = live_.lower_bound(begin); held != live_.end() && static_cast<char*>(held->first) < end; ++held) {
    char* const block = static_cast<char*>(held->first);
    if (block > begin) rest(begin, static_cast<std::size_t>(block - begin));
    live_block(held->second);
    begin = block + held->second.bytes;
  }
  if (begin < end) rest(begin, static_cast<std::size_t>(end - begin));
}

ReservedBlocks CachingAllocator::end_reserving() {
  const std::lock_guard lock(mutex_);
  reserving_ = false;
  ReservedBlocks blocks;
  for (const auto& [begin, size] : noted_) {
    free_->withdraw(begin, size);
    visit(
        begin, size, [](Block& held) { held.reserved = true; },
        [this](char*, std::size_t bytes) { use_.live_bytes += static_cast<int64_t>(bytes); });
    blocks.handed_out.emplace_back(begin, size);
  }
  blocks.released = std::exchange(late_, {});
  use_.peak_bytes = std::max(use_.peak_bytes, use_.live_bytes);
  noted_.clear();
  return blocks;
}

void CachingAllocator::give_back(const ReservedBlocks& blocks) {
  const std::lock_guard lock(mutex_);
  for (const auto& [block, size] : blocks.released) {
    system_release(block);
    use_.reserved_bytes -= static_cast<int64_t>(size);
  }
  for (const auto& [begin, size] : blocks.handed_out)
    visit(
        static_cast<char*>(begin), size, [](Block& held) { held.reserved = false; },
        [this](char* part, std::size_t bytes) {
          use_.live_bytes -= static_cast<int64_t>(bytes);
          free_->give_back(part, bytes);
        });
}

}  // namespace longhand
