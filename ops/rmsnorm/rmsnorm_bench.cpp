// Residual add + RMSNorm at the shapes of the language models.
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"
#include "ops/rmsnorm/rmsnorm.h"

namespace longhand {
namespace {

std::vector<BenchCase> cases(const Device& device, Dtype activations, const BenchSizes& asked) {
  struct Size {
    int64_t rows, width;
    bool residual_grad;  // in training a gradient also arrives through the residual stream
  };
  const std::vector<Size> sizes =
      asked.given() ? std::vector<Size>{{asked.get("rows", 65536), asked.get("D", 768), true}}
      : device.is_cuda()
          ? std::vector<Size>{{65536, 768, false}, {65536, 768, true}, {65536, 2048, false}, {65536, 2048, true}, {32768, 512, true}}
          : std::vector<Size>{{2048, 512, true}};
  std::vector<BenchCase> result;
  for (const auto [rows, width, residual_grad] : sizes) {
    struct Set {
      Variable x, residual, weight;
      Tensor grad_y, grad_residual;
    };
    std::vector<Set> sets;
    const Dtype sums = activations == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    const int count = device.is_cuda() ? 3 : 1;
    for (int i = 0; i < count; ++i) {
      const auto seed = static_cast<uint64_t>(10 * i);
      sets.push_back({Variable::leaf(repeated_random_tensor(device, activations, {rows, width}, seed)),
                      Variable::leaf(repeated_random_tensor(device, sums, {rows, width}, seed + 1)),
                      Variable::leaf(repeated_random_tensor(device, sums, {width}, seed + 2)),
                      repeated_random_tensor(device, activations, {rows, width}, seed + 3),
                      repeated_random_tensor(device, sums, {rows, width}, seed + 4)});
    }
    BenchCase bench;
    bench.shape = std::to_string(rows) + " x " + std::to_string(width) + (residual_grad ? " with residual gradient" : "");
    bench.input_sets = count;
    bench.run = [sets, activations, residual_grad](int i, bool backward_too) {
      const Set& set = sets[static_cast<std::size_t>(i)];
      if (!backward_too) {
        const NoGrad no_grad;
        add_rmsnorm(set.x, set.residual, set.weight, 1e-5, activations);
        return;
      }
      for (const Variable& leaf : {set.x, set.residual, set.weight}) leaf.clear_grad();
      auto [y, residual] = add_rmsnorm(set.x, set.residual, set.weight, 1e-5, activations);
      residual_grad ? backward({y, residual}, {set.grad_y, set.grad_residual}) : backward({y}, {set.grad_y});
    };
    const auto elements = static_cast<double>(rows * width), a = static_cast<double>(size_of(activations)),
               s = static_cast<double>(size_of(sums));
    bench.forward_bytes = elements * (2 * a + 2 * s);
    // grad_y, y or the sum, the residual's gradient in; the sum's gradient out, in a narrower dtype once more
    const double kept_and_rounded = a < s ? 2 * a : s;
    bench.backward_bytes = elements * (a + kept_and_rounded + (residual_grad ? 2 : 1) * s);
    bench.forward_flops = 5 * elements;
    bench.backward_flops = 9 * elements;
    result.push_back(std::move(bench));
  }
  return result;
}

const BenchRegistration registration("add_rmsnorm", cases);

}  // namespace
}  // namespace longhand
