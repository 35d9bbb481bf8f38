// Part: what one of several gets of things in a row.
#pragma once
#include <cstdint>

namespace longhand {

/// [begin, end) of things in a row.
struct Part {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

/// Cuts n things into `parts` neighbouring parts whose sizes differ by one `unit` at most: part p is [floor(p u / parts), floor((p+1) u /
/// parts)) units of the u = ceil(n / unit) units.
Part part_of(int64_t n, int64_t part, int64_t parts, int64_t unit = 1);

}  // namespace longhand
