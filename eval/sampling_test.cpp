// Sampling by cases worked by hand, and by counting.
#include "eval/sampling.h"

#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "core/error.h"
#include "core/philox.h"
#include "ops/next_token/next_token.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
using Logits = std::vector<float>;
using Ids = std::vector<int32_t>;

Logits log_of(const std::vector<double>& p) {
  Logits logits;
  for (double x : p) logits.push_back(static_cast<float>(std::log(x)));
  return logits;
}

int32_t greedy(const Logits& logits, const Ids& seen = {}, double penalty = 1, const Ids& never = {}) {
  return Sampler({.repetition_penalty = penalty, .temperature = 0}, never).draw(logits, seen, 0, 0);
}

std::map<int32_t, int> counts(const SamplingOptions& options, const Logits& logits, int draws, const Ids& seen = {}) {
  Sampler sampler(options);
  std::map<int32_t, int> n;
  for (int i = 0; i < draws; ++i) ++n[sampler.draw(logits, seen, 0, static_cast<uint64_t>(i))];
  return n;
}

// The ids that can be drawn.
std::set<int32_t> kept(const SamplingOptions& options, const Logits& logits, const Ids& seen = {}) {
  std::set<int32_t> ids;
  for (const auto& [id, n] : counts(options, logits, 2000, seen)) ids.insert(id);
  return ids;
}

// Pearson's statistic of `draws` draws against the probabilities p; its mean is the degrees of freedom, its variance twice that.
double chi_square(const SamplingOptions& options, const Logits& logits, const std::vector<double>& p, int draws, const Ids& seen = {}) {
  auto n = counts(options, logits, draws, seen);
  double statistic = 0;
  for (std::size_t id = 0; id < p.size(); ++id) {
    const double expected = p[id] * draws, difference = n[static_cast<int32_t>(id)] - expected;
    if (p[id] == 0) CHECK(difference == 0);
    else statistic += difference * difference / expected;
  }
  return statistic;
}

