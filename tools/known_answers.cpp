// See known_answers.h.
#include "tools/known_answers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>

#include "autograd/tape.h"
#include "core/philox.h"
#include "models/language_model.h"
#include "models/model_config.h"
#include "ops/gla/gla.h"
#include "ops/selective_scan/selective_scan.h"
#include "ops/ssd/ssd.h"

namespace longhand {
namespace {

using Values = std::vector<double>;

// --- known answers ------------------------------------------------------------------------------------------------

// Element i of an input, from 0 in row-major order, is alpha * sin(beta * (i + 1)).
Variable wave(Dtype dtype, Shape shape, double alpha, double beta) {
  Values values(static_cast<std::size_t>(shape.numel()));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = alpha * std::sin(beta * static_cast<double>(i + 1));
  return Variable(Tensor::from(Device::cpu(), shape, values).to(dtype));
}

struct Answer {
  Tensor out, h_T;
};

struct KnownAnswer {
  const char* name;
  Answer (*compute)(Dtype);
  Values out, h_T;
};

Answer scan_answer(Dtype f) {
  const auto [y, h_T] = selective_scan(wave(f, {1, 3, 2}, 1, .7), wave(f, {1, 3, 2}, 1, .3), wave(f, {2, 2}, .5, 1.3),
                                       wave(f, {1, 3, 2}, 1, .5), wave(f, {1, 3, 2}, 1, 1.7), wave(f, {2}, 1, .2),
                                       wave(f, {1, 3, 2}, 1, .9), wave(f, {2}, .5, 1.1), wave(f, {1, 2, 2}, 1, 2.3));
  return {y.value(), h_T.value()};
}

Answer ssd_answer(Dtype f) {
  const auto [y, h_T] = ssd(wave(f, {1, 5, 2, 2}, 1, .7), wave(f, {1, 5, 2}, 1, .3), wave(f, {2}, .5, 1.3), wave(f, {1, 5, 1, 2}, 1, .5),
                            wave(f, {1, 5, 1, 2}, 1, 1.7), wave(f, {2}, 1, .2), wave(f, {2}, .5, 1.1), wave(f, {1, 2, 2, 2}, 1, 2.3));
  return {y.value(), h_T.value()};
}

Answer gla_answer(Dtype f) {
  const auto [o, h_T] = gla(wave(f, {1, 5, 1, 2}, 1, .7), wave(f, {1, 5, 1, 2}, 1, .5), wave(f, {1, 5, 1, 3}, 1, 1.7),
                            wave(f, {1, 5, 1, 2}, 2, .3), wave(f, {1, 1, 2, 3}, 1, 2.3));
  return {o.value(), h_T.value()};
}

const std::vector<KnownAnswer>& known_answers() {
  static const std::vector<KnownAnswer> answers{
      {"selective scan (Mamba-1)",
       scan_answer,
       {0.266145784, 0.650225963, -0.115910645, 0.028489698, 0.0849480076, 0.217111575},
       {-0.256827491, 0.0615955397, -0.57900863, 0.125295968}},
      {"SSD (Mamba-2)",
       ssd_answer,
       {0.476922058, 0.568780143,   0.417444318,  0.192615821,   0.158488017, 0.431862143,  0.37609922,
        0.225877481, 0.00851963113, 0.52742722,   0.946257068,   0.830699132, -0.151667085, 0.150014308,
        0.110469102, 0.140243492,   -0.485836591, -0.0158575671, 0.436220012, 0.709185768},
       {0.714260804, 0.672362838, -0.00625849127, 0.0208596737, -0.50528283, -0.391038533, -0.80973576, -0.670565639}},
      {"GLA",
       gla_answer,
       {1.28111955, -1.24544983, 0.157466397, 1.37892879, -0.251279403, -0.470358435, -1.1804814, 0.0741604762, 0.348627934, -2.06367183,
        -0.154448226, 1.00315352, 1.0110234, 0.402830142, -0.701322804},
       {1.69107264, 1.23006002, -1.02183358, 2.13302598, 0.835642225, -1.48349938}},
  };
  return answers;
}

double largest_error(const Values& actual, const Values& expected) {
  if (actual.size() != expected.size()) return INFINITY;
  double worst = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(actual[i] - expected[i]);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  return worst;
}

SelfTestRow judge(const std::string& name, double error, double allowed) {
  return {name, error <= allowed, fmt::format("largest error {:.1e}, allowed {:.0e}", error, allowed)};
}

SelfTestRow checked(const std::string& name, const std::function<SelfTestRow()>& check) {
  try {
    return check();
  } catch (const std::exception& error) {
    return {name, false, error.what()};
  }
}

// --- small models -------------------------------------------------------------------------------------------------

struct Measured {
  double loss;
  Values grad;
};

Measured measure(const std::string& family, const Device& device, Dtype dtype) {
  ModelConfig config = default_config(family);
  config.d_model = 128, config.n_layer = 2, config.vocab_size = 64;
  config.complete();
  LanguageModel model(config, device, dtype);
  model.initialize(1);
  std::vector<int32_t> tokens, targets;
  for (uint64_t i = 0; i < 2 * 150; ++i) {
    tokens.push_back(static_cast<int32_t>(philox_u64(1, i) % 64));
    targets.push_back(static_cast<int32_t>(philox_u64(2, i) % 64));
  }
  const Shape shape{2, 150};  // more than two chunks, the last one cut
  const auto result = model.loss({Tensor::from(device, shape, tokens), Tensor::from(device, shape, targets), {}});
  backward(result.loss);
  model.parameters().complete_grads();
  return {result.loss.value().to(Device::cpu()).item(), model.parameters().flat_grad().to_vector<double>()};
}

// |a - b| / |b| over all elements together.
double distance(const Values& a, const Values& b) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) difference += (a[i] - b[i]) * (a[i] - b[i]), size += b[i] * b[i];
  const double result = std::sqrt(difference / std::max(size, 1e-300));
  return a.size() != b.size() || std::isnan(result) ? INFINITY : result;
}

}  // namespace

