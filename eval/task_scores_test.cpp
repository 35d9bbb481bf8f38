// What the scorers of tasks are made of: rows read together, continuations, greedy answers, metrics, the log of samples.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>

#include "core/allocator.h"
#include "core/error.h"
#include "core/files.h"
#include "data/tasks/babi.h"
#include "data/tasks/babilong.h"
#include "data/tokenizer.h"
#include "eval/answer_metrics.h"
#include "eval/continuation_score.h"
#include "eval/generation.h"
#include "eval/greedy_answers.h"
#include "eval/row_stream.h"
#include "eval/sample_log.h"
#include "tests/support/check.h"
#include "tests/support/small_model.h"

namespace longhand::test {
namespace {

constexpr double kTolerance = 1e-10;  // f64, another order of the same sums

TEST("rows: of any lengths and in any order, each ends with the state of the row alone") {
  for (const std::string family : kFamilies) {
    CAPTURE(family);
    const auto model = shaken_model(family, Dtype::f64);
    const auto rows = random_sequences({9, 30, 0, 9, 41, 1});
    for (const int64_t chunk : {4, 16, 100}) {
      int64_t read = 0;
      const RecurrentState state = read_rows(*model, rows, chunk, [&](const RowChunk& c) { read += std::ssize(c.rows) * c.width; });
      CHECK(read == 90);
      REQUIRE(state.rows() == 6);
      const auto tensors = state.named_tensors();
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const NoGrad no_grad;
        const RecurrentState alone =
            rows[i].empty() ? model->zero_state(1) : model->forward(one_row(Device::cpu(), rows[i], 0, rows[i].size())).state;
        for (const auto& [name, tensor] : alone.named_tensors())
          expect_close(tensors.at(name).slice(0, static_cast<int64_t>(i), static_cast<int64_t>(i) + 1).clone().to_vector<double>(),
                       tensor.to_vector<double>(), kTolerance, 1e-3);
      }
    }
  }
}

TEST("continuations: log-likelihoods and hits are those of the whole logits, for ragged rows and any chunk") {
  const auto model = small_model(Dtype::f64);
  const auto texts = random_sequences({8, 30, 17, 150});
  const std::vector<std::size_t> contexts{7, 10, 1, 60};
  std::vector<ScoredRow> rows;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const auto cut = texts[i].begin() + static_cast<std::ptrdiff_t>(contexts[i]);
    rows.push_back({{texts[i].begin(), cut}, {cut, texts[i].end()}});
  }
  for (const int64_t chunk : {5, 64, 1000}) {
    const auto scores = score_continuations(*model, rows, {.chunk = chunk});
    REQUIRE(scores.size() == rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const NoGrad no_grad;
      const auto hidden = model->forward(one_row(Device::cpu(), texts[i], 0, texts[i].size())).hidden.value();
      const auto logits = model->logits(hidden).to_vector<double>();
      const auto V = logits.size() / texts[i].size();
      double expected = 0;
      std::vector<int32_t> best;
      for (std::size_t p = contexts[i]; p < texts[i].size(); ++p) {
        const auto row = std::span(logits).subspan((p - 1) * V, V);
        double sum = 0;
        for (const double logit : row) sum += std::exp(logit);
        expected += row[static_cast<std::size_t>(texts[i][p])] - std::log(sum);
        best.push_back(static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin()));
      }
      CHECK(scores[i].log_likelihood == doctest::Approx(expected).epsilon(1e-6));  // logits cross to the host as f32
      CHECK(scores[i].predicted == best);
      CHECK(scores[i].greedy == (best == rows[i].target));
    }
  }
  // What the model says itself is greedy.
  auto said = rows[1];
  said.target = score_continuations(*model, {{{3, 4, 5}, {0}}})[0].predicted;
  CHECK(score_continuations(*model, {{{3, 4, 5}, said.target}})[0].greedy);
  CHECK_THROWS_AS(score_continuations(*model, {{{}, {1}}}), ValueError);
  CHECK_THROWS_AS(score_continuations(*model, {{{1}, {}}}), ValueError);
  CHECK_THROWS_AS(score_continuations(*model, {{{1}, {kSmallVocab}}}), ValueError);
}

TEST("continuations: padding is not counted as read") {
  const auto model = small_model(Dtype::f64);
  int64_t read = 0;
  score_continuations(*model, {{{1, 2, 3}, {4}}, {{1}, {2, 3, 4, 5, 6, 7, 8}}}, {.chunk = 4, .progress = [&](int64_t n) { read += n; }});
  CHECK(read == 3 + 7);
}

