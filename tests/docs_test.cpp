// What the documents promise: links lead to files, and commands that they show exist with the options that they show.
#include <algorithm>
#include <filesystem>
#include <regex>
#include <set>

#include "core/switches.h"
#include "tests/support/command_help.h"

namespace fs = std::filesystem;

namespace longhand::test {
namespace {

const std::set<std::string> kNotOurs{"build", "runs"};

// Every *.md of the project.
std::vector<fs::path> documents(const fs::path& root) {
  std::vector<fs::path> out;
  for (auto it = fs::recursive_directory_iterator(root); it != fs::recursive_directory_iterator(); ++it) {
    const std::string name = it->path().filename().string();
    if (it->is_directory() && (name.starts_with(".") || (it.depth() == 0 && kNotOurs.contains(name)))) it.disable_recursion_pending();
    if (it->is_regular_file() && it->path().extension() == ".md") out.push_back(it->path());
  }
  std::sort(out.begin(), out.end());
  return out;
}

// A document's text outside code blocks, and the code: whole blocks, and words between backticks as lines of their own.
struct Parts {
  std::string prose, code;
};

Parts parts_of(const std::string& text) {
  Parts parts;
  bool in_block = false;
  for (const std::string& line : split_at(text, '\n')) {
    if (line.starts_with("```")) {
      in_block = !in_block;
    } else if (in_block) {
      parts.code += line + "\n";
    } else {
      const auto pieces = split_at(line, '`');  // prose, code, prose, ...
      for (std::size_t i = 0; i < pieces.size(); ++i) (i % 2 == 0 ? parts.prose : parts.code) += pieces[i] + (i % 2 == 0 ? " " : "\n");
      parts.prose += "\n";
    }
  }
  return parts;
}

// "README.md: docs/gone.md" for every relative link that leads nowhere; `seen` counts the links looked at.
std::vector<std::string> broken_links(const fs::path& document, int& seen) {
  static const std::regex link(R"(\]\(([^)\s]+)\))");
  std::vector<std::string> broken;
  const std::string prose = parts_of(text_of(document.string())).prose;
  for (auto it = std::sregex_iterator(prose.begin(), prose.end(), link); it != std::sregex_iterator(); ++it) {
    const std::string target = (*it)[1].str(), path = target.substr(0, target.find('#'));
    if (path.empty() || target.find(':') != std::string::npos) continue;  // a place in the same page; a web address
    ++seen;
    if (!fs::exists(document.parent_path() / path)) broken.push_back(document.filename().string() + ": " + target);
  }
  return broken;
}

// The words of a command line up to a comment, a pipe or its end. Quotes are taken off.
std::vector<std::string> words_of(const std::string& line) {
  std::vector<std::string> words(1);
  char quote = 0;
  for (const char c : line) {
    if (quote != 0) {
      if (c == quote) quote = 0;
      else words.back() += c;
    } else if (c == '\'' || c == '"') {
      quote = c;
    } else if (c == '#' || c == '|' || c == ';') {
      break;
    } else if (c != ' ') {
      words.back() += c;
    } else if (!words.back().empty()) {
      words.emplace_back();
    }
  }
  if (words.back().empty()) words.pop_back();
  return words;
}

// What is wrong with the `longhand ...` commands in `code`; `seen` counts them.
std::vector<std::string> wrong_commands(std::string code, const std::map<std::string, CommandHelp>& help, int& seen) {
  static const std::regex continued(R"(\\\n\s*)"), program(R"re("\$longhand"|\S*/longhand\b)re"), command(R"((^|\|)\s*longhand (.*))");
  code = std::regex_replace(std::regex_replace(code, continued, ""), program, "longhand");
  std::vector<std::string> wrong;
  for (const std::string& line : split_at(code, '\n')) {
    std::smatch match;
    if (line.starts_with("#") || !std::regex_search(line, match, command)) continue;
    const std::vector<std::string> words = words_of(match[2]);
    std::string path;
    std::size_t i = 0;
    for (; i < words.size() && !help.at(path).subcommands.empty() && !words[i].starts_with("-"); ++i) {
      const std::string next = (path.empty() ? "" : path + " ") + words[i];
      if (!help.contains(next)) {
        wrong.push_back("no such subcommand: " + line);
        break;
      }
      path = next;
    }
    ++seen;
    for (; i < words.size(); ++i) {
      const std::string option = words[i].substr(0, words[i].find('='));
      if (option.starts_with("--") && !help.at(path).takes(option)) wrong.push_back("no option " + option + ": " + line);
    }
  }
  return wrong;
}

// The switches that are set in `code` and that longhand does not know; `seen` counts all. Options of the build (-D) are none.
std::vector<std::string> unknown_switches_in(const std::string& code, int& seen) {
  static const std::regex setting(R"((^|[^A-Z_D])(LONGHAND_[A-Z_]+)=)");
  std::vector<std::string> unknown;
  for (auto it = std::sregex_iterator(code.begin(), code.end(), setting); it != std::sregex_iterator(); ++it) {
    const std::string name = (*it)[2].str();
    const auto rows = switch_table();
    ++seen;
    if (std::none_of(rows.begin(), rows.end(), [&](const SwitchRow& row) { return name == row.name; })) unknown.push_back(name);
  }
  return unknown;
}

}  // namespace

TEST("docs: every relative link leads to a file") {
  int seen = 0;
  for (const fs::path& document : documents(LONGHAND_SOURCE_DIR))
    for (const std::string& link : broken_links(document, seen)) FAIL_CHECK(link);
  CHECK(seen > 20);
}

TEST("docs: every longhand command they show exists, with its options") {
  const auto help = all_help();
  const fs::path root = LONGHAND_SOURCE_DIR;
  int seen = 0;
  for (const fs::path& document : documents(root))
    for (const std::string& problem : wrong_commands(parts_of(text_of(document.string())).code, help, seen))
      FAIL_CHECK(document.filename().string() << ": " << problem);
  CHECK(seen > 8);
  for (const std::string& problem : wrong_commands(text_of((root / "tools/quickstart.sh").string()), help, seen)) FAIL_CHECK(problem);
  for (const auto& entry : fs::directory_iterator(root / "tools/recipes")) {
    std::string comments;
    for (const std::string& line : split_at(text_of(entry.path().string()), '\n'))
      if (line.starts_with("#   longhand ")) comments += line.substr(4) + "\n";
    for (const std::string& problem : wrong_commands(comments, help, seen)) FAIL_CHECK(entry.path().filename().string() << ": " << problem);
  }
}

TEST("docs: every switch they set is one that longhand knows, and shows in a column of its own") {
  int seen = 0;
  for (const fs::path& document : documents(LONGHAND_SOURCE_DIR))
    for (const std::string& name : unknown_switches_in(parts_of(text_of(document.string())).code, seen))
      FAIL_CHECK(document.filename().string() << ": " << name);
  CHECK(seen > 8);
  const std::string shown = run_process({LONGHAND_BINARY, "inspect", "switches"}).out;
  for (const SwitchRow& row : switch_table()) CHECK(shown.find(std::string(row.name) + "  ") != std::string::npos);
}

TEST("docs: a broken link, a wrong subcommand, a wrong option and an unknown switch are seen") {
  const ScratchFolder scratch;
  std::ofstream(scratch.file("page.md")) << "[a](page.md#part) [b](gone.md) [c](https://example.org)\n```\n[d](not/a/link)\n```\n";
  int seen = 0;
  CHECK(broken_links(scratch.file("page.md"), seen) == std::vector<std::string>{"page.md: gone.md"});
  CHECK(seen == 2);
  seen = 0;
  const auto wrong = wrong_commands(
      "longhand trian x.toml\nlonghand data check a \\\n  --tokenzier bytes\necho x | longhand tokenize --tokenizer bytes # --not\n",
      all_help(), seen);
  CHECK(seen == 3);
  REQUIRE(wrong.size() == 2);
  CHECK(wrong[0] == "no such subcommand: longhand trian x.toml");
  CHECK(wrong[1].starts_with("no option --tokenzier: "));
  seen = 0;
  CHECK(unknown_switches_in("cmake -DLONGHAND_MPI=ON\nLONGHAND_TRACE=1 LONGHAND_TRACK=2 longhand", seen) ==
        std::vector<std::string>{"LONGHAND_TRACK"});
  CHECK(seen == 2);
}

}  // namespace longhand::test
