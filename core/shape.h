// Shape: the sizes of a tensor's axes, a small value without heap memory.
#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace longhand {

class Shape {
 public:
  static constexpr int kMaxRank = 6;
  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes);
  template <class It>
  Shape(It begin, It end) {
    for (; begin != end; ++begin) push_back(static_cast<int64_t>(*begin));
  }

  int rank() const { return rank_; }
  int64_t operator[](int axis) const { return sizes_[index(axis)]; }  // a negative axis counts from the end
  int64_t& operator[](int axis) { return sizes_[index(axis)]; }
  const int64_t* begin() const { return sizes_.data(); }
  const int64_t* end() const { return sizes_.data() + rank_; }
  int64_t numel() const;  // ShapeError over 2^60; axes of size 0 count as 1 there, so that strides of empty tensors fit too
  void push_back(int64_t size);
  bool operator==(const Shape& other) const;
  std::string str() const;  // "[8, 2048, 1024]"

 private:
  std::size_t index(int axis) const {
    const int i = axis < 0 ? axis + rank_ : axis;
    if (i < 0 || i >= rank_) refuse_axis(axis);
    return static_cast<std::size_t>(i);
  }
  [[noreturn]] void refuse_axis(int axis) const;
  std::array<int64_t, kMaxRank> sizes_{};
  int rank_ = 0;
};

}  // namespace longhand
