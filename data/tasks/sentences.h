// Text cut into sentences, by rules that can be read here.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace longhand {

/// The sentences of a text in order, each with single blanks between its words.
/// ends     behind  . ! ?  and the quotes and brackets that follow, where white space and then anything but a small letter comes; and at an
///          empty line (the end of a paragraph or heading)
/// not      behind a single capital letter ("J. Smith") or an abbreviation of the list in sentences.cpp ("Mr.", "Dr.", "etc.")
/// text     valid UTF-8; only ASCII marks end a sentence, and the quotes U+2019 and U+201D close one
std::vector<std::string> split_sentences(std::string_view text);

}  // namespace longhand
