// How things are cut into parts, and one process by itself; several are in tests/scale_test.cpp.
#include "train/communicator.h"

#include "core/error.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

TEST("communicator: parts are neighbours that cover everything and differ by one unit at most") {
  for (const int64_t n : {0, 1, 5, 64, 1000, 1 << 20})
    for (const int64_t parts : {1, 2, 3, 8})
      for (const int64_t unit : {1, 4, 64}) {
        int64_t at = 0, least = n, most = 0;  // units
        for (int64_t p = 0; p < parts; ++p) {
          const Part part = part_of(n, p, parts, unit);
          CHECK(part.begin == at);
          CHECK((part.begin % unit == 0 || part.begin == n));
          at = part.end;
          const int64_t units = (part.size() + unit - 1) / unit;
          least = std::min(least, units), most = std::max(most, units);
        }
        CHECK(at == n);
        CHECK(most - least <= 1);
      }
}

TEST("communicator: one process by itself changes nothing") {
  const auto alone = single_process();
  CHECK(alone->alone());
  CHECK(alone->leads());
  CHECK(alone->describe() == "1 process");
  const Tensor t = Tensor::from(Device::cpu(), {5}, std::vector<float>{1, 2, 3, 4, 5});
  alone->all_reduce_sum(t);
  alone->reduce_scatter_sum(t, 1);
  alone->all_gather(t, alone->cuts(5));
  alone->broadcast(t, 0);
  CHECK(alone->gather(t).to_vector<float>() == std::vector<float>{1, 2, 3, 4, 5});
  CHECK(alone->all_texts("a") == std::vector<std::string>{"a"});
  CHECK(alone->all_reduce_max(-3) == -3);
  CHECK_NOTHROW(require_same_everywhere(*alone, "x: y"));
}

}  // namespace
}  // namespace longhand
