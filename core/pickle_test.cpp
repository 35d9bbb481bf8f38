// The pickle reader: what it makes of each operation, and every rule.
#include "core/pickle.h"

#include "core/error.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

using Kind = PickleValue::Kind;
const std::string kProto = "\x80\x02";

std::span<const std::byte> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

std::string refusal(const std::string& text) {
  try {
    read_pickle(bytes_of(text), "x.bin");
  } catch (const FileError& error) {
    CHECK(std::string(error.what()).find("x.bin") != std::string::npos);
    CHECK(std::string(error.what()).find("byte") != std::string::npos);
    return error.what();
  }
  return "";
}

void check_refused(const std::string& operations, const char* rule) {
  const std::string text = refusal(kProto + operations);
  CHECK_MESSAGE(text.find(rule) != std::string::npos, rule << " in " << text);
}

std::string text_operation(const std::string& text) {
  std::string out = "X";
  for (int i = 0; i < 4; ++i) out += static_cast<char>((text.size() >> (8 * i)) & 0xFF);
  return out + text;
}

std::string repeated(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

}  // namespace

TEST("pickle: constants, numbers and strings") {
  const auto integer = [](const std::string& operations) {
    const std::string text = kProto + operations + ".";
    const Pickle pickle = read_pickle(bytes_of(text), "x");
    CHECK(pickle.root().kind == Kind::integer);
    return pickle.root().integer;
  };
  CHECK(integer("K\xff") == 255);
  CHECK(integer("M\xff\xff") == 65535);
  CHECK(integer("J\xff\xff\xff\xff") == -1);
  CHECK(integer(std::string("\x8a\0", 2)) == 0);
  CHECK(integer("\x8a\x01\xff") == -1);
  CHECK(integer("\x8a\x02\xff\x7f") == 32767);
  CHECK(integer("\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f") == INT64_MAX);
  CHECK(integer(std::string("\x8a\x08\0\0\0\0\0\0\0\x80", 10)) == INT64_MIN);
  const std::string real = kProto + std::string("G\x3f\xf8\0\0\0\0\0\0.", 10);
  CHECK(read_pickle(bytes_of(real), "x").root().real == 1.5);
  const std::string tuple = kProto + "(N\x88\x89" + text_operation("h\xc3\xa9") + "U\x02okt.";
  const Pickle pickle = read_pickle(bytes_of(tuple), "x");
  const auto& items = pickle.root().items;
  REQUIRE(items.size() == 5);
  CHECK(items[0]->kind == Kind::none);
  CHECK(items[1]->integer == 1);
  CHECK(items[2]->integer == 0);
  CHECK(items[3]->text == "h\xc3\xa9");
  CHECK(items[4]->text == "ok");
}

TEST("pickle: containers, memo, OrderedDict and calls") {
  const std::string dict = "ccollections\nOrderedDict\nq\x01)Rq\x02(" + text_operation("a") +
                           "]q\x03(K\x01K\x02"
                           "e" +
                           text_operation("b") +
                           "h\x01]K\x05K\x06\x86"
                           "aK\x07K\x08\x86"
                           "a\x85Ru}" +
                           text_operation("_metadata") + "}sb.";
  const std::string text = kProto + dict;
  const Pickle pickle = read_pickle(bytes_of(text), "x");
  const auto& root = pickle.root();
  CHECK(root.kind == Kind::dict);
  CHECK(root.ordered);
  REQUIRE(root.items.size() == 4);  // the state of BUILD is dropped
  CHECK(root.items[0]->text == "a");
  CHECK(root.items[1]->items.size() == 2);
  CHECK(root.items[3]->kind == Kind::dict);
  CHECK(root.items[3]->items.size() == 4);
  CHECK(root.items[3]->items[2]->integer == 7);
  const std::string call = kProto + "ctorch._utils\n_rebuild_parameter\nK\x01\x85R.";
  const Pickle called = read_pickle(bytes_of(call), "x");
  CHECK(called.root().kind == Kind::call);
  CHECK(called.root().items[1]->items[0]->integer == 1);
}

TEST("pickle: a file makes no more of its items than twice its bytes") {
  std::string pairs = "]q\x01(";
  for (int i = 0; i < 200; ++i) pairs += "K\x01N\x86";
  pairs += "e";
  const std::string dict = "ccollections\nOrderedDict\nh\x01\x85R";  // a copy of the whole list
  const std::string once = kProto + pairs + dict + "\x86.";
  CHECK(read_pickle(bytes_of(once), "x").root().items[1]->items.size() == 400);
  check_refused("(" + pairs + repeated(dict, 100) + "t.", "more items than its bytes account for");
}

