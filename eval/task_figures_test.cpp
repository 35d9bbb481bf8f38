// Figures of tasks: results with the same settings share one, others do not, and what cannot be read is said.
#include "eval/task_figures.h"

#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "tests/support/check.h"

namespace longhand {
namespace {

using test::ScratchFolder;

RunData run_with(const ScratchFolder& scratch, const std::string& name, const std::string& file, const std::string& csv,
                 const std::string& json) {
  RunData run;
  run.name = name;
  run.folder = scratch.file(name);
  std::filesystem::create_directories(run.folder + "/eval");
  std::ofstream(run.folder + "/eval/" + file + ".csv") << csv;
  std::ofstream(run.folder + "/eval/" + file + ".json") << json;
  return run;
}

constexpr const char* kPasskeyCsv = "length,depth,samples,accuracy\n2048,0.1,50,0.5\n2048,0.9,50,1\n4096,0.1,50,0\n4096,0.9,50,0.25\n";

TEST("task figures: passkey of two runs is one heat map, a row for each run and depth") {
  const ScratchFolder scratch;
  std::vector<RunData> runs{run_with(scratch, "a", "passkey-x", kPasskeyCsv, R"({"digits": 5, "step": 10, "weights": "1"})"),
                            run_with(scratch, "b", "passkey-y", kPasskeyCsv, R"({"digits": 5, "step": 20, "weights": "2"})"),
                            run_with(scratch, "c", "passkey-z", kPasskeyCsv, R"({"digits": 0})")};
  for (RunData& run : runs) read_task_results(run);
  std::vector<Figure> figures;
  add_passkey_figures(runs, figures);
  REQUIRE(figures.size() == 2);
  const Figure& shared = figures[figures[0].table.rows.size() == 4 ? 0 : 1];
  CHECK(shared.table.header == std::vector<std::string>{"depth", "2,048", "4,096"});
  REQUIRE(shared.table.rows.size() == 4);
  CHECK(shared.table.rows[0] == std::vector<std::string>{"a, depth 0.1", "50.0%", "0.0%"});
  CHECK(shared.table.rows[3] == std::vector<std::string>{"b, depth 0.9", "100.0%", "25.0%"});
  CHECK(shared.caption.find("50 samples in each cell") != std::string::npos);
}

TEST("task figures: copying and babilong, and several steps of a run") {
  const ScratchFolder scratch;
  const std::string csv = "length,samples,string_accuracy,character_accuracy\n40,8,0.5,0.9\n50,8,0,0.3\n";
  RunData run = run_with(scratch, "a", "copy-1", csv, R"({"variant": "copy", "step": 1})");
  run_with(scratch, "a", "copy-2", csv, R"({"variant": "copy", "step": 2})");
  run_with(scratch, "a", "babilong-1", "task,length,samples,accuracy\nqa1,0,4,0.75\nqa1,4000,4,0.5\n", "{}");
  run_with(scratch, "a", "copy-3", "length,samples\n1,2\n", "{}");
  read_task_results(run);
  CHECK(run.problems.size() == 1);
  std::vector<Figure> figures;
  add_copy_figures({run}, figures);
  REQUIRE(figures.size() == 1);
  CHECK(figures[0].table.header[1] == "a, step 1: characters");
  CHECK(figures[0].table.rows[1] == std::vector<std::string>{"50", "30.0%", "0.0%", "30.0%", "0.0%"});
  add_babilong_figures({run}, figures);
  REQUIRE(figures.size() == 2);
  CHECK(figures[1].table.rows[0] == std::vector<std::string>{"qa1", "75.0%", "50.0%"});
  std::vector<Figure> none;
  add_passkey_figures({run}, none);
  CHECK(none.empty());
}

TEST("task figures: LAMBADA and multiple choice are tables, a row for each run, one for each data") {
  const ScratchFolder scratch;
  constexpr const char* kLambadaCsv = "samples,accuracy,perplexity\n5153,0.0041,44012.4\n";
  constexpr const char* kChoicesHeader = "questions,labelled,accuracy,accuracy_per_character,accuracy_per_token,greedy\n";
  std::vector<RunData> runs{
      run_with(scratch, "a", "lambada-x", kLambadaCsv, R"({"data": "11", "data_file": "/d/lambada_test.jsonl", "weights": "1"})"),
      run_with(scratch, "b", "lambada-x", "samples,accuracy,perplexity\n5153,0.5,10\n", R"({"data": "11", "weights": "2"})"),
      run_with(scratch, "c", "lambada-x", kLambadaCsv, R"({"data": "12"})"),
      run_with(scratch, "d", "choices-piqa", kChoicesHeader + std::string("7,4,0.75,0.5,0.25,0\n"),
               R"({"data": "3", "data_file": "piqa.jsonl"})"),
      run_with(scratch, "e", "choices-mine", kChoicesHeader + std::string("7,0,nan,nan,nan,nan\n"), R"({"data": "4"})"),
      run_with(scratch, "f", "choices-mine", kChoicesHeader + std::string("7,2,nan,nan,nan,nan\n"), R"({"data": "5"})")};
  for (RunData& run : runs) read_task_results(run);
  CHECK(runs[5].problems.size() == 1);
  std::vector<Figure> lambada, choices;
  add_lambada_tables(runs, lambada);
  add_choices_tables(runs, choices);
  REQUIRE(lambada.size() == 2);
  const Figure& both = lambada[lambada[0].table.rows.size() == 2 ? 0 : 1];
  CHECK(both.title == "LAMBADA: lambada_test.jsonl");
  CHECK(both.svg.empty());
  CHECK(both.table.header == std::vector<std::string>{"Run", "Passages", "Accuracy", "Perplexity"});
  REQUIRE(both.table.rows.size() == 2);
  CHECK(both.table.rows[0] == std::vector<std::string>{"a", "5,153", "0.41%", "44,012"});
  CHECK(both.table.rows[1] == std::vector<std::string>{"b", "5,153", "50.00%", "10"});
  REQUIRE(choices.size() == 2);
  const Figure& piqa = choices[choices[0].title == "Multiple choice: piqa.jsonl" ? 0 : 1];
  CHECK(piqa.table.rows[0] == std::vector<std::string>{"d", "7", "4", "75.0%", "50.0%", "25.0%", "0.0%"});
  const Figure& mine = choices[&piqa == &choices[0] ? 1 : 0];
  CHECK(mine.table.rows[0] == std::vector<std::string>{"e", "7", "0", "–", "–", "–", "–"});
  const std::string page = report_html(runs, "today");
  CHECK(page.find("<h2>LAMBADA: lambada_test.jsonl</h2>") != std::string::npos);
  CHECK(page.find("<div class=\"box\"></div>") == std::string::npos);
}

TEST("task figures: other books, another tokenizer or other prompts are no comparison, and captions say the unit") {
  const ScratchFolder scratch;
  const std::string csv = "task,length,samples,accuracy\nqa1,4000,4,0.5\n";
  std::vector<RunData> runs{run_with(scratch, "a", "babilong-x", csv, R"({"books": "1", "tokenizer": "x", "prompts": "0"})"),
                            run_with(scratch, "b", "babilong-x", csv, R"({"books": "2", "tokenizer": "x", "prompts": "0"})"),
                            run_with(scratch, "c", "babilong-x", csv, R"({"books": "1", "tokenizer": "y", "prompts": "0"})"),
                            run_with(scratch, "d", "babilong-x", csv, R"({"books": "1", "tokenizer": "x", "prompts": "1"})"),
                            run_with(scratch, "e", "babilong-x", csv, R"({"books": "1", "tokenizer": "x", "prompts": "0"})"),
                            run_with(scratch, "f", "passkey-x", kPasskeyCsv, R"({"unit": "tokens"})"),
                            run_with(scratch, "g", "passkey-x", kPasskeyCsv, R"({"unit": "characters"})")};
  for (RunData& run : runs) read_task_results(run);
  std::vector<Figure> babilong, passkey;
  add_babilong_figures(runs, babilong);
  add_passkey_figures(runs, passkey);
  CHECK(babilong.size() == 4);
  CHECK(babilong[0].svg.find("length in tokens") != std::string::npos);
  REQUIRE(passkey.size() == 2);
  const Figure& tokens = passkey[passkey[0].title.ends_with("f") ? 0 : 1];
  const Figure& characters = passkey[passkey[0].title.ends_with("f") ? 1 : 0];
  CHECK(tokens.caption.find("by tokens of the prompt and depth") != std::string::npos);
  CHECK(tokens.svg.find("length in tokens") != std::string::npos);
  CHECK(characters.caption.find("by characters of the filler and depth") != std::string::npos);
  CHECK(characters.svg.find("length in characters") != std::string::npos);
}

TEST("task figures: lengths are written as the task counts them") {
  const ScratchFolder scratch;
  std::vector<RunData> runs{
      run_with(scratch, "a", "babilong-x", "task,length,samples,accuracy\nqa1,0,10,1\nqa1,64000,10,1\nqa1,128000,10,1\nqa1,1000000,10,1\n",
               "{}"),
      run_with(scratch, "b", "passkey-x", "length,depth,samples,accuracy\n128000,0.5,10,1\n131072,0.5,10,1\n", R"({"unit": "tokens"})"),
      run_with(scratch, "c", "passkey-x", "length,depth,samples,accuracy\n128000,0.5,10,1\n", R"({"unit": "characters"})")};
  for (RunData& run : runs) read_task_results(run);
  std::vector<Figure> babilong, passkey;
  add_babilong_figures(runs, babilong);
  add_passkey_figures(runs, passkey);
  REQUIRE(babilong.size() == 1);
  REQUIRE(passkey.size() == 2);
  for (const char* text : {">0<", ">64k<", ">128k<", ">1M<"}) CHECK_MESSAGE(babilong[0].svg.find(text) != std::string::npos, text);
  const std::string both = passkey[0].svg + passkey[1].svg;
  CHECK(both.find(">125k<") != std::string::npos);  // 128,000 tokens, k being 1,024
  const auto first = both.find(">128k<");           // 131,072 tokens, and 128,000 characters
  REQUIRE(first != std::string::npos);
  CHECK(both.find(">128k<", first + 1) != std::string::npos);
}

TEST("task figures: titles name the settings in which the figures of a task differ, and no others") {
  const ScratchFolder scratch;
  const auto titles = [&](const char* task, const std::string& csv, const std::vector<std::string>& settings, auto add) {
    RunData run;
    for (std::size_t i = 0; i < settings.size(); ++i) run = run_with(scratch, "a", fmt::format("{}-{}", task, i), csv, settings[i]);
    read_task_results(run);
    std::filesystem::remove_all(run.folder);
    std::vector<Figure> figures;
    add({run}, figures);
    std::set<std::string> out;
    for (const Figure& figure : figures) out.insert(figure.title);
    return out;
  };
  using Titles = std::set<std::string>;
  const std::string copy = "length,samples,string_accuracy,character_accuracy\n40,8,0.5,0.9\n";
  CHECK(titles("copy", copy,
               {R"({"variant": "copy", "ngram": 3, "seed": 0, "lengths": [40, 50]})",
                R"({"variant": "prefix-ngram", "ngram": 3, "seed": 0, "lengths": [40, 50]})",
                R"({"variant": "prefix-ngram", "ngram": 4, "seed": 0, "lengths": [1, 2, 3, 4, 5, 6, 7]})"},
               add_copy_figures) == Titles{"Synthetic copying by length, lengths 40, 50, variant copy, ngram 3: a",
                                           "Synthetic copying by length, lengths 40, 50, variant prefix-ngram, ngram 3: a",
                                           "Synthetic copying by length, lengths 1 to 7, variant prefix-ngram, ngram 4: a"});
  CHECK(titles("copy", copy, {R"({"variant": "copy"})"}, add_copy_figures) == Titles{"Synthetic copying by length: a"});
  CHECK(titles("passkey", kPasskeyCsv,
               {R"({"digits": 5, "seed": 1, "depths": ["0.1", "0.9", "0.1", "0.9"]})",
                R"({"digits": 0, "seed": 1, "depths": ["0.1", "0.9", "0.1", "0.9"]})",
                R"({"digits": 0, "seed": 1, "depths": ["any", "any"]})"},
               add_passkey_figures) == Titles{"Passkey retrieval, depths 0.1, 0.9, digits 5: a",
                                              "Passkey retrieval, depths 0.1, 0.9, digits 0: a",
                                              "Passkey retrieval, depths any, digits 0: a"});
  const std::string babilong = "task,length,samples,accuracy\nqa1,4000,4,0.5\n";
  CHECK(
      titles("babilong", babilong,
             {R"({"books": "1-a", "prompts": "x", "facts_to": 1.0, "book_files": ["p/old.jsonl"], "prompts_file": ""})",
              R"({"books": "2-b", "prompts": "y", "facts_to": 1.0, "book_files": ["p/new.jsonl", "q.zst"], "prompts_file": "d/few.json"})",
              R"({"books": "2-b", "prompts": "y", "facts_to": 0.5, "book_files": ["p/new.jsonl", "q.zst"], "prompts_file": "d/few.json"})"},
             add_babilong_figures) == Titles{"BABILong, prompts none, books old.jsonl, facts to 1.0: a",
                                             "BABILong, prompts few.json, books new.jsonl q.zst, facts to 1.0: a",
                                             "BABILong, prompts few.json, books new.jsonl q.zst, facts to 0.5: a"});
  // The same names of other files are told apart by a hash.
  const Titles same =
      titles("babilong", babilong, {R"({"books": "1-a", "book_files": ["x.jsonl"]})", R"({"books": "2-b", "book_files": ["x.jsonl"]})"},
             add_babilong_figures);
  REQUIRE(same.size() == 2);
  for (const std::string& title : same) CHECK_MESSAGE(title.starts_with("BABILong, books x.jsonl ("), title);
  const std::string choices = "questions,labelled,accuracy,accuracy_per_character,accuracy_per_token,greedy\n7,4,0.75,0.5,0.25,0\n";
  const Titles delimiters = titles(
      "choices", choices,
      {R"({"data": "1", "data_file": "piqa.jsonl", "delimiter": " "})", R"({"data": "2", "data_file": "piqa.jsonl", "delimiter": "\n"})"},
      add_choices_tables);
  REQUIRE(delimiters.size() == 2);
  for (const std::string& title : delimiters) {
    CHECK_MESSAGE(title.starts_with("Multiple choice: piqa.jsonl, data "), title);
    CHECK_MESSAGE(title.find("piqa", 20) == std::string::npos, title);
    CHECK_MESSAGE((title.ends_with(R"(, delimiter " ")") || title.ends_with(R"(, delimiter "\n")")), title);
  }
  CHECK(titles("choices", choices,
               {R"({"data": "1", "data_file": "piqa.jsonl", "delimiter": " "})",
                R"({"data": "2", "data_file": "arc.jsonl", "delimiter": " "})"},
               add_choices_tables) == Titles{"Multiple choice: piqa.jsonl", "Multiple choice: arc.jsonl"});
}

}  // namespace
}  // namespace longhand
