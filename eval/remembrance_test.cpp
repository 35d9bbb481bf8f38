// Effective remembrance against every suffix run on its own.
#include "eval/remembrance.h"

#include <fmt/format.h>

#include <cmath>
#include <numeric>

#include "core/allocator.h"
#include "core/error.h"
#include "core/files.h"
#include "tests/support/small_model.h"

using namespace longhand;
using namespace longhand::test;

namespace {

constexpr Distance kAllDistances[] = {Distance::total_variation, Distance::jensen_shannon, Distance::cosine};

// softmax of the logits behind tokens [begin, end) of one sequence, from the zero state, with the textbook's formula.
std::vector<double> prediction(const LanguageModel& model, const std::vector<int32_t>& tokens, std::size_t begin, std::size_t end) {
  const NoGrad no_grad;
  const Tensor hidden = model.forward(one_row(model.device(), tokens, begin, end)).hidden.value();
  std::vector<double> p = model.logits(hidden.slice(1, hidden.dim(1) - 1, hidden.dim(1))).to_vector<double>();
  double sum = 0;
  for (double& value : p) sum += value = std::exp(value);
  for (double& value : p) value /= sum;
  return p;
}

Remembrance measure(const LanguageModel& model, const Sequences& sequences, const RemembranceOptions& options) {
  return effective_remembrance(model, each_of(sequences), options);
}

}  // namespace

TEST("remembrance: distances of distributions worked by hand") {
  const std::vector<double> p{1, 0, 0}, q{0, 1, 0}, half{0.5, 0.5, 0}, even{0.25, 0.25, 0.5};
  for (const Distance d : kAllDistances) {
    CHECK(distance_between(d, half, half) == doctest::Approx(0.0));
    CHECK(distance_between(d, p, q) == doctest::Approx(1.0));  // nothing in common
    CHECK(distance_between(d, half, even) == doctest::Approx(distance_between(d, even, half)));
    CHECK_THROWS_AS(distance_between(d, p, std::vector<double>{1}), ShapeError);
  }
  CHECK(distance_between(Distance::total_variation, half, even) == doctest::Approx(0.5));
  CHECK(distance_between(Distance::cosine, half, even) == doctest::Approx(1 - 0.25 / std::sqrt(0.5 * 0.375)));
  // m = (3/8, 3/8, 1/4): 1/2 [ log2(4/3) + 1/2 log2(2/3) + 1/2 log2(2) ]
  CHECK(distance_between(Distance::jensen_shannon, half, even) ==
        doctest::Approx(0.5 * (std::log2(4.0 / 3) + 0.5 * std::log2(2.0 / 3) + 0.5)));
  CHECK(distance_between(Distance::jensen_shannon, p, half) ==
        doctest::Approx(0.5 * (std::log2(4.0 / 3) + 0.5 * std::log2(2.0 / 3) + 0.5)));
  for (const Distance d : kAllDistances) CHECK(parse_distance(name_of(d)) == d);
  CHECK_THROWS_AS(parse_distance("l2"), ConfigError);
}

TEST("remembrance: softmax of large logits is finite, and of no number is refused") {
  const std::vector<double> p = softmax(std::vector<double>{1000, 1000, -1000});
  CHECK(p == std::vector<double>{0.5, 0.5, 0});
  CHECK_THROWS_AS(softmax(std::vector<double>{1, std::nan("")}), NumericError);
}

TEST("remembrance: equals every suffix run on its own, for every family, distance, chunk and batch") {
  for (const char* family : kFamilies) {
    const auto model = shaken_model(family, Dtype::f64);
    const Sequences sequences = random_sequences({41, 40, 50});
    const std::vector<int64_t> starts{0, 1, 7, 8, 20, 31, 38, 39};
    for (const Distance distance : kAllDistances) {
      std::vector<std::vector<double>> expected(starts.size());
      for (const auto& tokens : sequences)
        for (std::size_t i = 0; i < starts.size(); ++i)
          expected[i].push_back(distance_between(distance, prediction(*model, tokens, 0, 40),
                                                 prediction(*model, tokens, static_cast<std::size_t>(starts[i]), 40)));
      CHECK(expected[7][0] > 1e-3);  // the last token alone predicts otherwise than all of them
      for (const auto& [chunk, batch] : {std::pair{1000, 100}, {1, 8}, {7, 1}, {16, 3}, {8, 16}}) {
        const Remembrance r =
            measure(*model, sequences, {.context = 40, .starts = starts, .distance = distance, .chunk = chunk, .batch = batch});
        CHECK(r.sequences() == 3);
        for (std::size_t i = 0; i < starts.size(); ++i)
          expect_close(r.values[i], expected[i], 1e-8, 1e-3, fmt::format("{} start {} chunk {} batch {}", family, starts[i], chunk, batch));
        CHECK(r.mean(0) == 0);
      }
    }
  }
}

