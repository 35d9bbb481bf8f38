// JSON of files that others wrote, where a doubtful text is refused instead of read in one of several ways.
#pragma once
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

}  // namespace longhand
