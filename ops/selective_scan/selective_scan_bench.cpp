// The selective scan: bytes, work and time at the shapes of the Mamba-1 models.
#include "autograd/tape.h"
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"
#include "ops/selective_scan/selective_scan.h"

namespace longhand {
namespace {

struct Case {
  int64_t B, T, D, N;
};

BenchCase make_case(const Device& device, Dtype activations, const Case& c) {
  const int sets = device.is_cuda() ? 3 : 1;
  const Dtype sums = activations == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  std::vector<std::vector<Variable>> inputs;
  std::vector<Tensor> grads;
  for (int i = 0; i < sets; ++i) {
    const auto seed = static_cast<uint64_t>(i) * 100;
    auto leaf = [&](Dtype dtype, Shape shape, uint64_t k, double scale, double mean) {
      return Variable::leaf(repeated_random_tensor(device, dtype, shape, seed + k, scale, mean));
    };
    inputs.push_back({leaf(activations, {c.B, c.T, c.D}, 1, 1, 0), leaf(activations, {c.B, c.T, c.D}, 2, 0.5, 0),
                      leaf(sums, {c.D, c.N}, 3, 0.5, 1.5), leaf(activations, {c.B, c.T, c.N}, 4, 1, 0),
                      leaf(activations, {c.B, c.T, c.N}, 5, 1, 0), leaf(sums, {c.D}, 6, 1, 0), leaf(activations, {c.B, c.T, c.D}, 7, 1, 0),
                      leaf(sums, {c.D}, 8, 0.5, -4), leaf(sums, {c.B, c.D, c.N}, 9, 1, 0)});
    grads.push_back(repeated_random_tensor(device, activations, {c.B, c.T, c.D}, seed + 10));
  }
  BenchCase bench;
  bench.shape = "B" + std::to_string(c.B) + " T" + std::to_string(c.T) + " D" + std::to_string(c.D) + " N" + std::to_string(c.N);
  bench.input_sets = sets;
  bench.run = [inputs, grads](int set, bool with_backward) {
    const auto& v = inputs[static_cast<std::size_t>(set)];
    const auto forward = [&] { return selective_scan(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]); };
    if (!with_backward) {
      const NoGrad no_grad;
      forward();
      return;
    }
    for (const Variable& leaf : v) leaf.clear_grad();
    backward({forward().y}, {grads[static_cast<std::size_t>(set)]});
  };
  const double s = static_cast<double>(size_of(activations)), tokens = static_cast<double>(c.B * c.T), d = static_cast<double>(c.D),
               n = static_cast<double>(c.N), states = 4.0 * static_cast<double>(c.B) * d * n;
  bench.forward_bytes = tokens * s * (4 * d + 2 * n) + 2 * states;   // x, dt, z, B_t, C_t, h0 in; y, h_T out
  bench.backward_bytes = tokens * s * (7 * d + 4 * n) + 2 * states;  // x, dt, z, grad_y, B_t, C_t, h0 in; their gradients out
  bench.forward_flops = tokens * d * (6 * n + 11);
  bench.backward_flops = tokens * d * (19 * n + 28);
  bench.forward_exps = tokens * d * (n + 2);   // the decays, softplus and the gate
  bench.backward_exps = tokens * d * (n + 2);  // the same again: only the states at borders are kept
  return bench;
}

std::vector<BenchCase> cases(const Device& device, Dtype activations, const BenchSizes& asked) {
  std::vector<BenchCase> result;
  const std::vector<Case> shapes =
      asked.given()      ? std::vector<Case>{{asked.get("B", 8), asked.get("T", 2048), asked.get("D", 1536), asked.get("N", 16)}}
      : device.is_cuda() ? std::vector<Case>{{8, 2048, 1536, 16}, {32, 2048, 1536, 16}, {1, 65536, 1536, 16}}
                         : std::vector<Case>{{2, 512, 512, 16}};
  for (const Case& c : shapes) result.push_back(make_case(device, activations, c));
  return result;
}

const BenchRegistration registration("selective_scan", cases);

}  // namespace
}  // namespace longhand
