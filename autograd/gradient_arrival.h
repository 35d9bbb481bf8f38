// Backward with word of each parameter's gradient as it arrives, for what can begin before the walk has come to its end.
#pragma once
#include <functional>
#include <string>

#include "autograd/variable.h"

namespace longhand {

/// Called with the name of a parameter that the walk reaches, as soon as nothing of it will change the parameter's gradient any more.
using GradientArrived = std::function<void(const std::string& parameter)>;

/// backward(root) of tape.h.
void backward(const Variable& root, const GradientArrived& arrived);

}  // namespace longhand
