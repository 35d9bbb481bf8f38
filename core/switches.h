// The LONGHAND_* environment switches: one table, read once, settable for a scope in code. They show things and never change a result.
#pragma once
#include <span>
#include <string>
#include <vector>

namespace longhand {

struct Switches {
  int trace = 0;        // LONGHAND_TRACE: 1 prints each op in order, 2 adds shapes and milliseconds
  bool memory = false;  // LONGHAND_MEMORY: bytes alive at the peak, by the op that made them
  bool check = false;   // LONGHAND_CHECK: domain checks; stop at the first NaN or infinity
  bool poison = false;  // LONGHAND_POISON: new buffers are filled with NaN, so that a value nobody wrote is seen
  bool exact = false;   // LONGHAND_EXACT: a tensor's memory is its own, so that memory checkers see every step beside it
  std::string dump;     // LONGHAND_DUMP: the folder that the values and gradients of the first forward and backward go to; "": none
  std::string graph;    // LONGHAND_GRAPH: the file that the graph of the first backward of a loss goes to; "": none
};

const Switches& switches();

/// Sets the switches until the object goes: SwitchScope scope([](Switches& s) { s.check = true; });
class SwitchScope {
 public:
  template <class F>
  explicit SwitchScope(F&& change) : before_(switches()) {
    Switches now = before_;
    change(now);
    set(now);
  }
  ~SwitchScope() { set(before_); }
  SwitchScope(const SwitchScope&) = delete;
  SwitchScope& operator=(const SwitchScope&) = delete;

 private:
  static void set(const Switches&);
  Switches before_;
};

struct SwitchRow {
  const char* name;
  const char* values;
  const char* shows;
};
std::span<const SwitchRow> switch_table();

/// LONGHAND_ names in the environment that no row of the table knows; the program reports them at its start.
std::vector<std::string> unknown_switches();

}  // namespace longhand
