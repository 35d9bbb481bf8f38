// See lambada.h.
#include "data/tasks/lambada.h"

#include "core/error.h"
#include "data/shard_reader.h"
#include "data/tasks/continuation.h"

namespace longhand {

LambadaSample split_last_word(const std::string& text) {
  const auto blank = text.rfind(' ');
  if (blank == std::string::npos || size_without_white_end(std::string_view(text).substr(0, blank)) == 0 || blank + 1 == text.size())
    throw ValueError("lambada: a text without a last word behind a blank", {{"text", text.substr(0, 80)}});
  return {text.substr(0, blank), text.substr(blank)};
}

std::vector<LambadaSample> read_lambada(const std::string& path) {
  std::vector<LambadaSample> samples;
  ShardReader reader(path, {.max_line_bytes = 1 << 20, .source = {.held_whole = true}});  // of passages of a page
  for (Document document; reader.next(document);) {
    try {
      samples.push_back(split_last_word(document.text));
    } catch (const ValueError&) {
      throw FileError("lambada: a text without a last word behind a blank",
                      {{"file", path}, {"line", std::to_string(document.line)}, {"byte", std::to_string(document.byte_offset)}});
    }
  }
  if (samples.empty()) throw FileError("lambada: a file without a passage", {{"file", path}});
  return samples;
}

}  // namespace longhand
