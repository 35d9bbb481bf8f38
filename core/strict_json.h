// JSON of files that others wrote, where a doubtful text is refused instead of read in one of several ways.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace longhand {

/// One JSON object: UTF-8, only white space around it, no key twice on a level, not deeper than 8 levels, no NUL.
/// Json     nlohmann::json or nlohmann::ordered_json
/// what     how messages call the text: "safetensors: the header"
/// file     where it stands
/// errors   FileError beginning with `what`, naming `file` and the rule
template <class Json = nlohmann::json>
Json parse_strict_json(std::string_view text, const std::string& what, const std::string& file);

/// A number without a fraction that fits into 64 bits. (get<int64_t>() cuts fractions off, and is undefined for what does not fit.)
/// errors   nlohmann's type_error for anything else
template <class Json>
int64_t whole_number(const Json& value) {
  return value.template get_ref<const int64_t&>();
}

}  // namespace longhand
