// SwiGLU at the shapes of the GLA models: the two halves of one projection, as the models give them.
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"
#include "ops/swiglu/swiglu.h"

#include "autograd/tape.h"

namespace longhand {
namespace {

std::vector<BenchCase> cases(const Device& device, Dtype activations, const BenchSizes& asked) {
  struct Size {
    int64_t rows, width;
  };
  const std::vector<Size> sizes = asked.given()      ? std::vector<Size>{{asked.get("rows", 32768), asked.get("width", 2816)}}
                                  : device.is_cuda() ? std::vector<Size>{{32768, 2816}, {16384, 5632}}
                                                     : std::vector<Size>{{2048, 1024}};
  std::vector<BenchCase> result;
  for (const auto& [rows, width] : sizes) {
    struct Set {
      Variable both;  // [rows, gate and up]
      Tensor grad;
    };
    std::vector<Set> sets;
    const int count = device.is_cuda() ? 3 : 1;
    for (int i = 0; i < count; ++i) {
      const auto seed = static_cast<uint64_t>(10 * i);
      sets.push_back({Variable::leaf(repeated_random_tensor(device, activations, {rows, 2 * width}, seed)),
                      repeated_random_tensor(device, activations, {rows, width}, seed + 1)});
    }
    BenchCase bench;
    bench.shape = std::to_string(rows) + " x " + std::to_string(width);
    bench.input_sets = count;
    bench.run = [sets, width = width](int i, bool backward_too) {
      const Set& set = sets[static_cast<std::size_t>(i)];
      const auto run = [&] {
        const auto parts = split(set.both, {width, width});
        return swiglu(parts[0], parts[1]);
      };
      if (!backward_too) {
        const NoGrad no_grad;
        run();
        return;
      }
      set.both.clear_grad();
      backward({run()}, {set.grad});
    };
    const double elements = static_cast<double>(rows * width), a = static_cast<double>(size_of(activations));
    bench.forward_bytes = elements * 3 * a;
    bench.backward_bytes = elements * 5 * a;
    bench.forward_flops = 6 * elements;
    bench.backward_flops = 12 * elements;
    result.push_back(std::move(bench));
  }
  return result;
}

const BenchRegistration registration("swiglu", cases);

}  // namespace
}  // namespace longhand
