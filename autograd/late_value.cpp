// See late_value.h.
#include "autograd/late_value.h"

#include <utility>

#include "autograd/node.h"

namespace longhand {

void LateValue::give(const Tensor& value) {
  for (const auto& work : std::exchange(waiting_, {})) work(value);
}

Variable remade(Variable variable, std::function<Tensor()> make, std::shared_ptr<LateValue> late) {
  const Variable result = remade(std::move(variable), std::move(make));
  if (result && result.state()->remade != nullptr) result.state()->late = std::move(late);
  return result;
}

Awaited::Awaited(const Variable& variable)
    : kept_(variable), remade_(variable.state()->remade), late_(variable.state()->late), shape_(variable.shape()) {}

void Awaited::then(BackwardCall& call, int input, std::function<void(BackwardCall&, const Tensor&)> rest) const {
  Node& node = Node::of(call);
  const bool there = remade_ == nullptr || remade_->value.defined();
  if (there || late_ == nullptr || node.slot_of(input) != nullptr) return rest(call, kept_.get());
  late_->waiting_.push_back([node = node.wait(), rest = std::move(rest), shape = shape_](const Tensor& value) {
    node->go_on([&](BackwardCall& again) { rest(again, value.reshape(shape)); });
  });
}

}  // namespace longhand
