// embedding: bytes and time; ids follow about the law of natural text, where a few tokens make up much of it.
#include "ops/embedding/embedding.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "core/philox.h"
#include "ops/common/bench.h"
#include "ops/common/bench_inputs.h"

namespace longhand {
namespace {

struct Case {
  int64_t B, T, V, d;
};

BenchCase make_case(const Device& device, Dtype dtype, const Case& c) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < c.B * c.T; ++i)  // the k-th most frequent token has a share of about 1/k
    ids.push_back(static_cast<int32_t>(std::min<double>(std::pow(static_cast<double>(c.V), philox_uniform(1, static_cast<uint64_t>(i))) - 1,
                                                        static_cast<double>(c.V - 1))));
  const auto distinct = static_cast<double>(std::set<int32_t>(ids.begin(), ids.end()).size());
  const Tensor tokens = Tensor::from(device, {c.B, c.T}, ids), grad = repeated_random_tensor(device, Dtype::f32, {c.B, c.T, c.d}, 2);
  const Variable weight =
      Variable::parameter(repeated_random_tensor(device, dtype, {c.V, c.d}, 3), Tensor::zeros(device, Dtype::f32, {c.V, c.d}), "weight");
  BenchCase bench;
  bench.shape = shape_text({{"B", c.B}, {"T", c.T}, {"V", c.V}, {"d", c.d}});
  bench.run = [=](int, bool with_backward) {  // the gradient is added to what is there, as with a tied head
    if (with_backward) {
      backward({embedding(tokens, weight, Dtype::f32)}, {grad});
    } else {
      const NoGrad no_grad;
      embedding(tokens, weight, Dtype::f32);
    }
  };
  const auto rows = static_cast<double>(c.B * c.T), d = static_cast<double>(c.d);
  bench.forward_bytes = rows * d * 4 + distinct * d * static_cast<double>(size_of(dtype)) + rows * 4;
  bench.backward_bytes = rows * d * 4 + 2 * distinct * d * 4 + rows * 4;
  bench.backward_flops = rows * d;
  return bench;
}

std::vector<BenchCase> cases(const Device& device, Dtype dtype, const BenchSizes& asked) {
  const Case c = device.is_cuda() ? Case{16, 2048, 50280, 768} : Case{4, 256, 4096, 256};
  return {make_case(device, dtype, {asked.get("B", c.B), asked.get("T", c.T), asked.get("V", c.V), asked.get("d", c.d)})};
}

const BenchRegistration registration("embedding", cases);

}  // namespace
}  // namespace longhand
