// The pages of the model folders say where each line of their equations is computed: those functions must be there.
#include <filesystem>
#include <regex>

#include "tests/support/command_help.h"

namespace fs = std::filesystem;

namespace longhand::test {
namespace {

// "mamba2.cpp: forwards" for every row "| line | [file](path) | `function` |" whose file does not define the function; `seen` counts rows.
std::vector<std::string> missing_functions(const fs::path& page, int& seen) {
  static const std::regex row(R"(\| [^|]+ \| \[[^\]]+\]\(([^)]+)\) \| `(\w+)` \|)");
  std::vector<std::string> missing;
  for (const std::string& line : split_at(text_of(page.string()), '\n')) {
    std::smatch match;
    if (!std::regex_match(line, match, row)) continue;
    ++seen;
    const fs::path file = page.parent_path() / match[1].str();
    const std::regex definition("\\w[\\w:<>*&]* " + match[2].str() + R"(\([^;]*\) (const )?(override )?\{)");
    if (!fs::exists(file) || !std::regex_search(text_of(file.string()), definition))
      missing.push_back(file.filename().string() + ": " + match[2].str());
  }
  return missing;
}

}  // namespace

TEST("model pages: every function that they name is in the file that they name") {
  const fs::path models = fs::path(LONGHAND_SOURCE_DIR) / "models";
  int pages = 0;
  for (const auto& entry : fs::directory_iterator(models)) {
    if (!entry.is_directory()) continue;
    const fs::path page = entry.path() / "README.md";
    REQUIRE_MESSAGE(fs::exists(page), page.string());
    int rows = 0;
    for (const std::string& name : missing_functions(page, rows)) FAIL_CHECK(name);
    CHECK(rows >= 5);
    ++pages;
  }
  CHECK(pages >= 3);
}

TEST("model pages: a function that is gone is seen") {
  const ScratchFolder scratch;
  std::ofstream(scratch.file("a.cpp")) << "void here(int x) {\n}\nint only_called = there(3);\n";
  std::ofstream(scratch.file("README.md")) << "| 1 | [a](a.cpp) | `here` |\n| 2 | [a](a.cpp) | `there` |\n| 3 | [b](b.cpp) | `here` |\n";
  int rows = 0;
  CHECK(missing_functions(scratch.file("README.md"), rows) == std::vector<std::string>{"a.cpp: there", "b.cpp: here"});
  CHECK(rows == 3);
}

}  // namespace longhand::test
