// Gradient check: the tape's gradients against central differences, in f64 on the CPU.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "autograd/variable.h"

namespace longhand {

struct GradcheckResult {
  double worst = 0;   // largest |tape - difference| / (largest |difference| of that input, at least 1e-3)
  std::string where;  // "input 2 index 17: tape 0.125, difference 0.126"
};

/// Checks d(sum_k <R_k, outputs_k>)/d(inputs) for fixed random R_k (so every output counts, states included) at the given f64 inputs.
///   difference_i = (F(x + h e_i) - F(x - h e_i)) / 2h,  h = 1e-5: relative error near 1e-10, so 1e-7 is a comfortable bound
/// f        maps leaves to outputs; undefined outputs are left out
/// inputs   f64 CPU tensors, changed element by element and restored
GradcheckResult gradcheck(const std::function<std::vector<Variable>(const std::vector<Variable>&)>& f, const std::vector<Tensor>& inputs,
                          uint64_t seed = 1);

/// Random f64 (or other floating dtype) tensor N(0, scale) for tests and checks, keyed by seed.
Tensor random_tensor(const Device& device, Dtype dtype, Shape shape, uint64_t seed, double scale = 1.0, double mean = 0.0);

}  // namespace longhand
