// The part of Python's pickle format that files of tensors use, read as data: nothing is looked up, imported or called. What a program
// would call stands in the result as a value of kind `call` or `persistent` for the reader to understand or refuse.
#pragma once
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace longhand {

struct PickleValue {
  enum class Kind { none, boolean, integer, real, text, tuple, list, dict, global, call, persistent };
  Kind kind = Kind::none;
  int64_t integer = 0;  // boolean: 0 or 1; global: row of pickle_globals()
  double real = 0;
  std::string_view text;  // inside the pickle's own bytes
  /// tuple, list: the elements; dict: key, value, key, value ..; call: the global, the tuple of arguments; persistent: the identifier.
  std::vector<const PickleValue*> items;
  uint64_t byte = 0;     // of the operation that made it, from the beginning of the pickle
  int depth = 0;         // of the containers inside
  bool ordered = false;  // a dict that is a collections.OrderedDict
  bool nested = false;   // stands inside another value: must not change any more
};

/// A global that a pickle may name.
struct PickleGlobal {
  const char* module;
  const char* name;
};

/// Everything that may be named: OrderedDict, the two functions that rebuild tensors, the storage classes.
std::span<const PickleGlobal> pickle_globals();

/// A value and the memory of everything in it.
class Pickle {
 public:
  Pickle() = default;
  Pickle(Pickle&&) = default;
  Pickle& operator=(Pickle&&) = default;

  const PickleValue& root() const { return *root_; }

 private:
  friend class PickleReader;
  std::deque<PickleValue> values_;  // addresses stay
  const PickleValue* root_ = nullptr;
};

/// Reads one value from `bytes`, which must outlive the result. Protocol 2: PROTO first, STOP last.
/// Calls: OrderedDict with nothing or a list of pairs gives a dict; of the rebuilding functions a `call`; nothing else may be called.
/// where    for messages: the file and the entry
/// errors   FileError naming `where`, byte and rule: any other opcode or global (by name), a stack or memo slot that is empty, nesting over
///          64, strings over 1 MiB, more than 1,000,000 values, more items in containers than twice the bytes (one list made into many
///          dicts), a container that changes after it was put into another, text that is not UTF-8, bytes after STOP
/// source   the format's own description: Python, Lib/pickletools.py; the subset: torch, _weights_only_unpickler.py
Pickle read_pickle(std::span<const std::byte> bytes, const std::string& where);

}  // namespace longhand
