// State statistics against the states of whole runs, element by element.
#include "eval/state_statistics.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "core/allocator.h"
#include "core/error.h"
#include "core/files.h"
#include "tests/support/small_model.h"

using namespace longhand;
using namespace longhand::test;

namespace {

struct Naive {
  double mean = 0, std = 0, norm = 0, max_abs = 0;
};

Naive naive(const std::vector<double>& values) {
  Naive n;
  const auto count = static_cast<double>(values.size());
  for (const double v : values) n.mean += v / count, n.norm += v * v, n.max_abs = std::max(n.max_abs, std::abs(v));
  for (const double v : values) n.std += (v - n.mean) * (v - n.mean) / count;
  n.std = std::sqrt(n.std), n.norm = std::sqrt(n.norm);
  return n;
}

// One head (or all) of a layer's state after the first `position` tokens of one sequence.
std::vector<double> elements(const LanguageModel& model, const std::vector<int32_t>& tokens, int64_t position, std::size_t layer,
                             const std::string& name, int64_t head) {
  const NoGrad no_grad;
  const auto state = model.forward(one_row(model.device(), tokens, 0, static_cast<std::size_t>(position))).state;
  const Tensor t = state.get(layer, name).value();
  return (head == kAllHeads ? t : t.slice(1, head, head + 1)).to_vector<double>();
}

const StateLine& line_of(const StateCurve& curve, int64_t position, const std::string& tensor, int64_t layer, int64_t head) {
  for (const StateLine& line : curve.lines)
    if (line.position == position && line.tensor == tensor && line.layer == layer && line.head == head) return line;
  FAIL("no line of position " << position << " " << tensor << " layer " << layer << " head " << head);
  return curve.lines.front();
}

StateCurve measure(const LanguageModel& model, const Sequences& sequences, const StateCurveOptions& options) {
  return state_curve(model, each_of(sequences), options);
}

void check_line(const StateLine& line, const std::vector<std::vector<double>>& of_sequences) {
  double mean = 0, std = 0, norm = 0, max_abs = 0, squares = 0;
  const auto n = static_cast<double>(of_sequences.size());
  for (const auto& values : of_sequences) {
    const Naive s = naive(values);
    mean += s.mean / n, std += s.std / n, norm += s.norm / n, max_abs += s.max_abs / n;
  }
  for (const auto& values : of_sequences) squares += std::pow(naive(values).std - std, 2);
  const std::string what = fmt::format("position {} {} layer {} head {}", line.position, line.tensor, line.layer, line.head);
  expect_close({line.mean, line.std, line.norm, line.max_abs}, {mean, std, norm, max_abs}, 1e-11, 1e-6, what);
  expect_close({line.std_error}, {std::sqrt(squares / (n - 1) / n)}, 1e-7, 1e-6, what);
  CHECK(line.sequences == static_cast<int64_t>(of_sequences.size()));
}

}  // namespace

TEST("state: per head, layer and model equal the states of whole runs, for every family, chunk and batch") {
  for (const char* family : kFamilies) {
    const auto model = shaken_model(family, Dtype::f64);
    const Sequences sequences = random_sequences({40, 45, 40});
    const bool has_heads = std::string(family) != "mamba1";
    for (const auto& [chunk, batch] : {std::pair{1000, 8}, {7, 2}, {1, 1}}) {
      CAPTURE(family);
      const StateCurve curve =
          measure(*model, sequences, {.context = 40, .positions = {1, 13, 40}, .conv_windows = true, .chunk = chunk, .batch = batch});
      CHECK(curve.sequences == 3);
      CHECK(curve.tokens == 3 * 40);
      for (const int64_t position : {1, 13, 40}) {
        std::vector<std::vector<double>> all(3);
        double layer_stds = 0;
        for (std::size_t layer = 0; layer < 2; ++layer) {
          std::vector<std::vector<double>> of_layer, of_head;
          for (std::size_t i = 0; i < 3; ++i) {
            of_layer.push_back(elements(*model, sequences[i], position, layer, "ssm", kAllHeads));
            of_head.push_back(elements(*model, sequences[i], position, layer, "ssm", 1));
            all[i].insert(all[i].end(), of_layer[i].begin(), of_layer[i].end());
            layer_stds += naive(of_layer[i]).std / 6;
          }
          const auto number = static_cast<int64_t>(layer);
          check_line(line_of(curve, position, "ssm", number, kAllHeads), of_layer);
          if (has_heads) check_line(line_of(curve, position, "ssm", number, 1), of_head);
        }
        check_line(line_of(curve, position, "ssm", kAllLayers, kAllHeads), all);
        CHECK(line_of(curve, position, "ssm", kMeanOfLayers, kAllHeads).std == doctest::Approx(layer_stds).epsilon(1e-11));
        if (std::string(family) == "gla") continue;  // no convolution by default
        std::vector<std::vector<double>> window;
        for (const auto& tokens : sequences) window.push_back(elements(*model, tokens, position, 1, "conv", kAllHeads));
        check_line(line_of(curve, position, "conv", 1, kAllHeads), window);
      }
    }
  }
}

