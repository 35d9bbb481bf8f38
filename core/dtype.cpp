// Names and conversions of element types; see dtype.h.
#include "core/dtype.h"

#include <array>

#include "core/error.h"

namespace longhand {
namespace {

struct Row {
  const char* name;
  bool floating;
};
constexpr std::array<Row, 8> kRows{
    {{"f64", true}, {"f32", true}, {"f16", true}, {"bf16", true}, {"i64", false}, {"i32", false}, {"u16", false}, {"u8", false}}};
const Row& row(Dtype dtype) {
  return kRows[static_cast<std::size_t>(dtype)];
}

}  // namespace

const char* name_of(Dtype dtype) {
  return row(dtype).name;
}
bool is_floating(Dtype dtype) {
  return row(dtype).floating;
}

Dtype parse_dtype(const std::string& name) {
  for (std::size_t i = 0; i < kRows.size(); ++i)
    if (name == kRows[i].name) return static_cast<Dtype>(i);
  throw ConfigError("dtype: unknown name", {{"given", name}, {"expected", "f64, f32, f16, bf16, i64, i32, u16 or u8"}});
}

f16::f16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x47800000u) {
    result = 0x7c00u;  // 2^16 and above: infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 1/2 puts the float's last bit at 2^-24, the subnormal unit, and rounds there.
    result = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  bits = static_cast<uint16_t>(sign | result);
}

f16::operator float() const {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

}  // namespace longhand
