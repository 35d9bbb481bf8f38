// Loss by position: streaming, rows, masks and memory change nothing but the speed.
#include "eval/perplexity.h"

#include <fmt/format.h>

#include <cmath>

#include "autograd/tape.h"
#include "core/allocator.h"
#include "core/error.h"
#include "tests/support/small_model.h"

using namespace longhand;
using namespace longhand::test;

namespace {

PositionLoss measure(const LanguageModel& model, const Sequences& sequences, int64_t context, int64_t chunk, int64_t batch) {
  return position_loss(model, each_of(sequences), {.context = context, .chunk = chunk, .batch = batch, .progress = {}});
}

// The losses of one sequence from one forward over all of it.
std::vector<double> whole(const LanguageModel& model, const std::vector<int32_t>& tokens) {
  const NoGrad no_grad;
  const auto T = static_cast<int64_t>(tokens.size()) - 1;
  const std::vector<int32_t> inputs(tokens.begin(), tokens.end() - 1), targets(tokens.begin() + 1, tokens.end());
  return model.loss({Tensor::from(model.device(), {1, T}, inputs), Tensor::from(model.device(), {1, T}, targets), {}})
      .token_loss.to_vector<double>();
}

}  // namespace

TEST("streaming in chunks of any size gives the losses of one long forward") {
  for (const auto& [dtype, tolerance] : {std::pair{Dtype::f64, 1e-12}, {Dtype::f32, 1e-6}}) {
    const auto model = small_model(dtype);
    const Sequences sequences = random_sequences({101});
    const std::vector<double> expected = whole(*model, sequences[0]);
    for (const int64_t chunk : {1, 3, 16, 17, 99, 100, 1000}) {
      const PositionLoss loss = measure(*model, sequences, 100, chunk, 1);
      CHECK(loss.tokens == std::vector<int64_t>(100, 1));
      expect_close(loss.loss_sum, expected, tolerance, 1e-30, fmt::format("chunk {}", chunk));
    }
  }
}

TEST("the state is carried: without it the losses behind the first chunk are others") {
  const auto model = small_model(Dtype::f64);
  const Sequences sequences = random_sequences({65});
  const PositionLoss streamed = measure(*model, sequences, 64, 32, 1);
  const std::vector<double> second_half = whole(*model, {sequences[0].begin() + 32, sequences[0].end()});
  double difference = 0;
  for (std::size_t t = 0; t < 32; ++t) difference = std::max(difference, std::abs(second_half[t] - streamed.loss_sum[32 + t]));
  CHECK(difference > 1e-3);
}

TEST("several rows of different lengths give the sums of single rows, each sequence counted to its end") {
  const auto model = small_model(Dtype::f64);
  const std::vector<std::size_t> lengths = {2, 40, 17, 5, 38, 8, 9, 64};
  const Sequences sequences = random_sequences(lengths);
  std::vector<double> sums(50);
  std::vector<int64_t> tokens(50);
  for (const auto& sequence : sequences) {
    const std::vector<double> losses = whole(*model, sequence);
    for (std::size_t t = 0; t < std::min<std::size_t>(50, losses.size()); ++t) sums[t] += losses[t], ++tokens[t];
  }
  for (const int64_t batch : {1, 2, 3, 8, 20})
    for (const int64_t chunk : {1, 7, 8, 64}) {
      const PositionLoss loss = measure(*model, sequences, 50, chunk, batch);
      CHECK(loss.sequences == 8);
      CHECK(loss.tokens == tokens);
      expect_close(loss.loss_sum, sums, 1e-12, 1e-30, fmt::format("batch {}, chunk {}", batch, chunk));
    }
}

TEST("the order of sequences changes no bit of the sums by position") {
  const auto model = small_model(Dtype::f64);
  Sequences sequences = random_sequences({41, 9, 41, 30, 41, 17, 41});
  const std::vector<double> sums = measure(*model, sequences, 40, 16, 1).loss_sum;
  std::reverse(sequences.begin(), sequences.end());
  CHECK(measure(*model, sequences, 40, 16, 1).loss_sum == sums);
  std::swap(sequences[1], sequences[4]);
  CHECK(measure(*model, sequences, 40, 16, 1).loss_sum == sums);
}

