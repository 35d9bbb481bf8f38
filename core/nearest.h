// Suggestions for misspelt names.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace longhand {

/// The known name with the smallest edit distance (insert, delete, replace) to `given`; empty when `known` is empty.
std::string nearest_name(std::string_view given, const std::vector<std::string>& known);

}  // namespace longhand
