// Philox4x32-10: a counter-based random generator. The same (key, counter) gives the same bits on CPU and GPU, in any order, on any
// number of threads or devices, so noise can be keyed by what it belongs to: (seed, step, layer, global row, element).
// source  Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; constants from its table 2
#pragma once
#include <array>
#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace longhand {

struct PhiloxBlock {
  uint32_t word[4];
};

/// Four random words for a 64-bit key and a 128-bit counter.
LONGHAND_HOST_DEVICE inline PhiloxBlock philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  auto low = [](uint64_t v) { return static_cast<uint32_t>(v); };
  auto high = [](uint64_t v) { return static_cast<uint32_t>(v >> 32); };
  uint32_t k0 = low(key), k1 = high(key);
  uint32_t c0 = low(counter_low), c1 = high(counter_low), c2 = low(counter_high), c3 = high(counter_high);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = high(p1) ^ c1 ^ k0;
    c1 = low(p1);
    c2 = high(p0) ^ c3 ^ k1;
    c3 = low(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// 64 random bits keyed by (key, a, b).
LONGHAND_HOST_DEVICE inline uint64_t philox_u64(uint64_t key, uint64_t a, uint64_t b = 0) {
  const PhiloxBlock r = philox(key, a, b);
  return (uint64_t{r.word[0]} << 32) | r.word[1];
}

/// A word as a number in (0, 1): (w + 1/2) / 2^32, never 0 and never 1.
LONGHAND_HOST_DEVICE inline double unit_interval(uint32_t word) {
  return (static_cast<double>(word) + 0.5) * 0x1p-32;
}

/// Two independent N(0, 1) numbers from two words, by the Box-Muller transform.
LONGHAND_HOST_DEVICE inline void box_muller(uint32_t w0, uint32_t w1, float& n0, float& n1) {
  const float radius = sqrtf(-2.0f * logf(static_cast<float>(unit_interval(w0))));
  const float angle = 6.283185307f * static_cast<float>(unit_interval(w1));
  n0 = radius * cosf(angle);
  n1 = radius * sinf(angle);
}

/// Element `index` of an endless sequence of U(0, 1) numbers keyed by `key`.
LONGHAND_HOST_DEVICE inline double philox_uniform(uint64_t key, uint64_t index) {
  return unit_interval(philox(key, index / 4, 0).word[index % 4]);
}

/// Element `index` of an endless sequence of N(0, 1) numbers keyed by `key`.
LONGHAND_HOST_DEVICE inline float philox_normal(uint64_t key, uint64_t index) {
  const PhiloxBlock r = philox(key, index / 4, 1);
  float n[4];
  box_muller(r.word[0], r.word[1], n[0], n[1]);
  box_muller(r.word[2], r.word[3], n[2], n[3]);
  return n[index % 4];
}

/// A new key from a key and a tag: sub-streams for (seed, step), then layer, then row. `tag` may be a hash_name().
LONGHAND_HOST_DEVICE inline uint64_t philox_key(uint64_t key, uint64_t tag) {
  return philox_u64(key, tag, 2);
}

/// FNV-1a of a name, to key a stream by what it is for ("init", "shuffle", a parameter's name).
constexpr uint64_t hash_name(const char* name) {
  uint64_t h = 0xcbf29ce484222325u;
  for (; *name; ++name) h = (h ^ static_cast<unsigned char>(*name)) * 0x100000001b3u;
  return h;
}

}  // namespace longhand
