// See pickle.h.
#include "core/pickle.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <unordered_map>

#include "core/error.h"
#include "core/plain_text.h"

namespace longhand {
namespace {

using Kind = PickleValue::Kind;
constexpr int kDeepest = 64;
constexpr std::size_t kMostValues = 1'000'000, kDeepestStack = 1'000'000, kLongestText = std::size_t{1} << 20, kLongestGlobal = 256;

constexpr PickleGlobal kGlobals[] = {
    {"collections", "OrderedDict"},
    {"torch._utils", "_rebuild_tensor_v2"},
    {"torch._utils", "_rebuild_parameter"},
    {"torch", "FloatStorage"},
    {"torch", "HalfStorage"},
    {"torch", "BFloat16Storage"},
    {"torch", "DoubleStorage"},
    {"torch", "LongStorage"},
    {"torch", "IntStorage"},
    {"torch", "ShortStorage"},
    {"torch", "CharStorage"},
    {"torch", "ByteStorage"},
    {"torch", "BoolStorage"},
};
constexpr int64_t kOrderedDict = 0, kLastFunction = 2;  // rows: what may be called comes first

// Names of operations that are refused, so that a message says what was met.
struct Opcode {
  unsigned char byte;
  const char* name;
};
constexpr Opcode kForeign[] = {
    {'0', "POP"},          {'1', "POP_MARK"},    {'2', "DUP"},           {'F', "FLOAT"},
    {'I', "INT"},          {'L', "LONG"},        {'P', "PERSID"},        {'S', "STRING"},
    {'T', "BINSTRING"},    {'V', "UNICODE"},     {'B', "BINBYTES"},      {'C', "SHORT_BINBYTES"},
    {'d', "DICT"},         {'g', "GET"},         {'i', "INST"},          {'l', "LIST"},
    {'o', "OBJ"},          {'p', "PUT"},         {0x81, "NEWOBJ"},       {0x82, "EXT1"},
    {0x83, "EXT2"},        {0x84, "EXT4"},       {0x8b, "LONG4"},        {0x8c, "SHORT_BINUNICODE"},
    {0x8d, "BINUNICODE8"}, {0x8e, "BINBYTES8"},  {0x8f, "EMPTY_SET"},    {0x90, "ADDITEMS"},
    {0x91, "FROZENSET"},   {0x92, "NEWOBJ_EX"},  {0x93, "STACK_GLOBAL"}, {0x94, "MEMOIZE"},
    {0x95, "FRAME"},       {0x96, "BYTEARRAY8"}, {0x97, "NEXT_BUFFER"},  {0x98, "READONLY_BUFFER"},
};

const char* name_of_kind(Kind kind) {
  constexpr const char* kNames[] = {"None",   "a bool", "an integer", "a float",  "a string", "a tuple",
                                    "a list", "a dict", "a global",   "a tensor", "a storage"};
  return kNames[static_cast<std::size_t>(kind)];
}

}  // namespace

std::span<const PickleGlobal> pickle_globals() {
  return kGlobals;
}

class PickleReader {
 public:
  PickleReader(std::span<const std::byte> bytes, const std::string& where) : bytes_(bytes), where_(where) {}

  Pickle read() {
    if (take(1) != 0x80) refuse("does not begin with PROTO");
    if (const uint64_t protocol = take(1); protocol != 2)
      refuse("another protocol than 2", {{"protocol", std::to_string(protocol)}, {"try", "torch.save without pickle_protocol"}});
    while (result_.root_ == nullptr) {
      begin_ = at_;
      step(static_cast<unsigned char>(take(1)));
    }
    if (at_ != bytes_.size()) refuse("bytes after STOP", {{"bytes", std::to_string(bytes_.size() - at_)}});
    return std::move(result_);
  }

 private:
  [[noreturn]] void refuse(const std::string& rule, std::vector<ErrorRow> rows = {}) const {
    rows.insert(rows.begin(), {{"file", where_}, {"byte", std::to_string(begin_)}});
    throw FileError("pickle: " + rule, std::move(rows));
  }

  // --- operands ---------------------------------------------------------------------------------------------------

  std::string_view take_bytes(uint64_t count) {
    if (count > bytes_.size() - at_)
      refuse("ends in the middle of an operation", {{"bytes missing", std::to_string(count - (bytes_.size() - at_))}});
    const std::string_view text(reinterpret_cast<const char*>(bytes_.data()) + at_, count);
    at_ += count;
    return text;
  }

  uint64_t take(int count) {  // little-endian
    uint64_t value = 0;
    int shift = 0;
    for (const char c : take_bytes(static_cast<uint64_t>(count))) {
      value |= static_cast<uint64_t>(static_cast<unsigned char>(c)) << shift;
      shift += 8;
    }
    return value;
  }

  std::string_view take_line() {
    const std::size_t most = std::min(bytes_.size() - at_, kLongestGlobal);
    const std::string_view ahead(reinterpret_cast<const char*>(bytes_.data()) + at_, most);
    const auto end = ahead.find('\n');
    if (end == std::string_view::npos) refuse("a global whose name does not end");
    at_ += end + 1;
    return ahead.substr(0, end);
  }

