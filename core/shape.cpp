// See shape.h.
#include "core/shape.h"

#include <algorithm>

#include "core/error.h"

namespace longhand {

Shape::Shape(std::initializer_list<int64_t> sizes) {
  for (int64_t size : sizes) push_back(size);
}

void Shape::push_back(int64_t size) {
  if (rank_ == kMaxRank) throw ShapeError("shape: more axes than a tensor can have", {{"limit", std::to_string(kMaxRank)}});
  if (size < 0) throw ShapeError("shape: a negative size", {{"axis", std::to_string(rank_)}, {"size", std::to_string(size)}});
  sizes_[static_cast<std::size_t>(rank_++)] = size;
}

void Shape::refuse_axis(int axis) const {
  throw ShapeError("shape: no such axis", {{"axis", std::to_string(axis)}, {"shape", str()}});
}

int64_t Shape::numel() const {
  constexpr int64_t kMostElements = int64_t{1} << 60;  // their bytes fit in 64 bits
  int64_t n = 1;
  for (int64_t size : *this)
    if (__builtin_mul_overflow(n, std::max<int64_t>(size, 1), &n) || n > kMostElements)
      throw ShapeError("shape: more than 2^60 elements", {{"shape", str()}});
  return std::find(begin(), end(), 0) == end() ? n : 0;
}

bool Shape::operator==(const Shape& other) const {
  return std::equal(begin(), end(), other.begin(), other.end());
}

std::string Shape::str() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) text += (i ? ", " : "") + std::to_string(sizes_[static_cast<std::size_t>(i)]);
  return text + "]";
}

}  // namespace longhand
