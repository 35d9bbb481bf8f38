// cross_entropy: head, softmax and loss together, with the weight a parameter; chunk sizes beside the one the op chooses.
#include "ops/cross_entropy/cross_entropy.h"

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "core/philox.h"
#include "ops/common/bench.h"

namespace longhand {
namespace {

struct Case {
  int64_t rows, d, V;
  std::vector<int64_t> chunks;
  int64_t hopeless = 0;  // rows, strewn over the others, whose logits are some hundreds and their targets therefore less likely than e^-62
};

std::vector<BenchCase> make_cases(const Device& device, Dtype dtype, const Case& c) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < c.rows; ++i)
    ids.push_back(static_cast<int32_t>(philox_u64(1, static_cast<uint64_t>(i)) % static_cast<uint64_t>(c.V)));
  const Tensor targets = Tensor::from(device, {c.rows}, ids);
  const Variable x = Variable::leaf(random_tensor(device, dtype, {c.rows, c.d}, 2));
  for (int64_t i = 0; i < c.hopeless; ++i) multiply(x.value().slice(0, c.rows * i / c.hopeless, c.rows * i / c.hopeless + 1), 1024);
  const Variable weight =
      Variable::parameter(random_tensor(device, dtype, {c.V, c.d}, 3, 0.02), Tensor::zeros(device, Dtype::f32, {c.V, c.d}), "weight");
  const auto rows = static_cast<double>(c.rows), d = static_cast<double>(c.d), V = static_cast<double>(c.V),
             size = static_cast<double>(size_of(dtype));
  std::vector<BenchCase> result;
  for (const int64_t chunk : c.chunks) {  // the logits of one chunk are larger than the caches: one set of inputs will do
    BenchCase bench;
    bench.products = true;
    bench.shape = std::to_string(c.rows) + " x " + std::to_string(c.d) + " -> " + std::to_string(c.V) +
                  (chunk > 0 ? " chunk " + std::to_string(chunk) : "") + (c.hopeless > 0 ? " hopeless " + std::to_string(c.hopeless) : "");
    bench.run = [=](int, bool with_backward) {
      const CrossEntropyOptions options{chunk, 0, 1.0};
      if (!with_backward) {
        const NoGrad no_grad;
        linear_cross_entropy(x, weight, targets, {}, options);
        return;
      }
      x.clear_grad();
      weight.clear_grad();
      backward(linear_cross_entropy(x, weight, targets, {}, options).loss);
    };
    bench.forward_bytes = size * (rows * d + V * d);
    bench.backward_bytes = size * (2 * rows * d + V * d) + 4 * V * d;
    bench.forward_flops = 2 * rows * d * V;
    bench.backward_flops = 4 * rows * d * V;
    result.push_back(std::move(bench));
  }
  return result;
}

std::vector<BenchCase> cases(const Device& device, Dtype dtype, const BenchSizes& asked) {
  if (asked.given())
    return make_cases(
        device, dtype,
        {asked.get("rows", 32768), asked.get("d", 768), asked.get("V", 50280), {asked.get("chunk", 0)}, asked.get("hopeless", 0)});
  if (device.is_cuda()) return make_cases(device, dtype, {32768, 768, 50280, {0, 2048, 8192}});
  return make_cases(device, dtype, {512, 256, 8192, {0}});
}

const BenchRegistration registration("cross_entropy", cases);

}  // namespace
}  // namespace longhand
