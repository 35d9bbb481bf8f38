// Where parameters begin in the flat buffers of a ParameterSet: what cuts the buffers cuts between units of these many elements.
#pragma once
#include <cstdint>

namespace longhand {

constexpr int64_t kParameterAlignment = 64;  // elements

/// n elements, and the gap behind them.
constexpr int64_t aligned_elements(int64_t n) {
  return (n + kParameterAlignment - 1) / kParameterAlignment * kParameterAlignment;
}

}  // namespace longhand
