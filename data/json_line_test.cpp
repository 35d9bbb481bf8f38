// The strict line parser: a table of rules, then agreement with nlohmann-json on mutated lines.
#include "data/json_line.h"

#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "data/unicode.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

std::string rule_broken_by(std::string_view line) {
  JsonLine out;
  const auto fault = parse_json_line(line, out);
  return fault ? fault->rule : "";
}

std::string text_of(std::string_view line) {
  JsonLine out;
  const auto fault = parse_json_line(line, out);
  CHECK_MESSAGE(!fault, line, ": ", fault ? fault->rule : "");
  return out.text;
}

// What nlohmann-json makes of a line, with longhand's own rules on top: its callbacks see every key, so doubles are seen too.
class Oracle : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::string text, set_name;
  bool refused = false, out_of_range = false;

  // True if the line is a document.
  bool accepts(const std::string& line) { return nlohmann::json::sax_parse(line, this) && !refused && texts_ == 1; }

  bool null() override { return scalar(); }
  bool boolean(bool) override { return scalar(); }
  bool number_integer(number_integer_t) override { return scalar(); }
  bool number_unsigned(number_unsigned_t) override { return scalar(); }
  bool number_float(number_float_t, const string_t&) override { return scalar(); }
  bool binary(binary_t&) override { return scalar(); }
  bool string(string_t& value) override {
    if (at_text()) {
      text = value;
      return true;
    }
    if (path_ == std::vector<std::string>{"meta", "pile_set_name"}) set_name = value;
    return scalar();
  }
  bool start_object(std::size_t) override { return open("{"); }
  bool start_array(std::size_t) override { return open("["); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    path_.back() = name;
    texts_ += path_.size() == 1 && name == "text";
    refused = refused || texts_ > 1;
    if (path_.size() == 1 && name == "meta" && ++metas_ > 1) refused = true;
    if (path_ == std::vector<std::string>{"meta", "pile_set_name"} && ++names_ > 1) refused = true;
    return true;
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
    out_of_range = error.id == 406;
    return false;
  }

 private:
  bool at_text() const { return path_.size() == 1 && path_[0] == "text"; }
  bool scalar() {
    refused = refused || path_.empty() || at_text();
    return true;
  }
  bool open(const char* kind) {
    refused = refused || at_text() || (path_.empty() && *kind != '{') || path_.size() >= static_cast<std::size_t>(kMaxJsonNesting);
    path_.push_back(kind);
    return true;
  }
  bool close() {
    path_.pop_back();
    return true;
  }

  std::vector<std::string> path_;  // the current key of each object around, "[" for a list
  int texts_ = 0, metas_ = 0, names_ = 0;
};

TEST("a sound line gives its text and its set") {
  JsonLine out;
  CHECK(!parse_json_line(
      R"( {"id": [1, -0.5e+3, {"text": null}], "text": "a\n\u00e9\ud83d\ude00b", "meta": {"x": 1, "pile_set_name": "Docs"}}  )", out));
  CHECK(out.text ==
        "a\n\xC3\xA9\xF0\x9F\x98\x80"
        "b");
  CHECK(out.set_name == "Docs");
  CHECK(!parse_json_line(R"({"t\u0065xt": ""})", out));
  CHECK(out.text.empty());
  CHECK(out.set_name.empty());
  CHECK(text_of(R"({"text": "\"\\\/\b\f\n\r\t\u0000"})") == std::string("\"\\/\b\f\n\r\t\0", 9));
}

