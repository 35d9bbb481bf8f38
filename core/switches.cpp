// See switches.h.
#include "core/switches.h"

#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "core/error.h"

namespace longhand {
namespace {

constexpr std::array<SwitchRow, 15> kTable{{
    {"LONGHAND_TRACE", "0, 1, 2", "each op in order; 2 adds shapes, dtypes and milliseconds"},
    {"LONGHAND_MEMORY", "0, 1", "live and peak bytes, and the ops whose tensors were alive at the peak"},
    {"LONGHAND_CHECK", "0, 1", "domain checks; stops at the first NaN or infinity and names op, tensor, index and layer"},
    {"LONGHAND_POISON", "0, 1", "new buffers start as NaN, so that a value nobody wrote is seen"},
    {"LONGHAND_EXACT", "0, 1", "each tensor's memory is its own and exactly as large as it is, for memory checkers (1 under ASan)"},
    {"LONGHAND_DUMP", "folder", "the outputs of every op of the first forward and their gradients, as safetensors, a file an op"},
    {"LONGHAND_GRAPH", "file.dot", "the graph behind the first loss that is walked backward, for Graphviz: ops, layers, shapes"},
    {"LONGHAND_DATA", "folder", "real data for the tests (without it those tests are skipped)"},
    {"LONGHAND_GOLDEN", "folder", "reference cases for the tests (without it those tests are skipped)"},
    {"LONGHAND_KILLS", "a number", "how many times the crash test kills a run (8 without it)"},
    {"LONGHAND_CRASH_DEVICE", "cpu, cuda", "where the runs that the crash test kills compute (cpu without it)"},
    {"LONGHAND_PARITY_EVERY", "a number", "which comparisons with the CPU the tests make: 11 makes every eleventh (1 without it)"},
    {"LONGHAND_FUZZ_INPUTS", "a number", "how many damaged files of each kind the fuzz test reads (1500 without it)"},
    {"LONGHAND_SOAK_STEPS", "a number", "how many steps the soak test trains (2000 without it)"},
    {"LONGHAND_SOAK_GPU", "a number", "rounds of the soak of a GPU's memory, which needs a GPU to itself (left out without it)"},
}};

#if defined(__SANITIZE_ADDRESS__)
constexpr int kUnderAsan = 1;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr int kUnderAsan = 1;
#else
constexpr int kUnderAsan = 0;
#endif
#else
constexpr int kUnderAsan = 0;
#endif

int read_level(const char* name, int highest, int unset = 0) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return unset;
  for (int level = 0; level <= highest; ++level)
    if (std::to_string(level) == value) return level;
  throw ConfigError("switches: a value that the switch does not take",
                    {{"switch", name}, {"value", value}, {"expected", "a number from 0 to " + std::to_string(highest)}});
}

Switches& current() {
  static Switches s = [] {
    Switches read;
    read.trace = read_level("LONGHAND_TRACE", 2);
    read.memory = read_level("LONGHAND_MEMORY", 1) != 0;
    read.check = read_level("LONGHAND_CHECK", 1) != 0;
    read.poison = read_level("LONGHAND_POISON", 1) != 0;
    read.exact = read_level("LONGHAND_EXACT", 1, kUnderAsan) != 0;
    if (const char* dump = std::getenv("LONGHAND_DUMP")) read.dump = dump;
    if (const char* graph = std::getenv("LONGHAND_GRAPH")) read.graph = graph;
    return read;
  }();
  return s;
}

}  // namespace

const Switches& switches() {
  return current();
}
void SwitchScope::set(const Switches& s) {
  current() = s;
}
std::span<const SwitchRow> switch_table() {
  return kTable;
}

std::vector<std::string> unknown_switches() {
  std::vector<std::string> unknown;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (!text.starts_with("LONGHAND_")) continue;
    const std::string_view name = text.substr(0, text.find('='));
    bool known = false;
    for (const auto& row : kTable) known = known || name == row.name;
    if (!known) unknown.emplace_back(name);
  }
  return unknown;
}

}  // namespace longhand
