// Free memory: what is cut, joined, withdrawn and given back, against a picture of every byte.
#include "core/free_memory.h"

#include <algorithm>
#include <map>

#include "core/allocator.h"
#include "core/error.h"
#include "core/philox.h"
#include "core/switches.h"
#include "tests/support/check.h"

using namespace longhand;

namespace {

constexpr std::size_t kPage = 1 << 16, kPages = 64;

// An arena over addresses that nobody touches, and what the system would see of it.
struct Addresses {
  std::size_t mapped = 0, room = kPages * kPage;
  char* base = reinterpret_cast<char*>(std::size_t{1} << 40);
  Arena::Space space() {
    return {base, kPages * kPage, kPage,
            [this](char* at, std::size_t bytes) {
              CHECK(at == base + mapped);
              CHECK(bytes % kPage == 0);
              if (mapped + bytes > room) return false;
              mapped += bytes;
              return true;
            },
            [this](char* at, std::size_t bytes) {
              CHECK(at + bytes == base + mapped);
              mapped -= bytes;
            }};
  }
};

void* take_or_grow(Arena& arena, std::size_t size) {
  void* block = arena.take(size);
  if (block != nullptr || arena.grow(size) == 0) return block;
  return arena.take(size);
}

class TestAllocator final : public CachingAllocator {
 public:
  explicit TestAllocator(Addresses& addresses) : CachingAllocator(std::make_unique<Arena>(addresses.space())) {}

 protected:
  void* system_allocate(std::size_t) override { return nullptr; }
  void system_release(void*) noexcept override {}
  void fill_bytes(void*, int, std::size_t) override {}
  std::string description() const override { return "test"; }
};

}  // namespace

TEST("arena: the smallest stretch that fits is cut, and neighbours join") {
  Addresses addresses;
  Arena arena(addresses.space());
  auto at = [&](std::size_t offset) { return static_cast<void*>(addresses.base + offset); };
  CHECK(take_or_grow(arena, 1024) == at(0));
  CHECK(take_or_grow(arena, 4096) == at(1024));
  CHECK(take_or_grow(arena, 512) == at(5120));
  CHECK(take_or_grow(arena, 2048) == at(5632));
  CHECK(take_or_grow(arena, 512) == at(7680));
  CHECK(addresses.mapped == kPage);
  arena.give_back(at(1024), 4096);
  arena.give_back(at(5632), 2048);
  CHECK(take_or_grow(arena, 1024) == at(5632));  // not from the larger one, nor from what was never used
  CHECK(take_or_grow(arena, 4096) == at(1024));
  arena.give_back(at(1024), 4096);
  arena.give_back(at(5120), 512);
  arena.give_back(at(5632), 1024);
  CHECK(take_or_grow(arena, 4096 + 512 + 2048) == at(1024));  // one stretch again
}

TEST("arena: it grows by what is missing at its end, and gives whole pages of its end back") {
  Addresses addresses;
  Arena arena(addresses.space());
  void* const first = take_or_grow(arena, kPage / 2);
  void* const second = take_or_grow(arena, kPage);  // half of it was there
  CHECK(second == addresses.base + kPage / 2);
  CHECK(addresses.mapped == 2 * kPage);
  CHECK(arena.release() == 0);
  arena.give_back(second, kPage);
  CHECK(arena.release() == kPage);
  CHECK(addresses.mapped == kPage);
  CHECK(take_or_grow(arena, kPage) == second);
  addresses.room = 3 * kPage;
  CHECK(take_or_grow(arena, 2 * kPage) == nullptr);
  CHECK(take_or_grow(arena, kPages * kPage) == nullptr);
  arena.give_back(second, kPage);
  arena.give_back(first, kPage / 2);
  CHECK(arena.release() == 2 * kPage);
  CHECK(addresses.mapped == 0);
}