TEST("state: windows of convolutions are left out unless asked for") {
  const StateCurve curve = measure(*small_model(Dtype::f32), random_sequences({8}), {.context = 8, .positions = {8}});
  for (const StateLine& line : curve.lines) CHECK(line.tensor == "ssm");
  CHECK(std::isnan(curve.lines.front().std_error));  // one sequence
}

TEST("state: moments of parts merge to those of the whole") {
  std::vector<double> values;
  for (int i = 0; i < 100; ++i) values.push_back(1e3 + std::sin(i) * i);
  const Naive whole = naive(values);
  for (const std::size_t at : {0, 1, 37, 100}) {
    Moments m = moments_of(values.data(), at);
    m.merge(moments_of(values.data() + at, values.size() - at));
    CHECK(m.count == 100);
    CHECK(m.mean == doctest::Approx(whole.mean).epsilon(1e-13));
    CHECK(m.std() == doctest::Approx(whole.std).epsilon(1e-12));
    CHECK(m.norm() == doctest::Approx(whole.norm).epsilon(1e-13));
    CHECK(m.max_abs == whole.max_abs);
  }
  CHECK(Moments().std() == 0);
}

TEST("state: histograms count magnitudes in octaves, signs apart, every element once") {
  MagnitudeHistogram h;
  for (const double value : {0.0, 1.0, 1.99, -2.0, 0.5, std::exp2(-31), -1e30, std::exp2(-30)}) h.add(value);
  const auto bin = [](double from) {
    for (int i = 0; i < MagnitudeHistogram::kBins; ++i)
      if (MagnitudeHistogram::from(i) == from) return static_cast<std::size_t>(i);
    return std::size_t{1000};
  };
  CHECK(h.positive[0] == 2);
  CHECK(h.positive[bin(std::exp2(-30))] == 1);
  CHECK(h.positive[bin(0.5)] == 1);
  CHECK(h.positive[bin(1)] == 2);
  CHECK(h.negative[bin(2)] == 1);
  CHECK(h.negative[MagnitudeHistogram::kBins - 1] == 1);
  for (int i = 0; i + 1 < MagnitudeHistogram::kBins; ++i) CHECK(MagnitudeHistogram::to(i) == MagnitudeHistogram::from(i + 1));
  CHECK(MagnitudeHistogram::to(MagnitudeHistogram::kBins - 1) == std::numeric_limits<double>::infinity());

  const auto model = shaken_model("mamba2", Dtype::f64);
  const Sequences sequences = random_sequences({20, 20});
  const StateCurve curve = measure(*model, sequences, {.context = 20, .positions = {20}, .histograms = {5, 20}, .batch = 1});
  REQUIRE(curve.histograms.size() == 6);  // two positions, two layers and all
  MagnitudeHistogram expected;
  for (const auto& tokens : sequences)
    for (const double value : elements(*model, tokens, 5, 1, "ssm", kAllHeads)) expected.add(value);
  const MagnitudeHistogram& found = curve.histograms.at({5, "ssm", 1});
  CHECK(found.negative == expected.negative);
  CHECK(found.positive == expected.positive);
  const std::string csv = state_histogram_csv(curve);
  CHECK(csv.starts_with("position,tensor,layer,magnitude_from,magnitude_to,negative,positive\n5,ssm,all,"));
  CHECK(csv.find("\n20,ssm,1,") != std::string::npos);
  for (const StateLine& line : curve.lines) CHECK(line.position == 20);

  StateCurve every_bin = curve;
  every_bin.histograms[{5, "ssm", 0}] = h;
  const ScratchFolder scratch;
  const std::string path = scratch.file("state-a.histogram.csv");
  write_file_atomically(path, state_histogram_csv(every_bin));
  const auto read = read_state_histogram_csv(path);
  CHECK(read.size() == every_bin.histograms.size());
  for (const auto& [key, histogram] : every_bin.histograms) {
    CHECK(read.at(key).negative == histogram.negative);
    CHECK(read.at(key).positive == histogram.positive);
  }
  write_file_atomically(path, csv + "20,ssm,1,3,6,1,1\n");
  CHECK(message_of<FileError>([&] { read_state_histogram_csv(path); }).find("3 is not the lower end of an octave") != std::string::npos);
}

