// The measures of a model on a GPU are those of the same model on the CPU.
#include <fmt/format.h>

#include "eval/forgetting.h"
#include "eval/perplexity.h"
#include "eval/remembrance.h"
#include "eval/state_statistics.h"
#include "tests/support/small_model.h"

using namespace longhand;
using namespace longhand::test;

namespace {

// f32 on both: sums in another order through two layers, as bounded in models (kPiecesTolerance), and some of it through exponentials.
constexpr double kParityTolerance = 1e-3;

std::vector<double> everything(const LanguageModel& model, const Sequences& sequences) {
  std::vector<double> values = position_loss(model, each_of(sequences), {.context = 60, .chunk = 25, .batch = 2}).loss_sum;
  const auto remembrance =
      effective_remembrance(model, each_of(sequences), {.context = 60, .starts = {0, 13, 40, 59}, .chunk = 25, .batch = 8});
  for (const auto& of_start : remembrance.values) values.insert(values.end(), of_start.begin(), of_start.end());
  const auto state =
      state_curve(model, each_of(sequences), {.context = 60, .positions = {1, 33, 60}, .conv_windows = true, .chunk = 25, .batch = 2});
  for (const StateLine& line : state.lines) values.insert(values.end(), {line.mean, line.std, line.norm, line.max_abs});
  const auto forgetting_ = forgetting(model, each_of(sequences), {.context = 60, .lags = {1, 4, 16, 60}, .chunk = 25, .batch = 2});
  for (const auto& head : forgetting_.heads) values.insert(values.end(), head.curve.retention.begin(), head.curve.retention.end());
  return values;
}

}  // namespace

TEST("measures: CUDA equals the CPU, for every family") {
  if (cuda_device_count() == 0) SKIP("there is no CUDA device");
  const Sequences sequences = random_sequences({61, 61, 70});
  for (const char* family : kFamilies) {
    const auto cpu = shaken_model(family, Dtype::f32), cuda = shaken_model(family, Dtype::f32, Device::cuda());
    const auto expected = everything(*cpu, sequences), found = everything(*cuda, sequences);
    REQUIRE(found.size() == expected.size());
    for (std::size_t i = 0; i < found.size(); ++i)
      expect_close({found[i]}, {expected[i]}, kParityTolerance, 0.1, fmt::format("{} value {}", family, i));
    const auto half = shaken_model(family, Dtype::bf16, Device::cuda());
    for (const double value : everything(*half, sequences)) CHECK(std::isfinite(value));
  }
}
