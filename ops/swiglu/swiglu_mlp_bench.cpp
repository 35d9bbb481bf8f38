// The position-wise network of the GLA models as a whole, beside the floor of its six products. Parameters, so that the gradients of the
// weights go straight to their places.
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"
#include "ops/swiglu/swiglu.h"

#include "autograd/tape.h"

namespace longhand {
namespace {

BenchCase make_case(const Device& device, Dtype dtype, int64_t rows, int64_t in, int64_t width) {
  const BenchInputs inputs(device, dtype, {rows, in}, {rows, in});
  const auto parameter = [&](Shape shape, uint64_t seed, const char* name) {
    return Variable::parameter(random_tensor(device, dtype, shape, seed, 0.03), Tensor::zeros(device, Dtype::f32, shape), name);
  };
  const Variable gate_up = parameter({2 * width, in}, 3, "gate_up"), down = parameter({in, width}, 4, "down");
  BenchCase bench;
  bench.shape = std::to_string(rows) + " x " + std::to_string(in) + ", E " + std::to_string(width);
  bench.products = true;
  bench.input_sets = inputs.sets();
  bench.run = [=](int set, bool with_backward) {
    const Variable& x = inputs.xs[static_cast<std::size_t>(set)];
    if (!with_backward) {
      const NoGrad no_grad;
      swiglu_mlp(x, gate_up, down);
      return;
    }
    x.clear_grad();
    gate_up.clear_grad();
    down.clear_grad();
    backward({swiglu_mlp(x, gate_up, down)}, {inputs.grads[static_cast<std::size_t>(set)]});
  };
  const auto size = static_cast<double>(size_of(dtype)), R = static_cast<double>(rows), D = static_cast<double>(in),
             E = static_cast<double>(width);
  bench.forward_bytes = size * (2 * R * D + 3 * D * E);
  bench.backward_bytes = size * (3 * R * D + 3 * D * E) + 4 * 3 * D * E;
  bench.forward_flops = 6 * R * D * E;
  bench.backward_flops = 2 * bench.forward_flops;
  return bench;
}

std::vector<BenchCase> cases(const Device& device, Dtype dtype, const BenchSizes& asked) {
  if (asked.given()) return {make_case(device, dtype, asked.get("rows", 32768), asked.get("in", 1024), asked.get("width", 2816))};
  if (!device.is_cuda()) return {make_case(device, dtype, 1024, 256, 768)};
  return {make_case(device, dtype, 32768, 1024, 2816), make_case(device, dtype, 16384, 1024, 2816)};
}

const BenchRegistration registration("swiglu_mlp", cases);

}  // namespace
}  // namespace longhand
