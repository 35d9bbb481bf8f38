// SSD: bytes, flops and time at the shapes of the Mamba-2 models.
#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"
#include "ops/ssd/ssd.h"

namespace longhand {
namespace {

struct Case {
  int64_t B, T, H, P, G, N;
};

BenchCase make_case(const Device& device, Dtype activations, const Case& c) {
  const auto sets = device.is_cuda() ? 3 : 1;
  std::vector<std::vector<Variable>> inputs;
  std::vector<std::vector<Tensor>> grads;
  for (int i = 0; i < sets; ++i) {
    const auto seed = static_cast<uint64_t>(i) * 100;
    auto leaf = [&](Dtype dtype, Shape shape, uint64_t k, double scale, double mean) {
      return Variable::leaf(repeated_random_tensor(device, dtype, shape, seed + k, scale, mean));
    };
    inputs.push_back({leaf(activations, {c.B, c.T, c.H, c.P}, 1, 1, 0), leaf(activations, {c.B, c.T, c.H}, 2, 1, -4),
                      leaf(Dtype::f32, {c.H}, 3, 0.5, 1), leaf(activations, {c.B, c.T, c.G, c.N}, 4, 1, 0),
                      leaf(activations, {c.B, c.T, c.G, c.N}, 5, 1, 0), leaf(Dtype::f32, {c.H}, 6, 1, 0),
                      leaf(Dtype::f32, {c.H}, 7, 0.5, 0), leaf(Dtype::f32, {c.B, c.H, c.P, c.N}, 8, 1, 0)});
    grads.push_back({repeated_random_tensor(device, activations, {c.B, c.T, c.H, c.P}, seed + 9)});
  }
  BenchCase bench;
  bench.shape = shape_text({{"B", c.B}, {"T", c.T}, {"H", c.H}, {"P", c.P}, {"N", c.N}}) + (c.G > 1 ? " G" + std::to_string(c.G) : "");
  bench.products = true;
  bench.input_sets = sets;
  bench.run = [inputs, grads](int set, bool with_backward) {
    const auto& v = inputs[static_cast<std::size_t>(set)];
    auto forward = [&] { return ssd(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]); };
    if (!with_backward) {
      const NoGrad no_grad;
      forward();
      return;
    }
    for (const Variable& leaf : v) leaf.clear_grad();
    backward({forward().y}, grads[static_cast<std::size_t>(set)]);
  };
  const double s = static_cast<double>(size_of(activations)), tokens = static_cast<double>(c.B * c.T), e = static_cast<double>(c.H * c.P),
               gn = static_cast<double>(c.G * c.N), h = static_cast<double>(c.H),
               states = 4.0 * static_cast<double>(c.B) * e * static_cast<double>(c.N), Q = 64;
  bench.forward_bytes = tokens * s * (2 * e + 2 * gn + h) + 2 * states;       // x, B, C, dt, h0 in; y, h_T out
  bench.backward_bytes = tokens * s * (3 * e + 4 * gn + 2 * h) + 2 * states;  // x, dy, B, C, dt, h0 in; dx, dB, dC, ddt, dh0 out
  const double n = static_cast<double>(c.N);
  bench.forward_flops = tokens * (Q * gn + e * (Q + 4 * n));  // below the diagonal only; C B' once per group
  bench.backward_flops =
      tokens * (Q * gn + e * (2 * Q + 10 * n) + 2 * Q * h * n);  // dY X', V, dB, dC inside the chunk; five products with states
  return bench;
}

std::vector<BenchCase> cases(const Device& device, Dtype activations, const BenchSizes& asked) {
  std::vector<Case> shapes;
  if (asked.given())
    shapes = {{asked.get("B", 8), asked.get("T", 2048), asked.get("H", 24), asked.get("P", 64), asked.get("G", 1), asked.get("N", 128)}};
  else if (device.is_cuda()) shapes = {{8, 2048, 24, 64, 1, 128}, {32, 2048, 24, 64, 1, 128}, {1, 65536, 24, 64, 1, 128}};
  else shapes = {{4, 512, 8, 64, 1, 64}, {2, 512, 8, 64, 1, 128}};
  std::vector<BenchCase> result;
  for (const Case& c : shapes) result.push_back(make_case(device, activations, c));
  return result;
}

const BenchRegistration registration("ssd", cases);

}  // namespace
}  // namespace longhand
