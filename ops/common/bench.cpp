// See bench.h.
#include "ops/common/bench.h"

namespace longhand {

std::vector<BenchEntry>& bench_table() {
  static std::vector<BenchEntry> table;
  return table;
}

}  // namespace longhand