TEST("arena: blocks never overlap, and everything comes back, whatever the order") {
  Addresses addresses;
  Arena arena(addresses.space());
  std::map<char*, std::size_t> held;
  for (uint64_t i = 0; i < 20000; ++i) {
    const uint64_t random = philox_u64(1, i);
    if (held.size() < 3 || (random % 2 == 0 && held.size() < 60)) {
      const std::size_t size = arena.block_size(1 + (random >> 8) % (random % 5 == 0 ? 40000 : 3000));
      auto* const block = static_cast<char*>(take_or_grow(arena, size));
      REQUIRE(block != nullptr);
      CHECK(block + size <= addresses.base + addresses.mapped);
      const auto next = held.lower_bound(block);
      if (next != held.end()) CHECK(block + size <= next->first);
      if (next != held.begin()) CHECK(std::prev(next)->first + std::prev(next)->second <= block);
      held[block] = size;
    } else {
      auto it = held.begin();
      std::advance(it, static_cast<std::ptrdiff_t>((random >> 8) % held.size()));
      arena.give_back(it->first, it->second);
      held.erase(it);
    }
  }
  for (const auto& [block, size] : held) arena.give_back(block, size);
  const std::size_t mapped = addresses.mapped;
  CHECK(arena.release() == mapped);
  CHECK(addresses.mapped == 0);
}

TEST("arena: what is withdrawn is given to nobody until it is given back") {
  Addresses addresses;
  Arena arena(addresses.space());
  CHECK(take_or_grow(arena, kPage) == addresses.base);
  arena.give_back(addresses.base, kPage);
  auto* const held = static_cast<char*>(arena.take(1024));
  arena.withdraw(held, 8192);  // its first kilobyte is not free anyway
  CHECK(arena.take(512) == held + 8192);
  arena.withdraw(addresses.base + kPage - 512, 512);
  CHECK(arena.take(kPage - 8192 - 512) == nullptr);
  CHECK(arena.take(kPage - 8192 - 1024) == held + 8192 + 512);
  CHECK(arena.take(512) == nullptr);
  arena.give_back(held + 1024, 7168);
  CHECK(arena.take(7168) == held + 1024);
}

TEST("reserved stretches of an arena count once, whatever lay in them one after the other") {
  const SwitchScope shared([](Switches& s) { s.exact = false; });
  Addresses addresses;
  TestAllocator memory(addresses);
  void* const early = memory.allocate(4096);
  memory.begin_reserving();
  void* const first = memory.allocate(8192);
  memory.release(first);
  void* const low = memory.allocate(2048);
  void* const high = memory.allocate(4096);
  CHECK(low == first);
  memory.release(low);
  memory.release(early);  // its place may serve the recording from here on
  void* const late = memory.allocate(1024);
  const ReservedBlocks blocks = memory.end_reserving();
  CHECK(memory.use().live_bytes == 8192 + (late == early ? 1024 : 0));
  memory.release(high);
  memory.release(late);
  CHECK(memory.use().live_bytes == 8192 + (late == early ? 1024 : 0));
  std::vector<void*> others;
  for (int i = 0; i < 16; ++i) others.push_back(memory.allocate(512));
  for (void* other : others) {
    auto* const at = static_cast<char*>(other);
    for (const auto& [begin, size] : blocks.handed_out) CHECK_FALSE((at >= begin && at < static_cast<char*>(begin) + size));
  }
  for (void* other : others) memory.release(other);
  memory.give_back(blocks);
  CHECK(memory.use().live_bytes == 0);
  memory.release_cached();
  CHECK(addresses.mapped == 0);
  CHECK(memory.use().reserved_bytes == 0);
  CHECK_THROWS_AS(memory.allocate(kPages * kPage + 1), MemoryError);
}

TEST("an arena gives a tensor of no bytes a place of its own") {
  const SwitchScope shared([](Switches& s) { s.exact = false; });
  Addresses addresses;
  TestAllocator memory(addresses);
  void* const nothing = memory.allocate(0);  // the first of all: nothing is mapped yet
  void* const block = memory.allocate(4096);
  void* const nothing_again = memory.allocate(0);
  CHECK(nothing != block);
  CHECK(nothing_again != block);
  CHECK(nothing_again != nothing);
  memory.release(nothing);
  memory.release(nothing_again);
  CHECK(memory.allocate(4096) != block);  // still in use
}
