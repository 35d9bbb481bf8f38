// GLA: bytes, flops and time at the shapes of the GLA models.
#include "ops/gla/gla.h"

#include "autograd/tape.h"
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"

namespace longhand {
namespace {

struct Case {
  int64_t B, T, H, Dk, Dv;
};

BenchCase make_case(const Device& device, Dtype activations, const Case& c) {
  const auto sets = device.is_cuda() ? 3 : 1;
  std::vector<std::vector<Variable>> inputs;
  std::vector<Tensor> grads;
  const Dtype sums = activations == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const Shape keys{c.B, c.T, c.H, c.Dk}, values{c.B, c.T, c.H, c.Dv}, state{c.B, c.H, c.Dk, c.Dv};
  for (int i = 0; i < sets; ++i) {
    const auto seed = static_cast<uint64_t>(i) * 100;
    const auto leaf = [&](Dtype dtype, const Shape& shape, uint64_t k) {
      return Variable::leaf(repeated_random_tensor(device, dtype, shape, seed + k));
    };
    inputs.push_back({leaf(activations, keys, 1), leaf(activations, keys, 2), leaf(activations, values, 3), leaf(activations, keys, 4),
                      leaf(sums, state, 5)});
    grads.push_back(repeated_random_tensor(device, activations, values, seed + 6));
  }
  BenchCase bench;
  bench.shape = shape_text({{"B", c.B}, {"T", c.T}, {"H", c.H}, {"Dk", c.Dk}, {"Dv", c.Dv}});
  bench.products = true;
  bench.input_sets = sets;
  bench.run = [inputs, grads](int set, bool with_backward) {
    const auto& v = inputs[static_cast<std::size_t>(set)];
    const auto forward = [&] { return gla(v[0], v[1], v[2], v[3], v[4]); };
    if (!with_backward) {
      const NoGrad no_grad;
      forward();
      return;
    }
    for (const Variable& leaf : v) leaf.clear_grad();
    backward({forward().o}, {grads[static_cast<std::size_t>(set)]});
  };
  const double s = static_cast<double>(size_of(activations)), rows = static_cast<double>(c.B * c.T * c.H), dk = static_cast<double>(c.Dk),
               dv = static_cast<double>(c.Dv), states = static_cast<double>(size_of(sums)) * static_cast<double>(c.B * c.H) * dk * dv,
               Q = 64;
  bench.forward_bytes = rows * s * (3 * dk + 2 * dv) + 2 * states;       // q, k, gate, v, h0 in; o, h_T out
  bench.backward_bytes = rows * s * (6 * dk + 3 * dv) + 2 * states;      // q, k, gate, v, grad o, h0 in; their gradients out
  bench.forward_flops = rows * (Q * (dk + dv) + 4 * dk * dv);            // pairs j <= i of a chunk; state read and updated
  bench.backward_flops = rows * (Q * (3 * dk + 2 * dv) + 10 * dk * dv);  // scores again, their gradient, q, k, v; five products with states
  return bench;
}

std::vector<BenchCase> cases(const Device& device, Dtype activations, const BenchSizes& asked) {
  std::vector<Case> shapes;
  if (asked.given()) shapes = {{asked.get("B", 8), asked.get("T", 2048), asked.get("H", 4), asked.get("Dk", 128), asked.get("Dv", 256)}};
  else if (device.is_cuda()) shapes = {{8, 2048, 4, 128, 256}, {32, 2048, 4, 128, 256}, {1, 65536, 4, 128, 256}};
  else shapes = {{2, 512, 4, 64, 128}};
  std::vector<BenchCase> result;
  for (const Case& c : shapes) result.push_back(make_case(device, activations, c));
  return result;
}

const BenchRegistration registration("gla", cases);

}  // namespace
}  // namespace longhand
