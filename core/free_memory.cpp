// See free_memory.h.
#include "core/free_memory.h"

#include <algorithm>
#include <bit>

namespace longhand {

// --- size classes ---------------------------------------------------------------------------------------------

// Rounds up to one of eight steps per power of two: at most 12.5% is wasted and few sizes exist, so that blocks are found again.
std::size_t SizeClasses::block_size(std::size_t bytes) const {
  if (bytes <= 512) return 512;
  const std::size_t step = std::bit_floor(bytes - 1) / 8;
  return (bytes + step - 1) / step * step;
}

void* SizeClasses::take(std::size_t size) {
  const auto found = free_.find(size);
  if (found == free_.end() || found->second.empty()) return nullptr;
  void* block = found->second.back();
  found->second.pop_back();
  return block;
}

std::size_t SizeClasses::grow(std::size_t size) {
  void* block = allocate_(size);
  if (block == nullptr) return 0;
  free_[size].push_back(block);
  return size;
}

void SizeClasses::withdraw(void* begin, std::size_t size) {
  if (const auto found = free_.find(size); found != free_.end()) std::erase(found->second, begin);
}

std::size_t SizeClasses::release() {
  std::size_t bytes = 0;
  for (auto& [size, blocks] : free_) {
    for (void* block : blocks) release_(block);
    bytes += size * blocks.size();
    blocks.clear();
  }
  return bytes;
}

// --- arena ----------------------------------------------------------------------------------------------------

void Arena::insert(char* begin, std::size_t size) {
  free_.emplace(begin, size);
  by_size_.emplace(size, begin);
}

void Arena::erase(Stretches::iterator stretch) {
  by_size_.erase({stretch->second, stretch->first});
  free_.erase(stretch);
}

void* Arena::take(std::size_t size) {
  const auto smallest = by_size_.lower_bound({size, nullptr});
  if (smallest == by_size_.end()) return nullptr;
  const auto [free_size, begin] = *smallest;
  erase(free_.find(begin));
  if (free_size > size) insert(begin + size, free_size - size);
  return begin;
}

std::size_t Arena::grow(std::size_t size) {
  char* const end = space_.base + mapped_;
  std::size_t free_at_end = 0;
  if (!free_.empty())
    if (const auto last = std::prev(free_.end()); last->first + last->second == end) free_at_end = last->second;
  if (free_at_end >= size) return 0;
  const std::size_t more = (size - free_at_end + space_.page - 1) / space_.page * space_.page;
  if (more > space_.limit - mapped_ || !space_.map(end, more)) return 0;
  mapped_ += more;
  give_back(end, more);
  return more;
}

void Arena::give_back(void* block, std::size_t size) {
  auto* begin = static_cast<char*>(block);
  auto next = free_.lower_bound(begin);
  if (next != free_.end() && begin + size == next->first) {
    size += next->second;
    erase(next++);
  }
  if (next != free_.begin())
    if (const auto before = std::prev(next); before->first + before->second == begin) {
      begin = before->first;
      size += before->second;
      erase(before);
    }
  insert(begin, size);
}

void Arena::withdraw(void* begin, std::size_t size) {
  char* const from = static_cast<char*>(begin);
  char* const to = from + size;
  auto stretch = free_.upper_bound(from);
  if (stretch != free_.begin()) --stretch;
  while (stretch != free_.end() && stretch->first < to) {
    char* const first = stretch->first;
    char* const last = first + stretch->second;
    if (last <= from) {
      ++stretch;
      continue;
    }
    erase(stretch);
    if (first < from) insert(first, static_cast<std::size_t>(from - first));
    if (last > to) insert(to, static_cast<std::size_t>(last - to));
    stretch = free_.lower_bound(to);
    if (last > to) break;
    stretch = free_.lower_bound(last);
  }
}

std::size_t Arena::release() {
  if (free_.empty()) return 0;
  const auto last = std::prev(free_.end());
  char* const end = space_.base + mapped_;
  if (last->first + last->second != end) return 0;
  const std::size_t bytes = last->second / space_.page * space_.page;
  if (bytes == 0) return 0;
  char* const begin = last->first;
  const std::size_t left = last->second - bytes;
  erase(last);
  if (left > 0) insert(begin, left);
  space_.unmap(end - bytes, bytes);
  mapped_ -= bytes;
  return bytes;
}

}  // namespace longhand