TEST("pickle: everything else is refused by name") {
  CHECK(refusal("").find("middle of an operation") != std::string::npos);
  CHECK(refusal("N.").find("PROTO") != std::string::npos);
  CHECK(refusal("\x80\x04N.").find("another protocol") != std::string::npos);
  const std::pair<const char*, const char*> foreign[] = {{"i", "INST"},
                                                         {"o", "OBJ"},
                                                         {"\x81", "NEWOBJ"},
                                                         {"\x92", "NEWOBJ_EX"},
                                                         {"\x93", "STACK_GLOBAL"},
                                                         {"\x82", "EXT1"},
                                                         {"\x83", "EXT2"},
                                                         {"\x84", "EXT4"},
                                                         {"P", "PERSID"},
                                                         {"2", "DUP"},
                                                         {"0", "POP"},
                                                         {"1", "POP_MARK"},
                                                         {"S", "STRING"},
                                                         {"V", "UNICODE"},
                                                         {"I", "INT"},
                                                         {"L", "LONG"},
                                                         {"F", "FLOAT"},
                                                         {"g", "GET"},
                                                         {"p", "PUT"},
                                                         {"T", "BINSTRING"},
                                                         {"B", "BINBYTES"},
                                                         {"C", "SHORT_BINBYTES"},
                                                         {"d", "DICT"},
                                                         {"l", "LIST"},
                                                         {"\x8b", "LONG4"},
                                                         {"\x8c", "SHORT_BINUNICODE"},
                                                         {"\x8d", "BINUNICODE8"},
                                                         {"\x8e", "BINBYTES8"},
                                                         {"\x8f", "EMPTY_SET"},
                                                         {"\x90", "ADDITEMS"},
                                                         {"\x91", "FROZENSET"},
                                                         {"\x94", "MEMOIZE"},
                                                         {"\x95", "FRAME"},
                                                         {"\x96", "BYTEARRAY8"},
                                                         {"\x97", "NEXT_BUFFER"},
                                                         {"\x98", "READONLY_BUFFER"},
                                                         {"\xff", "no opcode"},
                                                         {"\x80", "no opcode"}};
  for (const auto& [opcode, name] : foreign) check_refused(std::string("N") + opcode, name);
  check_refused("cos\nsystem\n", "os.system");
  check_refused("ctorch\nfloat32\n", "torch.float32");
  check_refused("c__builtin__\neval\n", "__builtin__.eval");
  check_refused("ctorch._utils\n_rebuild_tensor\n", "_rebuild_tensor");
  check_refused("cco\x01ns\nx\n", "co\\x01ns.x");
  check_refused("ccollections\nOrderedDict", "does not end");
  check_refused("c" + std::string(5000, 'a') + "\nb\n.", "does not end");
  check_refused("ctorch\nFloatStorage\n)R", "cannot be called");
  check_refused("K\x01)R", "cannot be called");
  check_refused("ccollections\nOrderedDict\nK\x01R", "without a tuple");
  check_refused("ccollections\nOrderedDict\nK\x01\x85R", "list of pairs");
  check_refused(
      "ccollections\nOrderedDict\n]K\x01"
      "a\x85R",
      "list of pairs");
  check_refused("}}b.", "BUILD on something else");
  check_refused("Nb.", "stack empty");
  check_refused(
      "ccollections\nOrderedDict\n)RK\x01"
      "b",
      "BUILD with something else");
}

TEST("pickle: stack, memo and marks") {
  check_refused(".", "stack empty");
  check_refused("NN.", "more than one value");
  check_refused("(N.", "more than one value");
  check_refused("N.N", "bytes after STOP");
  check_refused("t", "no mark");
  check_refused("e", "no mark");
  check_refused("](K\x01", "middle of an operation");
  check_refused("](", "middle of an operation");
  check_refused("](e(\x85", "stack empty");  // not below a mark
  check_refused("(q\x01", "stack empty");
  check_refused("h\x05", "never set");
  check_refused(std::string("j\xff\xff\xff\xff"), "never set");
  check_refused(
      "K\x01K\x02"
      "a",
      "something else than a list");
  check_refused(
      "}K\x01"
      "a",
      "something else than a list");
  check_refused("]K\x01K\x02s", "something else than a dict");
  check_refused("}(K\x01u", "key without a value");
  check_refused("}NK\x01s", "neither a string nor an integer");
  check_refused("K\x01Q", "not named by a tuple");
}

TEST("pickle: limits") {
  check_refused("\x8a\x09" + std::string(9, '\1'), "more than 64 bits");
  check_refused("\x8a\xff" + std::string(255, '\1'), "more than 64 bits");
  check_refused(text_operation(std::string((1 << 20) + 1, 'a')), "over 1 MiB");
  check_refused("X\xff\xff\xff\xff", "over 1 MiB");
  check_refused("X\xff\xff\x01", "middle of an operation");
  check_refused(text_operation("\xff"), "not UTF-8");
  check_refused(text_operation("\xc0\xaf"), "not UTF-8");      // an overlong /
  check_refused(text_operation("\xed\xa0\x80"), "not UTF-8");  // a surrogate
  CHECK(refusal(kProto + "N" + repeated("\x85", 63) + ".").empty());
  check_refused("N" + repeated("\x85", 65) + ".", "deeper than 64");
  check_refused(repeated("(", 65), "deeper than 64");
  check_refused(repeated("]", 70) + repeated("a", 69) + ".", "deeper than 64");
  check_refused("(" + repeated("N", 1'000'001) + "t.", "more than 1,000,000 values");
  check_refused("Nq\x01(" + repeated("h\x01", 1'000'001) + "t.", "on the stack");
  check_refused(
      "]q\x01h\x01"
      "a.",
      "put into itself");
  check_refused(
      "]q\x01]q\x02h\x01"
      "ah\x01h\x02"
      "a.",
      "already stands inside another");  // a circle of two
}