TEST("task memory: what the device holds depends on rows and chunk, not on the length of prompts and continuations") {
  CachingAllocator& allocator = Device::cpu().allocator();
  const auto model = small_model(Dtype::f32);
  const auto letters = open_tokenizer("letters:5");
  const auto peak_of = [&](const auto& work) {
    allocator.reset_peak();
    const int64_t before = allocator.use().live_bytes;
    work();
    return allocator.use().peak_bytes - before;
  };
  const auto answers = [&](std::size_t length, int64_t chunk) {
    return peak_of([&] {
      std::vector<std::vector<int32_t>> prompts{random_tokens(length, 1), random_tokens(length / 2, 2)};
      for (auto& prompt : prompts)
        for (int32_t& token : prompt) token %= 9;
      greedy_answers(*model, prompts, *letters, {.max_tokens = 2, .chunk = chunk});
    });
  };
  const auto scores = [&](std::size_t length, int64_t chunk, bool long_target) {
    return peak_of([&] {
      const auto context = random_tokens(long_target ? 10 : length, 1), target = random_tokens(long_target ? length : 10, 2);
      score_continuations(*model, {{context, target}, {{1}, {2}}}, {.chunk = chunk});
    });
  };
  const int64_t one = answers(500, 100);
  CHECK(answers(4000, 100) == one);
  CHECK(answers(4000, 1000) > 4 * one);
  for (const bool long_target : {false, true}) {
    CAPTURE(long_target);
    const int64_t score = scores(500, 100, long_target);
    CHECK(scores(4000, 100, long_target) == score);
    CHECK(scores(4000, 1000, long_target) > 4 * score);
  }
}

TEST("greedy answers: of ragged prompts read together, those of each prompt alone") {
  ModelConfig config = small_config("mamba2");
  config.vocab_size = 257;
  config.complete();
  LanguageModel model(config, Device::cpu(), Dtype::f64, Dtype::f64);
  model.initialize(5);
  for (Parameter& p : model.parameters().all()) add_scaled(p.master, random_tensor(Device::cpu(), p.master.dtype(), p.shape, 7), 0.3);
  model.parameters().refresh_compute();
  const auto bytes = open_tokenizer("bytes");
  const std::vector<std::vector<int32_t>> prompts{{72, 105}, {1}, {72, 105, 32, 116, 104, 101, 114, 101}, {9, 8, 7}};
  int64_t read = 0;
  const auto texts = greedy_answers(model, prompts, *bytes, {.max_tokens = 6, .chunk = 3, .progress = [&](int64_t n) { read += n; }});
  CHECK(read == 1 + 0 + 7 + 2);
  REQUIRE(texts.size() == 4);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const Generation alone = generate(model, {prompts[i]},
                                      {.max_tokens = 6,
                                       .sampling = {.temperature = 0},
                                       .end_of_text = bytes->end_of_text(),
                                       .tokenizer = bytes.get(),
                                       .keep_state = false});
    CHECK(texts[i] == alone.rows[0].text);
  }
  CHECK_THROWS_AS(greedy_answers(model, {{}}, *bytes), ValueError);
}

TEST("passkey metric: the first run of digits") {
  CHECK(passkey_correct(" 41522. Remember", "41522"));
  CHECK(passkey_correct("is:41522", "41522"));
  CHECK(passkey_correct("041522 7", "41522"));
  CHECK_FALSE(passkey_correct("415 22", "41522"));
  CHECK_FALSE(passkey_correct("7 41522", "41522"));
  CHECK_FALSE(passkey_correct("415221", "41522"));
  CHECK_FALSE(passkey_correct("no digits", "41522"));
  CHECK_FALSE(passkey_correct("", "41522"));
}

TEST("babilong metric: exactly the target is left") {
  const std::vector<std::string> places{"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"};
  const std::string where = "Where is Mary?";
  CHECK(babilong_correct("The most recent location of Mary is Office. Or garden.", where, "office", places));
  CHECK(babilong_correct(" kitchen<context> garden", where, "kitchen", places));
  CHECK(babilong_correct("kitchen\n<example>\ngarden", where, "kitchen", places));
  CHECK_FALSE(babilong_correct("kitchen or garden", where, "kitchen", places));
  CHECK_FALSE(babilong_correct("", where, "kitchen", places));
  CHECK_FALSE(babilong_correct(". kitchen", where, "kitchen", places));
  // Labels of the question do not count against an answer, nor for it.
  CHECK(babilong_correct("Before the office the apple was in the garden", "Where was the apple before the office?", "garden", places));
  CHECK_FALSE(babilong_correct("office", "Where was the apple before the office?", "office", places));
  // A word within a word counts, as in the reference.
  CHECK(babilong_correct("the bedrooms", where, "bedroom", places));
  // Lists: every part and nothing else.
  const std::vector<std::string> things{"apple", "football", "milk", "nothing"};
  CHECK(babilong_correct("milk and apple", "What is Mary carrying?", "apple,milk", things));
  CHECK_FALSE(babilong_correct("milk", "What is Mary carrying?", "apple,milk", things));
  CHECK_FALSE(babilong_correct("milk, apple, football", "What is Mary carrying?", "apple,milk", things));
  CHECK(babilong_parts("apple,milk,football") == std::vector<std::string>{"apple", "milk", "football"});
  CHECK(babilong_parts("s,e") == std::vector<std::string>{"s,e"});
  CHECK_FALSE(babilong_correct("apple", "What is Mary carrying?", "apple,apple", things));  // two parts, and one label is left
  // Part of another label: no answer can be right.
  CHECK_FALSE(babilong_correct("none", "How many?", "none", {"none", "one", "three", "two"}));
}