TEST("the spread of sequences: a case by hand, and ranges of positions in any chunks") {
  const PositionSpread by_hand{.first = 1, .last = 1, .sequences = 3, .loss = 3, .squares = 14};  // 1, 2, 6
  CHECK(by_hand.standard_error() == doctest::Approx(std::sqrt(14.0 / 2 / 3)));
  CHECK(by_hand.perplexity_standard_error() == doctest::Approx(std::exp(3.0) * std::sqrt(14.0 / 2 / 3)));
  CHECK(std::isnan(PositionSpread{}.standard_error()));

  const auto spread_of = [](const std::vector<double>& means) {
    PositionSpread spread{.first = 0, .last = 0, .sequences = std::ssize(means)};
    for (const double mean : means) spread.loss += mean / static_cast<double>(means.size());
    for (const double mean : means) spread.squares += (mean - spread.loss) * (mean - spread.loss);
    return spread;
  };
  const auto model = small_model(Dtype::f64);
  const Sequences sequences = random_sequences({41, 9, 41, 30, 41});
  const std::vector<int64_t> ends{1, 8, 20, 40};
  for (const int64_t batch : {1, 3})
    for (const int64_t chunk : {1, 7, 64}) {
      const PositionLoss loss =
          position_loss(*model, each_of(sequences), {.context = 40, .chunk = chunk, .batch = batch, .spread_ends = ends});
      REQUIRE(loss.spreads.size() == 4);
      int64_t first = 1;
      for (std::size_t i = 0; i < ends.size(); ++i) {
        std::vector<double> means;
        for (const auto& sequence : sequences) {
          if (std::ssize(sequence) - 1 < ends[i]) continue;
          const std::vector<double> losses = whole(*model, sequence);
          double sum = 0;
          for (int64_t p = first; p <= ends[i]; ++p) sum += losses[static_cast<std::size_t>(p - 1)];
          means.push_back(sum / static_cast<double>(ends[i] - first + 1));
        }
        const PositionSpread expected = spread_of(means);
        CHECK(loss.spreads[i].first == first);
        CHECK(loss.spreads[i].last == ends[i]);
        CHECK(loss.spreads[i].sequences == expected.sequences);
        CHECK(loss.spreads[i].loss == doctest::Approx(expected.loss).epsilon(1e-12));
        CHECK(loss.spreads[i].standard_error() == doctest::Approx(expected.standard_error()).epsilon(1e-9));
        first = ends[i] + 1;
      }
    }
  // Where nothing differs, nearly all of what is subtracted cancels.
  const Sequences same(5, sequences[0]);
  for (const PositionSpread& spread : position_loss(*model, each_of(same), {.context = 40, .spread_ends = ends}).spreads) {
    CHECK(spread.sequences == 5);
    CHECK(spread.standard_error() < 3e-10);
  }
  CHECK_THROWS_AS(position_loss(*model, each_of(sequences), {.context = 8, .spread_ends = {4, 4}}), ValueError);
}

TEST("a model that knows nothing has loss log V and perplexity V at every position") {
  const auto model = small_model(Dtype::f32, 0);
  const PositionLoss loss = measure(*model, random_sequences({41, 30}), 40, 16, 2);
  for (int64_t p = 1; p <= 40; ++p) {
    CHECK(loss.loss(p) == doctest::Approx(std::log(32.0)).epsilon(1e-6));
    CHECK(loss.perplexity(p) == doctest::Approx(32).epsilon(1e-5));
  }
  CHECK(loss.mean_loss() == doctest::Approx(std::log(32.0)).epsilon(1e-6));
  CHECK(loss.total_tokens() == 40 + 29);
  CHECK(std::isnan(loss.loss(41)));
}

TEST("device memory does not grow with the context") {
  const auto model = small_model(Dtype::f32);
  const auto peak = [&](std::size_t context) {
    const Sequences sequences = random_sequences({context + 1, context + 1, context + 1});
    Device::cpu().allocator().reset_peak();
    measure(*model, sequences, static_cast<int64_t>(context), 32, 2);
    return Device::cpu().allocator().use().peak_bytes;
  };
  const int64_t small = peak(128), large = peak(8192);
  CHECK(small > 0);
  CHECK(large == small);
}

