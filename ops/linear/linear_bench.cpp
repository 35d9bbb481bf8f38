// linear: flops and time at the projections of the models. A parameter, so that the weight gradient goes straight to its place.
#include "ops/linear/linear.h"

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"

namespace longhand {
namespace {

struct Case {
  int64_t rows, in, out;
};

BenchCase make_case(const Device& device, Dtype dtype, const Case& c) {
  const BenchInputs inputs(device, dtype, {c.rows, c.in}, {c.rows, c.out});
  const Variable weight =
      Variable::parameter(random_tensor(device, dtype, {c.out, c.in}, 3, 0.05), Tensor::zeros(device, Dtype::f32, {c.out, c.in}), "weight");
  BenchCase bench;
  bench.shape = std::to_string(c.rows) + " x " + std::to_string(c.in) + " -> " + std::to_string(c.out);
  bench.products = true;
  bench.input_sets = inputs.sets();
  bench.run = [=](int set, bool with_backward) {
    const Variable& x = inputs.xs[static_cast<std::size_t>(set)];
    if (!with_backward) {
      const NoGrad no_grad;
      linear(x, weight);
      return;
    }
    x.clear_grad();
    weight.clear_grad();
    backward({linear(x, weight)}, {inputs.grads[static_cast<std::size_t>(set)]});
  };
  const auto size = static_cast<double>(size_of(dtype)), rows = static_cast<double>(c.rows), in = static_cast<double>(c.in),
             out = static_cast<double>(c.out);
  bench.forward_bytes = size * (rows * in + in * out + rows * out);
  bench.backward_bytes = size * (2 * rows * in + in * out + rows * out) + 4 * in * out;
  bench.forward_flops = 2 * rows * in * out;
  bench.backward_flops = 2 * bench.forward_flops;
  return bench;
}

std::vector<BenchCase> cases(const Device& device, Dtype dtype, const BenchSizes& asked) {
  std::vector<Case> shapes;
  if (asked.given()) shapes = {{asked.get("rows", 65536), asked.get("in", 768), asked.get("out", 3352)}};
  else if (device.is_cuda()) shapes = {{65536, 768, 3352}, {65536, 1536, 768}, {4096, 512, 2200}};
  else shapes = {{1024, 256, 1160}, {1, 1024, 4352}};
  std::vector<BenchCase> result;
  for (const Case& c : shapes) result.push_back(make_case(device, dtype, c));
  return result;
}

const BenchRegistration registration("linear", cases);

}  // namespace
}  // namespace longhand
