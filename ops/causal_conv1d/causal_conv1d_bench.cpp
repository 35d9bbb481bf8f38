// Causal convolution at the shapes of Mamba-1 and Mamba-2.
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"

namespace longhand {
namespace {

constexpr int64_t kWidth = 4;

std::vector<BenchCase> cases(const Device& device, Dtype activations, const BenchSizes& asked) {
  struct Size {
    int64_t B, T, C;
  };
  const std::vector<Size> sizes = asked.given()      ? std::vector<Size>{{asked.get("B", 32), asked.get("T", 2048), asked.get("C", 1536)}}
                                  : device.is_cuda() ? std::vector<Size>{{32, 2048, 1536}, {8, 2048, 1792}, {1, 65536, 1536}}
                                                     : std::vector<Size>{{1, 2048, 512}};
  std::vector<BenchCase> result;
  for (const auto [B, T, C] : sizes) {
    struct Set {
      Variable x, weight, bias;
      Tensor grad;
    };
    std::vector<Set> sets;
    const Dtype sums = activations == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    const int count = device.is_cuda() ? 3 : 1;
    for (int i = 0; i < count; ++i) {
      const auto seed = static_cast<uint64_t>(10 * i);
      sets.push_back({Variable::leaf(repeated_random_tensor(device, activations, {B, T, C}, seed)),
                      Variable::leaf(repeated_random_tensor(device, sums, {C, 1, kWidth}, seed + 1, 0.3)),
                      Variable::leaf(repeated_random_tensor(device, sums, {C}, seed + 2, 0.3)),
                      repeated_random_tensor(device, activations, {B, T, C}, seed + 3)});
    }
    BenchCase bench;
    bench.shape = "B" + std::to_string(B) + " T" + std::to_string(T) + " C" + std::to_string(C) + " W" + std::to_string(kWidth);
    bench.input_sets = count;
    bench.run = [sets](int i, bool backward_too) {
      const Set& set = sets[static_cast<std::size_t>(i)];
      if (!backward_too) {
        const NoGrad no_grad;
        causal_conv1d_silu(set.x, set.weight, set.bias, Variable());
        return;
      }
      for (const Variable& leaf : {set.x, set.weight, set.bias}) leaf.clear_grad();
      backward({causal_conv1d_silu(set.x, set.weight, set.bias, Variable()).y}, {set.grad});
    };
    const double elements = static_cast<double>(B * T * C), a = static_cast<double>(size_of(activations));
    bench.forward_bytes = elements * 2 * a;
    bench.backward_bytes = elements * 3 * a;
    bench.forward_flops = 12 * elements;
    bench.backward_flops = 35 * elements;
    result.push_back(std::move(bench));
  }
  return result;
}

const BenchRegistration registration("causal_conv1d_silu", cases);

}  // namespace
}  // namespace longhand
