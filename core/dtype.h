// Element types, and the two 16-bit floating point types as plain host values (storage and rounding; no arithmetic of their own).
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

namespace longhand {

enum class Dtype : uint8_t { f64, f32, f16, bf16, i64, i32, u16, u8 };

/// Bytes of one element.
constexpr int64_t size_of(Dtype dtype) {
  constexpr int64_t kBytes[] = {8, 4, 2, 2, 8, 4, 2, 1};
  return kBytes[static_cast<std::size_t>(dtype)];
}
const char* name_of(Dtype dtype);  // "f32"
bool is_floating(Dtype dtype);
Dtype parse_dtype(const std::string&);  // "bf16" -> Dtype::bf16; ConfigError for an unknown name

/// bfloat16: the upper half of a float; conversion rounds to nearest, ties to even, NaN stays NaN.
struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  explicit operator double() const { return static_cast<float>(*this); }
};

/// IEEE half precision; conversion rounds to nearest, ties to even.
struct f16 {
  uint16_t bits = 0;
  f16() = default;
  explicit f16(float value);
  explicit operator float() const;
  explicit operator double() const { return static_cast<float>(*this); }
};

template <class T>
constexpr Dtype dtype_of();
template <>
constexpr Dtype dtype_of<double>() {
  return Dtype::f64;
}
template <>
constexpr Dtype dtype_of<float>() {
  return Dtype::f32;
}
template <>
constexpr Dtype dtype_of<f16>() {
  return Dtype::f16;
}
template <>
constexpr Dtype dtype_of<bf16>() {
  return Dtype::bf16;
}
template <>
constexpr Dtype dtype_of<int64_t>() {
  return Dtype::i64;
}
template <>
constexpr Dtype dtype_of<int32_t>() {
  return Dtype::i32;
}
template <>
constexpr Dtype dtype_of<uint16_t>() {
  return Dtype::u16;
}
template <>
constexpr Dtype dtype_of<uint8_t>() {
  return Dtype::u8;
}

/// Calls f with a value of the host type of `dtype`: visit(d, [&](auto element) { using T = decltype(element); ... }).
template <class F>
decltype(auto) visit(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64:
      return f(double{});
    case Dtype::f32:
      return f(float{});
    case Dtype::f16:
      return f(f16{});
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::i64:
      return f(int64_t{});
    case Dtype::i32:
      return f(int32_t{});
    case Dtype::u16:
      return f(uint16_t{});
    case Dtype::u8:
      break;
  }
  return f(uint8_t{});
}

}  // namespace longhand
