// `longhand tokenize --tokenizer FILE [--jsonl]`: text on stdin to token ids on stdout.
#pragma once
#include <iosfwd>
#include <string>

namespace longhand {

struct TokenizeOptions {
  std::string tokenizer;      // "bytes" or the path of a tokenizer.json
  bool jsonl = false;         // stdin is one {"text": ...} object a line; otherwise all of stdin is one text
  bool parse_special = true;  // "<|endoftext|>" in the text becomes its id, as the field's libraries do when asked to encode a text
};

/// Writes the ids of each text from stdin to stdout as one JSON array a line. Lines of white space alone are passed over.
/// returns  0
/// errors   FileError for a line that is not a JSON object with a string "text" (line number and byte offset), or when stdout fails;
///          ValueError for text that is not UTF-8
int run_tokenize(const TokenizeOptions& options);

/// The same between any two streams.
void tokenize_stream(const TokenizeOptions& options, std::istream& in, std::ostream& out);

}  // namespace longhand
