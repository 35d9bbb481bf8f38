// The CSV of a loss-by-position curve and its logarithmic bins.
#include "eval/position_curve.h"

#include <cmath>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "eval/perplexity.h"
#include "tests/support/check.h"

using namespace longhand;
using longhand::test::ScratchFolder;

namespace {

PositionLoss made_up_loss(int64_t positions) {
  PositionLoss loss;
  for (int64_t p = 1; p <= positions; ++p) {
    loss.tokens.push_back(p <= positions / 2 ? 7 : 3);
    loss.loss_sum.push_back(static_cast<double>(loss.tokens.back()) * (2 + std::sin(static_cast<double>(p))));
  }
  loss.sequences = 7;
  return loss;
}

double tokens_of(const std::vector<PositionBin>& bins) {
  double sum = 0;
  for (const auto& bin : bins) sum += bin.tokens;
  return sum;
}

double nats_of(const std::vector<PositionBin>& bins) {
  double sum = 0;
  for (const auto& bin : bins) sum += bin.tokens * bin.loss;
  return sum;
}

}  // namespace

TEST("bins keep the tokens and the sum of the loss, and cover every position once") {
  const PositionLoss loss = made_up_loss(5000);
  const auto single = position_bins(loss);
  for (const int per_octave : {1, 3, 24}) {
    const auto bins = octave_bins(single, per_octave, {2000, 3});
    CHECK(tokens_of(bins) == tokens_of(single));
    CHECK(nats_of(bins) == doctest::Approx(nats_of(single)).epsilon(1e-12));
    int64_t next = 1;
    std::set<int64_t> ends;
    for (const auto& bin : bins) {
      CHECK(bin.first == next);
      next = bin.last + 1;
      ends.insert(bin.last);
    }
    CHECK(next == 5001);
    for (const int64_t end : {1, 2, 3, 4, 8, 1024, 2000, 2048, 4096, 5000})
      CHECK_MESSAGE(ends.contains(end), end, " is no end at ", per_octave, " an octave");
  }
}

TEST("one bin an octave ends at powers of two, and joining fine bins gives the same") {
  const auto single = position_bins(made_up_loss(64));
  const auto coarse = octave_bins(single, 1);
  REQUIRE(coarse.size() == 7);
  CHECK(coarse[0].last == 1);
  CHECK(coarse[3].first == 5);
  CHECK(coarse[3].last == 8);
  const auto joined = octave_bins(octave_bins(single, 24), 1);
  REQUIRE(joined.size() == coarse.size());
  for (std::size_t i = 0; i < joined.size(); ++i) CHECK(joined[i].loss == doctest::Approx(coarse[i].loss).epsilon(1e-12));
  const auto from_sixteen = octave_bins(single, 1, {}, 16);
  REQUIRE(from_sixteen.size() == 3);
  CHECK(from_sixteen[0].first == 1);
  CHECK(from_sixteen[0].last == 16);
  CHECK(from_sixteen[1].last == 32);
}

TEST("the perplexity of a bin is the geometric mean of its positions") {
  PositionLoss loss;
  loss.tokens = {1, 1};
  loss.loss_sum = {std::log(4.0), std::log(16.0)};
  CHECK(merge(position_bins(loss)).perplexity() == doctest::Approx(8.0));
  CHECK_THROWS_AS(merge({}), ValueError);
  CHECK_THROWS_AS(octave_bins({}, 0), ValueError);
}

TEST("the CSV has a header, one line a position, and reads back") {
  PositionLoss loss;
  loss.tokens = {2, 1};
  loss.loss_sum = {2 * std::log(10.0), 0.0};
  CHECK(position_csv(loss) == "position,tokens,loss,perplexity\n1,2,2.30258509,10\n2,1,0,1\n");
  const ScratchFolder scratch;
  const PositionLoss longer = made_up_loss(3000);
  write_position_csv(scratch.file("ppl-a.csv"), longer);
  CHECK(read_text_file(scratch.file("ppl-a.csv")) == position_csv(longer));
  const auto bins = read_position_csv(scratch.file("ppl-a.csv"), 24, {700});
  const auto expected = octave_bins(position_bins(longer), 24, {700});
  REQUIRE(bins.size() == expected.size());
  for (std::size_t i = 0; i < bins.size(); ++i) {
    CHECK(bins[i].last == expected[i].last);
    CHECK(bins[i].loss == doctest::Approx(expected[i].loss).epsilon(1e-8));
  }
}

TEST("a long curve can be written as bins, which read back as they are") {
  const PositionLoss loss = made_up_loss(5000);
  const ScratchFolder scratch;
  const std::string path = scratch.file("ppl-a.csv");
  write_position_csv(path, loss, 64);
  CHECK(read_text_file(path).starts_with("first,last,tokens,loss,perplexity\n1,1,7,"));
  const auto bins = read_position_csv(path, 64), expected = octave_bins(position_bins(loss), 64);
  REQUIRE(bins.size() == expected.size());
  CHECK(bins.size() < 600);
  for (std::size_t i = 0; i < bins.size(); ++i) {
    CHECK(bins[i].first == expected[i].first);
    CHECK(bins[i].last == expected[i].last);
    CHECK(bins[i].tokens == expected[i].tokens);
    CHECK(bins[i].loss == doctest::Approx(expected[i].loss).epsilon(1e-8));
  }
  write_file_atomically(path, "first,last,tokens,loss,perplexity\n1,2,3,1,2.7\n2,3,3,1,2.7\n");
  CHECK_THROWS_AS(read_position_csv(path, 1), FileError);
}

TEST("a damaged CSV is refused with file, line and reason") {
  const ScratchFolder scratch;
  const std::string header = "position,tokens,loss,perplexity\n", path = scratch.file("ppl-x.csv");
  const auto message = [&](const std::string& content) -> std::string {
    write_file_atomically(path, content);
    try {
      read_position_csv(path, 1);
    } catch (const FileError& error) {
      return error.what();
    }
    return "";
  };
  CHECK(message("loss\n").find("the first line is not") != std::string::npos);
  CHECK(message(header).find("no line behind the header") != std::string::npos);
  CHECK(message(header + "1,0,nan,nan\n").find("no position has a token") != std::string::npos);
  CHECK(message(header + "1,2,3.0\n").find("3 values where 4") != std::string::npos);
  CHECK(message(header + "1,2,nan,nan\n").find("not a finite number") != std::string::npos);
  CHECK(message(header + "1,x,1,1\n").find("not a count") != std::string::npos);
  const std::string falling = message(header + "2,1,1,2.7\n1,1,1,2.7\n");
  CHECK(falling.find("do not rise") != std::string::npos);
  CHECK(falling.find(path) != std::string::npos);
  CHECK(falling.find('3') != std::string::npos);
  CHECK_THROWS_AS(read_position_csv(scratch.file("missing.csv"), 1), FileError);
}

TEST("octave ends are those of the bins") {
  CHECK(octave_ends(1) == std::vector<int64_t>{1});
  CHECK(octave_ends(20, {5, 8, 20, 99}) == std::vector<int64_t>{1, 2, 4, 5, 8, 16, 20});
  const auto bins = octave_bins(position_bins(made_up_loss(300)), 1, {220});
  std::vector<int64_t> ends;
  for (const PositionBin& bin : bins) ends.push_back(bin.last);
  CHECK(ends == octave_ends(300, {220}));
}
