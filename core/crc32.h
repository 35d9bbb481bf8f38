// CRC-32 of zip archives.
#pragma once
#include <cstddef>
#include <cstdint>

namespace longhand {

/// The reflected cyclic redundancy check with polynomial 0x04C11DB7, register preset and result inverted.
/// before   the check of everything that came earlier, so that crc32(b, n, crc32(a, m)) is that of a followed by b
/// source   ISO 3309 / ITU-T V.42; check value of "123456789": 0xCBF43926
uint32_t crc32(const void* data, std::size_t bytes, uint32_t before = 0);

}  // namespace longhand
