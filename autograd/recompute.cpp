// See recompute.h.
#include "autograd/recompute.h"

#include <algorithm>

#include "autograd/node.h"
#include "core/error.h"

namespace longhand {
namespace {

thread_local Recompute level = Recompute::none;
constexpr std::pair<Recompute, const char*> kNames[] = {
    {Recompute::none, "none"}, {Recompute::light, "light"}, {Recompute::projections, "projections"}, {Recompute::full, "full"}};

}  // namespace

Recompute parse_recompute(const std::string& name) {
  for (const auto& [value, known] : kNames)
    if (name == known) return value;
  throw ConfigError("recompute: unknown level", {{"given", name}, {"expected", "none, light, projections or full"}});
}

const char* name_of(Recompute wanted) {
  for (const auto& [value, name] : kNames)
    if (value == wanted) return name;
  return "";
}

RecomputeScope::RecomputeScope(Recompute wanted) : before_(level) {
  level = wanted;
}
RecomputeScope::~RecomputeScope() {
  level = before_;
}
Recompute recompute_level() {
  return level;
}

const Tensor& Remade::get() {
  if (!value.defined()) {
    const NoGrad no_grad;
    value = make();
    make = nullptr;  // frees what it kept
  }
  return value;
}

Kept::Kept(const Variable& variable) {
  if (!variable) return;
  remade_ = variable.state()->remade;
  if (remade_ == nullptr) value_ = variable.value();
}

const Tensor& Kept::get() const {
  return remade_ != nullptr ? remade_->get() : value_;
}

Variable remade(Variable variable, std::function<Tensor()> make) {
  if (level != Recompute::none && variable.requires_grad())
    variable.state()->remade = std::make_shared<Remade>(Remade{std::move(make), {}});
  return variable;
}

std::vector<Variable> recomputed(const std::vector<Variable>& inputs,
                                 std::function<std::vector<Variable>(const std::vector<Variable>&)> f) {
  const bool wanted = grad_enabled() && std::any_of(inputs.begin(), inputs.end(), [](const Variable& v) { return v.requires_grad(); });
  if (!wanted) return f(inputs);
  std::vector<Tensor> values;
  {
    const NoGrad no_grad;
    for (const Variable& output : f(inputs)) values.push_back(output.value());
  }
  const std::vector<Kept> kept(inputs.begin(), inputs.end());
  return Tape::record(kRecomputedOp, std::move(values), inputs, [kept, f = std::move(f)](BackwardCall& call) {
    std::vector<Variable> again, roots;
    for (std::size_t i = 0; i < kept.size(); ++i)
      again.push_back(call.needs(static_cast<int>(i)) ? Variable::leaf(kept[i].get()) : Variable(kept[i].get()));
    const WithGrad with_grad;
    const RecomputeScope everything(Recompute::none);  // it is used at once
    const std::vector<Variable> outputs = f(again);
    std::vector<Tensor> grads;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      const Tensor& grad = call.grad(static_cast<int>(i));
      if (!grad.defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      grads.push_back(grad);
    }
    backward(roots, grads);
    for (std::size_t i = 0; i < kept.size(); ++i)
      if (call.needs(static_cast<int>(i))) call.set(static_cast<int>(i), again[i].grad());
  });
}

}  // namespace longhand
