// bAbI stories: facts, a question, its answer.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longhand {

struct BabiSample {
  std::vector<std::string> facts;  // in the order of the story
  std::string question, answer;
  std::vector<int64_t> supporting;  // facts that the answer rests on, as indices into `facts`, in the order of the file
};

/// Every question of a bAbI file (plain or zstd), each with all the facts before it in its story.
///   a line is "NUMBER TEXT"; the number is 1 at the beginning of a story; a question is "TEXT \t ANSWER \t NUMBERS of lines"
/// most_lines  samples of more lines (facts and question) are left out; 0: none is
/// errors      FileError naming file and line: no number, a number out of order, an empty text, other than two tabs, a number of a line
///             that is no fact before the question
std::vector<BabiSample> read_babi(const std::string& path, int64_t most_lines = 0);

/// "qa1" of "folder/qa1_single-supporting-fact_test.txt".
/// errors  ConfigError for a file name that does not begin with qaN_
std::string babi_task_of(const std::string& path);

}  // namespace longhand
