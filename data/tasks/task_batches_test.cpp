// Batches of tasks: worked by hand for copying, the same on any number of threads, resumed anywhere.
#include "data/tasks/task_batches.h"

#include <algorithm>
#include <fstream>
#include <set>

#include "core/error.h"
#include "data/tasks/copying.h"
#include "tests/support/check.h"

namespace longhand {
namespace {

TaskContext copy_context(int64_t row_tokens, const TaskOptions& options = {}) {
  return {.options = options, .tokenizer = open_tokenizer("letters:5"), .files = {}, .row_tokens = row_tokens};
}

BatchStream copies(const TaskBatchOptions& options, const std::optional<DataCursor>& at = {}) {
  return task_batches(options, "copy", copy_context(options.length + 1), at);
}

void expect_same(const Batch& a, const Batch& b) {
  CHECK(a.tokens == b.tokens);
  CHECK(a.targets == b.targets);
  CHECK(a.mask == b.mask);
  CHECK(a.resets == b.resets);
  CHECK(a.row_ids == b.row_ids);
  CHECK(a.cursor_after == b.cursor_after);
}

// The text of row b with its last target, and under each character whether it counts.
std::pair<std::string, std::string> row_of(const Batch& batch, int64_t b, const Tokenizer& letters) {
  std::vector<int32_t> ids(batch.row(b).begin(), batch.row(b).end());
  ids.push_back(batch.targets[static_cast<std::size_t>((b + 1) * batch.length - 1)]);
  std::string mask = "0";
  for (int64_t i = 0; i < batch.length; ++i) mask += batch.mask[static_cast<std::size_t>(b * batch.length + i)] != 0 ? '1' : '0';
  return {letters.decode(ids), mask};
}

// What counts in a row of whole copies whose last one may be cut.
std::string expected_mask(const std::string& text, bool cut_counts) {
  std::string mask;
  for (std::size_t at = 0; at < text.size();) {
    const auto end = text.find('.', at), bar = text.find('|', at);
    const bool cut = end == std::string::npos;
    const std::size_t next = cut ? text.size() : end + 1;
    for (; at < next; ++at) mask += (!cut || cut_counts) && bar != std::string::npos && at > bar ? '1' : '0';
  }
  return mask;
}

TEST("task batches: rows are whole examples one behind the other, the last one cut and not counted") {
  const auto letters = open_tokenizer("letters:5");
  BatchStream stream = copies({.rows = 3, .length = 219, .seed = 4});
  Batch batch;
  for (int64_t k = 0; k < 3; ++k) {
    REQUIRE(stream.next(batch));
    CHECK(batch.resets == std::vector<uint8_t>(3, 1));
    for (int64_t b = 0; b < 3; ++b) {
      CHECK(batch.row_ids[static_cast<std::size_t>(b)] == 3 * k + b);
      const auto [text, mask] = row_of(batch, b, *letters);
      CHECK(text.size() == 220);
      CHECK(text.front() == '$');
      CHECK(mask == expected_mask(text, false));
      CHECK(mask.find('1') != std::string::npos);
      for (int64_t i = 1; i < 219; ++i)
        CHECK(batch.tokens[static_cast<std::size_t>(b * 219 + i)] == batch.targets[static_cast<std::size_t>(b * 219 + i - 1)]);
    }
  }
}

TEST("task batches: in streams examples go on from batch to batch") {
  const auto letters = open_tokenizer("letters:5");
  BatchStream stream = copies({.arrangement = Arrangement::streams, .rows = 2, .length = 120, .seed = 4});
  std::string text, mask;
  Batch batch;
  for (int k = 0; k < 6; ++k) {
    REQUIRE(stream.next(batch));
    CHECK(batch.resets == std::vector<uint8_t>(2, k == 0 ? 1 : 0));
    const auto [part, counts] = row_of(batch, 1, *letters);
    if (k > 0) CHECK(text.back() == part.front());
    text += part.substr(k == 0 ? 0 : 1);
    mask += counts.substr(k == 0 ? 0 : 1);
  }
  CHECK(text.size() == 721);
  CHECK(mask == expected_mask(text, true));
}

TEST("task batches: the same for any number of threads, and resumed after any batch") {
  for (const Arrangement arrangement : {Arrangement::packed, Arrangement::streams}) {
    const TaskBatchOptions options{.arrangement = arrangement, .rows = 5, .length = 150, .seed = 9, .threads = 0};
    std::vector<Batch> whole(6);
    BatchStream stream = copies(options);
    for (Batch& batch : whole) stream.next(batch);
    for (const int threads : {1, 4}) {
      TaskBatchOptions other = options;
      other.threads = threads;
      BatchStream again = copies(other);
      Batch batch;
      for (const Batch& expected : whole) {
        again.next(batch);
        expect_same(batch, expected);
      }
      for (std::size_t k = 0; k + 1 < whole.size(); ++k) {
        BatchStream resumed = copies(other, DataCursor::from_json(whole[k].cursor_after.to_json()));
        resumed.next(batch);
        expect_same(batch, whole[k + 1]);
      }
    }
    TaskBatchOptions other_seed = options;
    other_seed.seed = 10;
    CHECK_THROWS_AS(copies(other_seed, whole[0].cursor_after), ConfigError);
    Batch batch;
    copies(other_seed).next(batch);
    CHECK(batch.tokens != whole[0].tokens);
  }
}

TEST("task batches: passkey and babilong rows too are the same for any number of threads, and every row of its own") {
  const test::ScratchFolder scratch;
  std::ofstream(scratch.file("qa1_a.txt")) << "1 Ann ran.\n2 Where is Ann? \tbarn\t1\n3 Bob ate.\n4 Where is Bob? \thall\t3\n";
  std::string book;
  for (int i = 1000; i < 4000; ++i) book += "Sentence " + std::to_string(i) + " of the book. ";
  std::ofstream(scratch.file("books.jsonl")) << "{\"text\": \"" + book + "\"}\n";
  const TaskContext context{.options = {.digits = 5, .babi = {scratch.file("qa1_a.txt")}, .lengths = {"0k", "600"}},
                            .tokenizer = open_tokenizer("bytes"),
                            .files = {scratch.file("books.jsonl")},
                            .row_tokens = 701};
  for (const char* task : {"passkey", "babilong"}) {
    CAPTURE(task);
    const auto batches = [&](int threads, uint64_t seed) {
      BatchStream stream = task_batches({.rows = 7, .length = 700, .seed = seed, .threads = threads}, task, context);
      std::vector<Batch> out(3);
      for (Batch& batch : out) stream.next(batch);
      return out;
    };
    const std::vector<Batch> one = batches(0, 3), five = batches(5, 3), other = batches(0, 4);
    std::set<std::vector<int32_t>> rows;
    for (std::size_t k = 0; k < one.size(); ++k) {
      expect_same(one[k], five[k]);
      CHECK(one[k].tokens != other[k].tokens);
      for (int64_t b = 0; b < 7; ++b) rows.insert({one[k].row(b).begin(), one[k].row(b).end()});
    }
    CHECK(rows.size() == 21);
  }
}

TEST("task batches: a cursor with too few streams, or behind the end of its sample, is refused") {
  const TaskBatchOptions options{.arrangement = Arrangement::streams, .rows = 5, .length = 150, .seed = 9, .threads = 0};
  Batch batch;
  copies(options).next(batch);
  DataCursor short_one = batch.cursor_after, behind = batch.cursor_after;
  short_one.streams.pop_back();
  behind.streams[3].at.token = 5000;
  CHECK_THROWS_WITH_AS(copies(options, short_one), doctest::Contains("another number of streams"), FileError);
  CHECK_THROWS_WITH_AS(copies(options, behind).next(batch), doctest::Contains("is shorter now"), FileError);
}

TEST("task batches: passkey rows are filled to their last token, and the key counts") {
  const std::shared_ptr<const Tokenizer> bytes = open_tokenizer("bytes");
  TaskContext context{.options = {.digits = 5}, .tokenizer = bytes, .files = {}, .row_tokens = 401};
  BatchStream stream = task_batches({.rows = 2, .length = 400}, "passkey", context);
  Batch batch;
  stream.next(batch);
  for (std::size_t b = 0; b < 2; ++b) {
    std::vector<int32_t> answer;
    for (std::size_t i = 0; i < 400; ++i)
      if (batch.mask[b * 400 + i] != 0) answer.push_back(batch.targets[b * 400 + i]);
    REQUIRE(answer.size() == 8);  // " 12345." and the end of text
    CHECK(answer.back() == bytes->end_of_text());
    const std::string key = bytes->decode(std::span(answer).subspan(1, 5));
    CHECK(bytes->decode(batch.row(static_cast<int64_t>(b))).find("\nThe pass key is " + key + ". Remember") != std::string::npos);
    CHECK(batch.mask[b * 400 + 399] == 1);
  }
  context.row_tokens = 200;
  CHECK_THROWS_AS(make_task("passkey", context), ConfigError);
}

TEST("task batches: babilong mixes files and lengths, and no sample is longer than a row") {
  const test::ScratchFolder scratch;
  std::ofstream(scratch.file("qa1_a.txt")) << "1 Ann ran.\n2 Where is Ann? \tbarn\t1\n";
  std::ofstream(scratch.file("qa2_b.txt")) << "1 Bob ate.\n2 Who ate? \tBob\t1\n";
  std::string book;
  for (int i = 1000; i < 4000; ++i) book += "Sentence " + std::to_string(i) + " of the book. ";
  std::ofstream(scratch.file("books.jsonl")) << "{\"text\": \"" + book + "\"}\n";
  const TaskContext context{.options = {.babi = {scratch.file("qa1_a.txt"), scratch.file("qa2_b.txt")}, .lengths = {"0k", "1k"}},
                            .tokenizer = open_tokenizer("bytes"),
                            .files = {scratch.file("books.jsonl")},
                            .row_tokens = 1001};
  const auto task = make_task("babilong", context);
  int short_ones = 0, second_file = 0;
  for (uint64_t key = 0; key < 100; ++key) {
    const TaskSample s = task->sample(key);
    CHECK(std::ssize(s.tokens) <= 1001);
    short_ones += s.tokens.size() < 200 ? 1 : 0;
    const std::string text = context.tokenizer->decode(s.tokens);
    CHECK((text.ends_with("Question: Where is Ann? barn.<|endoftext|>") || text.ends_with("Question: Who ate? Bob.<|endoftext|>")));
    second_file += text.ends_with("Bob.<|endoftext|>") ? 1 : 0;
    CHECK(context.tokenizer->decode(std::span(s.tokens).subspan(static_cast<std::size_t>(s.prompt))).front() == ' ');
  }
  CHECK(std::abs(short_ones - 50) < 25);
  CHECK(std::abs(second_file - 50) < 25);
}

TEST("task batches: babilong takes its background from the set that was asked for") {
  const test::ScratchFolder scratch;
  std::ofstream(scratch.file("qa1_a.txt")) << "1 Ann ran.\n2 Where is Ann? \tbarn\t1\n";
  std::ofstream shard(scratch.file("books.jsonl"));
  for (const char* set : {"Code", "Gutenberg (PG-19)"}) {
    std::string text;
    for (int i = 1000; i < 4000; ++i) text += "Sentence " + std::to_string(i) + " of " + set + ". ";
    shard << "{\"text\": \"" + text + "\", \"meta\": {\"pile_set_name\": \"" + set + "\"}}\n";
  }
  shard.close();
  const auto task_of = [&](const char* set) {
    return make_task("babilong", {.options = {.babi = {scratch.file("qa1_a.txt")}, .lengths = {"1k"}, .book_set = set},
                                  .tokenizer = open_tokenizer("bytes"),
                                  .files = {scratch.file("books.jsonl")},
                                  .row_tokens = 1001});
  };
  const auto holds = [&](const Task& task, const char* text) {
    int n = 0;
    for (uint64_t key = 0; key < 40; ++key)
      n += open_tokenizer("bytes")->decode(task.sample(key).tokens).find(text) != std::string::npos ? 1 : 0;
    return n;
  };
  const auto any = task_of(""), gutenberg = task_of("Gutenberg (PG-19)");
  CHECK(holds(*any, "of Code.") > 5);
  CHECK(holds(*gutenberg, "of Code.") == 0);
  CHECK(holds(*gutenberg, "of Gutenberg (PG-19).") == 40);
  CHECK(any->made_with() != gutenberg->made_with());
  CHECK_THROWS_AS(task_of("Books3"), FileError);
  const TaskContext facts_alone{.options = {.babi = {scratch.file("qa1_a.txt")}, .lengths = {"0k"}, .book_set = "Code"},
                                .tokenizer = open_tokenizer("bytes"),
                                .files = {scratch.file("books.jsonl")},
                                .row_tokens = 1001};
  CHECK_THROWS_AS(make_task("babilong", facts_alone), ConfigError);  // no length looks at books
}

TEST("task batches: babilong holds stories out, and keeps the mixture of files and lengths") {
  const test::ScratchFolder scratch;
  std::string stories, longer;
  for (int i = 0; i < 40; ++i) {
    const std::string name = "N" + std::to_string(i);
    stories += "1 " + name + " ran.\n2 Where is " + name + "? \tbarn\t1\n3 " + name + " sat.\n4 Who is " + name + "? \thall\t3\n";
    const int lines = i % 10 == 0 ? 30 : 200;  // at 1k a story has at most 87 lines
    for (int k = 1; k <= lines; ++k) longer += std::to_string(k) + " L" + std::to_string(i) + ".\n";
    longer += std::to_string(lines + 1) + " Long " + name + "? \tbarn\t1\n";
  }
  std::ofstream(scratch.file("qa1_a.txt")) << stories;
  std::ofstream(scratch.file("qa3_b.txt")) << longer;
  std::string book;
  for (int i = 1000; i < 4000; ++i) book += "Sentence " + std::to_string(i) + " of the book. ";
  std::ofstream(scratch.file("books.jsonl")) << "{\"text\": \"" + book + "\"}\n";
  const auto questions = [&](const std::vector<std::string>& files, bool held_out, int samples) {
    const auto task = make_task("babilong", {.options = {.babi = files, .lengths = {"1k"}},
                                             .tokenizer = open_tokenizer("bytes"),
                                             .files = {scratch.file("books.jsonl")},
                                             .row_tokens = 1001,
                                             .held_out = held_out});
    std::multiset<std::string> asked;
    for (int key = 0; key < samples; ++key) {
      const std::string text = open_tokenizer("bytes")->decode(task->sample(static_cast<uint64_t>(key)).tokens);
      const auto at = text.find("Question: ") + 10;
      asked.insert(text.substr(at, text.find('?', at) - at));
    }
    return asked;
  };
  const auto trained = questions({scratch.file("qa1_a.txt")}, false, 800), held_out = questions({scratch.file("qa1_a.txt")}, true, 100);
  CHECK(std::set<std::string>(held_out.begin(), held_out.end()).size() == 4);  // two questions of two stories
  CHECK(std::set<std::string>(trained.begin(), trained.end()).size() == 76);
  for (const std::string& question : held_out) CHECK_FALSE(trained.contains(question));
  // Nine of ten stories of the second file do not fit at this length; it has its half of the samples all the same.
  const auto mixed = questions({scratch.file("qa1_a.txt"), scratch.file("qa3_b.txt")}, false, 200);
  CHECK(std::abs(std::count_if(mixed.begin(), mixed.end(), [](const std::string& q) { return q.starts_with("Long"); }) - 100) < 35);
  std::ofstream(scratch.file("qa3_b.txt")) << longer.substr(longer.find("\n1 L1.") + 1, longer.find("\n1 L2.") - longer.find("\n1 L1."));
  CHECK_THROWS_AS(questions({scratch.file("qa3_b.txt")}, false, 1), ConfigError);  // none fits
}

TEST("task batches: babilong never trains on a question that it validates on, however often files repeat stories") {
  const test::ScratchFolder scratch;
  // 60 different stories of one question, 100 times each, in an order that no period of 20 divides.
  std::string repeated;
  for (int i = 0; i < 6000; ++i) {
    const std::string name = "N" + std::to_string(i * 7 % 60);
    repeated += "1 " + name + " ran.\n2 Where is " + name + "? \tbarn\t1\n";
  }
  // 100 different stories of two questions, of which every ten begin alike; and 20 other stories behind all beginnings.
  std::string alike, beginnings;
  for (int i = 0; i < 100; ++i) {
    const std::string first = "A" + std::to_string(i / 10), second = "B" + std::to_string(i);
    alike += "1 " + first + " ran.\n2 Where is " + first + "? \tbarn\t1\n3 " + second + " sat.\n4 Who is " + second + "? \thall\t3\n";
    if (i % 10 == 0) beginnings += "1 " + first + " ran.\n2 Where is " + first + "? \tbarn\t1\n";
  }
  for (int i = 0; i < 20; ++i) beginnings += "1 C" + std::to_string(i) + " ran.\n2 Where is C" + std::to_string(i) + "? \tbarn\t1\n";
  std::ofstream(scratch.file("qa1_repeated.txt")) << repeated;
  std::ofstream(scratch.file("qa1_alike.txt")) << alike;
  std::ofstream(scratch.file("qa2_beginnings.txt")) << beginnings;
  const auto asked = [&](const std::vector<std::string>& names, bool held_out) {
    std::vector<std::string> files;
    for (const std::string& name : names) files.push_back(scratch.file(name));
    const auto task =
        make_task("babilong",
                  {.options = {.babi = files}, .tokenizer = open_tokenizer("bytes"), .files = {}, .row_tokens = 200, .held_out = held_out});
    std::set<std::string> texts;  // facts and question
    for (uint64_t key = 0; key < 4000; ++key) texts.insert(open_tokenizer("bytes")->decode(task->sample(key).tokens));
    return texts;
  };
  struct Case {
    std::vector<std::string> files;
    std::size_t trained_at_least, held_out_at_least;
  };
  for (const Case& c :
       std::vector<Case>{{{"qa1_repeated.txt"}, 57, 3}, {{"qa1_alike.txt"}, 100, 6}, {{"qa1_alike.txt", "qa2_beginnings.txt"}, 100, 7}}) {
    CAPTURE(c.files.back());
    const std::set<std::string> trained = asked(c.files, false), held_out = asked(c.files, true);
    CHECK(trained.size() >= c.trained_at_least);
    CHECK(held_out.size() >= c.held_out_at_least);
    for (const std::string& text : held_out) CHECK_FALSE_MESSAGE(trained.contains(text), text);
  }
}

TEST("task batches: babilong says whether no story fits, or none that is held out, and what to do") {
  const test::ScratchFolder scratch;
  // Of 20 different stories the last by its text is held out: the only long one.
  std::string stories;
  for (int i = 0; i < 20; ++i) {
    const std::string name = std::string(1, static_cast<char>('A' + i));
    const int lines = i == 19 ? 100 : 1;  // at 1k a story has at most 87
    for (int k = 1; k <= lines; ++k) stories += std::to_string(k) + " " + name + " ran.\n";
    stories += std::to_string(lines + 1) + " Where is " + name + "? \tbarn\t1\n";
  }
  std::ofstream(scratch.file("qa1_a.txt")) << stories;
  std::string long_story;
  for (int k = 1; k <= 100; ++k) long_story += std::to_string(k) + " Ann ran.\n";
  std::ofstream(scratch.file("qa1_long.txt")) << long_story << "101 Where is Ann? \tbarn\t1\n";
  std::string book;
  for (int i = 1000; i < 4000; ++i) book += "Sentence " + std::to_string(i) + " of the book. ";
  std::ofstream(scratch.file("books.jsonl")) << "{\"text\": \"" + book + "\"}\n";
  const auto make = [&](const char* file, bool held_out) {
    return make_task("babilong", {.options = {.babi = {scratch.file(file)}, .lengths = {"1k"}},
                                  .tokenizer = open_tokenizer("bytes"),
                                  .files = {scratch.file("books.jsonl")},
                                  .row_tokens = 1001,
                                  .held_out = held_out});
  };
  CHECK_NOTHROW(make("qa1_a.txt", false));
  CHECK_THROWS_WITH_AS(make("qa1_a.txt", true), doctest::Contains("no held-out story of a file has few enough lines"), ConfigError);
  CHECK_THROWS_WITH_AS(make("qa1_a.txt", true), doctest::Contains("a file with more stories that fit"), ConfigError);
  CHECK_THROWS_WITH_AS(make("qa1_long.txt", false), doctest::Contains("no story of a file has few enough lines"), ConfigError);
  // A file whose questions all are held out with another one has nothing left to train on.
  std::string held_out = stories.substr(stories.find("1 T ran."));
  std::ofstream(scratch.file("qa2_b.txt")) << held_out;
  CHECK_THROWS_WITH_AS(make_task("babilong", {.options = {.babi = {scratch.file("qa1_a.txt"), scratch.file("qa2_b.txt")}},
                                              .tokenizer = open_tokenizer("bytes"),
                                              .files = {},
                                              .row_tokens = 2001}),
                       doctest::Contains("held out with another file"), ConfigError);
}

TEST("task batches: a babilong sample that is too long for a row loses background, and a story that is too long is passed over") {
  const test::ScratchFolder scratch;
  const std::string facts(1200, 'f'), question(500, 'q');
  std::ofstream(scratch.file("qa1_a.txt")) << "1 Ann ran.\n2 " << question << "? \tbarn\t1\n1 " << facts << ".\n2 Who? \tBob\t1\n";
  std::string book;
  for (int i = 1000; i < 4000; ++i) book += "Sentence " + std::to_string(i) + " of the book. ";
  std::ofstream(scratch.file("books.jsonl")) << "{\"text\": \"" + book + "\"}\n";
  const auto of_length = [&](const char* length) {
    return make_task("babilong", {.options = {.babi = {scratch.file("qa1_a.txt")}, .lengths = {length}},
                                  .tokenizer = open_tokenizer("bytes"),
                                  .files = {scratch.file("books.jsonl")},
                                  .row_tokens = 1001});
  };
  CHECK_NOTHROW(of_length("1301"));  // 300 tokens are for a prompt that training does not have
  CHECK_THROWS_AS(of_length("1302"), ConfigError);
  const auto task = of_length("1k");
  for (uint64_t key = 0; key < 20; ++key) {
    const TaskSample s = task->sample(key);
    CHECK(std::ssize(s.tokens) <= 1001);
    CHECK(std::ssize(s.tokens) > 900);
    CHECK(open_tokenizer("bytes")->decode(s.tokens).ends_with("qqq? barn.<|endoftext|>"));
  }
}

TEST("tasks: what does not fit is said") {
  CHECK_THROWS_AS(make_task("copying", copy_context(220)), ConfigError);
  CHECK_THROWS_AS(make_task("copy", copy_context(102)), ConfigError);  // 2 * 50 + 3 tokens
  CHECK_NOTHROW(make_task("copy", copy_context(103)));
  CHECK_THROWS_AS(make_task("copy", copy_context(220, {.min_length = 60})), ConfigError);
  CHECK_THROWS_AS(make_task("copy", copy_context(220, {.variant = "duplicate-ngram"})), ConfigError);
  CHECK_THROWS_AS(make_task("copy", {.options = {}, .tokenizer = open_tokenizer("bytes"), .files = {}, .row_tokens = 220}), ConfigError);
  CHECK_THROWS_AS(make_task("babilong", copy_context(220)), ConfigError);
  CHECK(parse_length("0k") == 0);
  CHECK(parse_length("256k") == 256000);
  CHECK(parse_length("1M") == 1000000);
  CHECK(parse_length("77") == 77);
  CHECK(parse_length("16k", 1024) == 16384);
  CHECK(parse_length("1M", 1024) == 1048576);
  CHECK(parse_length("77", 1024) == 77);
  for (const char* text : {"", "k", "1K", "-1k", "1k ", "2kk", "1Mk", "1kM", "1.5k", "0x10", "9999999999999"})
    for (const int64_t k : {1000, 1024}) CHECK_THROWS_AS(parse_length(text, k), ConfigError);
}

}  // namespace
}  // namespace longhand
