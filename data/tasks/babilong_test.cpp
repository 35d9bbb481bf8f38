// bAbI stories, sentences, and BABILong samples made of both.
#include "data/tasks/babilong.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <set>

#include "core/error.h"
#include "data/tasks/continuation.h"
#include "data/tasks/draws.h"
#include "data/tasks/sentences.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

using Texts = std::vector<std::string>;
using test::folder_from;
using test::ScratchFolder;

std::string write(const ScratchFolder& scratch, const std::string& name, const std::string& text) {
  std::ofstream(scratch.file(name), std::ios::binary) << text;
  return scratch.file(name);
}

TEST("babi: one sample for each question, with the facts before it") {
  const ScratchFolder scratch;
  const std::string path =
      write(scratch, "qa1_x_test.txt",
            "1 John went to the hall.\n2 Mary left.\n3 Where is John? \thall\t1\n4 John ran.\n5 Who? \tJohn,Mary\t4 2\n"
            "1 A b.\r\n2 C? \td\t1\r\n");
  const auto samples = read_babi(path);
  REQUIRE(samples.size() == 3);
  CHECK(samples[0].facts == Texts{"John went to the hall.", "Mary left."});
  CHECK(samples[0].question == "Where is John?");
  CHECK(samples[0].answer == "hall");
  CHECK(samples[0].supporting == std::vector<int64_t>{0});
  CHECK(samples[1].facts == Texts{"John went to the hall.", "Mary left.", "John ran."});
  CHECK(samples[1].answer == "John,Mary");
  CHECK(samples[1].supporting == std::vector<int64_t>{2, 1});  // line 4 is the third fact
  CHECK(samples[2].facts == Texts{"A b."});
  CHECK(samples[2].answer == "d");
  CHECK(read_babi(path, 3).size() == 2);
  CHECK(babi_task_of(path) == "qa1");
  CHECK(babi_task_of("a/qa20_agents.txt") == "qa20");
  CHECK_THROWS_AS(babi_task_of("stories.txt"), ConfigError);
}

