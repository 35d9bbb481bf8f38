// Eight bytes a step: table k tells what a byte does to the register k bytes later.
#include "core/crc32.h"

#include <array>
#include <cstring>

namespace longhand {
namespace {

constexpr uint32_t kReflectedPolynomial = 0xEDB88320u;
constexpr int kStep = 8;
using Table = std::array<uint32_t, 256>;

constexpr std::array<Table, kStep> make_tables() {
  std::array<Table, kStep> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? kReflectedPolynomial : 0);
    tables[0][byte] = value;
  }
  for (uint32_t byte = 0; byte < 256; ++byte)
    for (std::size_t k = 1; k < kStep; ++k) tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 0xFF];
  return tables;
}

constexpr std::array<Table, kStep> kTables = make_tables();

}  // namespace

uint32_t crc32(const void* data, std::size_t bytes, uint32_t before) {
  const auto* at = static_cast<const unsigned char*>(data);
  uint32_t crc = ~before;
  for (; bytes >= kStep; bytes -= kStep, at += kStep) {
    uint32_t low = 0, high = 0;
    std::memcpy(&low, at, 4);
    std::memcpy(&high, at + 4, 4);
    low ^= crc;
    crc = 0;
    for (std::size_t i = 0; i < 4; ++i) {
      crc ^= kTables[7 - i][(low >> (8 * i)) & 0xFF];
      crc ^= kTables[3 - i][(high >> (8 * i)) & 0xFF];
    }
  }
  for (; bytes > 0; --bytes, ++at) crc = (crc >> 8) ^ kTables[0][(crc ^ *at) & 0xFF];
  return ~crc;
}

}  // namespace longhand
