// Forgetting against products of decays taken one by one, and curves worked by hand.
#include "eval/forgetting.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "core/allocator.h"
#include "core/error.h"
#include "core/files.h"
#include "models/decay.h"
#include "tests/support/small_model.h"

using namespace longhand;
using namespace longhand::test;

namespace {

Forgetting measure(const LanguageModel& model, const Sequences& sequences, const ForgettingOptions& options) {
  return forgetting(model, each_of(sequences), options);
}

// Decays of every layer over one sequence: [layers].
std::vector<Decay> decays_of(const LanguageModel& model, const std::vector<int32_t>& tokens, std::size_t count) {
  const NoGrad no_grad;
  std::vector<Decay> decays;
  const DecayScope scope([&](const Decay& decay) { decays.push_back(decay); });
  model.forward(one_row(model.device(), tokens, 0, count));
  return decays;
}

RetentionCurve constant_decay(double a, const std::vector<int64_t>& lags) {
  RetentionCurve curve{lags, {}};
  for (const int64_t lag : lags) curve.retention.push_back(std::pow(a, static_cast<double>(lag)));
  return curve;
}

std::vector<int64_t> every_lag(int64_t last) {
  std::vector<int64_t> lags;
  for (int64_t k = 1; k <= last; ++k) lags.push_back(k);
  return lags;
}

}  // namespace

TEST("forgetting: retention is the mean product over the windows, multiplied out one by one, for every family, chunk and batch") {
  constexpr int64_t kContext = 50;
  const std::vector<int64_t> lags{1, 2, 5, 15, 16, 17, 30, 50};
  for (const char* family : kFamilies) {
    const auto model = shaken_model(family, Dtype::f64);
    const Sequences sequences = random_sequences({50, 60, 50});
    // Brute force: [layer][head][lag] sums of products and how many.
    std::vector<std::vector<std::vector<double>>> sums(2);
    std::vector<double> counts(lags.size());
    for (const auto& tokens : sequences) {
      const auto decays = decays_of(*model, tokens, kContext);
      REQUIRE(decays.size() == 2);
      for (std::size_t layer = 0; layer < 2; ++layer) {
        const Decay& d = decays[layer];
        sums[layer].resize(static_cast<std::size_t>(d.heads), std::vector<double>(lags.size()));
        const int64_t per_head = d.units / d.heads;
        for (std::size_t i = 0; i < lags.size(); ++i)
          for (int64_t begin = 0; begin + lags[i] <= kContext; begin += std::max<int64_t>(16, lags[i])) {
            if (layer == 0) counts[i] += 1;
            for (int64_t u = 0; u < d.units; ++u)
              for (int64_t n = 0; n < d.entries; ++n) {
                double product = 1;
                for (int64_t t = begin; t < begin + lags[i]; ++t)
                  product *=
                      std::exp(-d.rate[static_cast<std::size_t>(t * d.units + u)] * d.A[static_cast<std::size_t>(u * d.entries + n)]);
                sums[layer][static_cast<std::size_t>(u / per_head)][i] += product / static_cast<double>(per_head * d.entries);
              }
          }
      }
    }
    for (const auto& [chunk, batch] : {std::pair{1000, 8}, {7, 2}, {1, 1}, {16, 3}, {17, 3}}) {
      const Forgetting found = measure(*model, sequences, {.context = kContext, .lags = lags, .chunk = chunk, .batch = batch});
      CHECK(found.sequences == 3);
      CHECK(found.tokens == 3 * kContext);
      std::vector<double> of_model(lags.size());
      std::size_t next = 0;
      for (std::size_t layer = 0; layer < 2; ++layer) {
        std::vector<double> of_layer(lags.size());
        for (std::size_t head = 0; head < sums[layer].size(); ++head) {
          std::vector<double> expected = sums[layer][head];
          for (std::size_t i = 0; i < lags.size(); ++i) {
            CHECK(static_cast<double>(found.windows[i]) == counts[i]);
            expected[i] /= counts[i];
            of_layer[i] += expected[i] / static_cast<double>(sums[layer].size());
            of_model[i] += expected[i] / static_cast<double>(2 * sums[layer].size());
          }
          REQUIRE(next < found.heads.size());
          CHECK(found.heads[next].layer == static_cast<int64_t>(layer));
          CHECK(found.heads[next].head == static_cast<int64_t>(head));
          CHECK(found.heads[next].curve.lags == lags);
          expect_close(found.heads[next++].curve.retention, expected, 1e-12, 1e-12,
                       fmt::format("{} layer {} head {} chunk {}", family, layer, head, chunk));
        }
        if (sums[layer].size() == 1) continue;
        CHECK(found.heads[next].head == -1);
        expect_close(found.heads[next++].curve.retention, of_layer, 1e-12, 1e-12, "mean of heads");
      }
      REQUIRE(next + 1 == found.heads.size());
      CHECK(found.heads.back().layer == -1);
      expect_close(found.heads.back().curve.retention, of_model, 1e-12, 1e-12, "mean of layers");
    }
  }
}

TEST("forgetting: a constant decay has the half-life log 2 / -log a, whatever the lags") {
  for (const auto& [a, last] : {std::pair{0.3, int64_t{500}}, {0.9, 5000}, {0.99, 50000}})  // next to nothing is left at the last lag
    for (const auto& lags : {std::vector<int64_t>{1, 2, 4, last}, {3, 50, last}, {last}}) {
      const RetentionCurve curve = constant_decay(a, lags);
      for (const double share : {0.5, 0.9}) {
        const double expected = std::log(1 - share) / std::log(a);
        CHECK(curve.life(1 - share) == doctest::Approx(expected).epsilon(1e-9));
        CHECK(curve.reach(share) == doctest::Approx(expected).epsilon(1e-9));
      }
    }
}

