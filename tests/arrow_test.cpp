// The arrows between rooms: which folder may include which. A wrong include is a red test.
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>

#include "tests/support/check.h"

namespace fs = std::filesystem;

namespace {

const std::map<std::string, std::set<std::string>> kMayUse{
    {"core", {}},
    {"autograd", {"core"}},
    {"ops", {"autograd", "core"}},
    {"models", {"ops", "autograd", "core"}},
    {"data", {"core"}},
    {"train", {"models", "ops", "autograd", "core", "data"}},
    {"eval", {"models", "ops", "autograd", "core", "data"}},
    {"tools", {"train", "eval", "models", "ops", "autograd", "core", "data"}},
};

// Every wrong include below `root`: "data/x.cpp includes models/y.h".
std::vector<std::string> wrong_arrows(const fs::path& root) {
  const std::regex include_line(R"re(^\s*#\s*include\s+"([^"/]+)/([^"]*)")re");
  std::vector<std::string> wrong;
  for (const auto& [room, may_use] : kMayUse) {
    if (!fs::exists(root / room)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / room)) {
      const std::string extension = entry.path().extension().string();
      if (!std::set<std::string>{".h", ".cuh", ".cpp", ".cu", ".in"}.contains(extension)) continue;
      const std::string file = fs::relative(entry.path(), root).string();
      const bool is_test = file.find("_test.") != std::string::npos;
      std::ifstream in(entry.path());
      std::smatch match;
      for (std::string line; std::getline(in, line);) {
        if (!std::regex_search(line, match, include_line)) continue;
        const std::string target = match[1];
        if (target == room || may_use.contains(target) || (is_test && target == "tests")) continue;
        wrong.push_back(file + " includes " + target + "/" + match[2].str());
      }
    }
  }
  return wrong;
}

}  // namespace

TEST("no room includes a room that it may not use") {
  const auto wrong = wrong_arrows(LONGHAND_SOURCE_DIR);
  for (const auto& line : wrong) MESSAGE(line);
  CHECK(wrong.empty());
}

TEST("the arrow test sees a wrong arrow") {
  const longhand::test::ScratchFolder scratch;
  fs::create_directories(scratch.file("data"));
  std::ofstream(scratch.file("data/x.cpp")) << "#include \"core/tensor.h\"\n#include \"models/language_model.h\"\n";
  CHECK(wrong_arrows(scratch.path()) == std::vector<std::string>{"data/x.cpp includes models/language_model.h"});
}

TEST("every header compiles alone: it includes what it needs") {
  // Cheap form of the rule: every header has a guard and every quoted include exists.
  const fs::path root = LONGHAND_SOURCE_DIR;
  const std::regex include_line(R"re(^\s*#\s*include\s+"([^"]+)")re");
  for (const auto& [room, may_use] : kMayUse) {
    for (const auto& entry : fs::recursive_directory_iterator(root / room)) {
      const std::string extension = entry.path().extension().string();
      if (extension != ".h" && extension != ".cuh") continue;
      std::ifstream in(entry.path());
      bool guarded = false;
      std::smatch match;
      for (std::string line; std::getline(in, line);) {
        guarded = guarded || line == "#pragma once";
        if (std::regex_search(line, match, include_line))
          CHECK_MESSAGE(fs::exists(root / match[1].str()), entry.path().string() << " includes " << match[1].str());
      }
      CHECK_MESSAGE(guarded, entry.path().string());
    }
  }
}
