// See text_stream.h.
#include "eval/text_stream.h"

#include <algorithm>

#include "core/error.h"
#include "data/unicode.h"

namespace longhand {
namespace {

// The length of the longest end of `text` that a stop string begins with, but is not whole.
std::size_t begun(std::string_view text, std::string_view stop) {
  for (std::size_t length = std::min(text.size(), stop.size() - 1); length > 0; --length)
    if (text.ends_with(stop.substr(0, length))) return length;
  return 0;
}

// Bytes at the end of `text` that begin a character but do not finish it. Only the last three bytes can.
std::size_t unfinished_character(std::string_view text) {
  for (std::size_t length = std::min<std::size_t>(text.size(), 3); length > 0; --length) {
    const auto lead = static_cast<unsigned char>(text[text.size() - length]);
    if (lead < 0xC2 || lead > 0xF4) continue;  // no character of several bytes begins here
    const Utf8Step step = read_utf8(text, text.size() - length);
    const std::size_t needed = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (!step.valid && step.length == length && length < needed) return length;
  }
  return 0;
}

}  // namespace

TextStream::TextStream(std::vector<std::string> stops, std::string held) : stops_(std::move(stops)), held_(std::move(held)) {
  for (const std::string& stop : stops_)
    if (stop.empty()) throw ValueError("generation: a stop string is empty", {{"try", "leave it out"}});
  cut_at_stop(0);  // the other stream may have had other stop strings
}

// Ends the stream before the stop string whose last byte comes first, and after the `searched` bytes, which hold no whole one.
void TextStream::cut_at_stop(std::size_t searched) {
  std::size_t first_end = std::string::npos, start = 0;
  for (const std::string& stop : stops_) {
    const std::size_t found = held_.find(stop, searched - std::min(searched, stop.size() - 1));
    if (found == std::string::npos) continue;
    const std::size_t end = found + stop.size();
    if (end < first_end || (end == first_end && found < start)) first_end = end, start = found;
  }
  if (first_end == std::string::npos) return;
  stopped_ = true;
  held_.resize(start);
}

std::string TextStream::push(std::string_view bytes) {
  if (stopped_) return {};
  const std::size_t before = held_.size();
  held_ += bytes;
  cut_at_stop(before);
  if (stopped_) return finish();
  const std::size_t sure = certain();
  const std::string text = replace_invalid_utf8(std::string_view(held_).substr(0, sure));
  held_.erase(0, sure);
  return text;
}

std::size_t TextStream::certain() const {
  std::size_t back = 0;
  for (const std::string& stop : stops_) back = std::max(back, begun(held_, stop));
  const std::string_view sure = std::string_view(held_).substr(0, held_.size() - back);
  return sure.size() - unfinished_character(sure);
}

std::string TextStream::finish() {
  return replace_invalid_utf8(std::exchange(held_, {}));
}

}  // namespace longhand
