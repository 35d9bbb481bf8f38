// Numbers that are not finite, as the versions of the libraries write them into config.json.
#include "models/config_json.h"

#include <cmath>
#include <limits>

#include "core/error.h"
#include "tests/support/check.h"

using namespace longhand;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double number_in(const std::string& value) {
  return json_number(parse_python_json("{\"x\": " + value + "}", "config.json").at("x"));
}

std::string refusal(const std::string& value) {
  const auto json = parse_python_json("{\"x\": " + value + "}", "config.json");
  try {
    ConfigReader(json, "config.json").number("x", 1);
  } catch (const ConfigError& problem) {
    return problem.what();
  }
  return "not refused";
}

}  // namespace

TEST("config.json: an infinite number is read as a bare word, as a string and in an object __float__") {
  for (const std::string sign : {"", "-"}) {
    const double expected = sign.empty() ? kInfinity : -kInfinity;
    CHECK(number_in(sign + "Infinity") == expected);
    CHECK(number_in("\"" + sign + "Infinity\"") == expected);
    CHECK(number_in("{\"__float__\": \"" + sign + "Infinity\"}") == expected);
    const auto json = parse_python_json("{\"x\": {\"__float__\": \"" + sign + "Infinity\"}}", "config.json");
    CHECK(ConfigReader(json, "config.json").number("x", 1) == expected);
  }
  CHECK(number_in("-0.5e1") == -5);
}

TEST("config.json: what is no number is refused by key, NaN in every form too") {
  for (const char* value : {"NaN", "\"NaN\"", "{\"__float__\": \"NaN\"}", "{\"__float__\": \"0.5\"}", "{\"__float__\": {\"__float__\": 1}}",
                            "{\"__float__\": \"Infinity\", \"more\": 1}", "{\"float\": \"Infinity\"}", "{}", "\"inf\"", "true", "[1]"}) {
    CAPTURE(value);
    CHECK(std::isnan(number_in(value)));
    const std::string message = refusal(value);
    for (const char* part : {"config.json", "key       x", "expected  a number"})
      CHECK_MESSAGE(message.find(part) != std::string::npos, message, " lacks ", part);
  }
}

TEST("config.json: numbers without end are written as Python writes them, and read again") {
  for (const double value : {kInfinity, -kInfinity, 0.25}) {
    const std::string text = python_json_text({{"x", json_from_number(value)}});
    CHECK(text.find('"', text.find(':')) == std::string::npos);  // a bare word
    CHECK(json_number(parse_python_json(text, "config.json").at("x")) == value);
  }
  const auto json = parse_python_json(R"({"name": "to Infinity \" NaN"})", "config.json");  // inside a string a word is a word
  CHECK(json.at("name") == "to Infinity \" NaN");
}

TEST("config.json: a text that could be read in two ways, or takes the stack, is refused") {
  const auto refused_for = [](const std::string& text, const char* rule) {
    try {
      parse_python_json(text, "folder/config.json");
    } catch (const FileError& problem) {
      const std::string message = problem.what();
      return message.find(rule) != std::string::npos && message.find("folder/config.json") != std::string::npos;
    }
    return false;
  };
  const std::string deep = std::string(200'000, '[') + "1" + std::string(200'000, ']');
  CHECK(refused_for("{\"hidden_size\": " + deep + "}", "nested deeper"));
  CHECK(refused_for(R"({"hidden_size": 16, "expand": 2, "hidden_size": 32})", "stands twice"));
  CHECK(refused_for(R"({"ssm_cfg": {"d_state": 16, "d_state": 32}})", "stands twice"));
  CHECK(refused_for("[1]", "not a JSON object"));
  CHECK(refused_for(R"({"x": )", "not valid JSON"));
  CHECK(refused_for(R"({"x": 1} y)", "not valid JSON"));
}

TEST("config.json: whole numbers that no size can be are refused, not wrapped") {
  for (const char* value : {"18446744073709551615", "9223372036854775808", "9223372036854775807", "4294967296", "-9223372036854775808",
                            "2147483649", "1.5", "1e3", "true", "\"2\""}) {
    CAPTURE(value);
    const auto json = parse_python_json(std::string(R"({"x": )") + value + "}", "config.json");
    CHECK_THROWS_AS(ConfigReader(json, "config.json").integer("x", 1), ConfigError);
  }
  const auto json = parse_python_json(R"({"x": 2147483648, "y": -3})", "config.json");
  CHECK(ConfigReader(json, "config.json").integer("x", 1) == int64_t{1} << 31);
  CHECK(ConfigReader(json, "config.json").integer("y", 1) == -3);
  CHECK(ConfigReader(json, "config.json").integer("z", 1) == 1);
}
