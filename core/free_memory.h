// What an allocator knows of memory that is its own and in nobody's hands.
#pragma once
#include <cstddef>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace longhand {

class FreeMemory {
 public:
  virtual ~FreeMemory() = default;

  /// The size that is really needed for `bytes` bytes; the other functions are called with such sizes.
  virtual std::size_t block_size(std::size_t bytes) const = 0;

  /// A block out of what is free; null when nothing free is large enough.
  virtual void* take(std::size_t size) = 0;
  /// Takes memory from the system, so that take(size) finds a block.
  /// returns  what was taken from the system, in bytes; 0 when there is no room
  virtual std::size_t grow(std::size_t size) = 0;
  /// A block, or a part of one, is free again.
  virtual void give_back(void* block, std::size_t size) = 0;
  /// [begin, begin + size) is given to nobody from now on, as far as it is free, until it is given back.
  virtual void withdraw(void* begin, std::size_t size) = 0;
  /// Gives to the system what is free and can be given back to it.
  /// returns  bytes
  virtual std::size_t release() = 0;
};

/// Blocks of few sizes, each from the system by itself: a freed block serves the next request of its size.
class SizeClasses final : public FreeMemory {
 public:
  using Allocate = std::function<void*(std::size_t bytes)>;  // null when there is no room
  using Release = std::function<void(void* block)>;
  SizeClasses(Allocate allocate, Release release) : allocate_(std::move(allocate)), release_(std::move(release)) {}

  std::size_t block_size(std::size_t bytes) const override;
  void* take(std::size_t size) override;
  std::size_t grow(std::size_t size) override;
  void give_back(void* block, std::size_t size) override { free_[size].push_back(block); }
  void withdraw(void* begin, std::size_t size) override;
  std::size_t release() override;

 private:
  Allocate allocate_;
  Release release_;
  std::map<std::size_t, std::vector<void*>> free_;
};

/// One row of addresses that becomes longer where there is need. A block is cut from the smallest free stretch that holds it, the first of
/// several; a stretch that is given back joins its neighbours. So memory serves requests of any size one after the other, and what is
/// taken from the system is little more than what is in use at one time.
class Arena final : public FreeMemory {
 public:
  /// The addresses from `base` on, `limit` bytes of them. map(at, bytes): puts memory there, false when there is no room; unmap(at, bytes)
  /// takes it away. Both deal in multiples of `page`.
  struct Space {
    char* base;
    std::size_t limit, page;
    std::function<bool(char* at, std::size_t bytes)> map;
    std::function<void(char* at, std::size_t bytes)> unmap;
  };
  explicit Arena(Space space) : space_(std::move(space)) {}

  std::size_t block_size(std::size_t bytes) const override { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
  void* take(std::size_t size) override;
  std::size_t grow(std::size_t size) override;
  void give_back(void* block, std::size_t size) override;
  void withdraw(void* begin, std::size_t size) override;
  std::size_t release() override;

  std::size_t mapped() const { return mapped_; }

 private:
  static constexpr std::size_t kAlignment = 512;
  using Stretches = std::map<char*, std::size_t>;
  void insert(char* begin, std::size_t size);
  void erase(Stretches::iterator stretch);

  Space space_;
  std::size_t mapped_ = 0;                           // [base, base + mapped) has memory
  Stretches free_;                                   // never two that touch
  std::set<std::pair<std::size_t, char*>> by_size_;  // the same
};

}  // namespace longhand