TEST("state: device memory does not grow with the context") {
  const auto model = small_model(Dtype::f32);
  const auto peak = [&](int64_t context) {
    const Sequences sequences = random_sequences({static_cast<std::size_t>(context)});
    Device::cpu().allocator().reset_peak();
    measure(*model, sequences, {.context = context, .positions = {context / 2, context}, .chunk = 32, .batch = 2});
    return Device::cpu().allocator().use().peak_bytes;
  };
  const int64_t small = peak(128), large = peak(8192);
  CHECK(small > 0);
  CHECK(large == small);
}

TEST("state: wrong positions, short sequences and states that are no numbers are refused") {
  const auto model = small_model(Dtype::f32);
  const Sequences sequences = random_sequences({16});
  const auto message = [&](const StateCurveOptions& options) {
    return message_of<ValueError>([&] { measure(*model, sequences, options); });
  };
  for (const std::vector<int64_t>& positions : {std::vector<int64_t>{0}, {17}, {4, 4}, {5, 4}}) {
    CHECK(message({.context = 16, .positions = positions}).find("positions must rise") != std::string::npos);
    CHECK(message({.context = 16, .positions = {16}, .histograms = positions}).find("positions must rise") != std::string::npos);
  }
  CHECK(message({.context = 16, .positions = {}}).find("no position") != std::string::npos);
  CHECK(message({.context = 17, .positions = {1}}).find("shorter than the context") != std::string::npos);
  const auto broken = small_model(Dtype::f32, std::nan(""));
  CHECK(message_of<NumericError>([&] { measure(*broken, sequences, {.context = 16, .positions = {3}}); }).find("layers.0.ssm") !=
        std::string::npos);
}

TEST("state: the table reads back, and a damaged one is refused") {
  StateCurve curve;
  curve.lines = {{4, "ssm", 0, 1, 2, 0.5, 2, 0.25, 8, 3},
                 {4, "ssm", 0, kAllHeads, 2, 0.5, 2, 0.25, 8, 3},
                 {4, "ssm", kMeanOfLayers, kAllHeads, 1, 0.5, 2, std::nan(""), 8, 3},
                 {4, "ssm", kAllLayers, kAllHeads, 2, 0.5, 2, 0.25, 8, 3}};
  const std::string csv = state_csv(curve);
  CHECK(
      csv.starts_with("position,tensor,layer,head,sequences,mean,std,std_error,norm,max_abs\n4,ssm,0,1,2,0.5,2,0.25,8,3\n4,ssm,0,all,2,"));
  const ScratchFolder scratch;
  const std::string path = scratch.file("state-a.csv");
  write_file_atomically(path, csv);
  const auto lines = read_state_csv(path);
  REQUIRE(lines.size() == 4);
  CHECK(lines[0].head == 1);
  CHECK(lines[1].head == kAllHeads);
  CHECK(lines[2].layer == kMeanOfLayers);
  CHECK(std::isnan(lines[2].std_error));
  CHECK(lines[3].layer == kAllLayers);
  CHECK(lines[3].max_abs == 3);
  write_file_atomically(path, csv + "4,ssm,some,all,2,0.5,2,0.25,8,3\n");
  CHECK_THROWS_AS(read_state_csv(path), FileError);
}