TEST("babi: a line that is none of a story is named") {
  const ScratchFolder scratch;
  for (const char* text : {"1 a\n3 b\n", "x\n", "1 a\n2 b? c\td\n", "1 a\n2 b? \tc\t2\n", "1 a\n2 b? \tc\tx\n", "1\n",
                           "1 a\n2 b\n1 c\n2 d? \te\t2\n", "1 a\n2 ? \t\t1\n", "1a\n2 b? \tc\t1\n"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(read_babi(write(scratch, "bad.txt", text)), FileError);
  }
}

TEST("babi: the published files") {
  const auto folder = folder_from("LONGHAND_DATA");
  if (!folder) SKIP("LONGHAND_DATA is not set");
  struct Case {
    const char* file;
    std::size_t least, most;  // facts
    std::set<std::string> labels;
  };
  const std::set<std::string> places{"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"};
  for (const Case& c : {Case{"qa1_single-supporting-fact_test.txt", 2, 10, places},
                        Case{"qa2_two-supporting-facts_test.txt", 2, 88, places}, Case{"qa4_two-arg-relations_test.txt", 2, 2, places},
                        Case{"qa5_three-arg-relations_test.txt", 2, 126, {"Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"}}}) {
    CAPTURE(c.file);
    const auto samples = read_babi(*folder + "/babi/" + c.file);
    CHECK(samples.size() == 1000);
    std::set<std::string> labels;
    for (const BabiSample& s : samples) {
      CHECK(s.facts.size() >= c.least);
      CHECK(s.facts.size() <= c.most);
      labels.insert(s.answer);
    }
    CHECK(labels == c.labels);
  }
  CHECK(read_babi(*folder + "/babi/qa1_single-supporting-fact_train.txt.zst").size() == 10000);
}

TEST("sentences: marks, quotes, abbreviations, initials, paragraphs") {
  CHECK(split_sentences("One two. Three!  \"Four?\" Five\nsix.") == Texts{"One two.", "Three!", "\"Four?\"", "Five six."});
  CHECK(split_sentences("Mr. A. B. Smith came. He left.") == Texts{"Mr. A. B. Smith came.", "He left."});
  CHECK(split_sentences("It cost 3.50 dollars. and more? yes.") == Texts{"It cost 3.50 dollars. and more? yes."});
  CHECK(split_sentences("CHAPTER I\n \nIt was I. Then") == Texts{"CHAPTER I", "It was I.", "Then"});
  CHECK(split_sentences("He said \xE2\x80\x9CGo.\xE2\x80\x9D She went (home.) Now") ==
        Texts{"He said \xE2\x80\x9CGo.\xE2\x80\x9D", "She went (home.)", "Now"});
  CHECK(split_sentences(" \n \n").empty());
  CHECK(split_sentences("No end") == Texts{"No end"});
}

// A book whose sentences are all "s NNNN words words." in order.
Background numbered_book(int sentences) {
  std::string book;
  for (int i = 1000; i < 1000 + sentences; ++i) book += "Sentence " + std::to_string(i) + " of the book. ";
  return Background({book});
}

const BabiSample kStory{{"Ann went to the barn.", "Bob left."}, "Where is Ann?", "barn", {0}};

TEST("babilong: length 0 is the facts alone") {
  const auto bytes = open_tokenizer("bytes");
  CHECK(babilong_text(kStory, {}, {.length = 0}, *bytes, 1) == "Ann went to the barn. Bob left.");
  CHECK_THROWS_AS(babilong_text(kStory, {}, {.length = 1000}, *bytes, 1), ValueError);
  CHECK(most_babi_lines(0) == 0);
  CHECK(most_babi_lines(1000) == 87);
  CHECK(most_babi_lines(4000) == 462);
}

TEST("babilong: the tokens are length - 300, facts keep their order, sentences are whole but the last") {
  const auto bytes = open_tokenizer("bytes");
  const Background book = numbered_book(3000);
  std::set<std::size_t> places;
  for (uint64_t key = 0; key < 50; ++key) {
    const std::string text = babilong_text(kStory, book, {.length = 1500}, *bytes, key);
    CHECK(text.size() + 1 >= 1200 - 1);  // the first blank is taken off, and perhaps one where the last sentence is cut
    CHECK(text.size() + 1 <= 1200);
    const auto first = text.find("Ann went to the barn."), second = text.find("Bob left.");
    REQUIRE(second != std::string::npos);
    CHECK(first < second);
    places.insert(first);
    std::string rest = text;
    rest.erase(second, 10), rest.erase(first, 22);
    CHECK(rest.starts_with("Sentence "));
    for (std::size_t at = 0; at + 27 <= rest.size() - 27; at += 27) CHECK(rest.substr(at, 9) == "Sentence ");
    CHECK(text == babilong_text(kStory, book, {.length = 1500}, *bytes, key));
  }
  CHECK(places.size() > 15);
  CHECK(babilong_text(kStory, book, {.length = 1500}, *bytes, 7).find("Ann went to the barn.") == 81);  // in every version
  CHECK(babilong_text(kStory, book, {.length = 200}, *bytes, 0) == "Ann went to the barn. Bob left.");
}

TEST("babilong: facts stay in their range, and a text longer than the book goes on in other windows") {
  const auto bytes = open_tokenizer("bytes");
  const Background book = numbered_book(300);
  for (uint64_t key = 0; key < 20; ++key) {
    const std::string text = babilong_text(kStory, book, {.length = 30300, .facts_from = 0.5, .facts_to = 0.75}, *bytes, key);
    CHECK(text.size() > 29990);
    for (const char* fact : {"Ann went", "Bob left"}) {
      const double share = static_cast<double>(text.find(fact)) / 30000;
      CHECK(share > 0.49);
      CHECK(share < 0.76);
    }
  }
  CHECK_THROWS_AS(babilong_text(kStory, book, {.length = 1500, .facts_from = 0.99}, *bytes, 0), ValueError);
  CHECK_THROWS_AS(babilong_text(kStory, Background({"Too. Short. All. Of. It. Is. "}), {.length = 1500}, *bytes, 0), ValueError);
}

TEST("babilong: sentences of 10 tokens are taken, those of 9 are not") {
  const auto bytes = open_tokenizer("bytes");
  std::string book;
  for (int i = 0; i < 4000; ++i) book += i % 2 == 0 ? "Eight b. " : "Nine byte. ";  // 9 and 11 tokens with the blank before them
  const std::string text = babilong_text(kStory, Background({book}), {.length = 1500}, *bytes, 1);
  CHECK(text.find("Nine byte.") != std::string::npos);
  CHECK(text.find("Eight") == std::string::npos);
  std::string ten;
  for (int i = 0; i < 4000; ++i) ten += "Nine byt. ";  // 10 with it
  CHECK_NOTHROW(babilong_text(kStory, Background({ten}), {.length = 1500}, *bytes, 1));
}

TEST("babilong: gaps are uniform, with replacement, from before the first sentence to behind the last") {
  const auto bytes = open_tokenizer("bytes");
  const Background book = numbered_book(3000);
  constexpr int kDraws = 2000;
  std::map<std::size_t, int> seen;  // gaps of the first fact of one
  int together = 0;
  const BabiSample one{{"Ann went to the barn."}, "Where is Ann?", "barn", {0}};
  for (uint64_t key = 0; key < kDraws; ++key) {
    const std::string text = babilong_text(one, book, {.length = 300 + 22 + 9 * 27}, *bytes, key);  // 9 sentences of 27 tokens: 10 gaps
    const auto at = text.find("Ann went");
    ++seen[at / 27];
    const std::string two = babilong_text(kStory, book, {.length = 300 + 32 + 9 * 27}, *bytes, key);
    together += two.find("Ann went to the barn. Bob left.") != std::string::npos ? 1 : 0;
  }
  CHECK(seen.size() == 10);
  for (const auto& [gap, n] : seen) CHECK_MESSAGE(std::abs(n - kDraws / 10) < 70, gap);  // deviation 13
  CHECK(std::abs(together - kDraws / 10) < 70);                                          // of two facts one time in ten the same gap
}

TEST("babilong: lines that a story may have at a length, at least a fact and a question") {
  CHECK(most_babi_lines(316) == 2);
  CHECK(most_babi_lines(301) == 2);
  CHECK(most_babi_lines(324) == 3);
  CHECK(most_babi_lines(331) == 3);
  CHECK(most_babi_lines(332) == 4);
}

TEST("babilong: other books have another fingerprint, wherever they differ") {
  const std::string book(5000, 'a');
  std::string other = book;
  other[2500] = 'b';
  const std::set<std::string> all{Background().fingerprint(), Background({book}).fingerprint(), Background({other}).fingerprint(),
                                  Background({book, book}).fingerprint(), Background({book + book}).fingerprint()};
  CHECK(all.size() == 5);
}

TEST("babilong: the prompt's layout") {
  CHECK(babilong_prompt({}, " text \n", "Who?") == "<context>\ntext\n</context>\n\nQuestion: Who?");
  const ScratchFolder scratch;
  const std::string path =
      write(scratch, "p.json", R"({"qa1": {"instruction": "Do.", "examples": ["A?\nAnswer: b", "C"], "post_prompt": "So."}, "qa2": {}})");
  const auto prompts = read_babilong_prompts(path);
  CHECK(babilong_prompt(prompts.at("qa1"), "text", "Who?") ==
        "Do.\n\n<example>\nA?\nAnswer: b\n</example>\n\n<example>\nC\n</example>\n\nSo.\n\n<context>\ntext\n</context>\n\nQuestion: Who?");
  CHECK(prompts.at("qa2").examples.empty());
  CHECK_THROWS_AS(read_babilong_prompts(write(scratch, "q.json", R"({"qa1": {"instructions": "Do."}})")), FileError);
  CHECK_THROWS_AS(read_babilong_prompts(write(scratch, "q.json", R"({"qa1": {"examples": [1]}})")), FileError);
}

TEST("babilong: books of a real shard, a real story, real tokens") {
  const auto folder = folder_from("LONGHAND_DATA");
  if (!folder) SKIP("LONGHAND_DATA is not set");
  const Background books(BackgroundOptions{.files = {*folder + "/minipile/val.jsonl.zst"}, .set_name = "Gutenberg (PG-19)"});
  CHECK(books.books() == 7);
  const auto bpe = open_tokenizer(*folder + "/tokenizer/20B_tokenizer.json");
  const auto stories = read_babi(*folder + "/babi/qa1_single-supporting-fact_test.txt", most_babi_lines(16000));
  const std::string text = babilong_text(stories[0], books, {.length = 16000}, *bpe, 5);
  const auto tokens = std::ssize(encoded(*bpe, " " + text));
  CHECK(tokens > 15600);  // cut sentences and joints may tokenize otherwise as a whole
  CHECK(tokens < 15800);
  for (const std::string& fact : stories[0].facts) CHECK(text.find(fact) != std::string::npos);
  CHECK_THROWS_AS(Background(BackgroundOptions{.files = {*folder + "/minipile/val.jsonl.zst"}, .set_name = "none"}), FileError);
}

}  // namespace
}  // namespace longhand