  // --- the stack --------------------------------------------------------------------------------------------------

  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }  // nothing below the last mark can be taken

  PickleValue& pop() {
    if (stack_.size() <= floor()) refuse("an operation finds the stack empty");
    PickleValue& value = *stack_.back();
    stack_.pop_back();
    return value;
  }

  PickleValue& top() {
    if (stack_.size() <= floor()) refuse("an operation finds the stack empty");
    return *stack_.back();
  }

  std::vector<PickleValue*> pop_to_mark() {
    if (marks_.empty()) refuse("an operation finds no mark on the stack");
    const auto mark = static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<PickleValue*> values(stack_.begin() + mark, stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return values;
  }

  void push(PickleValue& value) {
    if (stack_.size() >= kDeepestStack) refuse("more than 1,000,000 values on the stack");
    stack_.push_back(&value);
  }

  PickleValue& make(Kind kind) {
    if (result_.values_.size() >= kMostValues) refuse("more than 1,000,000 values");
    PickleValue& value = result_.values_.emplace_back();
    value.kind = kind;
    value.byte = begin_;
    push(value);
    return value;
  }

  // Puts `item` into `container`. A value that stands inside another never changes again: so there are no circles, and depths hold.
  void put(PickleValue& container, PickleValue& item) {
    if (&container == &item) refuse("a container is put into itself");
    if (container.nested) refuse("a container changes that already stands inside another");
    // An item stands on the stack for at least one byte, and OrderedDict copies those of its list once more.
    if (++items_ > 2 * bytes_.size()) refuse("more items than its bytes account for", {{"limit", std::to_string(2 * bytes_.size())}});
    item.nested = true;
    container.items.push_back(&item);
    container.depth = std::max(container.depth, item.depth + 1);
    if (container.depth > kDeepest) refuse("nested deeper than 64 levels");
  }

  void make_tuple(const std::vector<PickleValue*>& items) {
    PickleValue& tuple = make(Kind::tuple);
    for (PickleValue* item : items) put(tuple, *item);
  }

  void set_items(PickleValue& dict, const std::vector<PickleValue*>& items) {
    if (dict.kind != Kind::dict) refuse("items are set on something else than a dict", {{"found", name_of_kind(dict.kind)}});
    if (items.size() % 2 != 0) refuse("a key without a value");
    for (std::size_t i = 0; i < items.size(); i += 2) {
      if (items[i]->kind != Kind::text && items[i]->kind != Kind::integer)
        refuse("a key that is neither a string nor an integer", {{"found", name_of_kind(items[i]->kind)}});
      put(dict, *items[i]);
      put(dict, *items[i + 1]);
    }
  }

  void append(PickleValue& list, const std::vector<PickleValue*>& items) {
    if (list.kind != Kind::list) refuse("something else than a list is appended to", {{"found", name_of_kind(list.kind)}});
    for (PickleValue* item : items) put(list, *item);
  }

  // --- operations -------------------------------------------------------------------------------------------------

  void push_text(uint64_t length) {
    if (length > kLongestText) refuse("a string over 1 MiB", {{"bytes", std::to_string(length)}});
    const std::string_view text = take_bytes(length);
    if (!is_utf8(text)) refuse("a string that is not UTF-8", {{"string", printable(text)}});
    make(Kind::text).text = text;
  }

  void push_long() {
    const uint64_t length = take(1);
    if (length > 8) refuse("an integer of more than 64 bits", {{"bytes", std::to_string(length)}});
    uint64_t value = take(static_cast<int>(length));
    if (length > 0 && length < 8 && ((value >> (8 * length - 1)) & 1) != 0) value |= ~uint64_t{0} << (8 * length);
    make(Kind::integer).integer = static_cast<int64_t>(value);
  }

  void push_real() {  // big-endian
    uint64_t bits = 0;
    for (const char c : take_bytes(8)) bits = (bits << 8) | static_cast<unsigned char>(c);
    make(Kind::real).real = std::bit_cast<double>(bits);
  }

  void push_global() {
    const std::string_view module = take_line(), name = take_line();
    for (std::size_t row = 0; row < std::size(kGlobals); ++row) {
      if (module != kGlobals[row].module || name != kGlobals[row].name) continue;
      make(Kind::global).integer = static_cast<int64_t>(row);
      return;
    }
    refuse("names something that no file of weights needs",
           {{"global", printable(module) + "." + printable(name)}, {"try", "save the model's state_dict alone, or use safetensors"}});
  }

  void reduce() {
    PickleValue& arguments = pop();
    PickleValue& callable = pop();
    if (callable.kind != Kind::global || callable.integer > kLastFunction)
      refuse("calls something that cannot be called",
             {{"callable", callable.kind == Kind::global ? kGlobals[callable.integer].name : name_of_kind(callable.kind)}});
    if (arguments.kind != Kind::tuple) refuse("a call without a tuple of arguments", {{"found", name_of_kind(arguments.kind)}});
    if (callable.integer != kOrderedDict) {
      PickleValue& call = make(Kind::call);
      put(call, callable);
      put(call, arguments);
      return;
    }
    PickleValue& dict = make(Kind::dict);
    dict.ordered = true;
    if (arguments.items.empty()) return;
    const PickleValue& pairs = *arguments.items[0];
    if (arguments.items.size() != 1 || pairs.kind != Kind::list) refuse("OrderedDict takes nothing or a list of pairs");
    for (const PickleValue* pair : pairs.items) {
      if ((pair->kind != Kind::tuple && pair->kind != Kind::list) || pair->items.size() != 2)
        refuse("OrderedDict takes nothing or a list of pairs");
      set_items(dict, {const_cast<PickleValue*>(pair->items[0]), const_cast<PickleValue*>(pair->items[1])});
    }
  }

  void build() {  // attributes of an OrderedDict, such as _metadata of a state dict: read and dropped
    const PickleValue& state = pop();
    const PickleValue& object = top();
    if (object.kind != Kind::dict || !object.ordered)
      refuse("BUILD on something else than an OrderedDict", {{"found", name_of_kind(object.kind)}});
    if (state.kind != Kind::dict) refuse("BUILD with something else than a dict", {{"found", name_of_kind(state.kind)}});
  }

  void load(uint64_t slot) {
    const auto found = memo_.find(slot);
    if (found == memo_.end()) refuse("reads a memo slot that was never set", {{"slot", std::to_string(slot)}});
    push(*found->second);
  }

  void stop() {
    PickleValue& value = pop();
    if (!stack_.empty() || !marks_.empty()) refuse("more than one value at STOP", {{"values", std::to_string(stack_.size() + 1)}});
    result_.root_ = &value;
  }

  void step(unsigned char opcode) {
    switch (opcode) {
      case '(':
        return open_mark();
      case ')':
        return make_tuple({});
      case 't':
        return make_tuple(pop_to_mark());
      case 0x85:
      case 0x86:
      case 0x87: {
        std::vector<PickleValue*> items(opcode - 0x84u);
        for (std::size_t i = items.size(); i-- > 0;) items[i] = &pop();
        return make_tuple(items);
      }
      case ']':
        make(Kind::list);
        return;
      case 'a': {
        PickleValue& item = pop();
        return append(top(), {&item});
      }
      case 'e': {
        const auto items = pop_to_mark();
        return append(top(), items);
      }
      case '}':
        make(Kind::dict);
        return;
      case 's': {
        PickleValue& value = pop();
        PickleValue& key = pop();
        return set_items(top(), {&key, &value});
      }
      case 'u': {
        const auto items = pop_to_mark();
        return set_items(top(), items);
      }
      case 'N':
        make(Kind::none);
        return;
      case 0x88:
        make(Kind::boolean).integer = 1;
        return;
      case 0x89:
        make(Kind::boolean).integer = 0;
        return;
      case 'J': {
        const auto value = static_cast<int32_t>(take(4));
        make(Kind::integer).integer = value;
        return;
      }
      case 'K': {
        const uint64_t value = take(1);
        make(Kind::integer).integer = static_cast<int64_t>(value);
        return;
      }
      case 'M': {
        const uint64_t value = take(2);
        make(Kind::integer).integer = static_cast<int64_t>(value);
        return;
      }
      case 0x8a:
        return push_long();
      case 'G':
        return push_real();
      case 'X':
        return push_text(take(4));
      case 'U':
        return push_text(take(1));
      case 'q':
        memo_[take(1)] = &top();
        return;
      case 'r':
        memo_[take(4)] = &top();
        return;
      case 'h':
        return load(take(1));
      case 'j':
        return load(take(4));
      case 'c':
        return push_global();
      case 'Q': {
        PickleValue& identifier = pop();
        if (identifier.kind != Kind::tuple) refuse("a storage that is not named by a tuple", {{"found", name_of_kind(identifier.kind)}});
        return put(make(Kind::persistent), identifier);
      }
      case 'R':
        return reduce();
      case 'b':
        return build();
      case '.':
        return stop();
      default:
        break;
    }
    const char* name = "no opcode of pickle";
    for (const Opcode& row : kForeign)
      if (row.byte == opcode) name = row.name;
    constexpr char kHex[] = "0123456789abcdef";
    refuse("an operation that no file of weights needs",
           {{"opcode", std::string(name) + " (0x" + kHex[opcode >> 4] + kHex[opcode & 15] + ")"}});
  }

  void open_mark() {
    if (marks_.size() >= kDeepest) refuse("nested deeper than 64 levels");
    marks_.push_back(stack_.size());
  }

  std::span<const std::byte> bytes_;
  const std::string& where_;
  std::size_t at_ = 0, begin_ = 0;  // the next byte | where the present operation began
  std::size_t items_ = 0;           // of all containers
  std::vector<PickleValue*> stack_;
  std::vector<std::size_t> marks_;  // how high the stack was
  std::unordered_map<uint64_t, PickleValue*> memo_;
  Pickle result_;
};

Pickle read_pickle(std::span<const std::byte> bytes, const std::string& where) {
  return PickleReader(bytes, where).read();
}

}  // namespace longhand
