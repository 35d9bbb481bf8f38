// Grids of positions.
#include "eval/position_grid.h"

#include <algorithm>

#include "core/error.h"
#include "tests/support/check.h"

using namespace longhand;
using Numbers = std::vector<int64_t>;

TEST("a logarithmic grid doubles in N steps and ends at the last number") {
  CHECK(position_grid("log:1", 1000, "x") == Numbers{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000});
  CHECK(position_grid("log:2", 16, "x") == Numbers{1, 2, 4, 5, 8, 11, 16});
  CHECK(position_grid("log:4", 1, "x") == Numbers{1});
  const Numbers fine = position_grid("log:24", 1 << 20, "x");
  for (int k = 0; k <= 20; ++k) CHECK(std::binary_search(fine.begin(), fine.end(), int64_t{1} << k));
}

TEST("an even grid has N steps, or every number where there are fewer") {
  CHECK(position_grid("even:4", 10, "x") == Numbers{2, 5, 7, 10});
  CHECK(position_grid("even:100", 3, "x") == Numbers{1, 2, 3});
  CHECK(position_grid("even:3", 3'000'000'000'000, "x") == Numbers{1'000'000'000'000, 2'000'000'000'000, 3'000'000'000'000});
}

TEST("starts lie in front of the end of the context: grids are lags, lists are starts") {
  CHECK(start_grid("log:1", 16, "x") == Numbers{0, 8, 12, 14, 15});
  CHECK(start_grid("even:4", 16, "x") == Numbers{0, 4, 8, 12});
  CHECK(start_grid("15,0,3,3", 16, "x") == Numbers{0, 3, 15});
}

TEST("what is no grid is refused by the option's name") {
  for (const char* text : {"", "log:", "log:0", "log:-1", "lin:3", "even:1.5", ":", "0,1", "1,,2", "17", "1;2", "x", "-1", "1,2,"}) {
    CAPTURE(text);
    std::string message;
    try {
      position_grid(text, 16, "--positions");
    } catch (const ConfigError& error) {
      message = error.what();
    }
    CHECK(message.find("--positions") != std::string::npos);
  }
  CHECK_THROWS_AS(start_grid("16", 16, "x"), ConfigError);
  CHECK_THROWS_AS(start_grid("-1", 16, "x"), ConfigError);
}

TEST("a grid in a file's name") {
  CHECK(grid_tag("log:8") == "log8");
  CHECK(grid_tag("0,1024,2047") == "0+1024+2047");
  CHECK(grid_tag("1000000,2000000,3000000,4000000,5000000") == "5-from-1000000-to-5000000");
}