TEST("forgetting: a decay of 1 never forgets, and one of 0 forgets at once") {
  const RetentionCurve keeps = constant_decay(1, {1, 8, 1000});
  CHECK(keeps.life(0.5) == std::numeric_limits<double>::infinity());
  CHECK(keeps.reach(0.5) == doctest::Approx(500));
  CHECK(keeps.reach(0.9) == doctest::Approx(900));
  const RetentionCurve slow = constant_decay(0.9999, {1, 8, 1000});
  CHECK(slow.life(0.5) == std::numeric_limits<double>::infinity());
  const RetentionCurve empties{{1, 8}, {0, 0}};
  CHECK(empties.life(0.5) < 0.01);
  CHECK(empties.reach(0.9) <= 1);
}

TEST("forgetting: reach is where the sums of the retention of single lags cross the share") {
  RetentionCurve curve{every_lag(400), {}};
  for (const int64_t k : curve.lags)
    curve.retention.push_back(0.5 * std::pow(0.5, static_cast<double>(k)) + 0.5 * std::pow(0.995, static_cast<double>(k)));
  std::vector<double> sums{0};  // sums[k]: lags before k
  for (int64_t k = 0; k < 400; ++k) sums.push_back(sums.back() + (k == 0 ? 1 : curve.retention[static_cast<std::size_t>(k - 1)]));
  for (const double share : {0.5, 0.9}) {
    const auto k = static_cast<std::size_t>(curve.reach(share));
    CHECK(sums[k] <= share * sums.back());
    CHECK(sums[k + 1] >= share * sums.back());
  }
  RetentionCurve sparse{{1, 2, 4, 8, 16, 32, 64, 128, 256, 400}, {}};  // the same curve at few lags
  for (const int64_t k : sparse.lags) sparse.retention.push_back(curve.retention[static_cast<std::size_t>(k - 1)]);
  CHECK(sparse.reach(0.5) == doctest::Approx(curve.reach(0.5)).epsilon(0.02));
  CHECK(sparse.life(0.1) == doctest::Approx(curve.life(0.1)).epsilon(0.02));
}

TEST("forgetting: heads whose decay is 1 are infinite in the table, which reads back") {
  const auto model = shaken_model("mamba2", Dtype::f64);
  for (Parameter& p : model->parameters().all())
    if (p.name == "backbone.layers.1.mixer.A_log") fill(p.master.slice(0, 0, 1), -1000);  // A = 0 for head 0
  model->parameters().refresh_compute();
  const Forgetting found = measure(*model, random_sequences({64, 64}), {.context = 64, .lags = {1, 2, 4, 8, 16, 32, 64}});
  for (const auto& head : found.heads)
    if (head.layer == 1 && head.head == 0) CHECK(head.curve.retention == std::vector<double>(7, 1.0));
  const std::string csv = forgetting_csv(found);
  CHECK(csv.starts_with("layer,head,half_life,tenth_life,reach_50,reach_90,retention_at_end\n0,0,"));
  CHECK(csv.find("\n1,0,inf,inf,32,57.6,1\n") != std::string::npos);
  CHECK(csv.find("\n1,mean,") != std::string::npos);
  CHECK(csv.find("\nmean,mean,") != std::string::npos);
  const ScratchFolder scratch;
  const std::string path = scratch.file("forget-a.csv");
  write_file_atomically(path, csv);
  const auto lines = read_forgetting_csv(path);
  REQUIRE(lines.size() == found.heads.size());
  for (std::size_t i = 0; i < lines.size(); ++i) {
    CHECK(lines[i].layer == found.heads[i].layer);
    CHECK(lines[i].head == found.heads[i].head);
    CHECK(lines[i].reach_90 == doctest::Approx(found.heads[i].curve.reach(0.9)).epsilon(1e-5));
  }
  CHECK(retention_csv(found).starts_with("layer,head,lag,windows,retention\n0,0,1,8,"));
  write_file_atomically(path, csv + "x,0,1,1,1,1,1\n");
  CHECK_THROWS_AS(read_forgetting_csv(path), FileError);
}

TEST("forgetting: device memory does not grow with the context") {
  const auto model = small_model(Dtype::f32);
  const auto peak = [&](int64_t context) {
    const Sequences sequences = random_sequences({static_cast<std::size_t>(context)});
    Device::cpu().allocator().reset_peak();
    measure(*model, sequences, {.context = context, .lags = {1, context}, .chunk = 32, .batch = 2});
    return Device::cpu().allocator().use().peak_bytes;
  };
  const int64_t small = peak(128), large = peak(8192);
  CHECK(small > 0);
  CHECK(large == small);
}

TEST("forgetting: wrong lags, short sequences and decays that are no numbers are refused") {
  const auto model = small_model(Dtype::f32);
  const Sequences sequences = random_sequences({16});
  const auto message = [&](const ForgettingOptions& options) {
    return message_of<ValueError>([&] { measure(*model, sequences, options); });
  };
  for (const std::vector<int64_t>& lags : {std::vector<int64_t>{0}, {17}, {4, 4}, {5, 4}})
    CHECK(message({.context = 16, .lags = lags}).find("lags must rise") != std::string::npos);
  CHECK(message({.context = 16, .lags = {}}).find("no lag") != std::string::npos);
  CHECK(message({.context = 17, .lags = {1}}).find("shorter than the context") != std::string::npos);
  const auto broken = small_model(Dtype::f32, std::nan(""));
  CHECK(message_of<NumericError>([&] { measure(*broken, sequences, {.context = 16, .lags = {1}}); }).find("decay is no number") !=
        std::string::npos);
}
