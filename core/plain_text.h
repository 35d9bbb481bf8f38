// Text from files, before anybody trusts it.
#pragma once
#include <string>
#include <string_view>

namespace longhand {

/// Bytes from a file made fit for a message: cut at 80, anything but printable ASCII as \xNN.
std::string printable(std::string_view text);

/// Whether these are the bytes of valid UTF-8 text (no overlong forms, no surrogates).
bool is_utf8(std::string_view text);

}  // namespace longhand