TEST("each rule has its own sentence") {
  const std::vector<std::pair<std::string, std::string>> table = {
      {R"([1])", "the line is not a JSON object"},
      {R"(x)", "the line is not a JSON object"},
      {R"({})", "the object has no field \"text\""},
      {R"({"meta": {"text": "a"}})", "the object has no field \"text\""},
      {R"({"text": "a"} {"text": "b"})", "there is more after the object"},
      {R"({"text": "a"},)", "there is more after the object"},
      {R"({"text": "a",})", "a comma stands before the closing brace"},
      {R"({"text": "a", "b": [1,]})", "a comma stands before the closing bracket"},
      {R"({text: "a"})", "a field name in quotes must stand here"},
      {R"({"text" "a"})", "a colon must follow the field name"},
      {R"({"text": "a" "b": 1})", "a comma or a closing brace must stand here"},
      {R"({"text": "a", "b": [1 2]})", "a comma or a closing bracket must stand here"},
      {R"({"text": 1})", "the field \"text\" is not a string"},
      {R"({"text": ["a"]})", "the field \"text\" is not a string"},
      {R"({"text": "a", "text": "b"})", "the field \"text\" stands twice"},
      {R"({"text": "a", "meta": 1, "meta": 2})", "the field \"meta\" stands twice"},
      {R"({"text": "a", "meta": {"pile_set_name": 1, "pile_set_name": 2}})", "the field \"pile_set_name\" stands twice"},
      {R"({"text": "a)", "the string never ends"},
      {R"({"text": "a\)", "the string never ends"},
      {R"({"text": "a\u00)", "the string never ends"},
      {R"({"text": "a")", "the line ends inside the object"},
      {R"({"text": "a", "b": [)", "the line ends where a value must stand"},
      {R"({"text": "a", "b": [1)", "the line ends inside a list"},
      {R"({"text": "\x41"})", "an unknown escape stands in a string"},
      {R"({"text": "\u12G4"})", "a \\u escape needs four hexadecimal digits"},
      {R"({"text": "\ude00"})", "a low surrogate escape stands without its partner"},
      {R"({"text": "\ud83d"})", "a high surrogate escape stands without its partner"},
      {R"({"text": "\ud83d\u0041"})", "a high surrogate escape stands without its partner"},
      {"{\"text\": \"a\tb\"}", "a control character stands unescaped in a string"},
      {"{\"text\": \"\xC0\xAF\"}", "the bytes are not well-formed UTF-8"},
      {"{\"text\": \"\xED\xA0\x80\"}", "the bytes are not well-formed UTF-8"},
      {"{\"text\": \"\xF4\x90\x80\x80\"}", "the bytes are not well-formed UTF-8"},
      {"{\"text\": \"\xE2\x82\"}", "the bytes are not well-formed UTF-8"},
      {"{\"text\": \"a\", \"\xFF\": 1}", "the bytes are not well-formed UTF-8"},
      {R"({"text": "a", "b": 01})", "a number has a leading zero"},
      {R"({"text": "a", "b": 1.})", "a digit must stand here"},
      {R"({"text": "a", "b": -})", "a digit must stand here"},
      {R"({"text": "a", "b": NaN})", "a value must be a string, number, object, list, true, false or null"},
      {R"({"text": "a", "b": +1})", "a value must be a string, number, object, list, true, false or null"},
      {R"({"text": "a"} // c)", "there is more after the object"},
  };
  for (const auto& [line, rule] : table) CHECK_MESSAGE(rule_broken_by(line) == rule, line);
}

