// Which sequences an evaluation scores.
#include "eval/token_sequences.h"

#include <fmt/format.h>

#include "core/error.h"
#include "core/files.h"
#include "data/tokenizer.h"
#include "tests/support/check.h"

using namespace longhand;
using longhand::test::ScratchFolder;

namespace {

// Documents "aaa..", "bbbb..", .. of the given numbers of bytes: with the byte tokenizer one token more each, the end-of-text.
std::string shard_of(const ScratchFolder& scratch, const std::vector<std::size_t>& lengths) {
  std::string text;
  for (std::size_t i = 0; i < lengths.size(); ++i)
    text += fmt::format("{{\"text\": \"{}\"}}\n", std::string(lengths[i], static_cast<char>('a' + i)));
  const std::string path = scratch.file("shard.jsonl");
  write_file_atomically(path, text);
  return path;
}

std::shared_ptr<const Tokenizer> bytes_tokenizer() {
  return open_tokenizer("bytes");
}

DocumentSequences open(const std::string& file, int64_t context, SequenceChoice choice, int64_t limit = 0) {
  SourceOptions source;
  source.files = {file};
  source.threads = 0;
  return DocumentSequences(source, bytes_tokenizer(), {.context = context, .choice = choice, .max_sequences = limit});
}

// First token and number of tokens of each sequence.
std::vector<std::pair<char, std::size_t>> all_of(DocumentSequences sequences) {
  std::vector<std::pair<char, std::size_t>> found;
  for (std::vector<int32_t> tokens; sequences.next(tokens);) found.emplace_back(static_cast<char>(tokens[0]), tokens.size());
  CHECK(sequences.sequences() == static_cast<int64_t>(found.size()));
  return found;
}

using Found = std::vector<std::pair<char, std::size_t>>;

}  // namespace

TEST("documents of at least context + 1 tokens, cut to that; with a limit the first or the longest") {
  const ScratchFolder scratch;
  const std::string file = shard_of(scratch, {10, 30, 9, 8, 20, 40});  // a .. f, tokens 11 31 10 9 21 41
  CHECK(all_of(open(file, 9, SequenceChoice::min_length)) == Found{{'a', 10}, {'b', 10}, {'c', 10}, {'e', 10}, {'f', 10}});
  CHECK(all_of(open(file, 9, SequenceChoice::longest_first)) == Found{{'a', 10}, {'b', 10}, {'c', 10}, {'e', 10}, {'f', 10}});
  CHECK(all_of(open(file, 9, SequenceChoice::min_length, 2)) == Found{{'a', 10}, {'b', 10}});
  CHECK(all_of(open(file, 9, SequenceChoice::longest_first, 2)) == Found{{'b', 10}, {'f', 10}});
}

TEST("all documents count to their ends, the end-of-text being the last target") {
  const ScratchFolder scratch;
  auto sequences = open(shard_of(scratch, {3, 0, 30}), 9, SequenceChoice::all);  // the empty document has nothing to predict
  std::vector<int32_t> tokens;
  REQUIRE(sequences.next(tokens));
  CHECK(tokens == std::vector<int32_t>{'a', 'a', 'a', bytes_tokenizer()->end_of_text()});
  REQUIRE(sequences.next(tokens));
  CHECK(tokens == std::vector<int32_t>(10, 'c'));
  CHECK(!sequences.next(tokens));
}

TEST("packed sequences follow each other, sharing the token that is the target of one and the input of the next") {
  const ScratchFolder scratch;
  auto sequences = open(shard_of(scratch, {3, 5, 2}), 4, SequenceChoice::packed);
  const int32_t end = bytes_tokenizer()->end_of_text();
  std::vector<int32_t> tokens;
  REQUIRE(sequences.next(tokens));
  CHECK(tokens == std::vector<int32_t>{'a', 'a', 'a', end, 'b'});
  REQUIRE(sequences.next(tokens));
  CHECK(tokens == std::vector<int32_t>{'b', 'b', 'b', 'b', 'b'});
  REQUIRE(sequences.next(tokens));
  CHECK(tokens == std::vector<int32_t>{'b', end, 'c', 'c', end});
  CHECK(!sequences.next(tokens));
}

TEST("no sequence is an error that names the longest document and the ways out") {
  const ScratchFolder scratch;
  const std::string file = shard_of(scratch, {10, 30, 9});
  for (const SequenceChoice choice : {SequenceChoice::min_length, SequenceChoice::longest_first, SequenceChoice::packed}) {
    for (const int64_t limit : {0, 3}) {
      auto sequences = open(file, 1000, choice, limit);
      std::vector<int32_t> tokens;
      std::string message;
      try {
        sequences.next(tokens);
      } catch (const ValueError& error) {
        message = error.what();
      }
      CHECK(message.find(choice == SequenceChoice::packed ? "52 tokens in all" : "31 tokens with end-of-text, shard.jsonl line 2") !=
            std::string::npos);
      CHECK(message.find(choice == SequenceChoice::packed ? "--context 51" : "--context 30") != std::string::npos);
    }
  }
}

TEST("bad lines are counted once, also where the data are read twice") {
  const ScratchFolder scratch;
  const std::string file = shard_of(scratch, {10, 30, 9, 40});
  write_file_atomically(file, "{\"text\": 3}\nnot JSON\n" + read_text_file(file));
  for (const auto& [choice, limit] :
       {std::pair{SequenceChoice::longest_first, 1}, {SequenceChoice::longest_first, 0}, {SequenceChoice::all, 0}}) {
    BadLines bad_lines;
    SourceOptions source;
    source.files = {file};
    source.threads = 0;
    source.skip_bad_lines = &bad_lines;
    DocumentSequences sequences(source, bytes_tokenizer(), {.context = 9, .choice = choice, .max_sequences = limit});
    for (std::vector<int32_t> tokens; sequences.next(tokens);) {
    }
    CHECK(bad_lines.count() == 2);
  }
}

TEST("choices have names") {
  for (const char* name : {"long-first", "min-length", "all", "packed"}) CHECK(name_of(parse_sequence_choice(name)) == std::string(name));
  CHECK_THROWS_AS(parse_sequence_choice("longest"), ConfigError);
}
