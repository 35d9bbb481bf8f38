// For the tests of ops whose backward can leave their output once more (autograd/late_value.h).
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "autograd/late_value.h"
#include "core/op_ledger.h"
#include "tests/support/check.h"

namespace longhand::test {

/// What the backward of `op` leaves for those who wait has the bits of its output, and nothing is made again.
/// f  one output of `op`, of leaves with these values
inline void expect_left(const std::string& op, const std::function<Variable(const std::vector<Variable>&)>& f,
                        const std::vector<Tensor>& inputs, const std::string& what) {
  INFO(what);
  const RecomputeScope light(Recompute::light);
  std::vector<Variable> leaves;
  for (const Tensor& input : inputs) leaves.push_back(Variable::leaf(input));
  const Variable y = f(leaves);
  const Tensor value = y.value();
  const Variable weight = Variable::leaf(Tensor::zeros(value.device(), value.dtype(), {1}));
  Tensor left;
  const Variable taken = record("take", value.clone(), {y, weight}, [&left, later = Awaited(y)](BackwardCall& call) {
    call.set(0, call.grad(0));
    later.then(call, 1, [&left](BackwardCall& then, const Tensor& t) {
      left = t.clone();
      then.set(1, Tensor::zeros(t.device(), t.dtype(), {1}));
    });
  });
  OpLedger ledger(value.device());
  backward({taken}, {Tensor::full(value.device(), value.dtype(), value.shape(), 1)});
  REQUIRE(left.defined());
  CHECK(left.to_vector<double>() == value.to_vector<double>());
  bool seen = false;
  for (const auto& [row, numbers] : ledger.rows()) {
    CHECK(row.substr(0, row.find(' ')) != op);
    seen = seen || row.substr(0, row.find(' ')) == op + "_backward";
  }
  CHECK(seen);
}

/// Every device and activation that there is.
inline std::vector<std::pair<Device, Dtype>> places_of_activations() {
  std::vector<std::pair<Device, Dtype>> places{{Device::cpu(), Dtype::f32}, {Device::cpu(), Dtype::f64}};
  if (cuda_device_count() > 0) places.insert(places.end(), {{Device::cuda(), Dtype::f32}, {Device::cuda(), Dtype::bf16}});
  return places;
}

}  // namespace longhand::test