TEST("progress is reported after each chunk and ends with everything done") {
  const auto model = small_model(Dtype::f32);
  const Sequences sequences = random_sequences({33, 33, 33});
  std::vector<EvalProgress> seen;
  position_loss(*model, each_of(sequences),
                {.context = 32, .chunk = 16, .batch = 2, .progress = [&](const EvalProgress& p) { seen.push_back(p); }});
  REQUIRE(seen.size() == 4);
  CHECK(seen[0].position == 16);
  CHECK(seen[1].sequences_done == 2);
  CHECK(seen[1].sequences_running == 1);
  CHECK(seen.back().sequences_done == 3);
  CHECK(seen.back().tokens == 96);
}

TEST("wrong sequences, settings and losses are refused by name") {
  const auto model = small_model(Dtype::f32);
  CHECK(message_of<ValueError>([&] {
          measure(*model, {{1, 2, 32}}, 8, 8, 1);
        }).find("outside the model's vocabulary") != std::string::npos);
  CHECK(message_of<ValueError>([&] { measure(*model, {{1, -1}}, 8, 8, 1); }).find("-1 at index 1 of sequence 1") != std::string::npos);
  CHECK(message_of<ValueError>([&] { measure(*model, {{1, 2}, {1}}, 8, 8, 1); }).find("without a token to predict") != std::string::npos);
  CHECK(message_of<ValueError>([&] { measure(*model, {}, 8, 0, 1); }).find("chunk must be at least 1") != std::string::npos);
  CHECK(measure(*model, {}, 8, 8, 1).sequences == 0);
  const auto broken = small_model(Dtype::f32, std::nan(""));
  const std::string message = message_of<NumericError>([&] { measure(*broken, {{1, 2, 3}}, 8, 8, 1); });
  CHECK(message.find("not a finite number") != std::string::npos);
}

TEST("the validation loss is the mean over counted positions of the first batches, every row from the zero state") {
  const auto model = small_model(Dtype::f64);
  const Device cpu = Device::cpu();
  const Sequences rows = random_sequences({17, 17, 17, 17});
  const auto batches = [&](bool masked) {
    return [&, masked, i = std::size_t{0}](TokenBatch& batch) mutable {
      if (i == 4) return false;
      std::vector<int32_t> tokens, targets;
      std::vector<float> mask;
      for (const std::size_t end = i + 2; i < end; ++i)
        for (std::size_t t = 0; t < 16; ++t)
          tokens.push_back(rows[i][t]), targets.push_back(rows[i][t + 1]), mask.push_back(t < 10 ? 1 : 0);
      batch = {Tensor::from(cpu, {2, 16}, tokens), Tensor::from(cpu, {2, 16}, targets),
               masked ? Tensor::from(cpu, {2, 16}, mask) : Tensor()};
      return true;
    };
  };
  const auto mean = [&](std::size_t count, std::size_t positions) {
    double sum = 0;
    for (std::size_t r = 0; r < count; ++r) {
      const auto losses = whole(*model, rows[r]);
      for (std::size_t t = 0; t < positions; ++t) sum += losses[t];
    }
    return sum / static_cast<double>(count * positions);
  };
  const ValidationLoss all = validation_loss(*model, batches(false), 100);
  CHECK(all.tokens == 64);
  CHECK(all.loss == doctest::Approx(mean(4, 16)).epsilon(1e-12));
  CHECK(all.loss == validation_loss(*model, batches(false), 100).loss);
  const ValidationLoss first = validation_loss(*model, batches(true), 1);
  CHECK(first.tokens == 20);
  CHECK(first.loss == doctest::Approx(mean(2, 10)).epsilon(1e-12));
  CHECK(first.bits_per_byte(80) == doctest::Approx(first.loss * 20 / (80 * std::log(2.0))));
  CHECK_THROWS_AS(first.bits_per_byte(0), ValueError);
  CHECK_THROWS_AS(validation_loss(*model, batches(false), 0), ValueError);
}
