// LAMBADA: the last word of a passage that needs the whole of it.
#pragma once
#include <string>
#include <vector>

namespace longhand {

struct LambadaSample {
  std::string context, target;  // the target begins with a blank
};

/// Cut at the last blank: everything before it, and the blank with the last word.
/// errors  ValueError for a text without a blank, or with nothing before or behind it
LambadaSample split_last_word(const std::string& text);

/// Every line {"text": ...} of the file.
/// errors  FileError naming file, line and byte
std::vector<LambadaSample> read_lambada(const std::string& path);

}  // namespace longhand
