// What every test program shares: the TEST macro, skips with a reason, and element-by-element comparison.
#pragma once
#include <doctest/doctest.h>

#include <optional>
#include <string>
#include <vector>

#include "core/device.h"

#define TEST(name) TEST_CASE(name)

/// Ends the current test as skipped and says why; ctest and tests/run.sh count it as skipped.
#define SKIP(reason)                      \
  do {                                    \
    ::longhand::test::print_skip(reason); \
    return;                               \
  } while (false)

namespace longhand::test {

void print_skip(const std::string& reason);

/// The folder named by an environment variable (LONGHAND_DATA, LONGHAND_GOLDEN), or nothing when it is unset or absent.
std::optional<std::string> folder_from(const char* variable);

/// Whether the device can give that much memory now.
bool has_room(const Device& device, int64_t bytes);

/// A new empty folder for one test, removed when the object goes.
class ScratchFolder {
 public:
  ScratchFolder();
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// Fails the test unless every |actual[i] - expected[i]| <= tolerance * scale, where scale is the largest |expected| (at least
/// `floor`). Compared element by element, NaN never passes; the message names the worst index.
void expect_close(const std::vector<double>& actual, const std::vector<double>& expected, double tolerance, double floor = 1e-30,
                  const std::string& what = "");

}  // namespace longhand::test