std::vector<SelfTestRow> self_test(const Device& device) {
  std::vector<SelfTestRow> rows;
  if (!device.is_cuda())
    for (const KnownAnswer& known : known_answers())
      for (const auto& [dtype, allowed] : {std::pair(Dtype::f64, 1e-8), std::pair(Dtype::f32, 1e-5)}) {  // the values have nine digits
        const std::string name = fmt::format("{} in {}", known.name, name_of(dtype));
        rows.push_back(checked(name, [&, type = dtype, bound = allowed] {
          const Answer answer = known.compute(type);
          return judge(
              name,
              std::max(largest_error(answer.out.to_vector<double>(), known.out), largest_error(answer.h_T.to_vector<double>(), known.h_T)),
              bound);
        }));
      }
  for (const char* family : {"mamba1", "mamba2", "gla"}) {
    const std::string name = fmt::format("{} model", family);
    std::string part = name + ", loss near log(vocabulary)";
    rows.push_back(checked(part, [&] { return judge(part, std::abs(measure(family, device, Dtype::f32).loss - std::log(64.0)), 0.5); }));
    part = name + ", the same bits twice";
    rows.push_back(checked(part, [&] {
      const Measured first = measure(family, device, Dtype::f32), second = measure(family, device, Dtype::f32);
      const bool same = first.loss == second.loss && first.grad == second.grad;
      return SelfTestRow{part, same, same ? fmt::format("loss and {} gradients", first.grad.size()) : "loss or gradients differ"};
    }));
    if (!device.is_cuda()) continue;
    for (const auto& [dtype, allowed] : {std::pair(Dtype::f32, 1e-4), std::pair(Dtype::bf16, 5e-2)}) {
      part = fmt::format("{}, gradient in {} beside the CPU's", name, name_of(dtype));
      rows.push_back(checked(part, [&, type = dtype, bound = allowed] {
        const Measured here = measure(family, device, type), reference = measure(family, Device::cpu(), Dtype::f32);
        return judge(part, std::max(distance(here.grad, reference.grad), std::abs(here.loss - reference.loss)), bound);
      }));
    }
  }
  return rows;
}

}  // namespace longhand