template <class Problem>
std::string message(const SamplingOptions& options, const Logits& logits = {0}) {
  try {
    Sampler(options).draw(logits, {}, 3, 5);
  } catch (const Problem& problem) {
    return problem.what();
  }
  return "no error";
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST("greedy takes the largest logit, and among equals the lowest id") {
  CHECK(greedy({1, 3, 2}) == 1);
  CHECK(greedy({-5, -1, -kInf, -1}) == 1);
  CHECK(greedy({2, 2, 2}) == 0);
  CHECK(greedy({7, 9, 8}, {}, 1, {1}) == 2);
  CHECK(greedy({7, 9, 8}, {}, 1, {1, 2, 5, -1}) == 0);  // ids outside the vocabulary are never drawn anyhow
}

TEST("the repetition penalty divides logits above 0 and multiplies those below, once for each token") {
  CHECK(greedy({3, -2, 1}, {0, 1}, 2) == 0);     // 1.5, -4, 1
  CHECK(greedy({3, -2, 1}, {0, 1}, 4) == 2);     // 0.75, -8, 1
  CHECK(greedy({3, -2, 1}, {0, 0, 0}, 2) == 0);  // still 1.5, however often it stands there
  CHECK(greedy({-3, -2}, {1}, 2) == 0);          // -3, -4
  CHECK(greedy({-3, -2}, {1}, 1) == 1);          // off
  CHECK(greedy({1, 1.5f}, {0}, 0.5) == 0);       // below 1 it invites: 2, 1.5
  CHECK(greedy({-kInf, -9}, {0}, 3) == 1);       // impossible stays impossible
  CHECK(greedy({0, -1}, {0}, 3) == 0);
  CHECK_THROWS_AS(greedy({0, 1}, {2}, 3), ValueError);
}

TEST("draws follow the softmax, and the temperature divides the logits first") {
  const std::vector<double> p{0.5, 0.25, 0.125, 0.0625, 0.0625};
  CHECK(chi_square({}, log_of(p), p, 20000) < 4 + 4 * std::sqrt(8.0));
  std::vector<double> flat;  // temperature 2: proportional to the square roots
  double sum = 0;
  for (double x : p) sum += std::sqrt(x);
  for (double x : p) flat.push_back(std::sqrt(x) / sum);
  CHECK(chi_square({.temperature = 2}, log_of(p), flat, 20000) < 4 + 4 * std::sqrt(8.0));
  CHECK(chi_square({.temperature = 2}, log_of(p), p, 20000) > 1000);
  Logits shifted = log_of(p);  // a shift changes nothing, even where exp() would overflow or vanish
  for (float& x : shifted) x += 1000;
  CHECK(chi_square({}, shifted, p, 20000) < 4 + 4 * std::sqrt(8.0) + 1);
  for (float& x : shifted) x -= 2000;
  CHECK(chi_square({}, shifted, p, 20000) < 4 + 4 * std::sqrt(8.0) + 1);
  CHECK(counts({.temperature = 1e-3}, {1, 2, 1.5f}, 100) == std::map<int32_t, int>{{1, 100}});
}

TEST("top-k keeps the k largest logits and what equals the last of them") {
  const Logits logits{1, 4, 3, 2, 3};
  CHECK(kept({.top_k = 1}, logits) == std::set<int32_t>{1});
  CHECK(kept({.top_k = 2}, logits) == std::set<int32_t>{1, 2, 4});
  CHECK(kept({.top_k = 3}, logits) == std::set<int32_t>{1, 2, 4});
  CHECK(kept({.top_k = 4}, logits) == std::set<int32_t>{1, 2, 3, 4});
  CHECK(kept({.top_k = 99}, logits) == std::set<int32_t>{0, 1, 2, 3, 4});
  CHECK(kept({.top_k = 4}, {-kInf, 1, -kInf, 0}) == std::set<int32_t>{1, 3});
}

TEST("top-p keeps the most probable tokens until they reach it, the lower id first among equals") {
  const Logits logits = log_of({0.1, 0.5, 0.25, 0.15});
  CHECK(kept({.top_p = 0.01}, logits) == std::set<int32_t>{1});
  CHECK(kept({.top_p = 0.49}, logits) == std::set<int32_t>{1});
  CHECK(kept({.top_p = 0.51}, logits) == std::set<int32_t>{1, 2});
  CHECK(kept({.top_p = 0.76}, logits) == std::set<int32_t>{1, 2, 3});
  CHECK(kept({.top_p = 0.91}, logits) == std::set<int32_t>{0, 1, 2, 3});
  CHECK(kept({.top_p = 0.5}, {0, 0, 0, 0}) == std::set<int32_t>{0, 1});
  CHECK(kept({.top_p = 0.51}, {0, 0, 0, 0}) == std::set<int32_t>{0, 1, 2});
  CHECK(chi_square({.top_p = 0.7}, logits, {0, 2.0 / 3, 1.0 / 3, 0}, 20000) < 1 + 4 * std::sqrt(2.0));
}

TEST("min-p keeps tokens in proportion to the most probable one") {
  const Logits logits = log_of({0.1, 0.5, 0.26, 0.14});
  CHECK(kept({.min_p = 0.5}, logits) == std::set<int32_t>{1, 2});
  CHECK(kept({.min_p = 0.25}, logits) == std::set<int32_t>{1, 2, 3});
  CHECK(kept({.min_p = 0.19}, logits) == std::set<int32_t>{0, 1, 2, 3});
  CHECK(kept({.min_p = 1}, {2, 2, 1}) == std::set<int32_t>{0, 1});
}

TEST("each filter sees what the one before has left") {
  const Logits logits = log_of({0.5, 0.2, 0.15, 0.1, 0.05});
  CHECK(kept({.top_p = 0.8}, logits) == std::set<int32_t>{0, 1, 2});
  CHECK(kept({.top_k = 3, .top_p = 0.8}, logits) == std::set<int32_t>{0, 1});              // of three: 0.59, 0.24, 0.18
  CHECK(kept({.temperature = 2, .top_p = 0.8}, logits) == std::set<int32_t>{0, 1, 2, 3});  // 0.34, 0.22, 0.19, 0.15, 0.11
  CHECK(kept({.min_p = 0.35}, logits) == std::set<int32_t>{0, 1});
  CHECK(kept({.temperature = 2, .min_p = 0.35}, logits) == std::set<int32_t>{0, 1, 2, 3});      // of the roots: 1, 0.63, 0.55, 0.45, 0.32
  CHECK(kept({.repetition_penalty = 10, .top_k = 2}, logits, {0}) == std::set<int32_t>{1, 2});  // log 0.5 becomes 10 log 0.5
  CHECK(kept({.top_k = 4, .top_p = 0.99, .min_p = 0.29}, logits) == std::set<int32_t>{0, 1, 2});
  CHECK(kept({.top_k = 1, .top_p = 0.01, .min_p = 1}, logits) == std::set<int32_t>{0});
}

TEST("a draw depends on seed, row and position alone") {
  const Logits logits(64, 0.0f);
  const auto sequence = [&](uint64_t seed, uint64_t row) {
    Sampler sampler({.seed = seed});
    Ids ids;
    for (uint64_t position = 0; position < 40; ++position) ids.push_back(sampler.draw(logits, {}, row, position));
    return ids;
  };
  const Ids first = sequence(1, 0);
  CHECK(first == sequence(1, 0));
  CHECK(first != sequence(2, 0));
  CHECK(first != sequence(1, 1));
  Sampler sampler({.seed = 1});
  for (uint64_t position = 40; position-- > 0;) CHECK(sampler.draw(logits, {}, 0, position) == first[position]);
  CHECK(std::set<int32_t>(first.begin(), first.end()).size() > 20);
}

TEST("options out of their range are refused by name") {
  const double nan = std::nan("");
  const std::vector<std::pair<SamplingOptions, std::string>> cases{{{.repetition_penalty = 0}, "repetition_penalty"},
                                                                   {{.repetition_penalty = -1}, "repetition_penalty"},
                                                                   {{.repetition_penalty = nan}, "repetition_penalty"},
                                                                   {{.temperature = -0.1}, "temperature"},
                                                                   {{.temperature = nan}, "temperature"},
                                                                   {{.temperature = HUGE_VAL}, "temperature"},
                                                                   {{.top_k = -1}, "top_k"},
                                                                   {{.top_p = 0}, "top_p"},
                                                                   {{.top_p = 1.1}, "top_p"},
                                                                   {{.top_p = nan}, "top_p"},
                                                                   {{.min_p = -0.1}, "min_p"},
                                                                   {{.min_p = 1.5}, "min_p"},
                                                                   {{.min_p = nan}, "min_p"}};
  for (const auto& [options, name] : cases) CHECK_MESSAGE(holds(message<ValueError>(options), "sampling: " + name + " is out"), name);
  CHECK(message<ValueError>({.top_p = 1, .min_p = 0}) == "no error");
}

TEST("logits that are no distribution are refused with row, position and id") {
  for (const double temperature : {0.0, 1.0}) {
    const SamplingOptions options{.temperature = temperature};
    for (const float bad : {std::nanf(""), kInf}) {
      const std::string text = message<NumericError>(options, {0, 1, bad});
      CHECK(holds(text, "token 5 of row 3"));
      CHECK(holds(text, "id     2"));
    }
    CHECK(holds(message<NumericError>(options, {-kInf, -kInf}), "every logit is -inf"));
    CHECK(holds(message<NumericError>(options, Logits{}), "every logit is -inf"));
    Sampler none(options, {0, 1});
    CHECK_THROWS_AS(none.draw(Logits{1, 2}, {}, 0, 0), NumericError);
  }
}

TEST("on a GPU all rows of a batch draw what each draws on the host, token after token") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const SamplingOptions all[] = {{.temperature = 0},
                                 {.repetition_penalty = 1.3, .temperature = 0},
                                 {.temperature = 1, .seed = 7},
                                 {.temperature = 0.7, .top_k = 1},
                                 {.temperature = 1.5, .top_k = 40, .seed = 2},
                                 {.temperature = 1, .top_p = 0.9, .seed = 3},
                                 {.temperature = 2, .top_p = 1e-9},
                                 {.temperature = 0.9, .min_p = 0.05, .seed = 5},
                                 {.temperature = 1, .min_p = 1},
                                 {.repetition_penalty = 1.2, .temperature = 0.8, .top_k = 50, .top_p = 0.95, .min_p = 0.02, .seed = 11}};
  for (const int64_t vocab : {1, 33, 1000, 50277})
    for (const bool coarse : {false, true})  // many equal logits
      for (const SamplingOptions& options : all) {
        constexpr int64_t B = 5;
        const int64_t padded = vocab + 11;
        const Ids never = vocab > 40 ? Ids{3, static_cast<int32_t>(vocab) - 1, -1} : Ids{};
        std::vector<Ids> seen(B);
        for (int64_t b = 0; b < B; ++b)
          for (int64_t i = 0; i < b * vocab / 20; ++i) seen[static_cast<std::size_t>(b)].push_back(static_cast<int32_t>(7 * i % vocab));
        std::vector<BatchSampler::Row> rows;
        for (uint64_t b = 0; b < B; ++b) rows.push_back({3 * b + 1, 10 * b, seen[b]});
        const BatchSampler batch(gpu, options, never, vocab, rows);
        Sampler one(options, never);
        for (uint64_t token = 0; token < 6; ++token) {
          Logits logits(static_cast<std::size_t>(B * padded));
          for (std::size_t i = 0; i < logits.size(); ++i) {
            logits[i] = 3 * philox_normal(token, i);
            if (coarse) logits[i] = std::round(logits[i]);
            if (vocab > 1 && i % 13 == 5) logits[i] = -kInf;
            if (static_cast<int64_t>(i) % padded >= vocab) logits[i] = 1e30f;  // pads the head
          }
          batch.queue(Tensor::from(Device::cpu(), {B, padded}, logits).to(gpu));
          const Ids drawn = batch.ids();
          for (uint64_t b = 0; b < B; ++b) {
            const auto of_row =
                std::span<const float>(logits).subspan(b * static_cast<std::size_t>(padded), static_cast<std::size_t>(vocab));
            const int32_t expected = one.draw(of_row, seen[b], rows[b].index, rows[b].position + token + 1);
            CAPTURE(vocab);
            CAPTURE(options.top_k);
            CAPTURE(options.top_p);
            CHECK(drawn[b] == expected);
            seen[b].push_back(expected);
          }
        }
      }
}

TEST("on a GPU logits that are no distribution give no id, and leave the other rows alone") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  for (const double temperature : {0.0, 1.0}) {
    const BatchSampler::Row rows[4] = {{0, 0, {}}, {1, 0, {}}, {2, 0, {}}, {3, 0, {}}};
    const BatchSampler batch(gpu, {.temperature = temperature, .top_k = 1}, {}, 3, rows);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    batch.queue(Tensor::from(Device::cpu(), {4, 3}, Logits{0, 1, 0, 0, nan, 0, 0, 0, kInf, -kInf, -kInf, -kInf}).to(gpu));
    CHECK(batch.ids() == Ids{1, kNotANumber, kNotANumber, kNothingPossible});
  }
}
