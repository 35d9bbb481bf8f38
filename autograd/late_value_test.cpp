// Gradients that wait for a value which the backward of the op in front leaves: the same sums, at the right moment.
#include "autograd/late_value.h"

#include "autograd/gradcheck.h"
#include "autograd/gradient_arrival.h"
#include "autograd/parameters.h"
#include "core/allocator.h"
#include "core/error.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

const Device kCpu = Device::cpu();

Tensor times(const Tensor& a, const Tensor& b) {
  auto values = a.to_vector<double>();
  const auto factors = b.to_vector<double>();
  for (std::size_t i = 0; i < values.size(); ++i) values[i] *= factors[i];
  return Tensor::from(kCpu, a.shape(), values);
}

Tensor threefold(const Tensor& t) {
  return times(t, Tensor::full(kCpu, Dtype::f64, t.shape(), 3));
}

struct Counts {
  int made = 0, left = 0;
};

// 3 x, which can be made again or left by the backward.
Variable tripled(const Variable& x, Counts& counts, bool gives = true) {
  const auto late = std::make_shared<LateValue>();
  const Variable y = record("tripled", threefold(x.value()), {x}, [x, late, gives, &counts](BackwardCall& call) {
    call.set(0, threefold(call.grad(0)));
    if (!late->wanted() || !gives) return;
    ++counts.left;
    late->give(threefold(x.value()));
  });
  const auto make_again = [x, &counts] {
    ++counts.made;
    return threefold(x.value());
  };
  return remade(y, make_again, late);
}

// x w elementwise; the gradient of w can wait for x.
Variable product(const Variable& x, const Variable& w) {
  const Awaited x_later(x);
  return record("product", times(x.value(), w.value()), {x, w}, [x_later, w](BackwardCall& call) {
    const Tensor grad = call.grad(0);
    call.set(0, times(grad, w.value()));
    if (!call.needs(1)) return;
    x_later.then(call, 1, [grad](BackwardCall& then, const Tensor& x_again) { then.set(1, times(grad, x_again)); });
  });
}

Tensor three_numbers(uint64_t seed) {
  return random_tensor(kCpu, Dtype::f64, {3}, seed);
}

TEST("late values: a leaf's gradient waits for what the backward in front leaves, through a reshape too; nothing is made again") {
  const RecomputeScope light(Recompute::light);
  for (const bool reshaped : {false, true}) {
    Counts counts;
    const auto f = [&](const std::vector<Variable>& in) {
      const Variable y = tripled(in[0], counts);
      return std::vector<Variable>{product(reshaped ? reshape(y, {3, 1}) : y, in[1])};
    };
    const Tensor w = three_numbers(2);
    CHECK(gradcheck(f, {three_numbers(1), reshaped ? w.reshape({3, 1}) : w}).worst < 1e-7);
    CHECK(counts.left > 0);
    CHECK(counts.made == 0);
  }
}

TEST("late values: several gradients wait for one value, and one that is needed before is made once for all") {
  const RecomputeScope light(Recompute::light);
  Counts counts;
  const auto both = [&](const std::vector<Variable>& in) {
    const Variable y = tripled(in[0], counts);
    return std::vector<Variable>{product(y, in[1]), product(y, in[2])};
  };
  CHECK(gradcheck(both, {three_numbers(1), three_numbers(2), three_numbers(3)}).worst < 1e-7);
  CHECK(counts.made == 0);
  CHECK(counts.left > 0);
  counts = {};
  const auto one_needs_it = [&](const std::vector<Variable>& in) {
    const Variable y = tripled(in[0], counts), first = product(y, in[1]);
    const Kept kept(y);
    const Variable second = record("needs_it", times(y.value(), y.value()), {y}, [kept](BackwardCall& call) {
      call.set(0, times(times(call.grad(0), kept.get()), Tensor::full(kCpu, Dtype::f64, {3}, 2)));
    });
    return std::vector<Variable>{first, second};
  };
  CHECK(gradcheck(one_needs_it, {three_numbers(1), three_numbers(2)}).worst < 1e-7);
  CHECK(counts.made > 0);
  CHECK(counts.left == 0);
}

