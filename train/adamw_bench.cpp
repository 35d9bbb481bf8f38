// Clipping and AdamW at the sizes of models. moves  gradients twice; masters and both moments in and out; the bf16 copy out.
#include "ops/common/bench.h"
#include "train/adamw.h"

namespace longhand {
namespace {

struct Sample {
  ParameterSet set;
  std::unique_ptr<AdamW> optimizer;
  Tensor loss;
};

BenchCase bench_case(const Device& device, Dtype compute, int64_t parameters) {
  auto sample = std::make_shared<Sample>();
  sample->set.declare("decayed", {parameters}, {.init = init_constant(0.1), .decay = true, .full_precision = false});
  sample->set.declare("norms", {4096}, {.init = init_constant(1), .decay = false, .full_precision = false});
  sample->set.allocate(device, Dtype::f32, compute);
  fill(sample->set.flat_master(), 0.1);
  fill(sample->set.flat_grad(), 1e-4);
  sample->optimizer = std::make_unique<AdamW>(sample->set, AdamWOptions{});
  sample->optimizer->set_rates(1e-4, 0.01);
  sample->loss = Tensor::full(device, Dtype::f32, {}, 1);
  const bool copied = compute != Dtype::f32;
  BenchCase result;
  result.shape = std::to_string(parameters / 1'000'000) + "M parameters";
  result.backward_is_all = true;
  result.run = [sample](int, bool) { sample->optimizer->step(sample->loss); };
  result.forward_bytes = static_cast<double>(parameters) * (4 + 28 + (copied ? 2 : 0));
  return result;
}

std::vector<BenchCase> cases(const Device& device, Dtype activations, const BenchSizes& asked) {
  if (asked.given()) return {bench_case(device, device.is_cuda() ? activations : Dtype::f32, asked.get("parameters", 134'000'000))};
  if (!device.is_cuda()) return {bench_case(device, Dtype::f32, 16'000'000)};
  return {bench_case(device, activations, 46'000'000), bench_case(device, activations, 134'000'000)};
}

const BenchRegistration registration("adamw", cases);

}  // namespace
}  // namespace longhand