TEST("a fault gives its byte in the line") {
  JsonLine out;
  CHECK(parse_json_line("{\"text\": \"0123456789abcdef\x01\"}", out)->byte == 26);
  CHECK(parse_json_line(R"({"text": "abc)", out)->byte == 9);
  CHECK(parse_json_line(R"({"text": "a"} x)", out)->byte == 14);
}

TEST("nesting is accepted up to the limit and no deeper") {
  const auto nested = [](int lists) {
    const auto n = static_cast<std::size_t>(lists);
    return R"({"text": "a", "x": )" + std::string(n, '[') + std::string(n, ']') + "}";
  };
  CHECK(rule_broken_by(nested(kMaxJsonNesting - 1)).empty());
  CHECK(rule_broken_by(nested(kMaxJsonNesting)) == "objects and lists are nested too deep");
  CHECK(rule_broken_by(nested(1000000)) == "objects and lists are nested too deep");
}

TEST("every character comes through, escaped and not, at every distance from the line's end") {
  for (uint32_t code = 1; code <= 0x10FFFF; code += code < 0x900 ? 1 : 257) {
    if (code >= 0xD800 && code <= 0xDFFF) continue;
    std::string utf8;
    append_utf8(static_cast<char32_t>(code), utf8);
    const std::string before(code % 9, 'x'), after(code % 11, 'y');
    const nlohmann::json object = {{"text", before + utf8 + after}};
    CHECK(text_of(object.dump()) == before + utf8 + after);
    CHECK(text_of(object.dump(-1, ' ', true)) == before + utf8 + after);
  }
}

TEST("the parser agrees with nlohmann-json on mutated lines") {
  const std::vector<std::string> seeds = {
      R"({"text": "Four score and seven years ago\n\"our\" fathers \u00e9 \ud83d\ude00", "meta": {"pile_set_name": "Test"}})",
      R"({"id": [1, 2.5, -3e-2, true, false, null, {"a": []}], "text": "", "meta": {"pile_set_name": "Docs", "n": {"text": "x"}}})",
      "{\"meta\": {}, \"text\": \"\xC3\xA9\xE6\x97\xA5\xF0\x9F\x98\x80 plain words that go on for a while\"}",
      R"( { "text" : "a" , "b" : [ [ ] , { } , "" , 0 , -0 , 10 ] } )",
  };
  const std::string pieces[] = {"\"",
                                "\\",
                                "{",
                                "}",
                                "[",
                                "]",
                                ",",
                                ":",
                                " ",
                                "\t",
                                "\r",
                                "0",
                                "1",
                                "-",
                                "+",
                                ".",
                                "e",
                                "E",
                                "u",
                                "n",
                                "\\u",
                                "\\ud83d",
                                "\\ude00",
                                "\\u0041",
                                "true",
                                "null",
                                "\"text\":",
                                "\"meta\":",
                                "\"pile_set_name\":",
                                "\x1F",
                                "\x7F",
                                "\x80",
                                "\xBF",
                                "\xC2",
                                "\xC0",
                                "\xE0",
                                "\xED",
                                "\xF0",
                                "\xF4",
                                "\xF5",
                                "\xFF",
                                "\xA0",
                                "\x9F",
                                "\x90",
                                "\x8F"};
  std::mt19937 random(1);
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  int accepted = 0, refused = 0;
  JsonLine out;
  for (int i = 0; i < 200000; ++i) {
    std::string line = seeds[below(seeds.size())];
    for (std::size_t edits = 1 + below(3); edits > 0 && !line.empty(); --edits) {
      const std::size_t at = below(line.size());
      const std::string& piece = pieces[below(std::size(pieces))];
      switch (below(4)) {
        case 0:
          line.insert(at, piece);
          break;
        case 1:
          line.replace(at, 1, piece);
          break;
        case 2:
          line.erase(at, 1 + below(3));
          break;
        default:
          line.insert(at, line.substr(below(line.size()), below(20)));
          break;
      }
    }
    Oracle oracle;
    const bool sound = oracle.accepts(line);
    if (oracle.out_of_range || line.starts_with('\xEF')) continue;  // it refuses 1e999, which RFC 8259 allows, and skips byte order marks
    const auto fault = parse_json_line(line, out);
    CHECK_MESSAGE(!fault == sound, line, ": ", fault ? fault->rule : "accepted");
    if (!fault && sound) {
      CHECK(out.text == oracle.text);
      CHECK(out.set_name == oracle.set_name);
    }
    ++(sound ? accepted : refused);
  }
  CHECK(accepted > 20000);
  CHECK(refused > 20000);
}

}  // namespace
}  // namespace longhand
