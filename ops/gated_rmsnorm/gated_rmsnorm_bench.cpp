// Gated RMSNorm at the shapes of Mamba-2 (gate first, whole rows) and GLA (norm first, per head).
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"
#include "ops/gated_rmsnorm/gated_rmsnorm.h"

namespace longhand {
namespace {

std::vector<BenchCase> cases(const Device& device, Dtype activations, const BenchSizes& asked) {
  struct Size {
    int64_t rows, width;
    GatedRmsnormOptions options;
    const char* name;
  };
  const GatedRmsnormOptions mamba2{1e-5, 1, false}, grouped{1e-5, 8, false}, gla{1e-6, 1, true};
  const GatedRmsnormOptions with_groups{1e-5, asked.get("groups", 1), false};
  const std::vector<Size> sizes = asked.given()
                                      ? std::vector<Size>{{asked.get("rows", 65536), asked.get("E", 1536), with_groups, "gate first"}}
                                  : device.is_cuda() ? std::vector<Size>{{65536, 1536, mamba2, "gate first"},
                                                                         {65536, 1536, grouped, "gate first, 8 groups"},
                                                                         {262144, 256, gla, "norm first"}}
                                                     : std::vector<Size>{{2048, 1024, mamba2, "gate first"}};
  std::vector<BenchCase> result;
  for (const Size& size : sizes) {
    struct Set {
      Variable y, z, weight;
      Tensor grad;
    };
    std::vector<Set> sets;
    const Shape shape{size.rows, size.width};
    const int count = device.is_cuda() ? 3 : 1;
    for (int i = 0; i < count; ++i) {
      const auto seed = static_cast<uint64_t>(10 * i);
      sets.push_back(
          {Variable::leaf(repeated_random_tensor(device, activations, shape, seed)),
           Variable::leaf(repeated_random_tensor(device, activations, shape, seed + 1)),
           Variable::leaf(repeated_random_tensor(device, activations == Dtype::f64 ? Dtype::f64 : Dtype::f32, {size.width}, seed + 2)),
           repeated_random_tensor(device, activations, shape, seed + 3)});
    }
    BenchCase bench;
    bench.shape = std::to_string(size.rows) + " x " + std::to_string(size.width) + " " + size.name;
    bench.input_sets = count;
    bench.run = [sets, options = size.options](int i, bool backward_too) {
      const Set& set = sets[static_cast<std::size_t>(i)];
      if (!backward_too) {
        const NoGrad no_grad;
        gated_rmsnorm(set.y, set.z, set.weight, options);
        return;
      }
      for (const Variable& leaf : {set.y, set.z, set.weight}) leaf.clear_grad();
      backward({gated_rmsnorm(set.y, set.z, set.weight, options)}, {set.grad});
    };
    const double elements = static_cast<double>(size.rows * size.width), a = static_cast<double>(size_of(activations));
    bench.forward_bytes = elements * 3 * a;
    bench.backward_bytes = elements * 5 * a;
    bench.forward_flops = 10 * elements;
    bench.backward_flops = 25 * elements;
    result.push_back(std::move(bench));
  }
  return result;
}

const BenchRegistration registration("gated_rmsnorm", cases);

}  // namespace
}  // namespace longhand
