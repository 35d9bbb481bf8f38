// Which positions a measure looks at, written in one word.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longhand {

/// Whole numbers from 1 to `last`, rising, each once:
///   log:N    N each time the number doubles: the floors of 2^(k/N), and `last`
///   even:N   N equal steps: the floors of k last / N for k = 1 .. N
/// errors   ConfigError naming `option` and the forms it may have
std::vector<int64_t> number_grid(const std::string& text, int64_t last, const char* option);

/// Whether `text` is a list such as 1,100,2048 rather than log:N or even:N.
bool is_number_list(const std::string& text);

/// The numbers of a list, rising, each once.
/// errors   ConfigError naming `option` for what is no whole number from `least` to `last`
std::vector<int64_t> number_list(const std::string& text, int64_t least, int64_t last, const char* option);

/// Positions 1 .. context from either form.
std::vector<int64_t> position_grid(const std::string& text, int64_t context, const char* option);

/// Where remembered suffixes begin, 0 <= start < context. log:N and even:N are lags: start = context - lag, so that log:N is dense where
/// the context ends; a list holds the starts themselves.
std::vector<int64_t> start_grid(const std::string& text, int64_t context, const char* option);

/// A grid as part of a file's name: "log8", "even16", "0+1024+2047" ("9-from-0-to-2047" for a long list).
std::string grid_tag(const std::string& text);

}  // namespace longhand