TEST("late values: the gradient of a weight that was computed itself does not wait, for its own backward may come before") {
  const RecomputeScope light(Recompute::light);
  Counts counts, of_weight;
  const auto f = [&](const std::vector<Variable>& in) {
    const Variable y = tripled(in[0], counts), w = tripled(in[1], of_weight);
    return std::vector<Variable>{product(y, w)};
  };
  CHECK(gradcheck(f, {three_numbers(1), three_numbers(2)}).worst < 1e-7);
  CHECK(counts.made > 0);
  CHECK(counts.left == 0);
}

TEST("late values: without recomputation everything is kept, and nobody waits") {
  Counts counts;
  const auto f = [&](const std::vector<Variable>& in) { return std::vector<Variable>{product(tripled(in[0], counts), in[1])}; };
  CHECK(gradcheck(f, {three_numbers(1), three_numbers(2)}).worst < 1e-7);
  CHECK(counts.made == 0);
  CHECK(counts.left == 0);
}

TEST("late values: a gradient's arrival is told when it is there, not while it waits") {
  const RecomputeScope light(Recompute::light);
  ParameterSet set;
  Parameter* first = set.declare("first", {3}, {.init = init_constant(2)});
  Parameter* second = set.declare("second", {3}, {.init = init_constant(5)});
  set.allocate(kCpu, Dtype::f64, Dtype::f64);
  set.initialize(1);
  Counts counts;
  const Variable inner = product(Variable(Tensor::full(kCpu, Dtype::f64, {3}, 1)), first->variable);
  const Variable y = product(tripled(inner, counts), second->variable);
  const Variable root = record("sum", Tensor::full(kCpu, Dtype::f64, {}, 90), {y},
                               [](BackwardCall& call) { call.set(0, Tensor::full(kCpu, Dtype::f64, {3}, 1)); });
  std::vector<std::string> order;
  backward(root, [&](const std::string& name) {
    order.push_back(name);
    CHECK(set.find(name)->grad.to_vector<double>() == std::vector<double>(3, name == "second" ? 6 : 15));
  });
  CHECK(order == std::vector<std::string>{"second", "first"});
  CHECK(counts.left == 1);
}

TEST("late values: a backward that is broken off while a gradient waits leaves nothing behind, and cannot be gone on with") {
  const int64_t before = kCpu.allocator().use().live_bytes;
  for (const bool once_more : {false, true}) {
    const RecomputeScope light(Recompute::light);
    Counts counts;
    const Variable x = Variable::leaf(three_numbers(1)), w = Variable::leaf(three_numbers(2));
    const Variable y = tripled(x, counts);
    const Variable fails = record("fails", threefold(y.value()), {y}, [](BackwardCall&) { throw NumericError("broken off"); });
    const Tensor grad = three_numbers(3);
    CHECK_THROWS_WITH_AS(backward({fails, product(y, w)}, {grad, grad}), doctest::Contains("broken off"), NumericError);
    CHECK(counts.left == 0);
    if (once_more) CHECK_THROWS_WITH_AS(backward({y}, {grad}), doctest::Contains("already walked"), ValueError);
  }
  CHECK(kCpu.allocator().use().live_bytes == before);
}

TEST("late values: a backward that never gives what it can leave is an error") {
  const RecomputeScope light(Recompute::light);
  Counts counts;
  const Variable x = Variable::leaf(three_numbers(1)), w = Variable::leaf(three_numbers(2));
  const Variable y = product(tripled(x, counts, false), w);
  CHECK_THROWS_WITH_AS(backward({y}, {three_numbers(3)}), doctest::Contains("waited for a value that nobody gave"), ValueError);
}

}  // namespace
