// See allocator.h.
#include "core/allocator.h"

#include <fmt/core.h>

#include <algorithm>
#include <bit>

#include "core/error.h"
#include "core/op_scope.h"
#include "core/switches.h"

namespace longhand {
namespace {

// Rounds up to one of eight steps per power of two: at most 12.5% is wasted and few sizes exist, so that blocks are found again.
std::size_t size_class(std::size_t bytes) {
  if (bytes <= 512) return 512;
  const std::size_t step = std::bit_floor(bytes - 1) / 8;
  return (bytes + step - 1) / step * step;
}

}  // namespace

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
  const bool exact = switches().exact && !reserving_;  // a graph's memory outlives its tensors
  const std::size_t size = exact ? std::max<std::size_t>(bytes, 1) : size_class(bytes);
  void* block = nullptr;
  if (auto found = free_.find(size); !exact && found != free_.end() && !found->second.empty()) {
    block = found->second.back();
    found->second.pop_back();
  } else {
    block = system_allocate(size);
    if (block == nullptr && !reserving_) {  // else recorded work may use what is free now
      release_cached_locked();
      block = system_allocate(size);
    }
    if (block == nullptr)
      throw MemoryError("memory: no room for a new tensor", {{"device", description()},
                                                             {"asked", std::to_string(size) + " bytes"},
                                                             {"live", std::to_string(use_.live_bytes) + " bytes"},
                                                             {"op", current_op_path()},
                                                             {"try", "a smaller batch or a shorter chunk"}});
    use_.reserved_bytes += static_cast<int64_t>(size);
    ++use_.system_allocations;
  }
  const auto signed_size = static_cast<int64_t>(size);
  Block& entry = live_[block];
  entry.bytes = size;
  entry.exact = exact;
  if (reserving_) noted_[block] = size;
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
    if (found->second.exact && !reserving_) {
      system_release(block);
      use_.reserved_bytes -= signed_size;
    } else {
      free_[found->second.bytes].push_back(block);
    }
  }
  live_.erase(found);
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
  release_cached_locked();
}

void CachingAllocator::begin_reserving() {
  const std::lock_guard lock(mutex_);
  reserving_ = true;
  noted_.clear();
}

ReservedBlocks CachingAllocator::end_reserving() {
  const std::lock_guard lock(mutex_);
  reserving_ = false;
  for (auto& [size, blocks] : free_) std::erase_if(blocks, [&](void* block) { return noted_.contains(block); });
  for (const auto& [block, size] : noted_) {
    const auto held = live_.find(block);
    if (held != live_.end()) held->second.reserved = true;
    else use_.live_bytes += static_cast<int64_t>(size);
  }
  use_.peak_bytes = std::max(use_.peak_bytes, use_.live_bytes);
  ReservedBlocks blocks(noted_.begin(), noted_.end());
  noted_.clear();
  return blocks;
}

void CachingAllocator::give_back(const ReservedBlocks& blocks) {
  const std::lock_guard lock(mutex_);
  for (const auto& [block, size] : blocks) {
    if (const auto held = live_.find(block); held != live_.end()) {
      held->second.reserved = false;
      continue;
    }
    use_.live_bytes -= static_cast<int64_t>(size);
    free_[size].push_back(block);
  }
}

void CachingAllocator::release_cached_locked() {
  for (auto& [size, blocks] : free_) {
    for (void* block : blocks) {
      system_release(block);
      use_.reserved_bytes -= static_cast<int64_t>(size);
    }
    blocks.clear();
  }
}

}  // namespace longhand