TEST("remembrance: only its own tokens are read for a start, and the device memory does not grow with the context") {
  const auto model = small_model(Dtype::f32);
  const Remembrance r = measure(*model, random_sequences({64, 64}), {.context = 64, .starts = {0, 32, 60}, .chunk = 16, .batch = 8});
  CHECK(r.tokens == 2 * (64 + 32 + 4));
  const auto peak = [&](int64_t context) {
    const Sequences sequences = random_sequences({static_cast<std::size_t>(context)});
    Device::cpu().allocator().reset_peak();
    measure(*model, sequences, {.context = context, .starts = {context / 2, context - 4}, .chunk = 32, .batch = 4});
    return Device::cpu().allocator().use().peak_bytes;
  };
  const int64_t small = peak(128), large = peak(8192);
  CHECK(small > 0);
  CHECK(large == small);
}

TEST("remembrance: mean and standard error over sequences") {
  Remembrance r;
  r.values = {{0.1, 0.3, 0.5}, {0.4}};
  CHECK(r.mean(0) == doctest::Approx(0.3));
  CHECK(r.standard_error(0) == doctest::Approx(0.2 / std::sqrt(3.0)));
  CHECK(std::isnan(r.standard_error(1)));
}

TEST("remembrance: progress ends with everything done") {
  const auto model = small_model(Dtype::f32);
  std::vector<EvalProgress> seen;
  measure(*model, random_sequences({32, 32, 32}),
          {.context = 32, .starts = {16}, .chunk = 16, .batch = 4, .progress = [&](const EvalProgress& p) { seen.push_back(p); }});
  REQUIRE(seen.size() == 4);
  CHECK(seen.back().tokens == 3 * (32 + 16));
  CHECK(seen.back().sequences_done == 2);
  CHECK(seen.back().sequences_running == 1);
}

TEST("remembrance: wrong starts, sequences and logits are refused by name") {
  const auto model = small_model(Dtype::f32);
  const Sequences sequences = random_sequences({16});
  const auto message = [&](const RemembranceOptions& options, const Sequences& of) {
    return message_of<ValueError>([&] { measure(*model, of, options); });
  };
  for (const std::vector<int64_t>& starts : {std::vector<int64_t>{16}, {17}, {-1}, {4, 4}, {5, 4}})
    CHECK(message({.context = 16, .starts = starts}, sequences).find("starts must rise and lie before the end") != std::string::npos);
  CHECK(message({.context = 16, .starts = {}}, sequences).find("no start") != std::string::npos);
  CHECK(message({.context = 17, .starts = {1}}, sequences).find("shorter than the context") != std::string::npos);
  CHECK(message({.context = 2, .starts = {1}}, {{1, 32}}).find("outside the model's vocabulary") != std::string::npos);
  CHECK(message({.context = 16, .starts = {1}, .chunk = 0}, sequences).find("chunk must be at least 1") != std::string::npos);
  const auto broken = small_model(Dtype::f32, std::nan(""));
  const std::string text = message_of<NumericError>([&] { measure(*broken, sequences, {.context = 16, .starts = {3}}); });
  CHECK(text.find("not a finite number") != std::string::npos);
  CHECK(text.find("0 to 16") != std::string::npos);
}

TEST("remembrance: the table reads back, and a damaged one is refused") {
  Remembrance r;
  r.context = 8;
  r.starts = {0, 6};
  r.values = {{0, 0}, {0.25, 0.5}};
  CHECK(remembrance_csv(r) == "start,lag,sequences,mean,standard_error\n0,8,2,0,0\n6,2,2,0.375,0.125\n");
  const ScratchFolder scratch;
  const std::string path = scratch.file("remember-a.csv");
  write_file_atomically(path, remembrance_csv(r));
  const auto points = read_remembrance_csv(path);
  REQUIRE(points.size() == 2);
  CHECK(points[1].start == 6);
  CHECK(points[1].lag == 2);
  CHECK(points[1].mean == 0.375);
  CHECK(points[1].standard_error == 0.125);
  r.values = {{0}, {0.25}};  // one sequence: no standard error
  write_file_atomically(path, remembrance_csv(r));
  CHECK(std::isnan(read_remembrance_csv(path)[1].standard_error));
  const std::string header = "start,lag,sequences,mean,standard_error\n";
  for (const std::string& content : {std::string("start\n"), header, header + "1,2,3,4\n", header + "2,1,1,0,0\n1,2,1,0,0\n",
                                     header + "1,2,1,nan,0\n", header + "1,2,x,0,0\n"}) {
    write_file_atomically(path, content);
    CHECK_THROWS_AS(read_remembrance_csv(path), FileError);
  }
  CHECK_THROWS_AS(read_remembrance_csv(scratch.file("gone.csv")), FileError);
}
