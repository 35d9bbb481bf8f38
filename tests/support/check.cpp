// Shared test helpers; see check.h.
#include "tests/support/check.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "core/allocator.h"
#include "core/error.h"

namespace longhand::test {

void print_skip(const std::string& reason) {
  fmt::print("skipped: {}\n", reason);
  std::fflush(stdout);
}

std::optional<std::string> folder_from(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr || !std::filesystem::is_directory(value)) return std::nullopt;
  return std::string(value);
}

bool has_room(const Device& device, int64_t bytes) {
  try {
    device.allocator().release(device.allocator().allocate(static_cast<std::size_t>(bytes)));
    device.allocator().release_cached();
    return true;
  } catch (const MemoryError&) {
    return false;
  }
}

ScratchFolder::ScratchFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "longhand-test-XXXXXX").string();
  REQUIRE(mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void expect_close(const std::vector<double>& actual, const std::vector<double>& expected, double tolerance, double floor,
                  const std::string& what) {
  REQUIRE_MESSAGE(actual.size() == expected.size(), what);
  double scale = floor;
  for (double value : expected) scale = std::max(scale, std::abs(value));
  double worst = -1;
  std::size_t where = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    double error = std::abs(actual[i] - expected[i]) / scale;
    if (std::isnan(error)) error = INFINITY;
    if (error > worst) worst = error, where = i;
  }
  if (actual.empty()) return;
  const std::string message =
      fmt::format("{} index {} of {}: actual {:.9g}, expected {:.9g}, error {:.3g} of the largest ({:.3g}), allowed {:.3g}", what, where,
                  actual.size(), actual[where], expected[where], worst, scale, tolerance);
  CHECK_MESSAGE(worst <= tolerance, message);
}

}  // namespace longhand::test
