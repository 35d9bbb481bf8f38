// See gradcheck.h.
#include "autograd/gradcheck.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "autograd/tape.h"
#include "core/error.h"
#include "core/philox.h"

namespace longhand {

Tensor random_tensor(const Device& device, Dtype dtype, Shape shape, uint64_t seed, double scale, double mean) {
  const Tensor host = Tensor::empty(Device::cpu(), Dtype::f64, shape);
  double* values = host.data<double>();
  const int64_t n = host.numel();
#pragma omp parallel for schedule(static) if (n > 4096)
  for (int64_t i = 0; i < n; ++i) values[i] = mean + scale * static_cast<double>(philox_normal(seed, static_cast<uint64_t>(i)));
  return host.to(dtype).to(device);
}

GradcheckResult gradcheck(const std::function<std::vector<Variable>(const std::vector<Variable>&)>& f, const std::vector<Tensor>& inputs,
                          uint64_t seed) {
  for (const Tensor& input : inputs)
    if (input.dtype() != Dtype::f64 || input.device().is_cuda() || !input.is_contiguous())
      throw DtypeError("gradcheck: inputs are contiguous f64 tensors on the CPU", {{"input", input.describe()}});

  auto projection = [&](const Tensor& output, std::size_t k) {
    return random_tensor(output.device(), Dtype::f64, output.shape(), seed + 1000 + k);
  };
  auto scalar = [&] {
    const NoGrad no_grad;
    std::vector<Variable> variables(inputs.begin(), inputs.end());
    const auto outputs = f(variables);
    double sum = 0;
    for (std::size_t k = 0; k < outputs.size(); ++k) {
      if (!outputs[k]) continue;
      const auto values = outputs[k].value().to_vector<double>();
      const auto weights = projection(outputs[k].value(), k).to_vector<double>();
      for (std::size_t i = 0; i < values.size(); ++i) sum += values[i] * weights[i];
    }
    return sum;
  };

  std::vector<Variable> leaves;
  for (const Tensor& input : inputs) leaves.push_back(Variable::leaf(input));
  std::vector<Variable> roots;
  std::vector<Tensor> grads;
  const auto outputs = f(leaves);
  for (std::size_t k = 0; k < outputs.size(); ++k) {
    if (!outputs[k].requires_grad()) continue;
    roots.push_back(outputs[k]);
    grads.push_back(projection(outputs[k].value(), k));
  }
  backward(roots, grads);

  GradcheckResult result;
  constexpr double h = 1e-5;
  for (std::size_t n = 0; n < inputs.size(); ++n) {
    const auto size = static_cast<std::size_t>(inputs[n].numel());
    const std::vector<double> tape = leaves[n].grad().defined() ? leaves[n].grad().to_vector<double>() : std::vector<double>(size, 0.0);
    std::vector<double> difference(size);
    double* values = inputs[n].data<double>();
    double scale = 1e-3;
    for (std::size_t i = 0; i < size; ++i) {
      const double before = values[i];
      values[i] = before + h;
      const double up = scalar();
      values[i] = before - h;
      const double down = scalar();
      values[i] = before;
      difference[i] = (up - down) / (2 * h);
      scale = std::max(scale, std::abs(difference[i]));
    }
    for (std::size_t i = 0; i < size; ++i) {
      double error = std::abs(tape[i] - difference[i]) / scale;
      if (std::isnan(error)) error = INFINITY;
      if (error > result.worst || result.where.empty()) {
        result.worst = std::max(result.worst, error);
        result.where = fmt::format("input {} index {}: tape {:.12g}, difference {:.12g}", n, i, tape[i], difference[i]);
      }
    }
  }
  return result;
}

}  // namespace longhand
