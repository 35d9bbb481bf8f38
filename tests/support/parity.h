// For the tests of ops: the same computation on a device and on the CPU in f64, outputs and gradients compared.
#pragma once
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "tests/support/check.h"

namespace longhand::test {

/// One input of a compared computation: random values of this shape, in this dtype on the device; an empty shape stands for "absent".
struct ParityInput {
  Shape shape;
  Dtype dtype;
  double mean = 0;
};

constexpr double kBf16Rounding = 1.0 / 256;  // what one rounding changes an element by at most, relative to it

constexpr double kSmallScale =
    0.1;  // inputs are of size 1: where everything is smaller than this, it is what is left after terms cancelled

/// While one of these lives, LONGHAND_PARITY_EVERY leaves nothing out: for the smallest sizes that take every path of the kernels.
class EveryComparison {
 public:
  EveryComparison() { ++alive; }
  ~EveryComparison() { --alive; }
  EveryComparison(const EveryComparison&) = delete;
  EveryComparison& operator=(const EveryComparison&) = delete;
  static inline int alive = 0;
};

/// LONGHAND_PARITY_EVERY=N keeps every Nth comparison of a process and leaves out the others: for tools under which a kernel takes a
/// thousand times as long.
inline bool is_left_out() {
  static const int64_t every = [] {
    const char* given = std::getenv("LONGHAND_PARITY_EVERY");
    const int64_t n = given == nullptr ? 1 : std::stoll(given);
    REQUIRE(n > 0);
    if (n > 1) MESSAGE("LONGHAND_PARITY_EVERY: 1 comparison of ", n, " is made");
    return n;
  }();
  static int64_t asked = 0;
  return EveryComparison::alive == 0 && asked++ % every != 0;
}

/// How far f32 may be off, relative to the largest element.
struct ParityTolerance {
  double outputs, gradients;
  ParityTolerance(double both) : ParityTolerance(both, both) {}
  ParityTolerance(double of_outputs, double of_gradients) : outputs(of_outputs), gradients(of_gradients) {}
};

/// f maps leaves to outputs; it takes all its dtypes from the leaves, since it also runs with every one of them in f64.
/// Compares each output and the gradient of each input: f32 within `tolerance` of the largest element, bf16 within kBf16Rounding.
/// grad_padding  unread elements behind each row of the output gradients: makes those strided
inline void expect_parity(const std::function<std::vector<Variable>(const std::vector<Variable>&)>& f,
                          const std::vector<ParityInput>& inputs, const Device& device, ParityTolerance tolerance, int64_t grad_padding = 0,
                          const std::string& what = "") {
  if (is_left_out()) return;
  std::vector<Variable> on_device, reference;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].shape.rank() == 0) {
      on_device.emplace_back();
      reference.emplace_back();
      continue;
    }
    const Tensor rounded = random_tensor(Device::cpu(), Dtype::f64, inputs[i].shape, 100 + i, 1.0, inputs[i].mean).to(inputs[i].dtype);
    on_device.push_back(Variable::leaf(rounded.to(device)));
    reference.push_back(Variable::leaf(rounded.to(Dtype::f64)));
  }
  const std::vector<Variable> outputs = f(on_device), expected = f(reference);

  const auto compare = [&](const Tensor& actual, const Tensor& wanted, double in_f32, const std::string& name) {
    REQUIRE(actual.shape() == wanted.shape());
    expect_close(actual.to_vector<double>(), wanted.to_vector<double>(), actual.dtype() == Dtype::bf16 ? kBf16Rounding : in_f32,
                 kSmallScale, what + " " + name);
  };
  std::vector<Variable> roots, expected_roots;
  std::vector<Tensor> grads, expected_grads;
  REQUIRE(outputs.size() == expected.size());
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    compare(outputs[i].value(), expected[i].value(), tolerance.outputs, "output " + std::to_string(i));
    Shape padded = outputs[i].shape();
    padded[-1] += grad_padding;
    const Tensor rounded = random_tensor(Device::cpu(), Dtype::f64, padded, 200 + i).to(outputs[i].value().dtype());
    roots.push_back(outputs[i]);
    grads.push_back(rounded.to(device).slice(-1, 0, outputs[i].shape()[-1]));
    expected_roots.push_back(expected[i]);
    expected_grads.push_back(rounded.to(Dtype::f64).slice(-1, 0, outputs[i].shape()[-1]));
  }
  backward(roots, grads);
  backward(expected_roots, expected_grads);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (!on_device[i]) continue;
    REQUIRE(on_device[i].grad().defined());
    CHECK(on_device[i].grad().dtype() == inputs[i].dtype);
    compare(on_device[i].grad(), reference[i].grad(), tolerance.gradients, "gradient of input " + std::to_string(i));
  }
}

}  // namespace longhand::test
