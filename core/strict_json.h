// JSON of files that others wrote, where a doubtful text is refused instead of read in one of several ways.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "core/error.h"

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

/// The same for a count: from `least` to 2^48, so that what is added to it stays within 64 bits.
/// errors   FileError naming `what` and the value
template <class Json>
int64_t whole_count(const Json& value, const std::string& what, int64_t least = 0) {
  const int64_t count = whole_number(value);
  if (count < least || count > int64_t{1} << 48) throw FileError(what + ": a count that cannot be", {{"value", std::to_string(count)}});
  return count;
}

}  // namespace longhand
