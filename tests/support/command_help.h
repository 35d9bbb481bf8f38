// The help texts of the longhand program, read as a user reads them: which subcommands and options there are, and what each is said to do.
#pragma once
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "tests/support/process.h"

namespace longhand::test {

struct HelpEntry {
  std::vector<std::string> names;  // {"-h", "--help"}
  std::string meaning;
};

struct CommandHelp {
  std::vector<HelpEntry> options, positionals, subcommands;
  bool takes(const std::string& option) const {
    for (const HelpEntry& entry : options)
      for (const std::string& name : entry.names)
        if (name == option) return true;
    return false;
  }
};

inline std::vector<std::string> split_at(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, separator);) parts.push_back(part);
  return parts;
}

/// An entry begins two columns in; what it means stands from column 34 on, or on the next line where the entry is wide.
inline CommandHelp parse_help(const std::string& text) {
  constexpr std::size_t kMeaningColumn = 34;
  CommandHelp help;
  std::vector<HelpEntry>* section = nullptr;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (line == "Options:") section = &help.options;
    if (line == "Positionals:") section = &help.positionals;
    if (line == "Subcommands:") section = &help.subcommands;
    if (section == nullptr || !line.starts_with("  ")) continue;
    if (line[2] != ' ') {
      const bool wide = line.size() <= kMeaningColumn || line[kMeaningColumn - 1] != ' ';
      const std::string name = line.substr(2, line.find(' ', 2) - 2);
      section->push_back({split_at(name, ','), wide ? "" : line.substr(kMeaningColumn)});
    } else if (!section->empty()) {
      section->back().meaning += line.substr(line.find_first_not_of(' '));
    }
  }
  return help;
}

/// The help of every command, under "" for longhand itself, "data", "data check" and so on. Each must exit 0 and say nothing on stderr.
inline std::map<std::string, CommandHelp> all_help() {
  std::map<std::string, CommandHelp> out;
  std::vector<std::string> open{""};
  while (!open.empty()) {
    const std::string path = open.back();
    open.pop_back();
    std::vector<std::string> words = split_at(path, ' ');
    words.insert(words.begin(), LONGHAND_BINARY);
    words.push_back("--help");
    const ProcessResult result = run_process(words);
    CHECK_MESSAGE(result.code == 0, path);
    CHECK_MESSAGE(result.err.empty(), path);
    for (const HelpEntry& entry : (out[path] = parse_help(result.out)).subcommands)
      open.push_back((path.empty() ? "" : path + " ") + entry.names.front());
  }
  return out;
}

}  // namespace longhand::test
