// Text to ids on the command line; see tokenize_command.h.
#include "tools/tokenize_command.h"

#include <cstdint>
#include <iostream>
#include <iterator>
#include <utility>
#include <vector>

#include "core/error.h"
#include "data/json_line.h"
#include "data/tokenizer.h"

namespace longhand {
namespace {

// The "text" of one line of JSON lines. `offset` is the byte at which the line starts.
std::string text_of_line(const std::string& line, std::size_t number, std::size_t offset) {
  JsonLine parsed;
  if (const auto fault = parse_json_line(line, parsed))
    throw FileError("tokenize: a line is not a JSON object with a text", {{"line", std::to_string(number)},
                                                                          {"byte offset", std::to_string(offset + fault->byte)},
                                                                          {"reason", fault->rule},
                                                                          {"expected", "{\"text\": \"...\"}"}});
  return std::move(parsed.text);
}

void write_ids(const Tokenizer& tokenizer, const std::string& text, std::vector<int32_t>& ids, std::ostream& out) {
  ids.clear();
  tokenizer.encode(text, ids);
  out << '[';
  for (std::size_t i = 0; i < ids.size(); ++i) out << (i > 0 ? "," : "") << ids[i];
  out << "]\n";
}

}  // namespace

void tokenize_stream(const TokenizeOptions& options, std::istream& in, std::ostream& out) {
  const auto tokenizer = open_tokenizer(options.tokenizer, {.parse_special = options.parse_special});
  std::vector<int32_t> ids;
  if (options.jsonl) {
    std::string line;
    std::size_t offset = 0;
    for (std::size_t number = 1; std::getline(in, line); ++number) {
      if (line.find_first_not_of(" \t\r") != std::string::npos) write_ids(*tokenizer, text_of_line(line, number, offset), ids, out);
      offset += line.size() + 1;
    }
  } else {
    const std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    write_ids(*tokenizer, text, ids, out);
  }
  if (in.bad()) throw FileError("tokenize: reading the text failed");
  out.flush();
  if (!out) throw FileError("tokenize: writing the ids failed");
}

int run_tokenize(const TokenizeOptions& options) {
  std::ios::sync_with_stdio(false);
  tokenize_stream(options, std::cin, std::cout);
  return 0;
}

}  // namespace longhand