TEST("babilong metric: of the 20 tasks all but counting let a right answer be right, and labels are those of the published files") {
  const auto folder = folder_from("LONGHAND_DATA");
  if (!folder) SKIP("LONGHAND_DATA is not set");
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(*folder + "/babi")) {
    const std::string path = entry.path().string();
    if (!path.ends_with("_test.txt")) continue;
    CAPTURE(path);
    ++files;
    const std::string task = babi_task_of(path);
    const std::vector<std::string> labels = babilong_labels(task);
    std::set<std::string> seen;
    int right = 0, none = 0;
    const auto samples = read_babi(path);
    for (const BabiSample& s : samples) {
      for (const std::string& part : babilong_parts(s.answer)) seen.insert(part);
      right += babilong_correct("It is " + s.answer + ".", s.question, s.answer, labels) ? 1 : 0;
      none += s.answer == "none" ? 1 : 0;
    }
    CHECK(seen == std::set<std::string>(labels.begin(), labels.end()));
    CHECK(samples.size() == 1000);
    CHECK(none == (task == "qa7" ? 468 : 0));
    CHECK(right == 1000 - none);
  }
  CHECK(files == 20);
  CHECK(babilong_labels("qa21").empty());
}

TEST("sample log: goes on where it stopped, and refuses lines of other settings") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("a/log.jsonl");
  {
    SampleLog log(path, {{"task", "x"}}, 3);
    CHECK(log.found() == 0);
    log.add(1, {{"output", "one\xC3"}, {"target", "one"}, {"correct", true}});
    CHECK_THROWS_WITH_AS(SampleLog(path, {{"task", "x"}}, 3), doctest::Contains("another process"), FileError);
    CHECK(log.done(1));
    CHECK_FALSE(log.done(0));
  }
  const std::string line = read_text_file(path);
  CHECK(line.starts_with("{\"sample\":1,\"settings\":\""));
  CHECK(line.ends_with("\"output\":\"one\xEF\xBF\xBD\",\"target\":\"one\",\"correct\":true}\n"));
  std::ofstream(path, std::ios::app) << "{\"sample\":2,\"sett";  // the program was killed here
  {
    SampleLog log(path, {{"task", "x"}}, 3);
    CHECK(log.found() == 1);
    CHECK(log.result(1).at("correct") == true);
    CHECK(read_text_file(path) == line);
    log.add(0, {{"output", "zero"}});
    CHECK(log.count() == 2);
  }
  CHECK(SampleLog(path, {{"task", "x"}}, 3).found() == 2);
  CHECK_THROWS_AS(SampleLog(path, {{"task", "y"}}, 3), FileError);
  CHECK_THROWS_AS(SampleLog(path, {{"task", "x"}}, 1), FileError);
  const std::string begin = line.substr(0, line.find(",\"output\"")), other = "{\"sample\":2" + begin.substr(begin.find(','));
  for (const std::string& bad : {line, std::string("{}\n"), std::string("x\n"), other + "}\n", other + ",\"output\":1,\"target\":2}\n",
                                 other + ",\"output\":1,\"target\":2,\"correct\":1}\n"}) {
    CAPTURE(bad);
    std::ofstream(path, std::ios::trunc) << line << bad;
    try {
      const SampleLog log(path, {{"task", "x"}}, 3);
      FAIL("accepted");
    } catch (const FileError& error) {
      const std::string message = error.what();
      CHECK_MESSAGE((message.find("line 2 of") != std::string::npos || message.find("line    2\n") != std::string::npos), message);
    }
  }
  std::ofstream(path, std::ios::trunc) << line << other << ",\"output\":1}\n";
  CHECK(SampleLog(path, {{"task", "x"}}, 3).found() == 2);
  CHECK(SampleLog(path, {{"task", "y"}}, 3, true).found() == 0);
  CHECK(read_text_file(path).empty());
  SampleLog nowhere("", {}, 2);
  nowhere.add(1, {{"correct", true}});
  CHECK(nowhere.done(1));
}

TEST("prompt hash: of every token, in order") {
  CHECK(prompt_hash({}) == "cbf29ce484222325");
  CHECK(prompt_hash({1, 2}) != prompt_hash({2, 1}));
  CHECK(prompt_hash({1}) != prompt_hash({1, 0}));
}

}  // namespace
}  // namespace longhand::test
